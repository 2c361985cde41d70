"""What every reader shares: bad rows with their reasons, and images that are there. Knows no format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyground.errors import DataError
from polyground.records import Example

OnBad = Literal["raise", "quarantine"]

NAMED = 10
"""How many bad rows or missing files an error message names."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be an example."""

    row: int
    """1-based position in the file."""
    key: str
    reason: str
    """A short word that can be counted: inverted, out_of_range, duplicate, …"""
    detail: str


@dataclass(frozen=True, slots=True)
class Source:
    """What one file holds: the examples, in file order, and the rows left out."""

    examples: tuple[Example, ...]
    bad: tuple[BadRow, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return dict(Counter(bad.reason for bad in self.bad))


class RowError(ValueError):
    """A row is bad; carries the countable reason beside the message."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def examples_of(source: Source, path: Path, *, on_bad: OnBad) -> list[Example]:
    """The examples of a source. With `raise`, one bad row is a DataError that counts the reasons and names the first rows."""
    if on_bad not in ("raise", "quarantine"):
        raise DataError(f"on_bad must be 'raise' or 'quarantine'; got {on_bad!r}")
    if source.bad and on_bad == "raise":
        counts = ", ".join(f"{count} {reason}" for reason, count in source.reasons.items())
        rows = "".join(f"\n  row {bad.row} ({bad.key}): {bad.detail}" for bad in source.bad[:NAMED])
        raise DataError(f"{path}: {len(source.bad)} bad rows ({counts}); repair them or read with on_bad='quarantine'{rows}")
    return list(source.examples)


def require_images(examples: Iterable[Example], path: Path) -> None:
    """Raises DataError naming the first ten image files that do not exist."""
    missing = [image for image in dict.fromkeys(i for example in examples for i in example.images) if not image.is_file()]
    if missing:
        names = "".join(f"\n  {image}" for image in missing[:NAMED])
        raise DataError(f"{path}: {len(missing)} image files are missing; set images_root to the folder they lie under{names}")


def load_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of JSON lines; told apart by the first character."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); download or build it again") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); download or build it again") from error
    return rows


def field_of(row: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the wanted kind, or a RowError that names it."""
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    value = row.get(name)
    if not isinstance(value, kind):
        raise RowError("malformed", f"field {name!r} is missing or of the wrong kind: {value!r}")
    return value


def scan_choices(
    path: str | Path,
    *,
    images_root: str | Path | None,
    name: str,
    task_field: str,
    read_row: Callable[[Any, str, Path], Example],
) -> Source:
    """All rows of a multiple-choice file. `read_row` makes a row, its key `name/task/position` and the image root an example.

    Beside the reasons of `read_row`'s RowErrors, a repeated question is left out as `duplicate`.
    """
    path = Path(path)
    root = path.parent if images_root is None else Path(images_root)
    positions: Counter[str] = Counter()
    examples, bad, seen = [], [], set()
    for number, row in enumerate(load_rows(path), start=1):
        task = str(row.get(task_field)) if isinstance(row, dict) else "?"
        key = f"{name}/{task}/{positions[task]}"
        positions[task] += 1
        try:
            example = read_row(row, key, root)
            identity = (task, example.images, example.question, example.choices)
            if identity in seen:
                raise RowError("duplicate", "an earlier row asks the same question about the same images")
        except RowError as error:
            bad.append(BadRow(number, key, error.reason, str(error)))
        else:
            seen.add(identity)
            examples.append(example)
    return Source(tuple(examples), tuple(bad))
