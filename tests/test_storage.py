"""Facts about rows and run folders: a kill loses nothing that was appended, and a wrong folder is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyground import __version__, storage
from polyground.errors import DataError, StorageError
from polyground.storage import (
    RowWriter,
    RunFolder,
    atomic_write_json,
    atomic_write_text,
    fingerprint,
    read_json,
    read_manifest,
    read_rows,
)

CONFIG = {"seed": 0, "sft": {"lora_r": 4}}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5))
def test_rows_survive_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "new" / "rows.jsonl"
    with RowWriter(path) as writer:
        for row in rows:
            writer.append(row)
    assert list(read_rows(path)) == rows


@pytest.mark.parametrize("torn", [b"", b'{"key": "b', b"\xe2\x82", b"x" * 200_000])
def test_a_torn_last_line_is_cut_on_reopening(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key": "a"}\n' + torn)
    with RowWriter(path) as writer:
        writer.append({"key": "b"})
    assert list(read_rows(path)) == [{"key": "a"}, {"key": "b"}]


def test_a_file_with_nothing_but_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key"')
    RowWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "place"),
    [
        pytest.param(b'{"a": 1}\n{"a": \n', ":2: not valid JSON", id="broken"),
        pytest.param(b'{"a": 1}\n\n[1]\n', ":3: a row is a JSON object", id="a-list"),
        pytest.param(b"\xff\n", ":1: not valid JSON", id="not-utf-8"),
        pytest.param(b"[" * 100_000 + b"\n", ":1: not valid JSON", id="nested-too-deep"),
        pytest.param(None, ": no such file", id="not-there"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: bytes | None, place: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert f"{path}{place}" in str(caught.value)


def test_bad_json_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(DataError, match=name):
            read_json(tmp_path / name)


def test_an_atomic_write_replaces_whole_and_leaves_no_draft(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "new" / "a.txt", "old\r\n")
    atomic_write_text(tmp_path / "new" / "a.txt", "é\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\n".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_numpy_paths_and_tuples_are_written_as_json(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"mean": np.float32(0.5), "path": Path("a/b"), "ious": (0.5, 0.7), "n": np.arange(2)})
    assert read_json(tmp_path / "a.json") == {"mean": 0.5, "path": "a/b", "ious": [0.5, 0.7], "n": [0, 1]}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    monkeypatch.setattr(storage.os, "fsync", raise_full)
    with pytest.raises(StorageError, match="free some space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def raise_full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_explained_and_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    writer = RowWriter(path)
    writer.append({"key": "a"})
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", raise_full)
        with pytest.raises(StorageError, match=r"rows\.jsonl: cannot be written \(No space left.*run the same command again"):
            writer.append({"key": "b"})
    writer.append({"key": "c"})
    assert [row["key"] for row in read_rows(path)] == ["a", "c"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_explained(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "rows.jsonl")
    writer._file.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        writer._file = full
        with pytest.raises(StorageError, match="free some space"):
            writer.append({"key": "a"})


def test_a_file_in_the_way_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "sft").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        RunFolder(tmp_path / "sft", "sft", CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_one_may_not_write_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="right to write"):
        RunFolder(tmp_path / "sft", "sft", CONFIG)


def test_a_stage_continues_and_completes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "reject", "reject", CONFIG) as first:
        first.append("rollouts.jsonl", {"key": "a"})
        first.append("kept.jsonl", {"example": "a"})
        assert not first.complete
    again = RunFolder(tmp_path / "reject", "reject", CONFIG)
    assert again.done_keys("rollouts.jsonl") == {"a"}
    assert again.done_keys("kept.jsonl", field="example") == {"a"}
    assert again.done_keys("never.jsonl") == set()
    assert not again.file("never.jsonl").exists()
    again.append("rollouts.jsonl", {"key": "b"})
    again.finish({"kept": np.int64(1)})
    done = RunFolder(tmp_path / "reject", "reject", CONFIG)
    assert done.complete
    assert done.summary == {"kept": 1}
    assert [row["key"] for row in done.rows("rollouts.jsonl")] == ["a", "b"]
    with pytest.raises(StorageError, match="already complete"):
        done.append("rollouts.jsonl", {"key": "c"})


def test_a_manifest_says_what_made_the_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path / "sft", "sft", CONFIG).finish({"loss": 0.5})
    manifest = read_manifest(tmp_path / "sft")
    assert (manifest.stage, manifest.config, manifest.summary, manifest.version) == ("sft", CONFIG, {"loss": 0.5}, __version__)
    assert manifest.fingerprint == fingerprint(CONFIG)
    assert manifest.finished.endswith("+00:00")


def test_wall_time_adds_up_over_resumptions(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "sft", "sft", CONFIG):
        pass
    state = read_json(tmp_path / "sft" / "state.json")
    atomic_write_json(tmp_path / "sft" / "state.json", {**state, "seconds": 100.0})
    assert 100 <= RunFolder(tmp_path / "sft", "sft", CONFIG).finish({}).seconds < 160


def test_another_configuration_is_refused_with_what_changed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "sft", "sft", CONFIG).close()
    with pytest.raises(StorageError, match=r"changed: sft\.lora_r\); choose another --out"):
        RunFolder(tmp_path / "sft", "sft", {"seed": 0, "sft": {"lora_r": 8}})


@pytest.mark.parametrize("complete", [True, False])
def test_another_stage_is_refused(tmp_path: Path, complete: bool) -> None:
    folder = RunFolder(tmp_path / "sft", "sft", CONFIG)
    folder.finish({}) if complete else folder.close()
    with pytest.raises(StorageError, match="belongs to the stage 'sft'"):
        RunFolder(tmp_path / "sft", "grpo", CONFIG)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_fingerprint_ignores_the_order_of_keys(config: dict[str, Any]) -> None:
    assert fingerprint(config) == fingerprint(dict(reversed(config.items())))
    assert fingerprint(config) == fingerprint(json.loads(json.dumps(config)))
    assert fingerprint({**config, "another": 1}) != fingerprint({**config, "another": 2})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(None, "does not exist; run `polyground sft`", id="not-there"),
        pytest.param("", "not the folder of a stage", id="foreign"),
        pytest.param('{"stage": "sft", "fingerprint": "", "config": {}, "seconds": 1}', "is not complete", id="unfinished"),
        pytest.param("{", "not valid JSON", id="broken"),
        pytest.param("[]", "not written by this program", id="a-list"),
        pytest.param("{}", "not written by this program", id="empty"),
    ],
)
def test_a_stage_that_is_not_complete_cannot_be_built_on(tmp_path: Path, state: str | None, message: str) -> None:
    folder = tmp_path / "sft"
    if state is not None:
        folder.mkdir()
        if state:
            (folder / "state.json").write_text(state)
    with pytest.raises(StorageError, match=message):
        read_manifest(folder)


OPEN_AND_APPEND_FOREVER = """
    import sys
    from polyground.storage import RunFolder
    folder = RunFolder(sys.argv[1], "sft", {"seed": 0, "sft": {"lora_r": 4}})
    for number in range(10**9):
        folder.append("rows.jsonl", {"key": str(number), "text": "x" * 5000})
        if number == 20:
            print("ready", flush=True)
