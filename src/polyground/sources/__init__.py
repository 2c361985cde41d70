"""One reader per public annotation format, by name; each gives examples with unit boxes, and says which rows it refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.blink import scan_blink
from polyground.sources.mig_bench import scan_mig_bench
from polyground.sources.mmiu import scan_mmiu
from polyground.sources.reading import BadRow, Item, OnBad, collect, reasons_of, require_images, require_none_bad

__all__ = ["SOURCES", "BadRow", "Item", "read_source", "scan_source"]

SOURCES: dict[str, Callable[..., Iterator[Item]]] = {
    "mig_bench": scan_mig_bench,
    "blink": scan_blink,
    "mmiu": scan_mmiu,
}
"""Readers by the name a recipe uses; all take the annotation's path and keyword options, and hold one row at a time."""

_log = logging.getLogger(__name__)


def scan_source(name: str, path: str | Path, /, **options: Any) -> Iterator[Item]:
    """Every row of one annotation as an example or a BadRow, streamed. An unknown reader or option is a DataError."""
    reader = SOURCES.get(name)
    if reader is None:
        near = get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(f"unknown source {name!r}{hint} Known sources: {', '.join(sorted(SOURCES))}")
    known = options_of(name)
    for option in options:
        if option not in known:
            raise DataError(f"source {name!r} has no option {option!r}; its options: {', '.join(known)}")
    return reader(Path(path), **options)


def options_of(name: str) -> list[str]:
    """The options a reader takes."""
    return [p.name for p in inspect.signature(SOURCES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def read_source(
    name: str,
    path: str | Path,
    /,
    *,
    on_bad: OnBad = "raise",
    check_images: bool = True,
    limit: int | None = None,
    **options: Any,
) -> list[Example]:
    """The examples of one annotation, in file order; at most `limit` rows are read.

    Bad rows raise a DataError, or are left out, counted in a warning, with `on_bad="quarantine"`. `check_images=False` reads an
    annotation without its images.
    """
    path = Path(path)
    if on_bad not in ("raise", "quarantine"):
        raise DataError(f"on_bad must be 'raise' or 'quarantine'; got {on_bad!r}")
    examples, bad = collect(islice(scan_source(name, path, **options), limit))
    if on_bad == "raise":
        require_none_bad(bad, path)
    elif bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons_of(bad).items())
        _log.warning("%s: left out %d of %d rows (%s)", path, len(bad), len(bad) + len(examples), counts)
    if check_images:
        require_images(examples, path)
    return examples
