"""The runs of a study, each in a process of its own: peak memory and crashes stay apart. What is finished is passed over."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

import polyground
from polyground.config import Recipe, dump_recipe
from polyground.errors import visible
from polyground.metrics import fixed_letters
from polyground.runs import STAGES
from polyground.stages import aligned, model_identity
from polyground.stages.results.study import Arm, Study, recipe_of
from polyground.storage import MANIFEST, atomic_write_json, atomic_write_text, read_json, read_manifest, read_rows

MADE = "made.json"
"""In a run's folder: by which commits, on which machine it was made, and the recipe it was finished with."""
RECIPE, LOG = "recipe.yaml", "run.log"

INTERRUPTED = 130

Launch = Callable[[Path, Path], int]
"""Runs the recipe in the first file, writes what it says to the second, and returns the exit code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm under one seed."""

    arm: Arm
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """As it is told in lines and tables."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where its recipe puts it."""
        return self.recipe.out

    @property
    def finished(self) -> bool:
        """With this very recipe, its headings and folders aside. A knob that came since leaves a run finished at its default."""
        found = self.made.get("finished")
        return found is not None and agree(found, self.settings, Recipe().to_json())

    @property
    def made(self) -> dict[str, Any]:
        """What the run's file says of commit, machine and time; empty before it has been started."""
        path = self.folder / MADE
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its figures."""
        dumped = self.recipe.model_dump(mode="json", exclude={"name", "out", "reuse", "report"})
        return {**dumped, "model": model_identity(self.recipe)}

    @property
    def hours(self) -> float:
        """Wall time spent in its folder, interruptions left out; what was taken over from another run cost nothing here."""
        path = self.folder / "times.json"
        return sum(row["seconds"] for row in read_json(path).values()) / 3600 if path.is_file() else 0.0

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What was remarked while RL trained: `step`, `kind`, `text`."""
        path = self.folder / "grpo" / "warnings.jsonl"
        return list(read_rows(path)) if path.is_file() else []

    @property
    def letters(self) -> list[list[str]]:
        """Split, model and the letter that the model answers nearly every question by, wherever there is one."""
        path = self.folder / "evaluate" / "results.json"
        return [list(found) for found in fixed_letters(read_json(path)["splits"])] if path.is_file() else []

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each complete stage, wherever it was made: what the run would have cost by itself."""
        return {name: read_manifest(self.folder / name).seconds for name in STAGES if (self.folder / name / MANIFEST).is_file()}


def runs_of(study: Study, *, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """The study's runs in order; of these arms and seeds where some are named."""
    return [
        Run(arm=arm, seed=seed, recipe=recipe_of(study, arm, seed))
        for arm, seed in study.runs()
        if (not only or arm.name in only) and (not seeds or seed in seeds)
    ]


def run_all(runs: Sequence[Run], *, launch: Launch, after: Callable[[], object]) -> list[str]:
    """Every run that is not finished, one after the other; `after` follows each. Returns what is to be said of those that failed.

    A run that fails stops no other. Raises KeyboardInterrupt where a run was interrupted.
    """
    console = Console(stderr=True)
    failed = []
    for number, run in enumerate(runs, start=1):
        finished = run.finished
        console.print(
            f"{number}/{len(runs)} {run.name}: {'finished before' if finished else run.folder}", highlight=False, markup=False
        )
        if finished:
            continue
        code = _run(run, launch)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            failed.append(
                f"{run.name}: ended with code {code} ({last_words(run.folder / LOG)}); all it said is in {run.folder / LOG}"
            )
            console.print(visible(failed[-1]), highlight=False, style="red", markup=False)
            continue
        console.print(f"{run.name}: {run.hours:.2f} hours", highlight=False, markup=False)
        after()
    return failed


def _run(run: Run, launch: Launch) -> int:
    attempts = [*run.made.get("attempts", ()), {"started": _now(), "commit": commit(), "machine": machine()}]
    atomic_write_json(run.folder / MADE, {"attempts": attempts})
    atomic_write_text(run.folder / RECIPE, dump_recipe(run.recipe))
    code = launch(run.folder / RECIPE, run.folder / LOG)
    if code == 0:
        atomic_write_json(run.folder / MADE, {"attempts": attempts, "finished": run.settings, "at": _now()})
    return code


