"""Questions shared out over processes and machines by a hash of their key, and their rows put together again in order.

Which part a row belongs to depends on its key and the number of parts alone: no list has to be agreed on, and no row can be
in two parts. What a row holds, and who makes it, is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from polyground.errors import ConfigError, DataError, StorageError
from polyground.storage import MANIFEST, RunFolder, atomic_write_rows, fingerprint, read_manifest, read_rows

logger = logging.getLogger("polyground")

PARTS = "shards"
"""Folder of a run that holds the parts: `shards/STAGE/0-of-4`, each the folder of a stage."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts of a stage, written `0/4`: the first of four."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """As in the name of its folder."""
        return f"{self.index}-of-{self.count}"

    def holds(self, key: str) -> bool:
        """Whether the row of this key is in this part: told by the key alone."""
        return shard_of(key, self.count) == self.index

    def of(self, items: Iterable[Item], keys: Iterable[str]) -> list[Item]:
        """Those of the items, in their order, whose key falls to this part."""
        return [item for item, key in zip(items, keys, strict=True) if self.holds(key)]


def shard_of(key: str, count: int) -> int:
    """Which of so many parts a key falls to, in [0, count).

    >>> [shard_of("e1", 5), shard_of("e2", 5), shard_of("e1", 1)]
    [3, 0, 0]
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % count


def parse_shard(text: str) -> Shard:
    """`0/4`. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ConfigError(f"shard {text!r}: write it as 0/4 for the first of four parts, 3/4 for the last")
    return Shard(int(found[1]), int(found[2]))


def launched_shard() -> Shard | None:
    """The place of this process among those of a launcher (`RANK` and `WORLD_SIZE`); None for a process on its own."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return None
    try:
        return parse_shard(f"{os.environ.get('RANK', '')}/{count}")
    except ConfigError as error:
        raise ConfigError(
            f"RANK={os.environ.get('RANK', '')!r} with WORLD_SIZE={count!r}: a launcher sets both, RANK below WORLD_SIZE; "
            "unset them for a process on its own"
        ) from error


def shared_stages(out: Path, verb: str, count: int) -> list[str]:
    """Folders of this verb that are shared out among so many parts, as far as their first part is complete."""
    found = (out / PARTS).glob(f"{verb}/**/{Shard(0, count).name}/{MANIFEST}")
    return sorted(path.parent.parent.relative_to(out / PARTS).as_posix() for path in found)


def launched_processes() -> int:
    """How many processes a launcher has started; 1 for a process on its own."""
    shard = launched_shard()
    return 1 if shard is None else shard.count


def launched_with(name: str) -> bool:
    """Whether accelerate was launched with `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")


def weights_in_pieces() -> bool:
    """Whether weights will be shared out over the processes of a training (FSDP, ZeRO-3)."""
    zero_3 = launched_with("DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return zero_3 or launched_with("FSDP")


def part_folder(out: Path, stage: str, shard: Shard) -> Path:
    """Where a part of a stage lies in a run's folder."""
    return out / PARTS / stage / shard.name


def part_identity(identity: Mapping[str, Any], shard: Shard) -> dict[str, Any]:
    """What decides the rows of a part."""
    return {**identity, "shard": str(shard)}


def wait_for_parts(out: Path, stages: Iterable[str], count: int, *, every: float = 1.0) -> None:
    """Return when all parts of these stages are complete. Who launched the processes ends this one when another fails."""
    said = -math.inf
    for stage in stages:
        while missing := _lacking(out / PARTS / stage, count):
            if time.monotonic() - said > 60:
                logger.warning("%s: waiting for the parts %s", out / PARTS / stage, ", ".join(map(str, missing)))
                said = time.monotonic()
            time.sleep(every)


def gather(folder: RunFolder, out: Path, stage: str, files: Mapping[str, Sequence[str]], *, field: str) -> int:
    """Write the rows of complete parts into the folder of the whole stage, in order; returns how many parts there are.

    `files` names each file of rows and the keys its rows may have, in order; `field` is where a row has its key. Nothing happens
    where there are no parts. Raises StorageError for parts that are not complete or were made under another configuration,
    DataError where a row is there twice.
    """
    shards = _complete(folder, out / PARTS / stage, stage)
    for file, keys in files.items():
        paths = [part_folder(out, stage, shard) / file for shard in shards]
        if any(path.exists() for path in paths):
            atomic_write_rows(folder.file(file), _in_order(paths, keys, field))
    return len(shards)


def _complete(folder: RunFolder, parts: Path, stage: str) -> list[Shard]:
    """The parts that make up the whole; of several ways to share it out, the first that is complete."""
    found = [_shard_named(path.name) for path in parts.iterdir() if path.is_dir()] if parts.is_dir() else []
    counts = sorted({shard.count for shard in found if shard is not None})
    missing: dict[int, list[Shard]] = {}
    for count in counts:
        missing[count] = _lacking(parts, count)
        if missing[count]:
            continue
        shards = _all_of(count)
        for shard in shards:
            if read_manifest(parts / shard.name).fingerprint != fingerprint(part_identity(folder.config, shard)):
                raise StorageError(
                    f"{parts / shard.name}: was made under another configuration than this run of `{folder.stage}`; "
                    f"restore the value that was changed, or delete {parts} to start again"
                )
        return shards
    if missing:
        lacking = ", ".join(str(shard) for shards in missing.values() for shard in shards)
        raise StorageError(
            f"{parts}: these parts are not complete: {lacking}; run `polyground {folder.stage}` with `--shard` for each of them, "
            f"or delete the folder to do all of {stage} in one process"
        )
    return []


def _all_of(count: int) -> list[Shard]:
    return [Shard(i, count) for i in range(count)]


def _lacking(parts: Path, count: int) -> list[Shard]:
    """The parts, of so many, that are not complete in this folder."""
    return [shard for shard in _all_of(count) if not (parts / shard.name / MANIFEST).is_file()]


def _shard_named(name: str) -> Shard | None:
    index, of, count = name.partition("-of-")
    return Shard(int(index), int(count)) if of and index.isdigit() and count.isdigit() else None


def _in_order(paths: Sequence[Path], keys: Sequence[str], field: str) -> Iterator[dict[str, Any]]:
    """The rows of all parts, each of which has its own in the order of the keys; one row of each part is held at a time."""
    parts = [read_rows(path) if path.exists() else iter(()) for path in paths]
    heads = [next(part, None) for part in parts]
    for key in keys:
        number = shard_of(key, len(parts))
        head = heads[number]
        if head is not None and head.get(field) == key:
            yield head
            heads[number] = next(parts[number], None)
    for path, head in zip(paths, heads, strict=True):
        if head is not None:
            raise DataError(
                f"{path}: the row of {head.get(field)!r} is there twice, out of order, or of no question of this run; "
                f"delete {path.parent} and run that part again"
            )
