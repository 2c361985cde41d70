"""Everything about a data set that would break or spoil training, found before any GPU is asked for.

Rows, boxes, placeholders, image files, images shared with a benchmark, prompt lengths and memory: counted, and the first ten of
each kind named. Rows are streamed; of each image its path and size are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from polyground.config import DataSource, GrpoConfig, ModelConfig, Recipe, SftConfig, load_recipe
from polyground.conventions import Convention, load_convention
from polyground.errors import DataError, StorageError, UsageError
from polyground.geometry import PER_MILLE
from polyground.imagefile import ImageError, decoded, image_size
from polyground.memory import Estimate, ModelSize, Prompts, describe, grpo_memory, model_size, sft_memory
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.sources import SOURCES, BadRow
from polyground.sources.reading import NAMED, current_row
from polyground.splits import ImageHashes, Leak, find_leaks
from polyground.stages import aligned, named_source, own_splits, scan_file, source_options, split_files, track, world_splits
from polyground.tokens import PromptCounter
from polyground.worlds.build import CHOICE

TRAINING, HELD_OUT = ("train", "rl"), ("test", "ood", "perception")
"""Splits that must share no image: the first with the second."""

TINY_AREA, WHOLE_AREA = 0.0005, 0.95
"""Boxes below and above these shares of their image are counted: often a scale gone wrong."""

_TOGETHER = 1024
_BINS, _BAR = 12, 40


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe: all its splits, its model and pixel budget")
    parser.add_argument("--source", metavar="NAME", help=f"the format of --path: {', '.join(SOURCES)}")
    parser.add_argument("--path", help="annotation file or folder")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reader: images_root=photos")
    parser.add_argument("--model", metavar="FOLDER", help="count tokens and memory for this model (a folder, or tiny)")
    parser.add_argument("--max-pixels-total", type=int, metavar="N", help="pixels that the images of one prompt share")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="SOURCE:PATH[,KEY=VALUE]",
        help="a benchmark that must share no image with the data; its reader's options follow",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="longest prompt in tokens; default: the model's context")
    parser.add_argument(
        "--headers-only", action="store_true", help="read the size of every image, decode none: faster, less sure"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="look at the images and count the tokens of N rows of each split")
    parser.add_argument("--workers", type=int, metavar="N", help="images decoded at a time (default: the number of cores)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything that is found to this file too")


def run(options: argparse.Namespace) -> str:
    """Look at every split and say what was found. Raises DataError, with the whole text, when something must be mended."""
    plan = _plan(options)
    if not plan.splits:
        raise DataError("\n".join([f"{plan.title}: there is no data to look at", *plan.not_there]))
    found = [_scan(name, files, plan) for name, files in plan.splits.items()]
    benchmarks = [_scan(name, files, plan) for name, files in plan.benchmarks.items()]
    looked = _look_at([*found, *benchmarks], plan)
    leaks = _leaks(found, benchmarks, looked, plan)
    lengths = {split.name: _lengths(split, looked, plan) for split in found} if plan.counter else {}
    report = _Report(plan, found, benchmarks, looked, leaks, lengths)
    if options.json:
        _write_json(options.json, report.to_json())
    text = report.text()
    if report.problems:
        raise DataError(text)
    return text


# ---------------------------------------------------------------- what to look at


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    title: str
    splits: dict[str, list[DataSource]]
    not_there: list[str]
    """Splits of the simulated world that are not built yet."""
    benchmarks: dict[str, list[DataSource]]
    model: str | None
    convention: Convention | None
    size: ModelSize | None
    counter: PromptCounter | None
    instruction: str
    max_length: int | None
    sample: int | None
    decode: bool
    workers: int
    sft: SftConfig
    grpo: GrpoConfig
    dtype: str
    assumed: str
    """Where the settings behind the memory estimate come from."""

    @property
    def limit(self) -> int:
        """Tokens a prompt may have."""
        return self.max_length or (0 if self.size is None else self.size.context)


def _plan(options: argparse.Namespace) -> _Plan:
    for name in ("sample", "workers", "max_length", "max_pixels_total"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    not_there: list[str] = []
    if options.recipe is not None:
        if options.source or options.path:
            raise UsageError(f"give {options.recipe} or --source and --path, not both")
        recipe = load_recipe(options.recipe)
        splits, not_there = _recipe_splits(recipe)
        title = str(options.recipe)
        model = options.model or recipe.model.path
        dtype, sft, grpo = recipe.model.dtype, recipe.sft, recipe.grpo
        assumed = f"with the settings of {options.recipe}"
    elif options.source and options.path:
        recipe = Recipe(model=ModelConfig())
        reader = source_options(options.source, options.option)
        splits = {"data": [DataSource(source=options.source, path=Path(options.path), options=reader)]}
        title = f"{options.path} ({options.source})"
        model = options.model
        dtype, common = "bfloat16", {"bf16": True, "gradient_checkpointing": True}
        sft, grpo = SftConfig(**common), GrpoConfig(per_device_train_batch_size=1, **common)
        assumed = f"with bfloat16, gradient checkpointing and LoRA rank {sft.lora_r} (a recipe has its own settings)"
    else:
        raise UsageError("give a recipe, or --source NAME --path FILE; see `polyground validate --help`")
    budget = options.max_pixels_total or recipe.model.max_pixels_total
    convention = None if model is None else _convention(model, budget, not_there)
    return _Plan(
        title=title,
        splits=splits,
        not_there=not_there,
        benchmarks=_benchmarks(options.against),
        model=model,
        convention=convention,
        size=None if convention is None else model_size(convention.path),
        counter=None if convention is None else PromptCounter(convention),
        instruction=recipe.prompts.instruction,
        max_length=options.max_length,
        sample=options.sample,
        decode=not options.headers_only,
        workers=options.workers or _cores(),
        sft=sft,
        grpo=grpo,
        dtype=dtype,
        assumed=assumed,
    )


def _recipe_splits(recipe: Recipe) -> tuple[dict[str, list[DataSource]], list[str]]:
    splits = {name: list(files) for name, files in own_splits(recipe).items()}
    unbuilt = []
    for split in world_splits(recipe):
        if split.endswith(CHOICE):
            continue  # a file of the split it goes with
        try:
            splits[split] = split_files(recipe, split)
        except StorageError:
            unbuilt.append(split)
    return splits, [f"{', '.join(unbuilt)}: the simulated world is not built yet (`polyground world`)"] if unbuilt else []


def _convention(model: str, budget: int | None, not_there: list[str]) -> Convention | None:
    """None for a model that is not downloaded yet: its data can be looked at all the same."""
    if model != "tiny" and not Path(model).is_dir():
        not_there.append(f"model {model}: the folder is not there, so tokens and memory are not counted")
        return None
    return load_convention(model, max_pixels_total=budget)


def _benchmarks(words: Sequence[str]) -> dict[str, list[DataSource]]:
    benchmarks: dict[str, list[DataSource]] = {}
    for word in words:
        file = named_source("--against", word)
        name = f"{file.source}:{file.path.name}"
        benchmarks[name if name not in benchmarks else word] = [file]
    return benchmarks


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class _Owner:
    """An image and the first example that shows it."""

    key: str
    images: tuple[Path, ...]


@dataclass(slots=True)
class _Split:
    """What the rows of one split say; of each image its path and first owner are kept, of each row nothing more."""

    name: str
    files: list[DataSource]
    good: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    image_counts: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first_bad: list[str] = field(default_factory=list)
    quarantined: int = 0
    """Bad rows of files that are read with `on_bad: quarantine`: left out, not a reason to stop."""
    images: dict[Path, str] = field(default_factory=dict)
    sampled: list[Example] | None = None
    areas: array[float] = field(default_factory=lambda: array("f"))
    tiny: int = 0
    whole: int = 0
    unnamed: int = 0
    """Boxes among several images that do not say which one they are in."""

    @property
    def bad(self) -> int:
        return self.reasons.total()

    @property
    def breaking(self) -> int:
        return self.bad - self.quarantined

    def examples(self) -> Iterator[Example]:
        """The examples whose images and tokens are looked at; read anew unless they are a sample."""
        if self.sampled is not None:
            yield from self.sampled
            return
        for file in self.files:
            for item in scan_file(file):
                if isinstance(item, Example):
                    yield item


def _scan(name: str, files: list[DataSource], plan: _Plan) -> _Split:
    """Every row of a split once."""
    split = _Split(name, files)
    keys: set[bytes] = set()
    rng = random.Random(f"validate/{name}")
    for file in files:
        quarantine = file.options.get("on_bad") == "quarantine"
        for item in scan_file(file):
            bad_rows = list(_bad_rows(item, current_row(), keys, plan))
            for bad in bad_rows:
                split.reasons[bad.reason] += 1
                split.quarantined += quarantine
                if len(split.first_bad) < NAMED:
                    split.first_bad.append(f"{file.path}: row {bad.row} ({bad.key}): {bad.reason}: {bad.detail}")
            if isinstance(item, Example) and not bad_rows:
                _count(item, split)
                _keep(item, split, plan.sample, rng)
    if split.sampled is not None:
        split.images = {image: example.key for example in reversed(split.sampled) for image in example.images}
    return split


def _bad_rows(item: Example | BadRow, number: int, keys: set[bytes], plan: _Plan) -> Iterator[BadRow]:
    """What is wrong with a row: what its reader says, and what only a prompt or the other files show."""
    if isinstance(item, BadRow):
        yield item
        return
    digest = hashlib.blake2b(item.key.encode("utf-8", "surrogatepass"), digest_size=12).digest()
    if digest in keys:
        yield BadRow(
            number, item.key, "duplicate_key", "an earlier row has this key; give each file its own `options: {name: …}`"
        )
    keys.add(digest)
    if outside := [b.image for b in item.target.boxes if b.image is not None and not 1 <= b.image <= len(item.images)]:
        yield BadRow(number, item.key, "bad_image", f"the answer is in image {outside[0]} of {len(item.images)}")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(item.choices)]
    if item.choices and (item.target.choice is None or item.target.choice not in letters):
        yield BadRow(
            number, item.key, "bad_choice", f"the answer {item.target.choice!r} is none of its {len(item.choices)} choices"
        )
    try:
        messages = student_messages(item, [PER_MILLE] * len(item.images), instruction=plan.instruction)
    except DataError as error:
        yield BadRow(number, item.key, "placeholder_mismatch", str(error))
        return
    if plan.counter and (token := plan.counter.control_token(messages)):
        yield BadRow(number, item.key, "control_token", f"the text holds {token}, which would break the prompt; remove it")


def _count(example: Example, split: _Split) -> None:
    split.good += 1
    split.tasks[example.task] += 1
    split.image_counts[len(example.images)] += 1
    for image in example.images:
        split.images.setdefault(image, example.key)
    for located in example.target.boxes:
        area = located.box.area
        split.areas.append(area)
        split.tiny += area < TINY_AREA
        split.whole += area > WHOLE_AREA
        split.unnamed += located.image is None and len(example.images) > 1


def _keep(example: Example, split: _Split, sample: int | None, rng: random.Random) -> None:
    """Reservoir sampling: every row is as likely as any other, however many there are."""
    if sample is None:
        return
    split.sampled = split.sampled or []
    if len(split.sampled) < sample:
        split.sampled.append(example)
    elif (place := rng.randrange(split.good)) < sample:
        split.sampled[place] = example


# ---------------------------------------------------------------- images


Result = TypeVar("Result")

Looked = Mapping[Path, tuple[int, int] | ImageError]
"""The upright size of every image, or why it cannot be used."""


def _look_at(splits: Sequence[_Split], plan: _Plan) -> Looked:
    """Open every image once, several at a time."""
    paths = list(dict.fromkeys(path for split in splits for path in split.images))

    def look(path: Path) -> tuple[int, int] | ImageError:
        try:
            if plan.decode:
                with decoded(path) as image:
                    return image.size
            return image_size(path)
        except ImageError as error:
            return error

    results = _side_by_side(look, paths, plan.workers)
    return dict(zip(paths, track(results, "images", total=len(paths)), strict=True))


def _side_by_side(function: Callable[[Path], Result], paths: Sequence[Path], workers: int) -> Iterator[Result]:
    """The function of every path, in order, several at a time; no more than a few are under way."""
    rest = iter(paths)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        while few := list(islice(rest, _TOGETHER)):
            yield from pool.map(function, few)


def _leaks(
    found: Sequence[_Split], benchmarks: Sequence[_Split], looked: Looked, plan: _Plan
) -> dict[tuple[str, str], list[Leak]]:
    """Images that training shares with what it is measured on, by the names of the two."""
    training = [split for split in found if split.name in (*TRAINING, "data")]
    held_out = [split for split in found if split.name.startswith(HELD_OUT)]
    pairs = [(first, second) for first in training for second in [*held_out, *benchmarks]]
    hashes = ImageHashes()

    def owners(split: _Split) -> Iterator[_Owner]:
        return (_Owner(key, (path,)) for path, key in split.images.items() if not isinstance(looked[path], ImageError))

    if pairs:
        distinct = {split.name: split for pair in pairs for split in pair}.values()
        readable = list(dict.fromkeys(owner.images[0] for split in distinct for owner in owners(split)))
        for _ in track(_side_by_side(hashes.of, readable, plan.workers), "hashes for leakage", total=len(readable)):
            pass
    return {(first.name, second.name): find_leaks(owners(first), owners(second), hashes=hashes) for first, second in pairs}


# ---------------------------------------------------------------- tokens


@dataclass(slots=True)
class _Lengths:
    """Prompt lengths of one split."""

    totals: array[int] = field(default_factory=lambda: array("l"))
    image_tokens: array[int] = field(default_factory=lambda: array("l"))
    not_counted: int = 0
    """Rows with an image that cannot be read, or a placeholder that does not fit."""
    too_thin: list[str] = field(default_factory=list)
    over: int = 0
    first_over: list[str] = field(default_factory=list)

    @property
    def longest(self) -> Prompts:
        place = max(range(len(self.totals)), key=self.totals.__getitem__)
        return Prompts(tokens=self.totals[place], image_tokens=self.image_tokens[place])

    def to_json(self) -> dict[str, Any]:
        if not self.totals:
            return {"rows": 0, "not_counted": self.not_counted}
        return {
            "rows": len(self.totals),
            "not_counted": self.not_counted,
            "min": min(self.totals),
            "median": statistics.median(self.totals),
            "p95": _percentile(self.totals, 95),
            "max": max(self.totals),
            "median_image_tokens": statistics.median(self.image_tokens),
            "over_limit": self.over,
        }


def _lengths(split: _Split, looked: Looked, plan: _Plan) -> _Lengths:
    lengths = _Lengths()
    if plan.convention is None or plan.counter is None:
        return lengths
    total = split.good if split.sampled is None else len(split.sampled)
    limit = plan.limit
    for example in track(split.examples(), f"tokens of {split.name}", total=total):
        sizes = [size for image in example.images if isinstance(size := looked.get(image), tuple)]
        if len(sizes) < len(example.images):
            lengths.not_counted += 1
            continue
        try:
            canvases = plan.convention.canvases(sizes)
        except DataError as error:
            lengths.too_thin.append(f"{example.key}: {error}")
            continue
        try:
            messages = student_messages(example, plan.convention.grids(sizes), instruction=plan.instruction)
        except DataError:
            lengths.not_counted += 1
            continue
        length = plan.counter.count(messages, canvases)
        lengths.totals.append(length.total)
        lengths.image_tokens.append(length.images)
        if length.total > limit:
            lengths.over += 1
            if len(lengths.first_over) < NAMED:
                lengths.first_over.append(f"{example.key}: {length.total} tokens, {length.images} of them of {len(sizes)} images")
    return lengths


def _percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]


# ---------------------------------------------------------------- what is said of it


@dataclass(frozen=True, slots=True)
class _Report:
    plan: _Plan
    found: Sequence[_Split]
    benchmarks: Sequence[_Split]
    looked: Looked
    leaks: Mapping[tuple[str, str], list[Leak]]
    lengths: Mapping[str, _Lengths]

    @property
    def everything(self) -> list[_Split]:
        return [*self.found, *self.benchmarks]

    @property
    def problems(self) -> list[str]:
        """One line for each kind of thing to mend."""
        lines = []
        for split in self.found:
            if split.breaking:
                lines.append(f"{split.name}: {_many(split.breaking, 'bad row')}; repair, or leave out with on_bad: quarantine")
            if not split.good:
                lines.append(f"{split.name}: no row can be used")
            if broken := self.broken(split):
                lines.append(
                    f"{split.name}: {_many(len(broken), 'image file')} cannot be used ({_counts(self.broken_reasons(split))})"
                )
        for split in self.benchmarks:
            if not split.good or self.broken(split):
                unknown = f"{len(self.broken(split))} of {len(split.images)} images" if split.good else "its rows"
                lines.append(f"{split.name}: {unknown} cannot be read, so it is not known whether training shares them")
        for (first, second), leaks in self.leaks.items():
            if leaks:
                lines.append(
                    f"{first} and {second} share {_many(len(leaks), 'image')}; drop the rows from {first} (convert --without)"
                )
        for name, lengths in self.lengths.items():
            if lengths.too_thin:
                lines.append(f"{name}: {_many(len(lengths.too_thin), 'row')} with an image too thin for the model; crop it")
            if lengths.over:
                lines.append(f"{name}: {_many(lengths.over, 'prompt')} over {self.plan.limit:,} tokens; lower max_pixels_total")
        return lines

    def broken(self, split: _Split) -> list[ImageError]:
        return [error for path in split.images if isinstance(error := self.looked[path], ImageError)]

    def broken_reasons(self, split: _Split) -> Counter[str]:
        return Counter(error.reason for error in self.broken(split))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """SFT and GRPO on the longest prompt of the data they read."""
        size, plan = self.plan.size, self.plan
        if size is None:
            return {}
        estimates: dict[str, Estimate] = {}
        sft, grpo = self._longest("train"), self._longest("rl")
        if sft is not None:
            completion = plan.grpo.max_completion_length
            estimates["SFT"] = sft_memory(size, plan.sft, dtype=plan.dtype, prompts=sft, completion=completion)
        if grpo is not None:
            estimates["GRPO"] = grpo_memory(size, plan.grpo, dtype=plan.dtype, prompts=grpo)
        return estimates

    def _longest(self, split: str) -> Prompts | None:
        """Of this split; where it is not there, of all that is."""
        named = [self.lengths[split]] if split in self.lengths else list(self.lengths.values())
        longest = [lengths.longest for lengths in named if lengths.totals]
        return max(longest, key=lambda prompts: prompts.tokens) if longest else None

    # In words ---------------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """For a terminal: what was counted, what is wrong, and what to do about it."""
        blocks = [self._head()]
        blocks.append(_counted("rows by task", self.everything, lambda split: split.tasks))
        blocks.append(_counted("rows by number of images", self.everything, lambda split: split.image_counts))
        for split in self.everything:
            if split.first_bad:
                blocks.append(
                    _named(f"bad rows of {split.name}: {split.bad} ({_counts(split.reasons)})", split.first_bad, split.bad)
                )
        blocks += [self._images(), *self._broken(), self._boxes(), *self._leakage(), *self._tokens(), self._memory()]
        if problems := self.problems:
            blocks.append(_named(f"TO MEND before training ({len(problems)})", problems, 0))
        else:
            blocks.append("nothing to mend")
        return "\n\n".join(block for block in blocks if block)

    def _head(self) -> str:
        rows, bad = sum(split.good for split in self.found), sum(split.bad for split in self.found)
        lines = [f"validate {self.plan.title}: {_many(rows, 'good row')}, {bad:,} bad"]
        if self.plan.convention is not None and self.plan.size is not None:
            size = self.plan.size
            counted = "" if size.counted_from == "weights" else " (by config.json: the weights are not there)"
            budget = self.plan.convention.max_pixels_total
            shared = f"{budget:,} pixels shared by the images of a prompt" if budget else "the folder's own pixel limit per image"
            lines.append(f"model {self.plan.model} ({size.model_type}), {size.parameters:,} parameters{counted}; {shared}")
        lines += [f"left out: {what}" for what in self.plan.not_there]
        if self.plan.sample is not None:
            lines.append(f"every row was read; images and tokens are those of {self.plan.sample} rows of each split")
        return "\n".join(lines)

    def _images(self) -> str:
        rows = []
        for split in self.everything:
            sizes = sorted((s for path in split.images if isinstance(s := self.looked[path], tuple)), key=lambda s: s[0] * s[1])
            reasons = self.broken_reasons(split)
            shown = [f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1])] if sizes else ["-"] * 3
            missing = reasons["missing_image"]
            rows.append([split.name, f"{len(split.images):,}", str(missing), str(reasons.total() - missing), *shown])
        how = "decoded to their end" if self.plan.decode else "headers only: files that are cut short are not noticed"
        header = ["split", "files", "missing", "damaged", "smallest", "median", "largest"]
        return f"images, {how}\n{aligned(header, rows)}"

    def _broken(self) -> Iterator[str]:
        for split in self.everything:
            if broken := self.broken(split):
                lines = [str(error) for error in broken[:NAMED]]
                yield _named(f"images of {split.name} that cannot be used: {len(broken)}", lines, len(broken))

    def _boxes(self) -> str:
        rows = []
        for split in self.everything:
            if split.areas:
                spread = [f"{100 * _percentile(split.areas, percent):.2g}" for percent in (5, 50, 95)]
                counts = [str(split.tiny), str(split.whole), str(split.unnamed)]
                rows.append([split.name, f"{len(split.areas):,}", *spread, *counts])
        header = ["split", "boxes", "p5", "median", "p95", f"< {100 * TINY_AREA:g}", f"> {100 * WHOLE_AREA:g}", "image not named"]
        return f"boxes, in percent of their image\n{aligned(header, rows)}" if rows else ""

    def _leakage(self) -> Iterator[str]:
        if self.leaks:
            training, held_out = (list(dict.fromkeys(names)) for names in zip(*self.leaks, strict=True))
            rows = [[second, *(str(len(self.leaks[first, second])) for first in training)] for second in held_out]
            table = aligned(["shared with", *training], rows)
            yield f"images of training that are also in what is measured, by the hash of their bytes\n{table}"
        for (first, second), leaks in self.leaks.items():
            if leaks:
                pairs = list(dict.fromkeys(f"{leak.first} and {leak.second}" for leak in leaks))
                yield _named(f"{first} and {second} share {_many(len(leaks), 'image')}, in", pairs[:NAMED], len(pairs))

    def _tokens(self) -> Iterator[str]:
        counter = self.plan.counter
        counted = {name: lengths for name, lengths in self.lengths.items() if lengths.totals}
        for name, lengths in self.lengths.items():
            if lengths.too_thin:
                yield _named(f"images of {name} too thin for the model", lengths.too_thin[:NAMED], len(lengths.too_thin))
        if counter is None or not counted:
            return
        rows = []
        for name, lengths in counted.items():
            row = lengths.to_json()
            keys = ("rows", "min", "median", "p95", "max", "median_image_tokens", "over_limit")
            rows.append([name, *(f"{row[key]:,.0f}" for key in keys)])
        how = (
            "exact for this folder's image sizes, chat template and tokenizer"
            if counter.exact
            else f"image tokens exact, text tokens an ESTIMATE: {counter.why_not_exact}"
        )
        header = ["split", "prompts", "min", "median", "p95", "max", "median of images", f"over {self.plan.limit:,}"]
        histogram = _histogram([total for lengths in counted.values() for total in lengths.totals])
        yield f"tokens of a prompt without its completion; {how}\n{aligned(header, rows)}\n\n{histogram}"
        for name, lengths in counted.items():
            if lengths.first_over:
                yield _named(
                    f"prompts of {name} over {self.plan.limit:,} tokens: {lengths.over}", lengths.first_over, lengths.over
                )

    def _memory(self) -> str:
        lines = [f"  {line}" for name, estimate in self.estimates.items() for line in describe(name, estimate)]
        head = f"memory of one device, estimated for the longest prompt and completion, {self.plan.assumed}"
        return "\n".join([head, *lines]) if lines else ""

    # As JSON ----------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.plan.title,
            "model": self.plan.model,
            "problems": self.problems,
            "not_there": self.plan.not_there,
            "splits": {split.name: self._split_json(split) for split in self.everything},
            "leaks": [
                {"training": first, "held_out": second, "shared": [[leak.first, leak.second, leak.sha256] for leak in leaks]}
                for (first, second), leaks in self.leaks.items()
            ],
            "text_tokens": None if self.plan.counter is None else "exact" if self.plan.counter.exact else "estimated",
            "memory": {name: estimate.to_json() for name, estimate in self.estimates.items()},
        }

    def _split_json(self, split: _Split) -> dict[str, Any]:
        return {
            "files": [str(file.path) for file in split.files],
            "rows": split.good,
            "tasks": dict(split.tasks),
            "image_counts": {str(count): rows for count, rows in sorted(split.image_counts.items())},
            "bad_rows": dict(split.reasons),
            "first_bad_rows": split.first_bad,
            "images": len(split.images),
            "broken_images": dict(self.broken_reasons(split)),
            "first_broken_images": [str(error) for error in self.broken(split)[:NAMED]],
            "boxes": {"count": len(split.areas), "tiny": split.tiny, "whole": split.whole, "image_not_named": split.unnamed},
            "tokens": self.lengths[split.name].to_json() if split.name in self.lengths else None,
        }


def _counted(title: str, splits: Sequence[_Split], counter_of: Callable[[_Split], Counter[Any]]) -> str:
    """A row per task or image count, a column per split."""
    rows = []
    for name in sorted({name for split in splits for name in counter_of(split)}):
        counts = [counter_of(split)[name] for split in splits]
        rows.append([str(name), *(f"{count:,}" if count else "" for count in counts)])
    rows.append(["together", *(f"{split.good:,}" for split in splits)])
    return f"{title}\n{aligned(['', *(split.name for split in splits)], rows)}"


def _named(title: str, lines: Sequence[str], total: int) -> str:
    more = [f"  and {total - len(lines)} more"] if total > len(lines) else []
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines), *more])


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


def _histogram(values: Sequence[int]) -> str:
    """Prompts by length, in bins of equal width from the shortest to the longest."""
    low, high = min(values), max(values)
    # Few prompts need few bars.
    width = -(-(high - low + 1) // min(_BINS, 2 * math.isqrt(len(values))))
    bins = Counter((value - low) // width for value in values)
    most, places = max(bins.values()), len(f"{high:,}")
    lines = []
    for number in range(max(bins) + 1):
        bar = "█" * round(_BAR * bins[number] / most) or ("▏" if bins[number] else "")
        edges = f"{low + number * width:>{places},} - {min(high, low + (number + 1) * width - 1):>{places},}"
        lines.append(f"  {edges}  {bar} {bins[number]:,}".rstrip())
    return "\n".join(lines)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another --json") from error
