"""Facts about stages done in parts, on several machines or by a launcher's processes: their rows are those of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polyground.cli import main
from polyground.storage import read_json, read_rows

ROWS = {
    "synthesize": ("synthesize/kept.jsonl",),
    "reject": ("reject/rollouts.jsonl", "reject/kept.jsonl"),
    "evaluate": tuple(f"evaluate/{role}/{split}.jsonl" for role in ("base", "sft") for split in ("test", "ood_scenes")),
}
VERBS = pytest.mark.parametrize("verb", ROWS)


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without its sampling stages, RL and results."""
    out = tmp_path / "run"
    for name in ("world", "synthesize", "sft", "sft-merged"):
        shutil.copytree(finished / name, out / name)
    return out


def splits(finished: Path) -> list[str]:
    return sorted(path.name for path in (finished / "evaluate" / "base").glob("*.jsonl"))


def rows(out: Path, verb: str, finished: Path) -> dict[str, list]:
    files = ROWS[verb]
    if verb == "evaluate":
        files = tuple(f"evaluate/{role}/{name}" for role in ("base", "sft") for name in splits(finished))
    return {file: [anywhere(row) for row in read_rows(out / file)] for file in files}


def anywhere(row: dict) -> dict:
    """The row without the folder its images lie in."""
    return row | ({"images": [Path(image).name for image in row["images"]]} if "images" in row else {})


@VERBS
def test_parts_make_the_rows_of_one_process(toy: Path, finished: Path, begun: Path, verb: str) -> None:
    if verb == "synthesize":
        shutil.rmtree(begun / "synthesize")
    command = [verb, str(toy / "recipe.yaml"), "--out", str(begun)]
    for i in (2, 0, 1):
        assert main([*command, "--shard", f"{i}/3"]) == 0
    assert not (begun / verb / "manifest.json").exists()
    assert main(command) == 0
    assert rows(begun, verb, finished) == rows(finished, verb, finished)
    if verb == "evaluate":
        done, calm = (read_json(out / "evaluate" / "results.json")["splits"] for out in (begun, finished))
        for split, found in done.items():
            assert found["models"]["base"] == calm[split]["models"]["base"]
    # A part of what is complete has nothing to do.
    assert main([*command, "--shard", "0/3"]) == 0


def test_a_killed_part_goes_on_where_it_stopped(toy: Path, finished: Path, begun: Path) -> None:
    command = ["reject", str(toy / "recipe.yaml"), "--out", str(begun)]
    assert main([*command, "--shard", "0/1"]) == 0
    part = begun / "shards" / "reject" / "0-of-1"
    (part / "manifest.json").unlink()
    lines = (part / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (part / "rollouts.jsonl").write_bytes(lines[0] + lines[1][:7])
    assert main([*command, "--shard", "0/1"]) == 0
    assert (part / "rollouts.jsonl").read_bytes() == b"".join(lines)


def test_a_part_that_is_missing_is_named(toy: Path, finished: Path, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reject", str(toy / "recipe.yaml"), "--out", str(begun)]
    assert main([*command, "--shard", "1/2"]) == 0
    assert main(command) == 2
    assert "not complete: 0/2; run `polyground reject` with `--shard`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        pytest.param(["sft", "--shard", "0/2"], {}, "`sft` is not shared out", id="training"),
        pytest.param(["run", "--shard", "0/2"], {}, "`run` is not shared out", id="run"),
        pytest.param(["reject", "--shard", "2/2"], {}, "counted from 0", id="beyond-the-last"),
        pytest.param(["run"], {"RANK": "0", "WORLD_SIZE": "2"}, "`run` runs in one process, and 2 were launched", id="launched"),
        pytest.param(["merge"], {"RANK": "1", "WORLD_SIZE": "2"}, "`merge` runs in one process", id="merge"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    toy: Path,
    words: list[str],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([words[0], str(toy / "recipe.yaml"), *words[1:]]) == 2
    assert said in capsys.readouterr().err


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`polyground` in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "polyground"]
    return subprocess.run(
        [*launcher, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_processes_of_a_launcher_share_out_and_put_together(toy: Path, finished: Path, begun: Path) -> None:
    done = launch(["reject", str(toy / "recipe.yaml"), "--out", str(begun)])
    assert done.returncode == 0, done.stderr[-6000:]
    assert rows(begun, "reject", finished) == rows(finished, "reject", finished)
    asked = [json.loads(path.read_text())["summary"]["asked"] for path in begun.glob("shards/reject/*/manifest.json")]
    assert len(asked) == 2
    assert sum(asked) == 4


@pytest.mark.slow
def test_a_training_by_two_processes_is_that_of_one_with_twice_the_accumulation(
    toy: Path, finished: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sft", "sft-merged"):
        shutil.rmtree(begun / name)
    words = ["sft", str(toy / "recipe.yaml"), "--out", str(begun), "--per_device_train_batch_size", "1"]
    done = launch(words)
    assert done.returncode == 0, done.stderr[-6000:]
    # A step of two processes with one row each has the rows of one process with two.
    two, one = ([row["loss"] for row in read_rows(out / "sft" / "log.jsonl") if "grad_norm" in row] for out in (begun, finished))
    assert two == pytest.approx(one, abs=1e-4)
    assert read_json(begun / "sft" / "manifest.json")["config"]["sft"]["gradient_accumulation_steps"] == 2
    assert main([*words, "--gradient_accumulation_steps", "2"]) == 0
    assert main(words) == 2
    assert "changed: sft.gradient_accumulation_steps" in capsys.readouterr().err
