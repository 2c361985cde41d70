"""Faults injected into a toy run, and whether it ends like a calm one: rows, tables and weights equal, nothing paid twice.

    python benchmarks/reliability.py --out docs/reliability.json [--kills 6] [--outage 60] [--only kill-time disk …]

Each attempt is a process of its own, forked from this one so that libraries are loaded once, and runs the command line. A
fault is survived when the same command, run again, ends with code 0 and leaves what the calm run left; times and dates aside.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from polyground import __version__
from polyground.cli import REFUSED
from polyground.cli import main as polyground
from polyground.errors import DataError
from polyground.storage import MANIFEST, read_json, read_rows

ROOT = Path(__file__).resolve().parents[1]

STAGES = ("world", "synthesize", "sft", "merge", "reject", "grpo", "merge", "evaluate", "report")
"""As `polyground run` does them."""

PATIENCE = 600.0
"""Seconds until an attempt counts as hung."""

VARIETY = '''
def variety(reading, example, completion):
    """Share of different characters: a random model is never right, and RL needs rewards that differ."""
    return len(set(completion.text)) / max(1, len(completion.text))
'''

TEXT = '<think>Image 1 shows it quite well.</think><answer>[{"image": 1, "bbox_2d": [0, 0, 1000, 1000]}]</answer>'
"""What the served teacher says; right, at a threshold near 0, wherever the target lies on image 1."""

LORA = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lora_r": 2, "lora_alpha": 4, "logging_steps": 1}
LORA |= {"save_steps": 1, "save_total_limit": 2, "report_to": []}


def recipe_tree(out: Path, model: Path, reward: Path) -> dict[str, Any]:
    """Five steps of SFT are one pass and a half over ten rows: some checkpoints lie at the end of a pass."""
    return {
        "name": "toy",
        "out": str(out),
        "model": {"path": str(model)},
        "prompts": {"instruction": ""},
        "world": {"train": 10, "rl": 4, "validation": 0, "test": 4, "ood": 1, "perception": 0},
        "rewards": [{"name": "iou", "weight": 0.5}, {"name": f"{reward}:variety", "weight": 0.5}],
        "sft": {**LORA, "max_steps": 6},
        "reject": {"num_generations": 2, "max_completion_length": 8, "min_pass_rate": None, "max_pass_rate": None, "batch": 1},
        "grpo": {**LORA, "max_steps": 4, "num_generations": 2, "max_completion_length": 8, "beta": 0.0},
        "evaluate": {"max_completion_length": 8, "batch_size": 1, "bootstrap": 20},
        "report": {"gallery_size": 1},
    }


# ---------------------------------------------------------------- attempts


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended."""

    code: int | None
    """None where a signal ended it."""
    said: str

    @property
    def killed(self) -> bool:
        return self.code is None

    @property
    def refused_clearly(self) -> bool:
        """One message for a person, and no traceback."""
        return self.code == REFUSED and "polyground: " in self.said and "Traceback" not in self.said


def start(words: Sequence[str], log: Path, *, before: Callable[[], None] | None = None) -> int:
    """Fork a process that runs the command line; its output goes to `log`. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if before is not None:
            before()
        code = polyground(list(words))
    except BaseException:  # noqa: BLE001 - the child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, log: Path, *, kill_after: float | None = None) -> Ended:
    """The end of a process, brought about by SIGKILL after so many of its own seconds on a core where they are given."""
    since = time.monotonic()
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code if code >= 0 else None, log.read_text(errors="replace"))
        if time.monotonic() - since > PATIENCE or (kill_after is not None and busy_seconds(process) > kill_after):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def busy_seconds(process: int) -> float:
    """What a process has had of a core, to the nanosecond: other work on the machine does not lengthen it."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    try:
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    except (OSError, IndexError):
        return 0.0


