"""Which format an annotation file has, told by the names of its fields; the grid of its numbers is never told from them.

A file that no format fits is answered with None, not with the nearest guess. Nothing is read beyond the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from polyground.errors import DataError
from polyground.sources.reading import HUB, load_json, stream_rows

LOOKED_AT = 20
"""Rows that must all be of one format."""

Row = Mapping[str, Any]


def recognise(path: Path | str) -> str | None:
    """The name of the reader in `sources.SOURCES`, or None. Raises DataError for a file that cannot be read at all.

    A format with fields of its own goes before one that shares them with others.
    """
    path = Path(path)
    if path.name == "dataset_info.json":
        return "sharegpt"
    tables = _tables(path)
    if tables is not None:
        return next((name for name, fits in _TABLES.items() if fits(tables)), None)
    rows = [row for _, row in islice(stream_rows(path), LOOKED_AT)]
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return next((name for name, fit in _ROWS.items() if fit(rows)), None)


def fields_of(path: Path | str) -> list[str]:
    """The fields of the first row, for a message about a file of no known format."""
    path = Path(path)
    tables = _tables(path)
    first = tables if tables is not None else next((row for _, row in stream_rows(path)), None)
    return list(map(str, first)) if isinstance(first, dict) else []


def _tables(path: Path) -> Row | None:
    """The one JSON object of a file that is no list of rows."""
    if str(path).startswith(HUB) or not path.is_file() or path.suffix.lower() != ".json":
        return None
    rows = stream_rows(path)
    try:
        first = next(rows, (0, None))[1]
    except DataError:
        found = load_json(path)
        return found if isinstance(found, dict) else None
    # `json.dump` writes an object on one line, where it looks like JSON lines of a single row.
    is_table = isinstance(first, dict) and any(fits(first) for fits in _TABLES.values())
    return first if is_table and next(rows, None) is None else None


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(field) is not None for field in fields)


def _each(fits: Callable[[Row], Any]) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: all(fits(row) for row in rows)


def _is_canonical(row: Row) -> bool:
    """What `convert` writes, or `synthesize` keeps."""
    return _has("key", "task", "images", "question")(row) and isinstance(row.get("target") or row.get("answer"), dict)


def _are_migician(rows: Sequence[Row]) -> bool:
    """Conversations with a type, some with Qwen's box tokens; descriptions of a region have none."""
    return all(map(_has("conversations", "type"), rows)) and any("<|box_" in text for row in rows for text in _texts(row))


def _is_swift(row: Row) -> bool:
    return _has("messages", "objects")(row) and isinstance(row["objects"], dict)


def _is_trl(row: Row) -> bool:
    """Messages with image parts, or a prompt beside its completion or solution."""
    messages = row.get("messages") or row.get("prompt")
    if isinstance(messages, str):
        return any(row.get(name) is not None for name in ("completion", "solution"))
    said = [message for message in messages or () if isinstance(message, dict)]
    parts = any(isinstance(message.get("content"), list | tuple) for message in said)
    return bool(said) and all("role" in message for message in said) and (parts or row.get("prompt") is not None)


def _is_sharegpt(row: Row) -> bool:
    """Messages of plain text, with a column of images or none."""
    return isinstance(row.get("conversations") or row.get("messages"), list | tuple)


def _texts(row: Row) -> Iterator[str]:
    for message in row.get("conversations") or ():
        text = message.get("value") if isinstance(message, dict) else None
        if isinstance(text, str):
            yield text


_TABLES: dict[str, Callable[[Row], bool]] = {
    "mc_bench": lambda tables: (
        _has("descriptions", "images", "annotations")(tables)
        or (_has("images", "annotations")(tables) and any("pair_id" in row for row in tables["images"][:1]))
    ),
    "odinw": _has("images", "annotations", "categories"),
}

_ROWS: dict[str, Callable[[Sequence[Row]], bool]] = {
    "polyground": _each(_is_canonical),
    "mig_bench": _each(_has("task", "images", "question", "answer", "need_format")),
    "blink": _each(_has("sub_task", "image_1")),
    "mmiu": _each(_has("input_image_path", "options", "output")),
    "ref_l4": _each(_has("caption", "bbox", "file_name")),
    "lisa": _each(_has("image_path", "instruction", "boxes")),
    "llmseg": _each(_has("image_path", "question", "bbox")),
    "revos": _each(_has("frames", "question", "bbox_list")),
    "reasonvos": _each(_has("image_list", "question", "bbox_list")),
    "swift": _each(_is_swift),
    "verl": _each(lambda row: row.get("problem") is not None or row.get("reward_model") is not None),
    "migician": _are_migician,
    "vlm_r1": _each(_has("conversations", "image")),
    "trl": _each(_is_trl),
    "sharegpt": _each(_is_sharegpt),
}
"""What each format's rows have that those below it need not have."""
