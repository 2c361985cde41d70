"""The stages: each `run(recipe)` reads like its box in the figure. Stages never import one another; folders join them.

What they share stands here: where things lie, how a split is read, how a model is opened, and a progress bar.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from polyground.config import DataSource, Recipe, Sampling
from polyground.conventions import load_convention, model_folder
from polyground.errors import ConfigError, DataError, SplitError, StorageError, UsageError
from polyground.geometry import Grid
from polyground.imagefile import problem_of
from polyground.records import Example, Message
from polyground.runs import ROLES
from polyground.shards import Shard, gather, parse_shard, part_folder, part_identity, weights_in_pieces
from polyground.sources import ABOUT_ROWS, SOURCES, BadRow, Item, chosen, read_source, scan_source
from polyground.sources.reading import require_none_bad
from polyground.storage import MANIFEST, RunFolder, made_alike, read_manifest, require_whole, take_over
from polyground.worlds.build import CHOICE, SCENES, SPLITS, WORLD_VERSION, annotation_path

if TYPE_CHECKING:
    from polyground.benchmarks import Annotation
    from polyground.models import Loaded
    from polyground.rewards import Scorer
    from polyground.rollout import Ask
    from polyground.sampling import Sampler

VERBS = {"sft-merged": "merge", "grpo-merged": "merge"}
"""The verb that makes a folder, where it is not called like it."""

EVALUATED = ("test", "ood", "perception")
"""Fields of `data` and `world` whose splits are benchmarks; `ood` and `perception` stand for several splits each."""

PLACEHOLDER = "https://teacher.example/v1"
"""The teacher's address in a recipe that waits for one; nobody answers there."""

_ABOUT_FILES = ("check_images", "images_root", "images_out", "strip_prefix")
"""Options of a data file that may differ between machines, and between two attempts at a stage."""

logger = logging.getLogger("polyground")

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Student:
    """A model opened for sampling: how it samples, how it is asked, and how its answers are scored."""

    sampler: Sampler
    ask: Ask
    scorer: Scorer
    batch: int = 1
    """Questions to put to it at once, at least: enough that servers are not idle while the last answers come in."""
    usage: Callable[[], Mapping[str, Any]] | None = None
    """What was asked of servers so far; None for a model in this process."""

    def spent(self) -> dict[str, Any]:
        """What a stage's summary says of servers."""
        return {} if self.usage is None else {"endpoint": self.usage()}


def model_path(recipe: Recipe, role: str) -> Path | str:
    """Where the model of this role lies; raises StorageError while its stage is not complete."""
    folder = ROLES[role]
    if folder is None:
        return recipe.model.path
    return require(recipe, folder)


def open_model(recipe: Recipe, role: str, *, training: bool = False) -> Loaded:
    """The model of this role on the best device here. Says that it is opened, which takes minutes where it is large.

    Where a training shares its weights out it stays in host memory: no device has to hold the whole.
    """
    from polyground.models import best_device, load_model

    path, device = model_path(recipe, role), "cpu" if training and weights_in_pieces() else best_device()
    say(f"opening {path} on {device}")
    return load_model(path, dtype=recipe.model.dtype, max_pixels_total=recipe.model.max_pixels_total, device=device)


