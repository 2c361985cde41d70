"""`polyground demo`: ask one or several models about images and see their boxes side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyground.app.asking import Panel, Settings, entrants, world_examples
from polyground.app.library import library_of
from polyground.app.server import require_gradio, scratch_folder, serve
from polyground.runs import is_run, noted


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help='a model folder, an adapter\'s folder, a run folder (its base, SFT and RL model), or "tiny" for the embedded base',
    )
    parser.add_argument(
        "--compare", action="append", default=[], metavar="PATH", help="another to answer beside it; may be given several times"
    )
    parser.add_argument("--instruction", default=None, metavar="TEXT", help="appended to the question (default: the run's own)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens per answer, at most (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_page_arguments(parser)


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """What `browse` takes as well."""
    parser.add_argument("--port", type=int, metavar="N", help="on 127.0.0.1 (default: the first free one from 7860)")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser window")


def run(options: argparse.Namespace) -> str:
    """Check what is asked for, then serve the page until it is interrupted; of a run, its rows are a second tab."""
    with opened(options) as page:
        serve(page, port=options.port, opens_browser=not options.no_open, what="polyground demo")
    return ""


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Any]:
    """The page, not served yet; what it writes goes when it is left."""
    found = entrants(options.model, options.compare)
    require_gradio()
    with scratch_folder() as scratch:
        run_folder = Path(options.model)
        library = None
        if is_run(run_folder):
            library = library_of(run_folder, options={}, answers={}, scratch=scratch)
        from polyground.app.page import build

        yield build(
            Panel(found, dtype=options.dtype),
            library,
            examples=world_examples(scratch / "world"),
            settings=Settings(instruction=instruction_for(options), max_tokens=options.max_tokens),
            scratch=scratch,
            first="ask",
        )


def instruction_for(options: argparse.Namespace) -> str:
    """What the models were trained with, unless told otherwise."""
    if options.instruction is not None:
        return str(options.instruction)
    folder = Path(options.model)
    # A merged model lies in the folder of its run.
    return str(next((note for run in (folder, folder.parent) if (note := noted(run, "prompts").get("instruction"))), ""))
