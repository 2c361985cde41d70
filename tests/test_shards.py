"""Facts about sharing a stage out: every row in one part, all parts in order again, nothing twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyground.errors import ConfigError, DataError, StorageError
from polyground.shards import Shard, gather, launched_shard, parse_shard, part_folder, part_identity, shard_of, wait_for_parts
from polyground.storage import RunFolder, read_rows

KEYS = [f"e{i}" for i in range(20)]
CONFIG = {"seed": 0}


def do_part(out: Path, shard: Shard, *, keys: list[str] = KEYS, config: dict = CONFIG, finish: bool = True) -> None:
    folder = RunFolder(part_folder(out, "reject", shard), "reject", part_identity(config, shard), own=True)
    for key in shard.of(keys, keys):
        folder.append("kept.jsonl" if int(key[1:]) % 3 else "rejected.jsonl", {"key": key})
    if finish:
        folder.finish({})
    folder.close()


def whole(out: Path) -> RunFolder:
    return RunFolder(out / "reject", "reject", CONFIG)


def put_together(out: Path) -> int:
    return gather(whole(out), out, "reject", {"kept.jsonl": KEYS, "rejected.jsonl": KEYS}, field="key")


@given(st.lists(st.text(), unique=True), st.integers(1, 9))
def test_every_key_falls_to_exactly_one_part(keys: list[str], count: int) -> None:
    parts = [Shard(i, count).of(keys, keys) for i in range(count)]
    assert Counter(key for part in parts for key in part) == Counter(keys)
    assert all(part == sorted(part, key=keys.index) for part in parts)


def test_parts_are_of_like_size() -> None:
    sizes = Counter(shard_of(f"question-{i}", 8) for i in range(8000))
    assert len(sizes) == 8
    assert all(850 < size < 1150 for size in sizes.values())


def test_where_a_key_falls_never_changes() -> None:
    assert [shard_of(key, 5) for key in ("", "e1", "größer", "e2")] == [1, 3, 2, 0]


@pytest.mark.parametrize("text", ["", "4", "4/4", "5/4", "-1/4", "0/0", "a/b", "1/2/3", "0/9999999"])
def test_a_part_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 0/4"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("rank", "world", "expected"),
    [(None, None, None), ("0", "1", None), ("0", "4", Shard(0, 4)), ("3", "4", Shard(3, 4))],
)
def test_a_launcher_says_which_part_is_whose(
    rank: str | None, world: str | None, expected: Shard | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launched_shard() == expected


@pytest.mark.parametrize(("rank", "world"), [("4", "4"), ("", "2"), ("1", "many")])
def test_a_launcher_that_contradicts_itself_is_named(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        launched_shard()


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_parts_give_the_rows_of_one_process_in_its_order(tmp_path: Path, count: int) -> None:
    for i in reversed(range(count)):
        do_part(tmp_path, Shard(i, count))
    assert put_together(tmp_path) == count
    kept, rejected = ([row["key"] for row in read_rows(tmp_path / "reject" / f"{name}.jsonl")] for name in ("kept", "rejected"))
    assert kept == [key for key in KEYS if int(key[1:]) % 3]
    assert rejected == [key for key in KEYS if not int(key[1:]) % 3]


def test_putting_together_twice_gives_the_same_rows(tmp_path: Path) -> None:
    for i in range(2):
        do_part(tmp_path, Shard(i, 2))
    put_together(tmp_path)
    once = (tmp_path / "reject" / "kept.jsonl").read_bytes()
    put_together(tmp_path)
    assert (tmp_path / "reject" / "kept.jsonl").read_bytes() == once


def test_without_parts_nothing_happens(tmp_path: Path) -> None:
    assert put_together(tmp_path) == 0
    assert not (tmp_path / "reject" / "kept.jsonl").exists()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    do_part(tmp_path, Shard(0, 3))
    do_part(tmp_path, Shard(1, 3), finish=False)
    with pytest.raises(StorageError, match="not complete: 1/3, 2/3; run `polyground reject` with `--shard`"):
        put_together(tmp_path)


def test_parts_that_were_begun_with_another_count_are_no_hindrance(tmp_path: Path) -> None:
    do_part(tmp_path, Shard(0, 3))
    for i in range(2):
        do_part(tmp_path, Shard(i, 2))
    assert put_together(tmp_path) == 2


def test_parts_of_another_configuration_are_refused(tmp_path: Path) -> None:
    do_part(tmp_path, Shard(0, 2))
    do_part(tmp_path, Shard(1, 2), config={"seed": 1})
    with pytest.raises(StorageError, match="1-of-2: was made under another configuration"):
        put_together(tmp_path)


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    do_part(tmp_path, Shard(0, 2))
    do_part(tmp_path, Shard(1, 2), keys=[*KEYS, *KEYS])
    with pytest.raises(DataError, match=r"1-of-2/.*twice, out of order, or of no question"):
        put_together(tmp_path)
    assert not (tmp_path / "reject" / "kept.jsonl").exists()


def test_each_process_of_a_launcher_locks_and_describes_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    do_part(tmp_path, Shard(1, 2), finish=False)
    assert {path.name for path in part_folder(tmp_path, "reject", Shard(1, 2)).iterdir()} >= {"state.json", ".lock"}


def test_waiting_ends_when_all_parts_are_there(tmp_path: Path) -> None:
    for i in range(2):
        do_part(tmp_path, Shard(i, 2))
    wait_for_parts(tmp_path, ["reject"], 2, every=0.01)
