"""What can be looked through: the splits, answers and groups of a run, or the rows of any data set that can be read.

Nothing is indexed before it is looked at. The files are only read; what has to be rewritten to be found by row goes into a
folder of its own, which goes with the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from polyground.app.rows import AnswerShelf, Examples, QuestionShelf, Said, Shelf
from polyground.config import Recipe, load_recipe
from polyground.errors import DataError, UsageError
from polyground.records import Completion, Example, Rollout, Score
from polyground.runs import ROLES, is_run
from polyground.sources import BadRow, scan_source
from polyground.stages import benchmark_rows, own_splits, read_split
from polyground.storage import atomic_write_rows, read_json
from polyground.worlds.build import SPLITS, annotation_path

THRESHOLD = 0.5
"""IoU from which an answer is right, where a run does not say."""


class Library:
    """Shelves by name, each put up when it is first asked for."""

    def __init__(self, title: str, *, threshold: float) -> None:
        self.title = title
        self.threshold = threshold
        self._builders: dict[str, Callable[[], Shelf]] = {}
        self._shelves: dict[str, Shelf] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._builders)

    @property
    def names(self) -> list[str]:
        """Of the shelves, in the order they were offered."""
        return list(self._builders)

    def offer(self, name: str, build: Callable[[], Shelf]) -> None:
        """Put a shelf under this name; it is built when somebody opens it."""
        self._builders[name] = build

    def shelf(self, name: str) -> Shelf:
        """The shelf of this name. Raises DataError for rows that cannot be read."""
        with self._lock:
            if name not in self._shelves:
                self._shelves[name] = self._builders[name]()
            return self._shelves[name]


def library_of(
    path: Path,
    *,
    source: str = "",
    options: Mapping[str, Any],
    answers: Mapping[str, Path],
    compare: Sequence[Path] = (),
    threshold: float | None = None,
    scratch: Path,
) -> Library:
    """What there is under a run folder, a recipe or a data file.

    `answers` are files of further models, by name; `compare` are runs whose answers to the same splits are shown beside.
    """
    recipe = load_recipe(path) if path.suffix in (".yaml", ".yml") else None
    run = recipe.out if recipe is not None else path
    if recipe is not None or (is_run(path) and not source):
        if not is_run(run):
            raise DataError(f"{run}: there is no run; `polyground run {path}` makes it")
        library = Library(run.name, threshold=threshold if threshold is not None else threshold_of(run))
        _offer_run(library, run, recipe, answers, compare, scratch)
        if not library:
            raise DataError(f"{run}: nothing to look through yet; run `polyground world` or `evaluate` with its recipe first")
        return library
    if compare:
        raise UsageError("--compare is for runs; give the answers to a data set as --answers NAME=FILE")
    if not path.exists() and not str(path).startswith("hub:"):
        raise DataError(f"{path}: no such run or data set; give the folder of a run, a recipe, or an annotation file")
    if path.is_dir() and not source:
        raise DataError(f"{path}: is not the folder of a run; for a folder of shards name its format with --source")
    library = Library(path.name, threshold=THRESHOLD if threshold is None else threshold)
    name = source or ("polyground" if path.suffix == ".jsonl" else "")
    if not name:
        raise UsageError(f"{path}: name its format with --source, such as mig_bench or sharegpt")
    library.offer(path.name, lambda: _dataset(library, path, name, options, answers, scratch))
    return library


def threshold_of(run: Path) -> float:
    """The IoU of the run's headline."""
    path = run / "evaluate" / "results.json"
    return float(read_json(path)["tags"]["headline_iou"]) if path.is_file() else THRESHOLD


def _dataset(
    library: Library, path: Path, source: str, options: Mapping[str, Any], answers: Mapping[str, Path], scratch: Path
) -> Shelf:
    spooled, bad = _spooled(scratch / "data.jsonl", source, path, options)
    if not spooled.stat().st_size:
        raise DataError(f"{path}: no row can be read as {source} ({bad} bad); `polyground validate` says what is wrong with them")
    shelf = QuestionShelf(path.name, Examples(spooled), answers, threshold=library.threshold)
    shelf.bad = bad
    return shelf