"""


def test_a_killed_writer_loses_nothing_and_another_process_is_kept_out_until_then(tmp_path: Path) -> None:
    writer = run_python(OPEN_AND_APPEND_FOREVER, tmp_path / "sft")
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StorageError, match="another process is running `sft` there"):
            RunFolder(tmp_path / "sft", "sft", CONFIG)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    folder = RunFolder(tmp_path / "sft", "sft", CONFIG)
    keys = [row["key"] for row in folder.rows("rows.jsonl")]
    assert len(keys) > 20
    assert keys == [str(number) for number in range(len(keys))]
    folder.append("rows.jsonl", {"key": "after"})
    assert folder.done_keys("rows.jsonl") == {*keys, "after"}


def test_a_folder_may_be_opened_twice_by_one_process(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "sft", "sft", CONFIG)
    second = RunFolder(tmp_path / "sft", "sft", CONFIG)
    first.append("rows.jsonl", {"key": "a"})
    second.append("rows.jsonl", {"key": "b"})
    assert second.done_keys("rows.jsonl") == {"a", "b"}


def test_a_finished_stage_lets_go_of_its_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path / "sft", "sft", CONFIG).finish({})
    other = run_python(
        "import sys; from polyground.storage import RunFolder as R; R(sys.argv[1], 'sft', {'seed': 0, 'sft': {'lora_r': 4}})",
        tmp_path / "sft",
    )
    assert other.communicate()[1] == ""
    assert other.returncode == 0


def test_ranks_other_than_the_first_write_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    RunFolder(tmp_path / "sft", "sft", CONFIG).close()
    assert not (tmp_path / "sft").exists()


def test_ranks_other_than_the_first_complete_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert RunFolder(tmp_path / "sft", "sft", CONFIG).finish({"steps": 3}).summary == {"steps": 3}
    assert not (tmp_path / "sft" / "manifest.json").exists()
