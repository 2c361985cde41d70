"""Examples from several sources made into one set: mixing, duplicates, leakage between splits, and fair subsampling.

Images are compared by the hash of their bytes, so a copy under another name is still found. Nothing is read but image files.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from polyground.errors import DataError
from polyground.records import Example

_CHUNK = 1 << 20
NAMED = 10
"""How many leaks an error message names."""


@dataclass(frozen=True, slots=True)
class Leak:
    """One image that two splits share."""

    sha256: str
    first: str
    """Key of an example of the first split that shows it."""
    second: str
    """Key of an example of the second."""


class Shows(Protocol):
    """An example, as far as leakage goes."""

    @property
    def key(self) -> str: ...
    @property
    def images(self) -> tuple[Path, ...]: ...


class ImageHashes:
    """SHA-256 of image files; each path is read once. Raises DataError for a file that cannot be read."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """In hexadecimal; raises DataError for a file that cannot be read."""
        if path not in self._known:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                raise DataError(f"{path}: image cannot be read ({error.strerror}); check the image root") from error
            self._known[path] = digest.hexdigest()
        return self._known[path]


def find_leaks(first: Iterable[Shows], second: Iterable[Shows], *, hashes: ImageHashes | None = None) -> list[Leak]:
    """Every image of the second split that the first also has, once, in the second's order."""
    hashes = hashes or ImageHashes()
    owners: dict[str, str] = {}
    for example in first:
        for image in example.images:
            owners.setdefault(hashes.of(image), example.key)
    leaks: dict[str, Leak] = {}
    for example in second:
        for image in example.images:
            digest = hashes.of(image)
            if digest in owners:
                leaks.setdefault(digest, Leak(digest, owners[digest], example.key))
    return list(leaks.values())


def require_no_leaks(splits: Mapping[str, Sequence[Example]], *, hashes: ImageHashes | None = None) -> None:
    """Raises DataError when two splits share an image, naming the splits and the first ten examples."""
    hashes = hashes or ImageHashes()
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if leaks := find_leaks(splits[first], splits[second], hashes=hashes):
                shown = "".join(f"\n  {leak.first} and {leak.second}" for leak in leaks[:NAMED])
                raise DataError(f"splits {first!r} and {second!r} share {len(leaks)} images; drop them with without_leaks{shown}")


def shown_in(examples: Iterable[Shows], *, hashes: ImageHashes) -> frozenset[str]:
    """The hashes of all images of these examples."""
    return frozenset(hashes.of(image) for example in examples for image in example.images)


def without_leaks(
    examples: Iterable[Example], held_out: Iterable[Example], *, hashes: ImageHashes | None = None
) -> list[Example]:
    """The examples that show no image of `held_out`, in their order."""
    hashes = hashes or ImageHashes()
    barred = shown_in(held_out, hashes=hashes)
    return [example for example in examples if not any(hashes.of(image) in barred for image in example.images)]


def without_duplicates(examples: Iterable[Example], *, hashes: ImageHashes | None = None) -> list[Example]:
    """The examples, without those that ask what an earlier one asked: same images (by bytes), question, boxes and choices."""
    hashes = hashes or ImageHashes()
    kept: dict[object, Example] = {}
    for example in examples:
        identity = (tuple(hashes.of(i) for i in example.images), example.question, example.question_boxes, example.choices)
        kept.setdefault(identity, example)
    return list(kept.values())


def mix(sources: Mapping[str, Sequence[Example]], *, weights: Mapping[str, float] | None = None, seed: int = 0) -> list[Example]:
    """All examples of all sources in one shuffled list; a weight below 1 keeps that share of a source, balanced over tasks.

    Raises DataError when two examples have the same key, a weight is not in [0, 1], or names no source.
    """
    weights = weights or {}
    if unknown := sorted(set(weights) - set(sources)):
        raise DataError(f"weights name unknown sources: {', '.join(unknown)}; known: {', '.join(sources)}")
    mixed: list[Example] = []
    for name, examples in sources.items():
        weight = weights.get(name, 1.0)
        if not 0 <= weight <= 1:
            raise DataError(f"the weight of source {name!r} must lie in [0, 1]; got {weight}")
        mixed.extend(subsample(examples, round(weight * len(examples)), seed=seed))
    keys: set[str] = set()
    for example in mixed:
        if example.key in keys:
            raise DataError(f"two examples have the key {example.key!r}; give each source a name of its own")
        keys.add(example.key)
    random.Random(f"{seed}/mix").shuffle(mixed)
    return mixed


def subsample(examples: Sequence[Example], count: int, *, seed: int = 0) -> list[Example]:
    """`count` of the examples, as evenly over the tasks as they allow, in their order; all of them when there are no more.

    Which ones depends on the seed and the keys alone, and a larger count keeps those of a smaller one.
    """
    if count >= len(examples):
        return list(examples)
    by_task: dict[str, list[tuple[str, int]]] = {}
    for position, example in enumerate(examples):
        rank = hashlib.sha256(f"{seed}/{example.key}".encode()).hexdigest()
        by_task.setdefault(example.task, []).append((rank, position))
    # Each task's n-th best ranked example comes before any task's next, so that every prefix is balanced.
    turns = [(turn, rank, position) for ranked in by_task.values() for turn, (rank, position) in enumerate(sorted(ranked))]
    return [examples[position] for position in sorted(position for _, _, position in sorted(turns)[: max(count, 0)])]