def model_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the model to start from. The shipped one is told by its weights: a later version may bring others."""
    named = recipe.model.to_json()
    return {**named, "sha256": _weights(model_folder("tiny"))} if recipe.model.path == "tiny" else named


@cache
def _weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def student(recipe: Recipe, role: str, *, sampler: Sampling, stage: str) -> Iterator[Student]:
    """The model of this role, in this process or on servers, and the recipe's scorer; servers are let go of at the end.

    Answers in the family's native form are read as well.
    """
    if sampler == "local":
        yield _loaded_student(recipe, role)
        return
    from polyground.prompts import student_messages
    from polyground.rewards import Scorer
    from polyground.sampling.endpoint import EndpointSampler, Tokens
    from polyground.sampling.served import serving_of
    from polyground.vision import grids_by

    folder = model_folder(model_path(recipe, role))
    convention = load_convention(folder, max_pixels_total=recipe.model.max_pixels_total)

    grids_of = grids_by(convention)

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        grids = grids_of(example.images)
        return student_messages(example, grids, instruction=recipe.prompts.instruction), grids

    shard = own_share(recipe)
    part = "" if shard is None else f"-{shard.name}"
    log = recipe.out / "logs" / f"vllm-{stage}-{role}{part}.log"
    with (
        serving_of(sampler, recipe.servers, role, model=folder.absolute(), dtype=recipe.model.dtype, log=log) as served,
        EndpointSampler.from_config(
            served.urls,
            served.model,
            recipe.servers.endpoint,
            cache=answers_folder(recipe, stage),
            api_key_env=served.api_key_env,
            convention=convention,
            section="servers.endpoint",
            tokens=Tokens(),
            version=model_version(recipe, role),
            require_running=served.require_running,
        ) as asked,
    ):
        scorer = Scorer(recipe.rewards, native=convention.native, reasoning=recipe.prompts.reasoning)
        batch = 4 * recipe.servers.endpoint.concurrency
        yield Student(sampler=asked, ask=ask, scorer=scorer, batch=batch, usage=lambda: asked.usage)


def spent_before(recipe: Recipe, *, sampler: Sampling, stage: str) -> dict[str, Any]:
    """As `Student.spent`, of a stage whose rows are all there already: what its kept answers took, those of all parts."""
    if sampler == "local":
        return {}
    from polyground.sampling.responses import Prices, Responses

    config = recipe.servers.endpoint
    spending = Responses.looked_at(config.cache or answers_folder(recipe, stage)).spending
    return {"endpoint": spending.told(Prices(prompt=config.prompt_price, completion=config.completion_price))}


def answers_folder(recipe: Recipe, stage: str) -> Path:
    """Where the answers of servers to a stage are kept, unless the recipe names a folder."""
    return recipe.out / "answers" / stage


def model_version(recipe: Recipe, role: str) -> str:
    """Names the weights of a role, whatever a server calls them: answers of other weights are not theirs."""
    folder = ROLES[role]
    named = [model_identity(recipe), upstream(recipe, folder) if folder else {}]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _loaded_student(recipe: Recipe, role: str) -> Student:
    from polyground.prompts import student_messages
    from polyground.rewards import Scorer
    from polyground.sampling.local import LocalSampler

    loaded = open_model(recipe, role)

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        grids = loaded.family.grids(example.images)
        return student_messages(example, grids, instruction=recipe.prompts.instruction), grids

    scorer = Scorer(recipe.rewards, native=loaded.family.native, reasoning=recipe.prompts.reasoning)
    return Student(sampler=LocalSampler(loaded), ask=ask, scorer=scorer)


def upstream(recipe: Recipe, *folders: str) -> dict[str, str]:
    """Fingerprints of the stages a stage builds on: part of its own configuration, so that nothing stale is continued."""
    return {folder: read_manifest(require(recipe, folder)).fingerprint for folder in folders}


def stage_folder(
    recipe: Recipe, folder: str, stage: str, identity: Mapping[str, Any], *, shard: Shard | None = None
) -> RunFolder:
    """The folder of a stage, opened; one that a run of `recipe.reuse` has made under the same identity is taken over first.

    With a shard, the folder of that part, unless the whole is complete.
    """
    adopt(recipe, folder, stage, identity)
    whole = recipe.out / folder
    if shard is None or made_alike(whole, stage=stage, config=identity):
        return RunFolder(whole, stage, identity)
    return RunFolder(part_folder(recipe.out, folder, shard), stage, part_identity(identity, shard), own=True)


def own_share(recipe: Recipe) -> Shard | None:
    """The part of a stage that is to be done; None for all of it."""
    return None if recipe.shard is None else parse_shard(recipe.shard)


def gather_parts(recipe: Recipe, folder: RunFolder, files: Mapping[str, Sequence[str]], *, field: str = "key") -> None:
    """Begin the whole of a stage with what its parts have done; see `shards.gather`."""
    stage = folder.path.relative_to(recipe.out).as_posix()
    if count := gather(folder, recipe.out, stage, files, field=field):
        logger.warning("%s: put together from %d parts", folder.path, count)


def adopt(recipe: Recipe, folder: str, stage: str, identity: Mapping[str, Any]) -> None:
    """Take a stage over from the first run of `recipe.reuse` that has it, where there is nothing of it here yet."""
    path = recipe.out / folder
    if path.exists():
        return
    made = (run / folder for run in recipe.reuse if made_alike(run / folder, stage=stage, config=identity))
    source = next(made, None)
    if source is None:
        return
    try:
        take_over(source, path)
    except StorageError:
        # Another process of the same run (torchrun) may have been first.
        if not made_alike(path, stage=stage, config=identity):
            raise


def start_folders(recipe: Recipe) -> list[str]:
    """The folder of the model that RL starts from; none for the base, which comes with the recipe."""
    folder = ROLES[recipe.grpo.start]
    return [] if folder is None else [folder]


def require(recipe: Recipe, folder: str) -> Path:
    """The folder of a complete stage; raises StorageError, naming the verb that makes it."""
    path = recipe.out / folder
    if not (path / MANIFEST).is_file():
        raise StorageError(f"{path}: is not complete; run `polyground {VERBS.get(folder, folder)}` with this recipe first")
    require_whole(path)
    return path


def world_splits(recipe: Recipe) -> list[str]:
    """Splits the simulated world has to provide: those with a size and without data of the user's own."""
    return [
        split
        for split, plan in SPLITS.items()
        if getattr(recipe.world, plan.size) and not getattr(recipe.data, plan.size.removesuffix(CHOICE))
    ]


