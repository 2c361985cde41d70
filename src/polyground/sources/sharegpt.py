"""ShareGPT and LLaMA-Factory: conversations with `<image>` in their text beside `images`, and dataset_info.json over them.

Rows of `instruction`, `input`, `output` (LLaMA-Factory's alpaca format) are read where dataset_info.json says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.conversations import (
    ASSISTANTS,
    SYSTEMS,
    USERS,
    Reading,
    Turn,
    examples_of,
    identity_of,
    images_of,
    messages_of,
    text_of,
    turns_of,
)
from polyground.sources.reading import ImageRoot, Item, RowError, image_root, load_json, scan_rows, shortened

INFO = "dataset_info.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which fields of a row hold what; the default tells the two usual layouts apart by their field names."""

    alpaca: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    """LLaMA-Factory's names to the file's."""
    tags: Mapping[str, str] | None = None
    """Keys and roles of a message; None to tell from/value and role/content apart by the message."""


def scan_sharegpt(
    path: Path,
    *,
    images_root: str | Path | None = None,
    strip_prefix: str | None = None,
    images_out: str | Path | None = None,
    dataset: str | None = None,
    grid: str | None = None,
    unnamed_image: int | None = None,
    marked_image: int | None = None,
    task: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    name: str = "sharegpt",
) -> Iterator[Item]:
    """All questions of a file, in file order; keys are `name/row`, or `name/row/turn` in rows of several turns.

    `path` is the data file, or a dataset_info.json (or the folder it lies in), of which `dataset` names the entry; its file
    name, formatting, columns and tags are honoured. With `dataset`, a data file's entry is looked for beside it. `grid` is the
    one boxes are written on (`conventions.GRIDS`) and has no default; `unnamed_image` the image of boxes that nothing names;
    `task` that of rows without a field `task`. Bad rows have the reasons of `scan_trl`.
    """
    file, folder, layout = _find(path, dataset)
    root = image_root(file, folder if images_root is None else images_root, strip_prefix, images_out)
    reading = Reading(file=file, source="sharegpt", grid=grid, unnamed_image=unnamed_image, marked_image=marked_image, task=task)

    def read_row(row: Any, key: str) -> Sequence[Example | RowError]:
        return read_conversation(row, key, root, reading, layout)

    return scan_rows(file, read_row, name=name, duplicates=duplicates)


def read_conversation(
    row: Any, key: str, root: ImageRoot, reading: Reading, layout: Layout, *, task: str | None = None
) -> Sequence[Example | RowError]:
    """The examples of one row; `task` is that of a row without the field."""
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    turns = _alpaca_turns(row, layout.columns) if layout.alpaca else _turns(row, layout)
    column = layout.columns.get("images")
    images = root.paths(images_of(row, *((column,) if column else ("images", "image"))))
    own, meta = identity_of(row)
    return examples_of(turns, images, key, reading, task=own or task, meta=meta)


def _turns(row: Mapping[str, Any], layout: Layout) -> list[Turn]:
    columns = [layout.columns["messages"]] if "messages" in layout.columns else ["conversations", "messages"]
    messages = next((row[column] for column in columns if row.get(column) is not None), None)
    if messages is None:
        raise RowError("malformed", f"the row has no {' or '.join(columns)}")
    tags = layout.tags
    if tags is None:
        first = messages[0] if isinstance(messages, list) and messages else None
        keys = ("role", "content") if isinstance(first, dict) and "role" in first else ("from", "value")
        return turns_of(messages_of(messages, *keys))
    return turns_of(
        messages_of(
            messages,
            tags.get("role_tag", "from"),
            tags.get("content_tag", "value"),
            users=(tags.get("user_tag", "human"),),
            assistants=(tags.get("assistant_tag", "gpt"),),
            systems=(tags.get("system_tag", "system"),),
        )
    )


def _alpaca_turns(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Turn]:
    def cell(column: str, usual: str | None) -> Any:
        name = columns.get(column, usual)
        return row.get(name) if name else None

    history = cell("history", None) or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise RowError("malformed", f"the history must be a list of pairs; got {shortened(history)}")
    asked = [text_of(part) for part in (cell("prompt", "instruction"), cell("query", "input")) if part]
    last = Turn("\n".join(asked), text_of(cell("response", "output")))
    return [*(Turn(text_of(question), text_of(answer)) for question, answer in history), last]


# ---------------------------------------------------------------- dataset_info.json


def _find(path: Path, dataset: str | None) -> tuple[Path, Path | None, Layout]:
    """The data file that is meant, the folder its images are named from (None for its own), and its layout."""
    info = path if path.name == INFO else path / INFO if path.is_dir() else path.parent / INFO
    if path.name != INFO and dataset is None:
        return path, None, Layout()
    entries = load_json(info)
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{info}: holds no data sets; it must be an object of entries by name")
    if dataset is None and len(entries) == 1:
        dataset = next(iter(entries))
    if dataset is None or dataset not in entries:
        near = get_close_matches(str(dataset), entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{info}: set dataset to one of its entries; got {dataset!r}{hint} Known: {', '.join(entries)}")
    entry = entries[dataset]
    if not isinstance(entry, dict):
        raise DataError(f"{info}: entry {dataset!r} must be an object")
    file = path
    if path.name == INFO or path.is_dir():
        if not isinstance(entry.get("file_name"), str):
            raise DataError(f"{info}: entry {dataset!r} has no file_name; download the data set and name its file")
        file = info.parent / entry["file_name"]
    return file, info.parent, _layout(entry, info, dataset)


def _layout(entry: Mapping[str, Any], info: Path, dataset: str) -> Layout:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{info}: entry {dataset!r} has formatting {formatting!r}; known: alpaca, sharegpt, openai")
    if entry.get("ranking"):
        raise DataError(f"{info}: entry {dataset!r} is a preference data set (ranking); it has no answers to learn from")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for what, names in (("columns", columns), ("tags", tags)):
        if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
            raise DataError(f"{info}: entry {dataset!r}: {what} must map names to names")
    if formatting == "openai":
        usual = {"role_tag": "role", "content_tag": "content", "user_tag": USERS[0], "assistant_tag": ASSISTANTS[0]}
        return Layout(columns={"messages": "messages", **columns}, tags={**usual, "system_tag": SYSTEMS[0], **tags})
    return Layout(alpaca=formatting == "alpaca", columns=columns, tags=tags)
