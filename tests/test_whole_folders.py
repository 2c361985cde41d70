"""A complete folder is what it was when it became complete; a folder written aside is written by one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyground.errors import StorageError
from polyground.storage import RunFolder, read_json, read_manifest, require_whole, sole


def finished(path: Path) -> Path:
    with RunFolder(path, "reject", {"seed": 1}) as folder:
        folder.append("rows.jsonl", {"key": "a"})
        folder.append("rows.jsonl", {"key": "b"})
        (path / "adapter").mkdir()
        (path / "adapter" / "adapter_model.safetensors").write_bytes(b"12345")
        (path / "checkpoint-1").mkdir()
        (path / "checkpoint-1" / "state.json").write_bytes(b"{}")
        folder.finish({})
    return path


def test_a_manifest_tells_the_length_of_every_file_that_lasts(tmp_path: Path) -> None:
    manifest = read_manifest(finished(tmp_path / "reject"))
    assert manifest.files == {"adapter/adapter_model.safetensors": 5, "rows.jsonl": 26}
    require_whole(tmp_path / "reject")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("rows.jsonl", b'{"key": "a"}\n', id="the-last-line-gone"),
        pytest.param("rows.jsonl", b'{"key": "a"}\n{"ke', id="half-of-it"),
        pytest.param("adapter/adapter_model.safetensors", b"", id="empty-weights"),
    ],
)
def test_a_file_that_lost_its_end_is_not_taken_for_whole(tmp_path: Path, name: str, content: bytes) -> None:
    path = finished(tmp_path / "reject")
    (path / name).write_bytes(content)
    for use in (lambda: require_whole(path), lambda: RunFolder(path, "reject", {"seed": 1})):
        with pytest.raises(StorageError, match=rf"{name}: has {len(content)} bytes, and had \d+ when `reject` was complete"):
            use()


def test_a_folder_without_lengths_of_an_older_version_is_read(tmp_path: Path) -> None:
    import json

    path = finished(tmp_path / "reject")
    row = {key: value for key, value in read_json(path / "manifest.json").items() if key != "files"}
    (path / "manifest.json").write_text(json.dumps(row), encoding="utf-8")
    (path / "rows.jsonl").unlink()
    assert read_manifest(path).files == {}
    assert RunFolder(path, "reject", {"seed": 1}).complete


def test_a_folder_written_aside_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    with sole(tmp_path / "merged", "merge"):
        process = os.fork()
        if process == 0:
            # POSIX locks are not inherited: this is another process.
            from polyground import storage

            storage._LOCKS.clear()
            code = 1
            try:
                with sole(tmp_path / "merged", "merge"):
                    code = 2
            except StorageError as error:
                code = 0 if "another process is running `merge` there" in str(error) else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    with sole(tmp_path / "merged", "merge"):
        assert not (tmp_path / "merged").exists()


def test_drafts_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "reject" / "deep").mkdir(parents=True)
    for folder in (tmp_path / "reject", tmp_path / "reject" / "deep"):
        (folder / ".state.json.999999999.tmp").write_text('{"sta', encoding="utf-8")
    with RunFolder(tmp_path / "reject", "reject", {"seed": 1}) as run:
        run.finish({})
    assert sorted(path.name for path in (tmp_path / "reject").rglob("*")) == [".lock", "deep", "manifest.json", "state.json"]