def world_parts(recipe: Recipe, split: str) -> list[str]:
    """The splits of the simulated world that make up one of the recipe: its multiple choices are a file of their own.

    Raises SplitError where there is none.
    """
    splits = world_splits(recipe)
    parts = [part for part in (split, f"{split}{CHOICE}") if part in splits]
    if not parts:
        known = ", ".join([*own_splits(recipe), *splits]) or "none"
        raise SplitError(
            f"the recipe has no split {split!r}: give data.{split} a file or world.{split} a size above 0; its splits: {known}"
        )
    return parts


def _built_world(recipe: Recipe) -> Path:
    world = recipe.out / "world"
    if not (world / MANIFEST).is_file():
        raise StorageError(f"{world}: the simulated world is not built; run `polyground world` with this recipe first")
    return world


def own_splits(recipe: Recipe) -> dict[str, list[DataSource]]:
    """Splits with data of the user's own, by name; each file of `ood` and `perception` is a benchmark of its own.

    It is called after its option `name`, or its file.
    """
    data = recipe.data
    splits = {name: list(sources) for name in ("train", "rl", "validation", "test") if (sources := getattr(data, name))}
    for group in ("ood", "perception"):
        for position, source in enumerate(getattr(data, group)):
            label = re.sub(r"[^\w.-]+", "_", str(source.options.get("name") or source.path.stem))
            name = f"{group}_{label}"
            splits[name if name not in splits else f"{name}_{position}"] = [source]
    return splits


def evaluation_splits(recipe: Recipe) -> list[str]:
    """Names of the splits to answer: `test` first, then `ood_…`, then `perception_…`; or what the recipe chooses.

    Raises ConfigError where it chooses a split that it does not have.
    """
    names = [*own_splits(recipe), *world_splits(recipe)]
    groups = EVALUATED if recipe.evaluate.splits is None else recipe.evaluate.splits
    found = {group: [name for name in names if name == group or name.startswith(f"{group}_")] for group in groups}
    missing = [group for group, members in found.items() if not members]
    if missing and recipe.evaluate.splits is not None:
        raise ConfigError(
            f"evaluate.splits: there is no split {missing[0]!r}; the recipe has {', '.join(names) or 'none'}"
            f" (a split of the simulated world needs a size above 0 in `world`)"
        )
    return list(dict.fromkeys(name for members in found.values() for name in members))


def read_split(recipe: Recipe, split: str) -> list[Example]:
    """The examples of a split, in file order. Raises DataError for bad rows, StorageError while the world is not built."""
    sources = own_splits(recipe).get(split)
    if sources is not None:
        examples = [example for source in sources for example in read_source(source.source, source.path, **source.options)]
        return _with_unique_keys(examples, split)
    parts, world = world_parts(recipe, split), _built_world(recipe)
    return [e for part in parts for e in read_source(SPLITS[part].source, annotation_path(world, part), name=part)]


def benchmark_rows(recipe: Recipe, split: str) -> Annotation | None:
    """The rows of a split that is one file of a public benchmark, as its publishers count them; None for any other split.

    As many as are evaluated. Duplicates and rows with a bad annotation are among them, whatever `on_bad` says.
    """
    from polyground.benchmarks import BENCHMARKS, read_annotation

    files = own_splits(recipe).get(split, [])
    if len(files) != 1 or files[0].source not in BENCHMARKS:
        return None
    file = files[0]
    if {"limit", "skip", "every"} & file.options.keys():
        # Figures on a part of a benchmark compare with nothing published.
        return None
    checked = file.options.get("check_images", True)
    return read_annotation(
        file.source,
        file.path,
        limit=recipe.evaluate.limit_per_split,
        check_images="exists" if checked is True else checked or "no",
        **scan_options(file),
    )


