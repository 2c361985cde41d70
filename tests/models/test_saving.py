"""A full disk is told in one sentence, whoever was writing; any other mishap stays what it is."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from polyground.errors import StorageError
from polyground.models.saving import saving

ROOM = 1000
"""Bytes that a file may have in the tests of a full disk: the system refuses more, by another number than a full disk's."""


@contextmanager
def little_room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def with_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(4096)}, path)


def with_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(4096)}, str(path))


def with_text(path: Path) -> None:
    path.write_text("x" * 100_000, encoding="utf-8")


def with_copies(_: Path) -> None:
    raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])


@pytest.mark.parametrize("write", [with_safetensors, with_torch, with_text, with_copies])
def test_a_disk_that_takes_no_more_is_one_error_of_ours(write: Callable[[Path], None], tmp_path: Path) -> None:
    told = pytest.raises(StorageError, match=r"run: cannot be written .*Free some space and run the same command again")
    with told, saving(tmp_path / "run"), little_room():
        write(tmp_path / "weights")


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(FileNotFoundError(errno.ENOENT, "No such file"), id="missing"),
        pytest.param(RuntimeError("CUDA out of memory"), id="memory"),
        pytest.param(SafetensorError("invalid header"), id="damaged"),
        pytest.param(ValueError("no space left"), id="value"),
    ],
)
def test_other_mishaps_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), saving(tmp_path):
        raise error


def test_what_is_written_is_left_alone(tmp_path: Path) -> None:
    with saving(tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
