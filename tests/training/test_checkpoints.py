"""Which checkpoint a training goes on from: the newest that is still what was written, whatever the clock says."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_sft import learn

from polyground.records import Example
from polyground.storage import read_json, read_rows
from polyground.training import runs
from polyground.training.runs import SEAL, last_checkpoint

SOME = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def trained(toy_folder: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps, two passes over four rows, with all its checkpoints."""
    out = tmp_path_factory.mktemp("trained")
    learn(toy_folder, examples, out, **SOME, save_total_limit=4)
    return out


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def interrupted(trained: Path, out: Path, *, after: int) -> Path:
    """A copy of the run as it was right after a checkpoint."""
    shutil.copytree(trained, out)
    shutil.rmtree(out / "adapter")
    for step in range(after + 1, 5):
        shutil.rmtree(out / f"checkpoint-{step}")
    return out


def test_a_checkpoint_says_what_its_files_hash_to(trained: Path) -> None:
    sealed = read_json(trained / "checkpoint-2" / SEAL)
    files = {path.name for path in (trained / "checkpoint-2").iterdir()} - {SEAL}
    assert set(sealed) == files | {"../log.jsonl"}
    assert files >= {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}


def test_a_checkpoint_whose_rows_were_lost_is_passed_over(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = interrupted(trained, tmp_path / "run", after=3)
    lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out / "log.jsonl").write_bytes(b"".join(lines[:3]))
    assert last_checkpoint(out) == out / "checkpoint-3"
    (out / "log.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:10])
    assert last_checkpoint(out) == out / "checkpoint-2"
    assert "../log.jsonl is damaged" in caplog.text


def test_what_is_kept_of_a_training_is_safetensors_and_json(trained: Path) -> None:
    kept = {path.suffix for path in trained.rglob("*") if path.is_file() and "checkpoint-" not in str(path)}
    assert kept <= {".safetensors", ".json", ".jsonl", ".md"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", SEAL])
def test_a_damaged_checkpoint_is_passed_over(trained: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    out = interrupted(trained, tmp_path / "run", after=3)
    path = out / "checkpoint-3" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert last_checkpoint(out) == out / "checkpoint-2"
    path.write_bytes(content[: len(content) // 2])
    assert last_checkpoint(out) == out / "checkpoint-2"
    assert f"{name} is damaged" in caplog.text or name == "trainer_state.json"


def test_a_training_goes_on_from_before_the_damage_and_ends_alike(
    toy_folder: Path, trained: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = interrupted(trained, tmp_path / "run", after=3)
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    # Read again by peft when it writes this checkpoint anew, unless the damaged one is gone.
    (out / "checkpoint-3" / "README.md").write_bytes(b"\xff\xfe\xff")
    learn(toy_folder, examples, out, **SOME)
    assert "resuming after step 2 of 4, which ended pass 1 over the data" in caplog.text
    ours, theirs = adapter(out), adapter(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in read_rows(out / "log.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_a_resumption_within_a_pass_says_nothing_of_passes(
    toy_folder: Path, trained: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learn(toy_folder, examples, interrupted(trained, tmp_path / "run", after=3), **SOME)
    assert "resuming after step 3 of 4" in caplog.text
    assert "pass" not in caplog.text


def test_a_finished_training_says_that_nothing_is_left(
    toy_folder: Path, trained: Path, examples: list[Example], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = interrupted(trained, tmp_path / "run", after=4)
    learn(toy_folder, examples, out, **SOME)
    assert "0 steps left (all 4 are in" in caplog.text
    assert all(torch.equal(adapter(out)[name], tensor) for name, tensor in adapter(trained).items())


def test_a_clock_put_back_does_not_make_the_newest_checkpoint_the_oldest(
    toy_folder: Path, trained: Path, examples: list[Example], tmp_path: Path
) -> None:
    out = interrupted(trained, tmp_path / "run", after=2)
    shutil.rmtree(out / "checkpoint-1")
    future = time.time() + 86400
    os.utime(out / "checkpoint-2", (future, future))
    learn(toy_folder, examples, out, **{**SOME, "max_steps": 3}, save_total_limit=1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_without_a_seal_is_not_taken_for_whole(trained: Path, tmp_path: Path) -> None:
    out = interrupted(trained, tmp_path / "run", after=3)
    (out / "checkpoint-3" / SEAL).unlink()
    assert last_checkpoint(out) == out / "checkpoint-2"


def test_the_checkpoint_before_is_there_until_the_new_one_is_sealed(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    digests = runs._digests

    def killed(checkpoint: Path) -> dict[str, str]:
        if checkpoint.name == "checkpoint-3":
            raise KilledError
        return digests(checkpoint)

    monkeypatch.setattr(runs, "_digests", killed)
    with pytest.raises(KilledError):
        learn(toy_folder, examples, tmp_path, **SOME, save_total_limit=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