def launch_run(recipe: Path, log: Path) -> int:
    """`polyground run` in a process of its own, which ends when this one does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with log.open("ab") as out:
            words = [sys.executable, "-m", "polyground", "run", str(recipe)]
            process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def agree(before: Any, now: Any, default: Any) -> bool:
    """Whether two settings say the same; what only the later one knows has to be at its default.

    >>> agree({"beta": 0}, {"beta": 0, "gamma": 1}, {"beta": 4, "gamma": 1})
    True
    >>> agree({"beta": 0}, {"beta": 4, "gamma": 1}, {"beta": 4, "gamma": 1})
    False
    """
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return bool(before == now)
    ground = default if isinstance(default, Mapping) else {}
    return all(agree(before[key], now[key], ground.get(key)) if key in before else now[key] == ground.get(key) for key in now)


def last_words(log: Path) -> str:
    """The last line of a log that says something, other than which page says more."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    said = (line.strip() for line in reversed(lines))
    return next((line for line in said if line and not line.startswith("more: ")), "it said nothing")


def plan(study: Study, runs: Sequence[Run]) -> str:
    """What is finished and what is to do, with the hours it took or, by earlier runs, is going to take."""
    rows, total, unknown = [], 0.0, 0
    finished = [run for run in runs_of(study) if run.finished]
    for run in runs:
        own = any(other.arm.name == run.arm.name for other in finished)
        expected = None if run.finished else estimated_hours(run, finished, baseline=study.baseline)
        if not run.finished:
            total += expected or 0.0
            unknown += expected is None
        state = "finished" if run.finished else "begun" if (run.folder / MADE).is_file() else "to do"
        hours = (
            f"{run.hours:.2f}"
            if run.finished
            else "not known"
            if expected is None
            else f"{'about' if own else 'at most'} {expected:.2f}"
        )
        rows.append([run.arm.name, str(run.seed), state, hours, str(run.folder)])
    to_do = sum(not run.finished for run in runs)
    known = "" if unknown == to_do and to_do else f", about {total:.1f} hours by the runs before them"
    more = f" and {unknown} of unknown length" if 0 < unknown < to_do else ""
    table = aligned(["arm", "seed", "state", "hours", "folder"], rows, left=1)
    return (
        f"{table}\n\n{len(runs) - to_do} of {len(runs)} runs are finished; {to_do} to do{known}{more}\ndry run: nothing was done"
    )


def estimated_hours(run: Run, finished: Sequence[Run], *, baseline: str) -> float | None:
    """What is left of a run, by the same arm under other seeds; else by the baseline, which shares less and so takes longer."""
    for arm in (run.arm.name, baseline):
        others = [other for other in finished if other.arm.name == arm]
        if others:
            return max(0.0, sum(other.hours for other in others) / len(others) - run.hours)
    return None


def commit() -> str | None:
    """The commit of the program, with `+` where its files or the recipes differ from it; None outside a checkout."""
    package = Path(polyground.__file__).parent
    if not _git(package, "ls-files", "__init__.py"):
        return None
    changed = _git(package, "status", "--porcelain", "--", ":/src", ":/recipes")
    return f"{_git(package, 'rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603, S607 - git
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> str:
    """The machine in words, without its name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = next(_lines("/proc/cpuinfo", r"model name\s*:\s*(.+)"), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    information = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpus = [model for file in information for model in _lines(str(file), r"Model:\s*(.+)")]
    versions = ", ".join(f"{name} {version}" for name in ("torch", "transformers", "peft") if (version := _version(name)))
    return (
        f"{cores} {'core' if cores == 1 else 'cores'} ({processor}), {memory:.0f} GiB, {' and '.join(gpus) or 'no GPU'}; "
        f"Python {platform.python_version()}, {versions}"
    )


def _lines(path: str, pattern: str) -> Iterator[str]:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from (found.strip() for found in re.findall(pattern, text))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
