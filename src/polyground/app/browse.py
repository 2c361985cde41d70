"""`polyground browse`: look through a run or a data set row by row, mark rows and take them away."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from polyground.app.demo import add_page_arguments
from polyground.app.library import library_of
from polyground.app.server import require_gradio, scratch_folder, serve
from polyground.errors import UsageError
from polyground.sources import SOURCES
from polyground.stages import source_options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN_OR_DATASET", help="a run folder, the recipe of a run, or an annotation file")
    parser.add_argument("--source", default="", metavar="FORMAT", help=f"format of a data set: {', '.join(sorted(SOURCES))}")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the source, as in images_root=photos"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="another run, whose answers to the same splits are shown beside; may be given several times",
    )
    parser.add_argument(
        "--answers",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="answers of a further model or checkpoint, in a file that `evaluate` wrote; may be given several times",
    )
    parser.add_argument("--iou", type=float, metavar="N", help="from which an answer is right (default: the run's, else 0.5)")
    add_page_arguments(parser)


def run(options: argparse.Namespace) -> str:
    """Check what is asked for, then serve the page until it is interrupted."""
    if options.iou is not None and not 0 < options.iou <= 1:
        raise UsageError(f"--iou {options.iou}: lies above 0 and at most at 1")
    if options.source and options.source not in SOURCES:
        raise UsageError(f"--source {options.source}: unknown format; known: {', '.join(sorted(SOURCES))}")
    with scratch_folder() as scratch:
        library = library_of(
            Path(options.path),
            source=options.source,
            options=source_options(options.source or "polyground", options.option),
            answers=named_files(options.answers),
            compare=options.compare,
            threshold=options.iou,
            scratch=scratch,
        )
        library.shelf(library.names[0])  # what is wrong with the data is said here, not on the page
        require_gradio()
        from polyground.app.asking import Settings
        from polyground.app.page import build

        page = build(None, library, examples=[], settings=Settings(), scratch=scratch, first="browse")
        serve(page, port=options.port, opens_browser=not options.no_open, what=f"polyground browse {library.title}")
    return ""


def named_files(words: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` words as files by name. Raises ConfigError for a word that is none, or a file that is not there."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--answers {word}: write it as NAME=FILE, as in step60=evaluate/rl/test.jsonl")
        if name in found or name in ("truth", "asked"):
            raise UsageError(f"--answers {word}: the name {name!r} is taken; give another")
        if not Path(file).is_file():
            raise UsageError(f"--answers {word}: there is no file {file}")
        found[name] = Path(file)
    return found
