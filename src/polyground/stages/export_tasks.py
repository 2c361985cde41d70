"""Write a benchmark as a task of lmms-eval: its rows, a YAML file, and a utils.py that calls this package.

Rows and images are named by absolute path: the folder belongs to the machine it was written on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from polyground import __version__
from polyground.answer import NATIVE_READERS
from polyground.benchmarks import BENCHMARKS, read_annotation
from polyground.conventions import GRIDS, load_convention, model_folder
from polyground.errors import StorageError, UsageError
from polyground.lmms_eval import LAYOUT, ROWS, SETTINGS, rows_of, settings_of, task_yaml, utils_py
from polyground.prompts import INSTRUCTIONS
from polyground.sources import options_of
from polyground.stages import source_options
from polyground.storage import atomic_write_json, atomic_write_rows, atomic_write_text


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `polyground export ANNOTATION --to lmms-eval` takes."""
    parser.add_argument("annotation", metavar="ANNOTATION", type=Path, help="the benchmark's own file")
    parser.add_argument("--to", required=True, choices=LAYOUT)
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the task's folder")
    grids = parser.add_mutually_exclusive_group(required=True)
    grids.add_argument("--grid", choices=list(GRIDS), help="how the model asked writes boxes")
    grids.add_argument(
        "--model", type=Path, metavar="FOLDER", help="instead: the family's own grid and form, from its small files"
    )
    parser.add_argument("--max-pixels", type=int, help="pixels one image has, where --model writes boxes in pixels")
    parser.add_argument("--max-pixels-total", type=int, help="pixels the images of a prompt share")
    parser.add_argument(
        "--native", choices=["none", *NATIVE_READERS], help="form of boxes without answer tags; default any, or the family's"
    )
    parser.add_argument(
        "--instruction",
        choices=["none", *INSTRUCTIONS],
        default="reasoned",
        help="what follows a question; none for a model trained here without one (default: reasoned)",
    )
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a reply")
    parser.add_argument("--images-root", help="folder the image names start from")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the benchmark's reader; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier export")


def run(options: argparse.Namespace) -> str:
    """Write the folder and say how to use it."""
    out = options.out.absolute()
    if (out / SETTINGS).exists() and not options.force:
        raise StorageError(f"{options.out}: holds a task already; choose another folder, or add --force to replace it")
    if options.images_root is not None and "images_root" not in options_of(options.benchmark):
        raise UsageError(f"{options.benchmark} has no --images-root; leave it out")
    if options.model is None and (options.max_pixels or options.max_pixels_total):
        raise UsageError("--max-pixels and --max-pixels-total go with --model: they decide the pixels it counts")
    annotation = read_annotation(
        options.benchmark,
        options.annotation.absolute(),
        check_images="exists",
        **{"images_root": options.images_root, **source_options(options.benchmark, options.option)},
    )
    native = options.native or "any"
    if options.model is not None:
        convention = load_convention(options.model, max_pixels=options.max_pixels, max_pixels_total=options.max_pixels_total)
        native = options.native or convention.native or "none"
    answers = {
        "grid": options.grid,
        "model": None if options.model is None else str(model_folder(options.model).absolute()),
        "max_pixels": options.max_pixels,
        "max_pixels_total": options.max_pixels_total,
        "native": None if native == "none" else native,
    }
    settings = settings_of(annotation, answers=answers, instruction=options.instruction)
    about = {
        "polyground": __version__,
        **annotation.tags(),
        "instruction": options.instruction,
        "grid": options.grid or "family's",
    }
    benchmark = annotation.benchmark
    atomic_write_rows(out / ROWS, rows_of(annotation))
    atomic_write_text(out / "utils.py", utils_py(benchmark))
    atomic_write_text(
        out / f"polyground_{benchmark.name}.yaml",
        task_yaml(benchmark, out / ROWS, max_tokens=options.max_tokens, about=json.loads(json.dumps(about))),
    )
    atomic_write_json(out / SETTINGS, settings)
    wrong = f" and {len(annotation.wrong)} that count as wrong" if annotation.wrong else ""
    return (
        f"export: wrote {options.out}: {len(annotation.examples):,} questions of {benchmark.title}{wrong}\n"
        f"ask them  lmms-eval --include_path {options.out} --tasks polyground_{benchmark.name} --batch_size 1 --model MODEL"
    )
