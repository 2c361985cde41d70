"""One reader per public annotation format, by name; each gives examples with unit boxes, and says which rows it refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.blink import read_blink
from polyground.sources.mig_bench import read_mig_bench
from polyground.sources.mmiu import read_mmiu

READERS: dict[str, Callable[..., list[Example]]] = {
    "mig_bench": read_mig_bench,
    "blink": read_blink,
    "mmiu": read_mmiu,
}
"""Readers by the name a recipe uses; all take the annotation's path and keyword options."""


def read_source(name: str, path: str | Path, /, **options: Any) -> list[Example]:
    """The examples of one annotation file. An unknown reader or option is a DataError that lists the known ones."""
    reader = READERS.get(name)
    if reader is None:
        near = get_close_matches(name, READERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown source {name!r}{hint} Known sources: {', '.join(sorted(READERS))}")
    known = [p.name for p in inspect.signature(reader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise DataError(f"source {name!r} has no option {option!r}; its options: {', '.join(known)}")
    return reader(Path(path), **options)