def _spooled(target: Path, source: str, path: Path, options: Mapping[str, Any]) -> tuple[Path, int]:
    """The examples of an annotation as rows of ours, written once, one in memory at a time; and how many rows were bad."""
    bad = 0

    def rows() -> Any:
        nonlocal bad
        for item in scan_source(source, path, **options):
            if isinstance(item, BadRow):
                bad += 1
            else:
                yield item.to_json()

    if not target.exists():
        atomic_write_rows(target, rows())
    return target, bad


# ---- runs


def _offer_run(
    library: Library,
    run: Path,
    recipe: Recipe | None,
    more: Mapping[str, Path],
    compare: Sequence[Path],
    scratch: Path,
) -> None:
    questions = _Questions(run, recipe, scratch)
    for split in _evaluated(run):
        answers = _answers_to(run, split) | {
            f"{other.name} {role}": path for other in compare for role, path in _answers_to(other, split).items()
        }
        library.offer(f"evaluation · {split}", _evaluation(library, questions, run, split, answers | dict(more)))
    if (path := run / "grpo" / "rollouts.jsonl").is_file():
        library.offer("GRPO · groups", _groups(library, questions, path))
    if (path := run / "reject" / "rollouts.jsonl").is_file():
        library.offer("rejection sampling · groups", _rejection(library, questions, path))
    for name, file in (("taught", "kept.jsonl"), ("dropped", "rejected.jsonl")):
        if (path := run / "synthesize" / file).is_file():
            library.offer(f"synthesis · {name}", _synthesis(library, questions, path, name))
    for split in questions.splits:
        library.offer(f"data · {split}", _split(library, questions, split))


def _evaluated(run: Path) -> list[str]:
    """Splits with answers, `test` first."""
    found = {path.stem for role in ROLES for path in (run / "evaluate" / role).glob("*.jsonl") if path.stat().st_size}
    return sorted(found, key=lambda split: (split != "test", split))


def _answers_to(run: Path, split: str) -> dict[str, Path]:
    paths = {role: run / "evaluate" / role / f"{split}.jsonl" for role in ROLES}
    return {role: path for role, path in paths.items() if path.is_file()}


def _evaluation(
    library: Library, questions: _Questions, run: Path, split: str, answers: Mapping[str, Path]
) -> Callable[[], Shelf]:
    def build() -> Shelf:
        spooled = questions.of(split)
        if spooled is None:
            raise DataError(
                f"{run / 'evaluate'}: the questions of {split!r} are in data of your own; give the recipe in place of the folder"
            )
        return QuestionShelf(split, Examples(spooled), answers, threshold=library.threshold, limit_to_answered=True)

    return build


def _split(library: Library, questions: _Questions, split: str) -> Callable[[], Shelf]:
    def build() -> Shelf:
        spooled = questions.of(split)
        if spooled is None:
            raise DataError(f"{split}: the split is not there any more; start this page again")
        return QuestionShelf(split, Examples(spooled), {}, threshold=library.threshold)

    return build


def _groups(library: Library, questions: _Questions, path: Path) -> Callable[[], Shelf]:
    def answers(rows: Sequence[Mapping[str, Any]]) -> list[Said]:
        return [
            Said(name=f"answer {number}", rollout=Rollout.from_json(row), advantage=row.get("advantage"))
            for number, row in enumerate(rows, start=1)
        ]

    def build() -> Shelf:
        return AnswerShelf(
            "GRPO",
            path,
            questions.find,
            questions.images,
            identity=lambda row: (str(row["step"]), str(row["example"])),
            answers=answers,
            facts=("step",),
            threshold=library.threshold,
            who="policy",
            is_group=True,
        )

    return build


