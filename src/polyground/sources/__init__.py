"""One reader per public annotation format, by name; each gives examples with unit boxes, and says which rows it refused."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from polyground.errors import DataError
from polyground.records import Example
from polyground.sources.blink import scan_blink
from polyground.sources.canonical import scan_canonical
from polyground.sources.mc_bench import scan_mc_bench
from polyground.sources.mig_bench import scan_mig_bench
from polyground.sources.migician import scan_migician
from polyground.sources.mmiu import scan_mmiu
from polyground.sources.odinw import scan_odinw
from polyground.sources.reading import BadRow, Item, OnBad, collect, reasons_of, require_none_bad, screen_images
from polyground.sources.reasoning_boxes import scan_lisa, scan_llmseg, scan_reasonvos, scan_revos
from polyground.sources.ref_l4 import scan_ref_l4
from polyground.sources.sharegpt import scan_sharegpt
from polyground.sources.swift import scan_swift
from polyground.sources.trl import scan_trl
from polyground.sources.verl import scan_verl
from polyground.sources.vlm_r1 import scan_vlm_r1

__all__ = ["ABOUT_ROWS", "SOURCES", "BadRow", "Item", "chosen", "read_source", "scan_source"]

SOURCES: dict[str, Callable[..., Iterator[Item]]] = {
    "mig_bench": scan_mig_bench,
    "mc_bench": scan_mc_bench,
    "lisa": scan_lisa,
    "llmseg": scan_llmseg,
    "revos": scan_revos,
    "reasonvos": scan_reasonvos,
    "ref_l4": scan_ref_l4,
    "odinw": scan_odinw,
    "blink": scan_blink,
    "mmiu": scan_mmiu,
    "trl": scan_trl,
    "sharegpt": scan_sharegpt,
    "migician": scan_migician,
    "swift": scan_swift,
    "verl": scan_verl,
    "vlm_r1": scan_vlm_r1,
    "polyground": scan_canonical,
}
"""Readers by the name a recipe uses; all take the annotation's path and keyword options, and hold one row at a time."""

CheckImages = bool | Literal["exists", "decode", "no"]
"""How far image files are looked at before anything is done with them."""

ABOUT_ROWS = ("on_bad", "check_images", "limit", "skip", "every")
"""The options of a data file that say which rows are used: `read_source` takes them, readers do not."""

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


def chosen(items: Iterable[Item], *, limit: int | None = None, skip: int = 0, every: int = 1) -> Iterator[Item]:
    """Of the items after the first `skip`, each `every`th, at most `limit`; numbers that cannot be are a DataError."""
    for option, value, least in (("limit", 1 if limit is None else limit, 1), ("skip", skip, 0), ("every", every, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"{option} must be a whole number of at least {least}; got {value!r}")
    return islice(islice(items, skip, None, every), limit)


def read_source(
    name: str,
    path: str | Path,
    /,
    *,
    on_bad: OnBad = "raise",
    check_images: CheckImages = True,
    limit: int | None = None,
    skip: int = 0,
    every: int = 1,
    **options: Any,
) -> list[Example]:
    """The examples of one annotation, in file order: of the questions after the first `skip`, each `every`th, at most `limit`.

    Readings with the same `every` and another `skip` below it share no question.
    Bad rows raise a DataError, or are left out, counted in a warning, with `on_bad="quarantine"`. A row is also bad when one
    of its images does not exist; with `check_images="decode"`, when one cannot be decoded to its end; `check_images=False`
    reads an annotation without its images.
    """
    path = Path(path)
    if on_bad not in ("raise", "quarantine"):
        raise DataError(f"on_bad must be 'raise' or 'quarantine'; got {on_bad!r}")
    if check_images not in (True, False, "exists", "decode", "no"):
        raise DataError(f"check_images must be exists, decode or no (or true or false); got {check_images!r}")
    items = chosen(scan_source(name, path, **options), limit=limit, skip=skip, every=every)
    if check_images not in (False, "no"):
        items = screen_images(items, decode=check_images == "decode")
    examples, bad = collect(items)
    if on_bad == "raise":
        require_none_bad(bad, path)
    elif not examples:
        require_none_bad(bad, path, remedy="no row is left; is it the right source, and the right images_root?")
    elif bad:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons_of(bad).items())
        _log.warning("%s: left out %d of %d rows (%s)", path, len(bad), len(bad) + len(examples), counts)
    return examples
