"""Facts about a run that is killed without warning: the same command goes on, and the results are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyground.records import Rollout
from polyground.storage import read_json, read_rows

MOMENTS = ("sft/checkpoint-1", "reject/rollouts.jsonl", "grpo/checkpoint-1", "evaluate/sft/test.jsonl")
"""The run is killed as soon as each of these exists: at a checkpoint, in the middle of sampling, of RL, of answering."""

PATIENCE = 120
"""Seconds until a moment counts as missed."""


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "polyground", "run", str(recipe), "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def kill_at(moment: Path, run: subprocess.Popen[bytes]) -> bool:
    """Kill -9 when the path exists; False when the run was over before."""
    since = time.monotonic()
    while not moment.exists() and run.poll() is None and time.monotonic() - since < PATIENCE:
        time.sleep(0.005)
    if run.poll() is not None:
        return False
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    return True


@pytest.mark.slow
def test_a_run_killed_four_times_ends_like_an_undisturbed_one(toy: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for moment in MOMENTS:
        assert kill_at(out / moment, start(toy / "recipe.yaml", out)), f"the run was over before {moment}"
    last = start(toy / "recipe.yaml", out)
    _, errors = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, errors.decode()
    assert read_json(out / "evaluate" / "results.json") == read_json(finished / "evaluate" / "results.json")
    for file in ("evaluate/base/test.jsonl", "evaluate/sft/test.jsonl", "evaluate/rl/test.jsonl", "reject/rollouts.jsonl"):
        assert list(read_rows(out / file)) == list(read_rows(finished / file)), file
    for stage in ("sft", "grpo"):
        assert _losses(out / stage / "log.jsonl") == _losses(finished / stage / "log.jsonl")


def _losses(log: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(log) if "loss" in row]


def test_what_was_answered_is_readable_and_no_question_is_answered_twice(finished: Path) -> None:
    for role in ("base", "sft", "rl"):
        rollouts = [Rollout.from_json(row) for row in read_rows(finished / "evaluate" / role / "test.jsonl")]
        assert len({rollout.example for rollout in rollouts}) == len(rollouts) == 4
