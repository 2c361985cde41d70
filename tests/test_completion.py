"""Facts about completion: what shells are told is what can be typed, and the shells understand it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from polyground.cli import OWN, STAGES, TOOLS, commands, main
from polyground.completion import SHELLS, Command, Option, script
from polyground.errors import UsageError

BASH = shutil.which("bash")

SMALL = {
    "grpo": Command(
        "learn", [Option("--loss_type", "how losses: are averaged", ("grpo", "dapo")), Option("--beta", "it's a weight")]
    ),
    "ground": Command("ask", [Option("--out", "a file")]),
    "completion": Command("complete", words=("bash", "zsh")),
}


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of a line."""
    assert BASH is not None
    words = line.split(" ")
    typed = " ".join(map(shlex.quote, words))
    ask = f"source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _polyground; "
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([BASH, "--norc", "-c", ask], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        pytest.param("polyground gr", ["grpo", "ground"], id="verbs"),
        pytest.param("polyground grpo --", ["--loss_type", "--beta"], id="keys-of-the-verb"),
        pytest.param("polyground grpo recipe.yaml --loss_type ", ["grpo", "dapo"], id="values-of-a-choice"),
        pytest.param("polyground completion ", ["bash", "zsh"], id="words"),
        pytest.param("polyground grpo rec", ["recipe.yaml"], id="files"),
        pytest.param("polyground ground --out rec", ["recipe.yaml"], id="files-after-a-flag"),
        pytest.param("polyground nosuch --", [], id="no-such-verb"),
    ],
)
def test_bash_offers_what_can_be_typed(tmp_path: Path, line: str, offered: list[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "script").write_text(script("bash", SMALL), encoding="utf-8")
    assert sorted(completed(line, tmp_path)) == sorted(offered)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_and_key_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    for verb in (*STAGES, *TOOLS, *OWN):
        assert verb in shown
    dash = "-l " if shell == "fish" else "--"
    assert f"{dash}num_generations" in shown
    assert f"{dash}images-root" in shown
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n", "/dev/stdin"], input=shown, text=True, check=True, timeout=60)


def test_a_choice_among_words_is_offered_as_its_values() -> None:
    told = {option.name: option.values for option in commands()["grpo"].options}
    assert {"grpo", "dapo"} <= set(told["--loss_type"])
    assert told["--bf16"] == ("true", "false")
    assert told["--learning_rate"] == ()


def test_nothing_but_plain_words_gets_into_a_script() -> None:
    with pytest.raises(ValueError, match="cannot stand in a shell script"):
        script("bash", {"x": Command("", [Option("--a$(reboot)")])})
    for shell in SHELLS:
        shown = script(shell, {"x": Command("it's `here` $(there)", [Option("--a", "don't $(do)")])})
        assert "'s" not in shown
        assert "'t" not in shown


def test_another_shell_is_refused() -> None:
    with pytest.raises(UsageError, match="known: bash, zsh, fish"):
        script("tcsh", SMALL)
