"""`polyground results STUDY`: a recipe over seeds and arms, and the tables that say what each stage buys.

Runs are ordinary runs. After each of them NAME.json, NAME.md and NAME.png are written anew from all that are finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from polyground.errors import ConfigError, StorageError
from polyground.stages.results.running import Launch, launch_run, plan, run_all, runs_of
from polyground.stages.results.study import Study, load_study
from polyground.stages.results.tables import gather, verdict_lines, written
from polyground.storage import atomic_write_json, atomic_write_text


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the tool takes."""
    parser.add_argument("study", type=Path, help="recipes/results.yaml, recipes/ablations.yaml, or one of your own")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="run these arms; tables hold all that are finished")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="run these of the study's seeds")
    parser.add_argument("--dry-run", action="store_true", help="say what is finished, what is to do, and how long it may take")
    parser.add_argument("--tables-only", action="store_true", help="write the tables of what is finished and run nothing")


def run(options: argparse.Namespace, *, launch: Launch = launch_run) -> str:
    """Run what is not finished, write the tables, and say whether the aims are met."""
    study = load_study(options.study)
    _require_known(study, options)
    chosen = runs_of(study, only=options.only, seeds=options.seeds)
    if options.dry_run:
        return plan(study, chosen)
    failed: list[str] = []
    results: dict[str, Any] = {}

    def tables() -> None:
        results.update(write_tables(study, options.study))

    if not options.tables_only:
        failed = run_all(chosen, launch=launch, after=tables)
    if not results:
        tables()
    if failed:
        raise StorageError("\n".join([f"{len(failed)} of {len(chosen)} runs failed; the same command tries them again", *failed]))
    return "\n".join([*verdict_lines(results), f"results: wrote {study.docs / study.name}.json, .md and .png"])


def write_tables(study: Study, path: Path) -> dict[str, Any]:
    """NAME.json, NAME.md and NAME.png of every run that is finished, whatever was asked to run."""
    from polyground.stages.results.drawing import draw

    results = gather(study, command=f"polyground results {path}")
    # Six decimals are more than any of the figures has, and half the bytes.
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 6))
    atomic_write_json(study.docs / f"{study.name}.json", rounded)
    atomic_write_text(study.docs / f"{study.name}.md", written(results))
    draw(results, study.docs / f"{study.name}.png")
    return results


def _require_known(study: Study, options: argparse.Namespace) -> None:
    names = [arm.name for arm in study.arms]
    if strange := [name for name in options.only if name not in names]:
        raise ConfigError(f"--only {strange[0]}: no such arm in {options.study}; its arms: {', '.join(names)}")
    known = sorted({seed for _, seed in study.runs()})
    if odd := [seed for seed in options.seeds if seed not in known]:
        raise ConfigError(f"--seeds {odd[0]}: {options.study} has the seeds {', '.join(map(str, known))}; add it there")