def _rejection(library: Library, questions: _Questions, path: Path) -> Callable[[], Shelf]:
    def answers(rows: Sequence[Mapping[str, Any]]) -> list[Said]:
        return [
            Said(name=f"answer {number}", rollout=Rollout.from_json(row))
            for number, row in enumerate(rows[0]["rollouts"], start=1)
        ]

    def build() -> Shelf:
        return AnswerShelf(
            "rejection",
            path,
            questions.find,
            questions.images,
            identity=lambda row: ("", str(row["key"])),
            answers=answers,
            facts=("pass_rate", "mean_reward"),
            threshold=library.threshold,
            who="SFT model",
            is_group=True,
        )

    return build


def _synthesis(library: Library, questions: _Questions, path: Path, name: str) -> Callable[[], Shelf]:
    def build() -> Shelf:
        return AnswerShelf(
            name,
            path,
            questions.find,
            questions.images,
            identity=lambda row: ("", str(row["key"])),
            answers=_of_teacher,
            facts=("reason", "attempts", "aided"),
            threshold=library.threshold,
            who="teacher",
            is_group=False,
        )

    return build


def _of_teacher(rows: Sequence[Mapping[str, Any]]) -> list[Said]:
    """What the teacher said last, with its score where it was kept."""
    row = rows[0]
    if "score" in row:
        score = Score.from_json(row["score"])
        text = f"<think>{row['reasoning']}</think>"
    else:
        score = Score(total=0.0, parts={}, unreadable=str(row.get("reason") or "dropped"))
        text = str(row.get("text") or "")
    rollout = Rollout(example=row["key"], task=row["task"], completion=Completion(text=text), score=score)
    return [Said(name="teacher", rollout=rollout, note=str(row.get("reason") or ""))]


class _Questions:
    """The questions of a run by split and by key, from the simulated world, the recipe's own data, or rows of its stages."""

    def __init__(self, run: Path, recipe: Recipe | None, scratch: Path) -> None:
        self._run, self._recipe, self._scratch = run, recipe, scratch
        self._by_key: list[Examples] | None = None
        world = run / "world"
        self._own = list(own_splits(recipe)) if recipe is not None else []
        self._world = [split for split in SPLITS if annotation_path(world, split).is_file() and split not in self._own]
        self.splits = [*self._own, *self._world]

    def of(self, split: str) -> Path | None:
        """A file of ours with the questions of a split; None where they are not known."""
        target = self._scratch / f"{split}.jsonl"
        if target.exists():
            return target
        if split in self._own and self._recipe is not None:
            annotation = benchmark_rows(self._recipe, split)
            examples = read_split(self._recipe, split) if annotation is None else annotation.examples
            atomic_write_rows(target, (example.to_json() for example in examples))
            return target
        if split in self._world:
            path = annotation_path(self._run / "world", split)
            return _spooled(target, SPLITS[split].source, path, {"name": split})[0]
        return None

    def find(self, key: str) -> Example | None:
        """The question of this key, wherever it is."""
        return next((example for one in self._files() if (example := one.get(key)) is not None), None)

    def images(self, key: str) -> int | None:
        return next((count for one in self._files() if (count := one.images(key)) is not None), None)

    def _files(self) -> list[Examples]:
        """Indexed files that training draws from."""
        if self._by_key is None:
            splits = [split for split in self.splits if split.partition("_")[0] in ("train", "rl")]
            files = [path for split in splits if (path := self.of(split)) is not None]
            stages = [self._run / stage / "kept.jsonl" for stage in ("reject", "synthesize")]
            files += [path for path in stages if path.is_file()] if not splits else []
            self._by_key = [Examples(path, found=self._found).load() for path in files]
        return self._by_key

    def _found(self, image: Path) -> Path:
        """An image as a stage called it, where the run was started from another folder or has been moved since."""
        if image.exists():
            return image
        tails = (self._run / Path(*image.parts[start:]) for start in range(1, len(image.parts)))
        return next((path for path in tails if path.exists()), image)
