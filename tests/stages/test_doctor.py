"""Facts about the doctor: what is missing and needed is said with its remedy, and decides the exit code; no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from polyground import extras as project_extras
from polyground.cli import main
from polyground.config import Recipe
from polyground.extras import BASE, EXTRAS, extra_of
from polyground.stages.doctor import Finding, _needed_extras, _problem, _recipe_files, _report, is_older, memory_of_host

ROOT = Path(__file__).parents[2]


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {"base": project["dependencies"], **project["optional-dependencies"]}
    for name, extra in {"base": BASE, **EXTRAS}.items():
        assert sorted(f"{library}>={least}" for library, least in extra.libraries.items()) == sorted(wanted[name])
    assert set(EXTRAS) == set(wanted) - {"base", "dev", "docs", "fuzz"}


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [
        pytest.param("5.9.0", "5.18", True, id="numbers-not-letters"),
        pytest.param("2.13.0+cpu", "2.6", False, id="a-local-build"),
        pytest.param("2.6.0rc1", "2.6", False, id="a-candidate-counts-as-its-release"),
        pytest.param("10", "10.0", False, id="equal"),
        pytest.param("0.16.9", "0.17", True, id="just-below"),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, least: str, older: bool) -> None:
    assert is_older(version, least) is older


def test_a_library_that_is_too_old_or_not_there_is_named() -> None:
    assert _problem(BASE, "numpy", "1.26") is None
    assert "is older than 999" in (_problem(BASE, "numpy", "999") or "")
    assert _problem(BASE, "no-such-library", "1") == "no-such-library is not installed"


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "train"), ("openai", "serve"), ("pycocotools", "eval"), ("gradio", "demo"), ("json", None)]
)
def test_a_module_that_is_missing_is_known_by_its_extra(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra


def proc(folder: Path, *, limit: str | None) -> Path:
    """A machine of 64 GiB, 32 of them free, in a container of the given limit."""
    for name, text in (
        ("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n"),
        ("sys/fs/cgroup/memory.max", limit),
    ):
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="ascii")
    return folder


@pytest.mark.parametrize(
    ("limit", "total", "free"),
    [
        pytest.param(None, 64, 32, id="no-container"),
        pytest.param("max\n", 64, 32, id="a-container-without-limit"),
        pytest.param(f"{8 << 30}\n", 8, 8, id="a-container-of-8-GiB"),
        pytest.param(f"{99 << 30}\n", 64, 32, id="a-limit-above-the-host"),
    ],
)
def test_memory_is_the_containers_where_that_is_less(tmp_path: Path, limit: str | None, total: int, free: int) -> None:
    assert memory_of_host(proc(tmp_path, limit=limit)) == (total << 30, free << 30)


def test_memory_that_cannot_be_told_is_not_guessed(tmp_path: Path) -> None:
    assert memory_of_host(tmp_path) == (None, None)


def test_a_remedy_stands_below_what_is_missing() -> None:
    text = _report([Finding("python", "ok", "3.12"), Finding("train", "missing", "torch is not installed", "pip install it")])
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if "MISSING" in line)
    assert "torch is not installed" in lines[at]
    assert lines[at + 1].strip() == "-> pip install it"
    assert lines[-1] == "one thing is missing; its arrow says what to do"


BLOCKED = """
import importlib.metadata, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "torchvision"}:
            raise ModuleNotFoundError(f"no {name}", name=name)

sys.meta_path.insert(0, Blocked())
found = importlib.metadata.version
def version(name):
    if name in {"torch", "transformers", "peft", "torchvision"}:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
from polyground.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""An install without torch, as far as anybody can tell."""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_without_torch_the_doctor_says_what_to_install(tmp_path: Path) -> None:
    done = without_torch("doctor", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 2
    assert "torch is not installed" in done.stderr
    assert "[train]" in done.stderr
    assert "Traceback" not in done.stderr
    [train] = [row for row in json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) if row["part"] == "train"]
    assert train["state"] == "missing"


def test_without_torch_light_work_lacks_nothing() -> None:
    done = without_torch("doctor", "--light")
    assert done.returncode == 0, done.stderr
    assert "nothing needed is missing" in done.stdout


def test_a_verb_without_its_library_says_which_extra_brings_it(tmp_path: Path) -> None:
    picture = ROOT / "docs" / "assets" / "result.png"
    done = without_torch("ground", "--model", "tiny", str(picture), "-q", "Where?")
    assert done.returncode == 2
    assert "[train]" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- with a recipe


def recipe(**tree: object) -> Recipe:
    return Recipe.model_validate(tree)


SERVED = {"teacher": "endpoint", "teacher_base_url": "http://127.0.0.1:1/v1", "teacher_model": "m"}


@pytest.mark.parametrize(
    ("tree", "extras"),
    [
        pytest.param({}, {"train"}, id="everything-here"),
        pytest.param({"synthesize": SERVED}, {"train", "serve"}, id="a-served-teacher"),
        pytest.param({"evaluate": {"sampler": "vllm"}}, {"train", "serve"}, id="a-server-of-its-own"),
        pytest.param({"data": {"ood": [{"source": "mc_bench", "path": "x.json"}]}}, {"train", "eval"}, id="average-precision"),
    ],
)
def test_a_recipe_needs_the_extras_of_what_it_does(tree: dict[str, object], extras: set[str]) -> None:
    assert _needed_extras(recipe(**tree)) == extras


def test_what_a_recipe_names_and_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    tree = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [{"source": "sharegpt", "path": str(tmp_path / "mine.json")}]},
        "synthesize": {**SERVED, "teacher_base_url": "https://teacher.example/v1", "api_key_env": "NO_SUCH_KEY"},
    }
    found = {finding.part: finding for finding in _recipe_files(recipe(**tree))}
    assert {part for part, finding in found.items() if finding.state == "missing"} == {"model", "data", "key", "teacher"}
    assert "NO_SUCH_KEY" in found["key"].text
    monkeypatch.setenv("NO_SUCH_KEY", "a secret")
    assert "a secret" not in repr(list(_recipe_files(recipe(**tree))))


def test_a_recipe_for_the_packaged_model_lacks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "run")}), encoding="utf-8")
    assert main(["doctor", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "tiny: qwen3_vl" in shown
    assert "nothing needed is missing" in shown
    assert not (tmp_path / "run").exists()


def test_an_environment_without_pip_is_told_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    assert project_extras.install_command("train").startswith("pip install ")
    monkeypatch.setattr(project_extras, "find_spec", lambda name: None)
    assert project_extras.install_command("train").startswith("uv pip install ")