def require_images(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Raises DataError, before a model is loaded, for rows of an earlier stage whose image files are no longer there."""
    problems = ((number, row, problem_of(Path(image))) for number, row in enumerate(rows, start=1) for image in row["images"])
    bad = [BadRow(number, row["key"], problem.reason, str(problem)) for number, row, problem in problems if problem is not None]
    require_none_bad(bad, path, remedy=f"put the images back, or delete {path.parent} and run that stage again")


def split_files(recipe: Recipe, split: str) -> list[DataSource]:
    """The annotation files of a split, the simulated world's included; what `scan_file` reads row by row."""
    sources = own_splits(recipe).get(split)
    if sources is not None:
        return sources
    parts, world = world_parts(recipe, split), _built_world(recipe)
    return [DataSource(source=SPLITS[part].source, path=annotation_path(world, part), options={"name": part}) for part in parts]


def scan_options(source: DataSource) -> dict[str, Any]:
    """The options that belong to the reader, without those that say what to do about bad rows and images."""
    return {name: value for name, value in source.options.items() if name not in ABOUT_ROWS}


def scan_file(source: DataSource) -> Iterator[Item]:
    """The rows of a data file that its recipe uses, bad ones included, streamed; images are not looked at."""
    chosen_rows = {name: source.options[name] for name in ("limit", "skip", "every") if name in source.options}
    return chosen(scan_source(source.source, source.path, **scan_options(source)), **chosen_rows)


def source_options(source: str, words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words of a command line; a value is YAML, except that a number stays text where the reader wants text."""
    known = inspect.signature(SOURCES[source]).parameters if source in SOURCES else {}
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--option {word}: write it as key=value, as in images_root=photos")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            # Something like a date that no calendar has is a ValueError.
            raise ConfigError(f"--option {word}: the value is not YAML ({error}); put it in quotes") from error
        wants_text = key in known and str(known[key].annotation).startswith("str")
        options[key] = text if wants_text and not isinstance(value, bool | list | dict | None) else value
    return options


def named_source(flag: str, word: str) -> DataSource:
    """`SOURCE:PATH[,KEY=VALUE…]` of a command line. Raises UsageError for another form or an unknown source."""
    source, colon, rest = word.partition(":")
    path, *options = rest.split(",")
    if not colon or source not in SOURCES:
        raise UsageError(f"{flag} {word}: write SOURCE:PATH, as in mig_bench:MIG_data.json; sources: {', '.join(SOURCES)}")
    return DataSource(source=source, path=Path(path), options=source_options(source, options))


def split_identity(recipe: Recipe, split: str) -> Any:
    """What decides the examples of a split, for fingerprints and result tags: no path of this machine."""
    sources = own_splits(recipe).get(split)
    if sources is not None:
        return [
            # Where images lie, and how closely they are looked at, decides no row that could be used.
            {
                "source": s.source,
                "file": s.path.name,
                "sha256": _digest(s.path),
                "options": {name: value for name, value in s.options.items() if name not in _ABOUT_FILES},
            }
            for s in sources
        ]
    return {
        "source": f"simulated world, in the layout of {SPLITS[split].source}",
        "split": split,
        "seed": recipe.world.seed,
        "version": WORLD_VERSION,
        "questions": {part: getattr(recipe.world, SPLITS[part].size) for part in world_parts(recipe, split)},
    }


def scene_paths(recipe: Recipe, split: str) -> list[Path]:
    """The facts behind a split of the simulated world, for the scripted teacher."""
    return [recipe.out / "world" / part / SCENES for part in world_parts(recipe, split)]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _with_unique_keys(examples: Sequence[Example], split: str) -> list[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.key in seen:
            raise DataError(
                f"split {split!r}: the key {example.key!r} stands twice; give each file its own `options: {{name: …}}`"
            )
        seen.add(example.key)
    return list(examples)


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table as text: the first `left` columns flush left, the others flush right, a line under the header."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(f"  {line}".rstrip() for line in [lines[0], "─" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def say(line: str) -> None:
    """One line, or a table, on standard error."""
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def track(rows: Iterable[Row], description: str, *, total: int, done: int = 0) -> Iterator[Row]:
    """Pass the rows on under a progress bar on standard error; where that is no terminal, say only start and end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    if not console.is_terminal:
        console.print(
            f"{description}: {total - done} to do" + (f" ({done} done before)" if done else ""), highlight=False, markup=False
        )
        yield from rows
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for row in rows:
            yield row
            progress.advance(task)
