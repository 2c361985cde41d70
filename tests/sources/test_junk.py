"""Whatever stands in a field, a reader gives examples, counted bad rows, or an error that says where: never a traceback."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import FIXTURES, Written, blink_row, mmiu_row, ref_l4_row, write_json

from polyground.errors import DataError
from polyground.geometry import PER_MILLE
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.sources import BadRow, scan_source

JUNK = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    "",
    "junk",
    "../../x",
    "<box>",
    "<image>",
    "\0",
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
]


def as_json(row: dict[str, Any]) -> Callable[[Path], Written]:
    return lambda folder: (write_json(folder / "rows.json", [row, row]), {})


WRITERS = {kind: fixture for kind, fixture in FIXTURES.items() if kind not in ("blink", "mmiu", "ref_l4", "verl")} | {
    "blink": ("blink", as_json(blink_row(image_1="1.jpg", image_2={"path": "2.jpg", "bytes": None}, image_3=None))),
    "mmiu": ("mmiu", as_json(mmiu_row())),
    "ref_l4": ("ref_l4", as_json(ref_l4_row())),
    "verl": ("verl", as_json({"problem": "<image>Which?\nA. x\nB. y", "answer": "B", "images": ["1.jpg"]})),
}
"""The fixtures, and for those in parquet, which fixes the kind of a column beforehand, a row of theirs in JSON."""


def places(node: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every node below the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield (*here, key)
        yield from places(inner, (*here, key))


def replaced(node: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = deepcopy(node)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.parametrize("kind", WRITERS)
def test_junk_in_any_field_is_counted_or_named(tmp_path: Path, kind: str) -> None:
    source, write = WRITERS[kind]
    path, options = write(tmp_path)
    lines = path.suffix == ".jsonl"
    content = [json.loads(path.read_text())] if lines else json.loads(path.read_text())
    # Of rows that are alike, the first two are enough.
    known = [place for place in places(content) if all(not isinstance(key, int) or key < 2 for key in place)]
    for place in known:
        for value in JUNK:
            changed = replaced(content, place, value)
            path.write_text("\n".join(map(json.dumps, changed)) if lines else json.dumps(changed), encoding="utf-8")
            try:
                items = list(scan_source(source, path, **options))
            except DataError:
                continue
            for item in items:
                assert isinstance(item, Example | BadRow)
                if isinstance(item, Example):
                    student_messages(item, [PER_MILLE] * len(item.images))
                    json.dumps(item.to_json())