class FileOperations:
    """Counts what a process does to files under a folder, and kills it just before the one of a given number."""

    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.utime", "shutil.copyfile")

    def __init__(self, folder: Path, *, kill_before: int | None = None, tell: Path | None = None) -> None:
        self.folder = str(folder)
        self.kill_before = kill_before
        self.tell = tell
        self.count = 0

    def __call__(self) -> None:
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in self.CHANGES:
            path = arguments[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else path
        if not isinstance(path, str) or not path.startswith(self.folder):
            return
        self.count += 1
        if self.tell is not None:
            descriptor = os.open(self.tell, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.write(descriptor, str(self.count).encode())
            os.close(descriptor)
        if self.count == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- what must be equal


_TIMES = {"seconds", "finished", "files", "peak_bytes", "tries", "failed_tries", "reused", "prefix_attention"}
"""Keys that say when, how long, by how many tries, and how long the first row of the last attempt was."""
_IGNORED = ("times.json", "state.json", ".lock", "README.md", "events.out")


def differences(calm: Path, found: Path) -> list[str]:
    """What two runs of one recipe differ in, times and dates aside. Checkpoints and the answers of servers are on the way."""
    ours, theirs = (dict(_results(folder)) for folder in (calm, found))
    told = [f"only in one: {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = _content(ours[name]), _content_or_none(theirs[name])
        if one != other:
            keys = sorted(_differing(one, other))[:3] if isinstance(one, dict) else []
            told.append(f"differs: {name}" + (f" ({', '.join(keys)})" if keys else ""))
    return told


def _differing(one: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the values that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differing(one.get(key), other.get(key), f"{prefix}{key}.")
    elif one != other:
        yield f"{prefix[:-1]} = {one!r:.60} and {other!r:.60}"


def _results(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        on_the_way = any(part.startswith("checkpoint-") for part in name.parts) or name.parts[0] == "answers"
        if (
            path.is_file()
            and not on_the_way
            and not any(path.name.startswith(word) or path.name.endswith(word) for word in _IGNORED)
        ):
            yield str(name), path


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        # The trainer's last line is about its own time, and a mean since it was last resumed.
        return [_timeless(row) for row in read_rows(path) if "train_runtime" not in row]
    if path.suffix == ".json":
        return _timeless(read_json(path))
    if path.suffix == ".html":
        text = path.read_text(encoding="utf-8")
        return re.sub(r"<h3>Wall time</h3>.*?</table>|[0-9.]+ (?:s|min)\b|evaluated <b>[^<]*", "", text, flags=re.DOTALL)
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def half_files(run: Path) -> list[str]:
    """Files that stand for something whole and are not: JSON anywhere, rows and weights in folders that have their manifest."""
    bad = []
    for path in sorted(run.rglob("*.json")):
        if not any(part.startswith(("checkpoint-", ".")) or part.endswith(".partial") for part in path.relative_to(run).parts):
            whole = any((parent / MANIFEST).is_file() for parent in path.parents) or path.name in ("state.json", "results.json")
            try:
                read_json(path)
            except DataError as error:
                bad += [str(error)] if whole else []
    for manifest in sorted(run.rglob(MANIFEST)):
        for path in sorted(manifest.parent.rglob("*")):
            if "checkpoint-" in str(path):
                continue
            try:
                if path.suffix == ".jsonl":
                    list(read_rows(path))
                elif path.suffix == ".safetensors":
                    with safe_open(path, framework="numpy") as file:
                        list(file.keys())
            except (DataError, SafetensorError) as error:
                bad.append(f"{path}: {error}")
    return bad


# ---------------------------------------------------------------- the harness


@dataclass
class Row:
    """One line of the table."""

    fault: str
    where: str
    injected: int = 0
    survived: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "notes": dict(self.notes), "failures": self.failures[:5]}


class Harness:
    """A calm run first, with a copy of its folder before each stage; then the faults, each from such a copy."""

    def __init__(self, work: Path, *, kills: int, outage: float, seed: int) -> None:
        self.work = work
        self.kills, self.outage = kills, outage
        self.rng = random.Random(seed)
        self.run = work / "run"
        self.log = work / "log.txt"
        self.rows: list[Row] = []
        self.seconds: dict[int, float] = {}
        self.operations: dict[int, int] = {}
        self.recipe = self._write_recipe()

    def _write_recipe(self) -> Path:
        sys.path.insert(0, str(ROOT / "tests"))
        from toys import write_toy

        self.work.mkdir(parents=True, exist_ok=True)
        if not (self.work / "model").is_dir():
            write_toy(self.work / "model")
        (self.work / "variety.py").write_text(VARIETY)
        tree = recipe_tree(self.run, self.work / "model", self.work / "variety.py")
        path = self.work / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def words(self, verb: str, *more: str) -> list[str]:
        return [verb, str(self.recipe), *more]

    def attempt(
        self, words: Sequence[str], *, before: Callable[[], None] | None = None, kill_after: float | None = None
    ) -> Ended:
        return wait(start(words, self.log, before=before), self.log, kill_after=kill_after)

    def stage_before(self, position: int) -> None:
        """Put the run's folder back to what it was before a stage of the calm run."""
        _empty(self.run)
        shutil.copytree(self.calm(position), self.run, dirs_exist_ok=True)

    def calm(self, position: int) -> Path:
        """The calm run before its stage of this position."""
        return self.work / f"calm-{position}"

    def go_calm(self) -> None:
        """The undisturbed run, unless an earlier call has left one in the folder to work in."""
        known = self.work / "calm.json"
        if known.is_file():
            seconds, operations = read_json(known)
            self.seconds, self.operations = dict(enumerate(seconds)), dict(enumerate(operations))
            return
        for position, verb in enumerate(STAGES):
            shutil.copytree(self.run, self.calm(position)) if self.run.exists() else self.calm(position).mkdir()
            since = time.monotonic()
            counted = self.work / "count.txt"
            used = _children_seconds()
            ended = self.attempt(self.words(verb), before=FileOperations(self.run, tell=counted))
            if ended.code != 0:
                raise SystemExit(f"the calm run failed at {verb}:\n{ended.said}")
            self.seconds[position] = _children_seconds() - used
            self.operations[position] = int(counted.read_text())
            took = f"{self.seconds[position]:.1f} s of a core in {time.monotonic() - since:.1f} s"
            say(f"calm {verb}: {took}, {self.operations[position]} file operations")
        shutil.copytree(self.run, self.calm(len(STAGES)))
        known.write_text(json.dumps([list(self.seconds.values()), list(self.operations.values())]))

    def end_calmly(self, row: Row, position: int, faults: int) -> None:
        """The same command without a fault."""
        self.compare(row, faults, self.calm(position + 1), [self.attempt(self.words(STAGES[position]))])

    def compare(self, row: Row, faults: int, calm: Path, last: Sequence[Ended]) -> None:
        """The faults are survived when the last attempt, each process of it, ended well and left what the calm run left."""
        problems = [f"ended with {ended.code}: {ended.said[-600:]}" for ended in last if ended.code != 0]
        self.judge(row, faults, problems or differences(calm, self.run))

    def judge(self, row: Row, faults: int, problems: Sequence[str]) -> None:
        row.injected += faults
        if problems:
            row.failures += [*problems[:3]]
            say(f"  NOT SURVIVED ({row.fault}, {row.where}): {problems[:3]}")
        else:
            row.survived += faults

    def row(self, fault: str, where: str) -> Row:
        self.rows.append(Row(fault, where))
        return self.rows[-1]

    def named(self, position: int) -> str:
        """The stage, told apart where it stands twice."""
        second = STAGES.index(STAGES[position]) != position
        return f"{STAGES[position]} (second)" if second else STAGES[position]

    # ---- faults

    def kill_in_time(self) -> None:
        """SIGKILL at random moments."""
        for position, verb in enumerate(STAGES):
            row = self.row("SIGKILL at a random moment", self.named(position))
            killed = [
                partial(self._alone, verb, kill_after=moment) for moment in self._moments(self.seconds[position], self.kills)
            ]
            self._kill(row, position, killed, partial(self._alone, verb), self.calm(position + 1))

    def kill_in_files(self) -> None:
        """SIGKILL just before a write, a rename, a deletion."""
        for position, verb in enumerate(STAGES):
            row = self.row("SIGKILL before a file operation", self.named(position))
            numbers = [max(1, int(number)) for number in self._moments(self.operations[position], self.kills)]
            killed = [partial(self._alone, verb, before=FileOperations(self.run, kill_before=number)) for number in numbers]
            self._kill(row, position, killed, partial(self._alone, verb), self.calm(position + 1))

    def kill_one_of_two(self) -> None:
        """One of the two processes of a stage killed at random moments."""
        for verb in ("synthesize", "sft", "reject", "grpo", "evaluate"):
            position = STAGES.index(verb)
            row = self.row("one of two processes killed", verb)
            self.stage_before(position)
            used = _children_seconds()
            if bad := [ended.said for ended in self.in_two(verb) if ended.code != 0]:
                raise SystemExit(f"the calm run in two processes failed at {verb}:\n{bad[0]}")
            moments = self._moments((_children_seconds() - used) / 2, max(1, self.kills // 2))
            calm = self.work / f"calm-two-{verb}"
            shutil.copytree(self.run, calm, dirs_exist_ok=True)
            killed = [partial(self.in_two, verb, victim=self.rng.randrange(2), kill_after=moment) for moment in moments]
            self._kill(row, position, killed, partial(self.in_two, verb), calm)

    def _moments(self, total: float, number: int) -> list[float]:
        """Random shares of a whole, earlier and earlier: what a folder has already got done is not done again."""
        return [self.rng.uniform(0.05, 0.9) * total * 0.75**power for power in range(number)]

    def _alone(self, verb: str, **how: Any) -> list[Ended]:
        return [self.attempt(self.words(verb), **how)]

    def _kill(
        self,
        row: Row,
        position: int,
        killed: Sequence[Callable[[], list[Ended]]],
        calmly: Callable[[], list[Ended]],
        calm: Path,
    ) -> None:
        """Attempt after attempt on one folder, put back where the stage was over before its kill; and one to the end."""
        self.stage_before(position)
        hit, halves = 0, []
        for attempt in killed:
            over = not attempt()[0].killed
            hit += not over
            halves += half_files(self.run)
            if over:
                self.stage_before(position)
        row.notes["the stage was over before"] += len(killed) - hit
        if halves:
            self.judge(row, hit, [f"taken for whole: {halves[0]}"])
        else:
            self.compare(row, hit, calm, calmly())
        say(f"{row.fault}, {row.where}: {row.survived} of {row.injected}")

    def in_two(self, verb: str, *, victim: int = 0, kill_after: float | None = None) -> list[Ended]:
        """A stage in two processes, the end of the victim first; where it is killed the other is ended too, as launchers do."""
        port = _free_port()
        logs = [self.work / f"log-{rank}.txt" for rank in range(2)]
        processes = [start(self.words(verb), log, before=_as_rank(rank, port)) for rank, log in enumerate(logs)]
        first = wait(processes[victim], logs[victim], kill_after=kill_after)
        if first.killed:
            os.kill(processes[1 - victim], signal.SIGTERM)
        return [first, wait(processes[1 - victim], logs[1 - victim])]

    def fill_the_disk(self) -> None:
        """A whole run on a disk of a few blocks, which is made larger each time that it was full."""
        # Twelve times a little more, until there is room for all.
        size = step = sum(path.stat().st_size + 4096 for path in self.calm(len(STAGES)).rglob("*")) // 12
        mounted = self._mount(size)
        row = self.row("disk full" if mounted else "no file may grow further (RLIMIT_FSIZE)", "the whole run")
        try:
            faults, problems = 0, []
            while faults < 60:
                limit = None if mounted else _limit(size)
                ended = self.attempt(self.words("run"), before=limit)
                if ended.code == 0:
                    break
                faults += 1
                where = re.findall(r"^.*\[?\d/9\]? ?(\w+)", ended.said, re.MULTILINE)
                row.notes[where[-1] if where else "?"] += 1
                if not ended.refused_clearly:
                    problems.append(f"not said clearly: {ended.said[-500:]}")
                problems += [f"taken for whole: {half}" for half in half_files(self.run)]
                size += step
                if mounted:
                    _command("mount", "-o", f"remount,size={size}", str(self.run))
            if ended.code != 0:
                problems.append(f"did not end: {ended.said[-500:]}")
            problems += differences(self.calm(len(STAGES)), self.run) if not problems else []
            self.judge(row, faults, problems)
        finally:
            if mounted:
                _command("umount", str(self.run))
        say(f"{row.fault}: {row.survived} of {row.injected} {dict(row.notes)}")

    def _mount(self, size: int) -> bool:
        _empty(self.run)
        self.run.mkdir(exist_ok=True)
        return _command("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(self.run))

    def truncate_unfinished(self) -> None:
        """The last line of every row file of a stage that was killed, cut in the middle."""
        for position, verb in enumerate(STAGES):
            row = self.row("last line of every unfinished file cut in half", self.named(position))
            for _ in range(max(1, self.kills // 3)):
                self.stage_before(position)
                before = set(self.run.rglob("*.jsonl"))
                total = self.operations[position]
                killer = FileOperations(self.run, kill_before=self.rng.randint(max(1, total // 3), total))
                self.attempt(self.words(verb), before=killer)
                cut = [path for path in self.run.rglob("*.jsonl") if path not in before and "checkpoint-" not in str(path)]
                whole = {manifest.parent for manifest in self.run.rglob(MANIFEST)}
                cut = [path for path in cut if not whole & set(path.parents) and _cut_last_line(path, self.rng)]
                if cut:
                    self.end_calmly(row, position, len(cut))
            if not row.injected:
                self.rows.remove(row)
            else:
                say(f"{row.fault}, {row.where}: {row.survived} of {row.injected}")

    def truncate_finished(self) -> None:
        """The end of every file of a finished stage gone, one at a time: whoever reads it next says so, or needs it not."""
        last = len(STAGES)
        for kind in ("half of the last line", "the whole last line"):
            row = self.row(f"finished file without {kind}", "every stage")
            whole = self.calm(last)
            names = [name for name, _ in _results(whole) if name.endswith((".jsonl", ".json", ".safetensors"))]
            names = sorted(self.rng.sample(names, min(len(names), 3 * self.kills)))
            for name in names:
                self.stage_before(last)
                path = self.run / name
                if not _shorten(path, half=kind.startswith("half")):
                    continue
                # Everything behind the damaged file is to be made again.
                stage = path.relative_to(self.run).parts[0]
                for later in _LATER.get(stage, ()):
                    _empty(self.run / later)
                    (self.run / later).rmdir() if (self.run / later).is_dir() else None
                ended = self.attempt(self.words("run"))
                if ended.refused_clearly:
                    row.notes["refused, naming the file" if path.name in ended.said else "refused"] += 1
                    self.judge(row, 1, [])
                elif ended.code == 0:
                    told = differences(whole, self.run)
                    made_again = path.is_file() and _content_or_none(path) == _content_or_none(whole / name)
                    row.notes["made again" if made_again else "not needed any more"] += 1
                    self.judge(
                        row, 1, [] if all(line.startswith(f"differs: {name}") for line in told) else [f"{name}: {told[:3]}"]
                    )
                else:
                    self.judge(row, 1, [f"{name}: {ended.said[-500:]}"])
            say(f"{row.fault}: {row.survived} of {row.injected} {dict(row.notes)}")

    def corrupt_checkpoints(self) -> None:
        """Each file of the newest checkpoint damaged in turn: cut, or a byte of it turned over."""
        for verb in ("sft", "grpo"):
            position = STAGES.index(verb)
            row = self.row("newest checkpoint damaged", verb)
            self.stage_before(position)
            steps = {"sft": 4, "grpo": 3}[verb]
            process = start(self.words(verb), self.log)
            newest = self.run / verb / f"checkpoint-{steps}"
            while not (newest / "whole.json").exists() and os.waitpid(process, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            saved = self.work / "with-checkpoint"
            _empty(saved)
            shutil.copytree(self.run, saved, dirs_exist_ok=True)
            for name in sorted(path.name for path in newest.iterdir() if path.is_file()):
                for way in ("cut", "turned"):
                    _empty(self.run)
                    shutil.copytree(saved, self.run, dirs_exist_ok=True)
                    _damage(newest / name, way, self.rng)
                    self.end_calmly(row, position, 1)
                    row.notes["passed over, and said"] += "is damaged" in self.log.read_text(errors="replace")
            say(f"{row.fault}, {row.where}: {row.survived} of {row.injected} {dict(row.notes)}")

    def move_the_clock(self) -> None:
        """Killed, then gone on with under a clock that was put back or forward, files keeping their dates."""
        for verb in ("synthesize", "sft", "reject", "grpo", "evaluate"):
            position = STAGES.index(verb)
            row = self.row("clock moved between two attempts, and while one runs", verb)
            for days in (-400.0, 400.0):
                self.stage_before(position)
                total = self.operations[position]
                self.attempt(
                    self.words(verb), before=FileOperations(self.run, kill_before=self.rng.randint(total // 3, total - 1))
                )
                _date_all(self.run, days=-days)
                # And a kill under the moved clock, so that what it wrote is gone on from.
                both = _all_of(_clock(days), FileOperations(self.run, kill_before=self.rng.randint(total // 4, total // 2)))
                self.attempt(self.words(verb), before=both)
                last = self._alone(verb, before=_clock(days, jump=-2 * days))
                self.compare(row, 1, self.calm(position + 1), last)
            say(f"{row.fault}, {row.where}: {row.survived} of {row.injected}")

    def run_twice(self) -> None:
        """A second process with the same command while the first is at work: it is refused, and disturbs nothing."""
        for position, verb in enumerate(STAGES):
            if verb == "report":
                continue  # one atomic write
            row = self.row("second process on the same folder", self.named(position))
            for _ in range(max(1, self.kills // 2)):
                self.stage_before(position)
                first = start(self.words(verb), self.log)
                lock = self._wait_for_lock(first)
                other = self.work / "second.txt"
                second = wait(start(self.words(verb), other), other)
                ended = wait(first, self.log)
                if not lock or second.code == 0:
                    row.notes["the first was over before"] += 1
                    continue
                problems = [] if "another process is running" in second.said and second.refused_clearly else [second.said[-500:]]
                problems += [] if ended.code == 0 else [ended.said[-500:]]
                self.judge(row, 1, problems or differences(self.calm(position + 1), self.run))
            say(f"{row.fault}, {row.where}: {row.survived} of {row.injected} {dict(row.notes)}")

    def _wait_for_lock(self, process: int) -> bool:
        """Whether the process came to hold a lock before it ended."""
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if any(_is_held(path) for path in [*self.run.glob("**/.lock"), *self.run.glob(".*.lock")]):
                return True
            time.sleep(0.002)
        return False

    def lose_the_endpoint(self) -> None:
        """A served teacher: the client killed at random moments, and the server itself for a minute."""
        for fault in ("client killed", "server killed"):
            for _ in range(max(1, self.kills // 3)):
                self._endpoint_trial(fault)

    def _endpoint_trial(self, fault: str) -> None:
        paid = self.work / "paid.jsonl"
        paid.unlink(missing_ok=True)
        port = _free_port()
        position = STAGES.index("synthesize")
        more = ["--synthesize.teacher=endpoint", f"--synthesize.teacher_base_url=http://127.0.0.1:{port}/v1"]
        more += ["--synthesize.teacher_model=m", "--synthesize.pass_iou=1e-6", "--synthesize.samples_per_example=3"]
        more += ["--synthesize.endpoint={concurrency: 2, timeout: 20, outage: 600}"]
        words = self.words("synthesize", *more)
        where = "synthesize, served teacher"
        label = "SIGKILL at a random moment" if fault == "client killed" else f"server killed for {self.outage:g} s"
        row = next((known for known in self.rows if (known.fault, known.where) == (label, where)), None) or self.row(label, where)
        calm = self.work / "calm-endpoint"
        server = _Server(port, paid)
        try:
            if not calm.exists():
                self.stage_before(position)
                used = _children_seconds()
                ended = self.attempt(words)
                if ended.code != 0:
                    raise SystemExit(f"the calm run with a served teacher failed:\n{ended.said}")
                (self.work / "calm-endpoint.json").write_text(json.dumps(_children_seconds() - used))
                shutil.copytree(self.run, calm)
                paid.unlink(missing_ok=True)
                server.restart()
            self.stage_before(position)
            faults, asked_again = 0, 0
            if fault == "client killed":
                for _ in range(3):
                    kept = _kept_requests(self.run)
                    before = _paid(paid)
                    longest = float(read_json(self.work / "calm-endpoint.json"))
                    ended = self.attempt(words, kill_after=self.rng.uniform(0.2, 0.8) * longest)
                    faults += ended.killed
                    asked_again += len(kept & set(_paid(paid)[len(before) :]))
                kept, before = _kept_requests(self.run), _paid(paid)
                ended = self.attempt(words)
                asked_again += len(kept & set(_paid(paid)[len(before) :]))
            else:
                process = start(words, self.log)
                while len(_paid(paid)) < 3:
                    time.sleep(0.005)
                server.kill()
                faults = 1
                time.sleep(self.outage)
                server.restart()
                ended = wait(process, self.log)
            problems = [] if ended.code == 0 else [ended.said[-500:]]
            problems += [f"{asked_again} kept answers were asked for again"] if asked_again else []
            problems += differences(calm, self.run) if not problems else []
            twice = sum(times - 1 for times in Counter(_paid(paid)).values())
            row.notes["answers that were under way and lost"] += twice
            row.notes["kept answers paid twice"] += asked_again
            self.judge(row, faults, problems)
        finally:
            server.kill()
        say(f"{row.fault}, {row.where}: {row.survived} of {row.injected} {dict(row.notes)}")


_LATER = {
    "world": ("synthesize",),
    "synthesize": ("sft",),
    "sft": ("sft-merged",),
    "sft-merged": ("reject",),
    "reject": ("grpo",),
    "grpo": ("grpo-merged",),
    "grpo-merged": ("evaluate/rl",),
}
"""By folder, what is made from it next."""

FAULTS: dict[str, Callable[[Harness], None]] = {
    "kill-time": Harness.kill_in_time,
    "kill-files": Harness.kill_in_files,
    "kill-one": Harness.kill_one_of_two,
    "disk": Harness.fill_the_disk,
    "unfinished": Harness.truncate_unfinished,
    "finished": Harness.truncate_finished,
    "checkpoint": Harness.corrupt_checkpoints,
    "twice": Harness.run_twice,
    "clock": Harness.move_the_clock,
    "endpoint": Harness.lose_the_endpoint,
}


# ---------------------------------------------------------------- small things


def _children_seconds() -> float:
    """Of a core, used by attempts that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def _empty(folder: Path) -> None:
    """Everything in a folder gone; the folder may be a mount."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _command(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _all_of(*parts: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        for part in parts:
            part()

    return both


def _as_rank(rank: int, port: int) -> Callable[[], None]:
    """What a launcher tells one of two processes, which forgets that this one was alone."""

    def put() -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in told.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    return put


def _clock(days: float, *, jump: float = 0.0) -> Callable[[], None]:
    """The wall clock of this process put elsewhere, and put somewhere else again after some twenty looks at it."""

    def put() -> None:
        true, looks = time.time, 0

        def moved() -> float:
            nonlocal looks
            looks += 1
            return true() + 86400 * (days + (jump if looks > 20 else 0.0))

        time.time = moved

    return put


def _date_all(folder: Path, *, days: float) -> None:
    """As if every file had been written so many days later."""
    for path in folder.rglob("*"):
        stamp = path.stat().st_mtime + 86400 * days
        os.utime(path, (stamp, stamp))


def _cut_last_line(path: Path, rng: random.Random) -> bool:
    """Leave a part of the last line, without its end; False where there is no line."""
    content = path.read_bytes()
    if not content.endswith(b"\n") or len(content) < 3:
        return False
    start_of_line = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: rng.randint(start_of_line + 1, len(content) - 2)])
    return True


def _shorten(path: Path, *, half: bool) -> bool:
    content = path.read_bytes()
    if not content or (not half and path.suffix == ".safetensors"):
        return False
    lines = content.splitlines(keepends=True) if path.suffix != ".safetensors" else [content]
    keep = lines[-1][: len(lines[-1]) // 2] if half else b""
    path.write_bytes(b"".join(lines[:-1]) + keep)
    return True


def _content_or_none(path: Path) -> Any:
    try:
        return _content(path)
    except DataError:
        return None


def _damage(path: Path, way: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if way == "cut":
        del content[len(content) // 2 :]
    else:
        content[rng.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)


def _is_held(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class _Server:
    """A chat server in a process of its own, which notes every answer that it has given."""

    def __init__(self, port: int, paid: Path) -> None:
        self._command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(port), "--paid", str(paid)]
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.restart()

    def restart(self) -> None:
        self.kill()
        self._process = subprocess.Popen(self._command)
        while True:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            if self._process.poll() is not None:
                raise SystemExit("the chat server did not start")
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(port: int, paid: Path) -> None:
    """Answer until killed. An answer is noted once it has been sent whole."""
    sys.path.insert(0, str(ROOT / "tests" / "sampling"))
    import fault_server

    class Noting(list[dict[str, Any]]):
        def append(self, request: dict[str, Any]) -> None:
            with paid.open("a") as file:
                file.write(json.dumps(_asked(request)) + "\n")

    plain = fault_server.chat

    def tagged(request: dict[str, Any], *, usage: bool, text: str) -> dict[str, Any]:
        return plain(request, usage=usage, text=text.replace("quite", f"quite {_asked(request)}"))

    fault_server.chat = tagged
    server = fault_server.FaultServer(text=TEXT, port=port)
    server.answered = Noting()
    server.hold = lambda: time.sleep(0.03)
    signal.pause()


def _asked(request: Mapping[str, Any]) -> str:
    """What tells one request from another, in twelve letters: numbers would be taken for coordinates."""
    digest = hashlib.sha256(json.dumps([request["messages"], request["seed"]], sort_keys=True).encode()).digest()
    return "".join(chr(ord("a") + byte % 26) for byte in digest[:12])


def _paid(path: Path) -> list[str]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _kept_requests(run: Path) -> set[str]:
    """The requests whose answers are whole on disk, by the word in them."""
    lines = [line for path in run.glob("answers/synthesize/*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return {word for line in lines if line.endswith("\n") for word in re.findall(r"quite ([a-z]{12}) well", line)}


# ---------------------------------------------------------------- the table


def table(told: Mapping[str, Any]) -> str:
    """The rows as Markdown; faults of one kind are added up over the places they were injected at."""
    lines = ["| fault | where | injected | survived |", "| --- | --- | --: | --: |"]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in told["faults"]:
        kinds.setdefault(row["fault"], []).append(row)
    for kind, rows in kinds.items():
        places = ", ".join(f"{row['where']} {row['injected']}" if len(rows) > 1 else row["where"] for row in rows)
        lines.append(f"| {kind} | {places} | {sum(r['injected'] for r in rows)} | {sum(r['survived'] for r in rows)} |")
    injected, survived = (sum(row[key] for row in told["faults"]) for key in ("injected", "survived"))
    return "\n".join([*lines, f"| **together** | | **{injected}** | **{survived}** |"])


def load_libraries(harness: Harness) -> None:
    """Once, here, by a run in this process: much is loaded only when it is used, and every fork would load it again."""
    import gc
    import importlib
    import threading

    from tqdm import tqdm

    # Its own lock lies in memory that forks share: an attempt killed while it holds that would stop all later ones.
    tqdm.set_lock(threading.RLock())
    importlib.import_module("polyground.sampling.endpoint")
    importlib.import_module("openai.resources.chat.completions")
    warm = harness.work / "warm"
    words = harness.words("run", f"--out={warm}", "--sft.max_steps=1", "--grpo.max_steps=1", "--world.ood=0")
    with harness.log.open("w") as log, redirect_stdout(log), redirect_stderr(log):
        code = polyground(words)
    if code != 0:
        raise SystemExit(f"the toy run fails by itself: {harness.log.read_text()[-2000:]}")
    shutil.rmtree(warm)
    gc.collect()
    gc.freeze()  # what a fork does not touch, it does not copy


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.json", help="where the table's figures go")
    parser.add_argument("--work", type=Path, help="an empty folder to work in; a temporary one where none is named")
    parser.add_argument("--kills", type=int, default=6, help="per stage and kind")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds that the server is gone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--paid", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.serve is not None:
        serve(found.serve, found.paid)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work = found.work or Path(tempfile.mkdtemp(prefix="polyground-reliability-"))
    since = time.monotonic()
    harness = Harness(work, kills=found.kills, outage=found.outage, seed=found.seed)
    try:
        load_libraries(harness)
        harness.go_calm()
        for name in found.only:
            FAULTS[name](harness)
            write(found, harness, seconds=time.monotonic() - since)
    finally:
        if found.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(table({"faults": [row.to_json() for row in harness.rows]}))
    return int(any(row.failures for row in harness.rows))


def write(found: argparse.Namespace, harness: Harness, *, seconds: float) -> None:
    """The figures so far; faults of an earlier call that this one does not repeat stay."""
    told = read_json(found.out) if found.out.is_file() else {"faults": []}
    names = {(row.fault, row.where) for row in harness.rows}
    kept = [row for row in told["faults"] if (row["fault"], row["where"]) not in names]
    value = {
        "command": f"python benchmarks/reliability.py --kills {found.kills} --outage {found.outage:g} --seed {found.seed}",
        "polyground": __version__,
        "python": platform.python_version(),
        "seconds": round(seconds),
        "faults": [*kept, *(row.to_json() for row in harness.rows)],
    }
    found.out.parent.mkdir(parents=True, exist_ok=True)
    found.out.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
