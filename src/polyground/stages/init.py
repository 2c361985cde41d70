"""A recipe for somebody's own model and data: four questions, or flags; looked at before anything is written.

The model folder tells its family, the annotation file its format, image files their folder. How numbers are to be read as boxes
is never told from them: that is asked. One file is divided into splits that share no image with what is measured. Nothing is
overwritten.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shlex
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from polyground.config import DataSource, GrpoConfig, SftConfig, load_recipe
from polyground.conventions import GRIDS, Convention, load_convention
from polyground.errors import ConfigError, DataError, GridError, PolygroundError, StorageError, UsageError
from polyground.exports import Style, names_under, write_row
from polyground.imagefile import image_size
from polyground.memory import ModelSize, Prompts, grpo_memory, many, model_size, readable, sft_memory
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.sources import SOURCES, BadRow, Item
from polyground.sources.reading import NAMED, screen_images
from polyground.sources.recognise import fields_of, recognise
from polyground.splits import ImageHashes
from polyground.stages import PLACEHOLDER, aligned, say, scan_file, source_options
from polyground.tokens import PromptCounter

SPLITS = ("train", "rl", "validation", "test")
HELD_OUT = {"test": (0.1, 500), "validation": (0.05, 200)}
"""Of one file: the share of its questions that is held out, and the most that are. The rest is halved between train and rl."""

BUDGETS = (3211264, 1605632, 802816, 401408, 200704)
"""Pixels the images of a prompt may share, the most first: 4096 image tokens of 28 x 28 pixels, half of them, and so on."""
USUAL_BUDGET = 1605632

GRID_WORDS = {
    "per_mille": "0-1000, x first (Qwen2-VL, Qwen3-VL, InternVL)",
    "unit": "fractions of the image, 0-1",
    "pixels": "pixels of the image file",
    "per_mille_yxyx": "0-1000, y first (Gemini)",
}

_TRIED, _MEASURED = 50, 200
"""Rows on which folders and grids are tried, and whose prompts are counted."""
_DTYPE, _SFT_COMPLETION = "bfloat16", 200
_SOME_BAD = 0.5
"""A larger share of bad rows means a wrong format, grid or folder."""

Answered = TypeVar("Answered")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", type=Path, default=Path("recipe.yaml"), help="the file to write (default: recipe.yaml)"
    )
    parser.add_argument("--model", metavar="FOLDER", help="the model to start from; `tiny` for the packaged one")
    parser.add_argument("--data", metavar="FILE", help="one annotation file, which is divided into splits")
    for split in SPLITS:
        parser.add_argument(f"--{split}", metavar="FILE", help=f"instead of --data: the file of {split}, used as it is")
    parser.add_argument("--grid", choices=GRIDS, help="how boxes are written in the data, where its format does not say")
    parser.add_argument("--teacher", metavar="URL", help="OpenAI-compatible address of the teacher, ending in /v1; '' for later")
    parser.add_argument("--teacher-model", metavar="NAME", help="as that server calls it")
    parser.add_argument("--teacher-key", metavar="VARIABLE", help="name of the environment variable with the key")
    parser.add_argument(
        "--teacher-grid", default="per_mille", metavar="GRID", help="how the teacher writes boxes (default: %(default)s)"
    )
    parser.add_argument("--source", choices=SOURCES, metavar="NAME", help="format of the data (default: told by its fields)")
    parser.add_argument("--images-root", metavar="FOLDER", help="what image names start from (default: looked for)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="another option of the reader")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one GPU: choose a pixel budget that fits")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--seed", type=int, default=0, help="another seed divides the file differently")


def run(options: argparse.Namespace) -> str:
    """Ask what no flag says, look at model and data, write the recipe, and say what was found and what to do next."""
    recipe: Path = options.recipe
    rows = recipe.parent / f"{recipe.stem}-data"
    _refuse_to_overwrite(recipe, options, rows)
    _require_answers(options)
    model = _settle(options.model, "1/4  Model folder (`tiny` for the packaged one): ", _look_at_model)
    files = _files(options)
    teacher = _teacher(options)
    scans = {split: _scan(file) for split, file in files.items()}
    measured = _measure(model, [example for scan in scans.values() for example in scan.first], memory=options.memory)
    if "data" in files:
        splits, shares = _write_rows(files["data"], scans["data"], rows, seed=options.seed)
    else:
        splits = {split: _without_bad(file, scans[split]) for split, file in files.items()}
        shares = {split: scan.good for split, scan in scans.items()}
    _write(recipe, _recipe_text(recipe, options, model, splits, shares, teacher, measured))
    load_recipe(recipe)
    return _report(recipe, model, files, scans, shares, measured, teacher)


def _refuse_to_overwrite(recipe: Path, options: argparse.Namespace, rows: Path) -> None:
    if recipe.suffix not in (".yaml", ".yml") or not str(recipe).isprintable():
        raise UsageError(f"{recipe}: a recipe's name ends in .yaml; write `polyground init {recipe.stem}.yaml`")
    for path in (recipe, *(() if _given(options) else (rows,))):
        if path.exists():
            raise UsageError(f"{path}: is there already, and nothing is overwritten; name another recipe, or move it away")


def _given(options: argparse.Namespace) -> dict[str, str]:
    """The files of single splits."""
    files = {split: getattr(options, split) for split in SPLITS if getattr(options, split)}
    if files and options.data:
        raise UsageError(f"give --data, which is divided, or files of splits (--{next(iter(files))}), not both")
    if files and not {"train", "rl"} <= set(files):
        raise UsageError("the cold start and RL each need questions of their own: give --train and --rl, or --data to be divided")
    return files


# ---------------------------------------------------------------- questions


def _require_answers(options: argparse.Namespace) -> None:
    """Without a terminal there is nobody to ask."""
    if sys.stdin.isatty():
        return
    missing = ["--model"] if options.model is None else []
    missing += ["--data"] if not options.data and not _given(options) else []
    if missing:
        raise UsageError(f"{' and '.join(missing)} missing, and this is no terminal to ask in; see `polyground init --help`")


def _settle(given: str | None, question: str, check: Callable[[str], Answered]) -> Answered:
    """What a flag says, or what is answered; a wrong answer is asked for again, a wrong flag is an error."""
    if given is not None:
        return check(given)
    while True:
        try:
            return check(input(question).strip())
        except EOFError:
            raise UsageError("nothing was answered; nothing was written") from None
        except PolygroundError as error:
            say(str(error))


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class _Model:
    path: str
    convention: Convention
    size: ModelSize

    @property
    def tiny(self) -> bool:
        return self.size.parameters < 100_000_000

    @property
    def about(self) -> str:
        boxes = "0-1000" if self.convention.per_mille else "pixels of the resized image"
        return f"{self.size.model_type}, {many(self.size.parameters)} parameters, boxes in {boxes}"


def _look_at_model(path: str) -> _Model:
    if not path:
        raise ConfigError("name a folder in the Hugging Face layout, or `tiny`")
    # A path that a shell has not seen may still hold a tilde.
    folder = path if path == "tiny" else os.path.expanduser(path)  # noqa: PTH111
    convention = load_convention(folder)
    return _Model(folder, convention, model_size(folder))


# ---------------------------------------------------------------- the data


def _files(options: argparse.Namespace) -> dict[str, DataSource]:
    """The data files by split; one that is still to be divided stands under `data`."""
    given = _given(options)
    if given:
        return {split: _look_at_file(path, options, name=split) for split, path in given.items()}
    return {"data": _settle(options.data, "2/4  Annotation file: ", lambda path: _look_at_file(path, options, name="data"))}


def _look_at_file(path: str, options: argparse.Namespace, *, name: str) -> DataSource:
    """The file with everything its reader must be told."""
    if not path:
        raise DataError("name the annotation file: JSON, JSON lines, parquet, or a folder of such shards")
    file = Path(os.path.expanduser(path))  # noqa: PTH111
    source = options.source or recognise(file)
    if source is None:
        fields = ", ".join(fields_of(file)) or "none"
        raise DataError(f"{file}: its format is not known by its fields ({fields}); say --source, one of {', '.join(SOURCES)}")
    parameters = inspect.signature(SOURCES[source]).parameters
    told = source_options(source, options.option)
    if options.images_root:
        told["images_root"] = options.images_root
    # Readers whose format fixes the numbers have a grid of their own, or none.
    open_grid = "grid" in parameters and parameters["grid"].default is None and "grid" not in told
    if open_grid and options.grid:
        told["grid"] = options.grid
    asks = open_grid and not options.grid and _needs_grid(source, file, told)
    grids: Sequence[str | None] = list(GRIDS) if asks else [None]
    if "images_root" in parameters and "images_root" not in told:
        told |= _images_root(source, file, told, grids)
    if asks:
        told["grid"] = _ask_grid(source, file, told)
    return DataSource(source=source, path=file, options={**told, "name": name})


def _needs_grid(source: str, file: Path, told: Mapping[str, Any]) -> bool:
    """Rows without numbers (multiple choices, boxes in ms-swift's `objects`) need none."""
    try:
        list(islice(_rows(source, file, told), _TRIED))
    except GridError:
        return True
    return False


def _fitting(source: str, file: Path, told: Mapping[str, Any], grid: str | None = None) -> tuple[int, int]:
    """Of the first rows, how many are good with their images there, and how many there are."""
    options = dict(told) if grid is None else {**told, "grid": grid}
    items = list(screen_images(islice(_rows(source, file, options), _TRIED), decode=False))
    return sum(isinstance(item, Example) for item in items), len(items)


def _images_root(source: str, file: Path, told: Mapping[str, Any], grids: Sequence[str | None]) -> dict[str, str]:
    """The first folder near the file from which most images of the first rows are found; none where its own will do."""
    here = file if file.is_dir() else file.parent
    tried = [here, here / "images", here.parent, here.parent / "images", Path.cwd(), Path.cwd() / "images", Path("/")]
    folders = [folder for folder in dict.fromkeys(tried) if folder.is_dir()]
    best, most = here, -1
    for folder in folders:
        good = max(_fitting(source, file, {**told, "images_root": str(folder)}, grid)[0] for grid in grids)
        if good > most:
            best, most = folder, good
    if most <= 0:
        items = islice(_rows(source, file, {**told, **({"grid": grids[0]} if grids[0] else {})}), _TRIED)
        why = "".join(f"\n  row {row.row} ({row.key}): {row.detail}" for row in list(_bad_of(items))[:NAMED])
        looked = ", ".join(map(str, folders))
        raise DataError(
            f"{file}: of the first rows, read as {source}, none is good with its images in {looked}; say --images-root "
            f"(what image names start from), another --grid or --source{why}"
        )
    return {"images_root": str(best)}


def _bad_of(items: Iterator[Item]) -> Iterator[BadRow]:
    return (item for item in screen_images(items, decode=False) if isinstance(item, BadRow))


def _ask_grid(source: str, file: Path, told: Mapping[str, Any]) -> str:
    fits = {grid: _fitting(source, file, told, grid) for grid in GRIDS}
    lines = [f"     {grid:<15} {words}; {fits[grid][0]} of {fits[grid][1]} rows fit" for grid, words in GRID_WORDS.items()]
    question = "\n".join(["3/4  How are the boxes in it written? The file does not say:", *lines])
    if not sys.stdin.isatty():
        raise GridError(f"{file}: the file does not say how its boxes are written; say --grid\n" + "\n".join(lines))

    def check(answer: str) -> str:
        if answer not in GRIDS:
            raise DataError(f"{answer!r} is none of {', '.join(GRIDS)}")
        return answer

    return _settle(None, f"{question}\n     ", check)


@dataclass(slots=True)
class _Scan:
    """What the rows of one file say; of each row only its key's rank and its group are kept."""

    good: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first_bad: list[str] = field(default_factory=list)
    first: list[Example] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("q"))
    """Of each good row: an earlier row of the same group, or itself. Rows that share an image are of one group."""
    folders: set[Path] = field(default_factory=set)

    def group(self, row: int) -> int:
        while self.parents[row] != row:
            self.parents[row] = self.parents[self.parents[row]]
            row = self.parents[row]
        return row


def _scan(file: DataSource) -> _Scan:
    """Every row once, its images looked up."""
    scan, owners, same = _Scan(), dict[Path, int](), _Copies()
    for item in _items(file):
        if isinstance(item, BadRow):
            scan.reasons[item.reason] += 1
            if len(scan.first_bad) < NAMED:
                scan.first_bad.append(f"row {item.row} ({item.key}): {item.reason}: {item.detail}")
            continue
        row = scan.good
        scan.good += 1
        scan.tasks[item.task] += 1
        scan.images[len(item.images)] += 1
        scan.keys.append(item.key)
        scan.parents.append(row)
        scan.folders.update(image.parent for image in item.images)
        if len(scan.first) < _MEASURED:
            scan.first.append(item)
        for image in item.images:
            scan.parents[scan.group(owners.setdefault(same.of(image), row))] = scan.group(row)
    bad = scan.reasons.total()
    if not scan.good or bad > _SOME_BAD * (bad + scan.good):
        why = "".join(f"\n  {line}" for line in scan.first_bad)
        raise DataError(
            f"{file.path}: {bad} of {bad + scan.good} rows are bad, read as {file.source}; is it the right --source, --grid and "
            f"--images-root?{why}"
        )
    return scan


class _Copies:
    """Tells copies of an image, under whatever name, by their bytes; only files of one length are read."""

    def __init__(self) -> None:
        self._lengths: dict[int, list[Path]] = {}
        self._first: dict[Path, Path] = {}
        self._hashes = ImageHashes()

    def of(self, image: Path) -> Path:
        """The first file with the same bytes; itself, where there was none."""
        if image not in self._first:
            others = self._lengths.setdefault(image.stat().st_size, [])
            same = next((other for other in others if self._hashes.of(other) == self._hashes.of(image)), None)
            if same is None:
                others.append(image)
            self._first[image] = same or image
        return self._first[image]


def _items(file: DataSource) -> Iterator[Item]:
    return screen_images(scan_file(file), decode=False)


def _rows(source: str, file: Path, options: Mapping[str, Any]) -> Iterator[Item]:
    return scan_file(DataSource(source=source, path=file, options=dict(options)))


def _without_bad(file: DataSource, scan: _Scan) -> DataSource:
    """The file as its stages read it: by default they stop at a bad row."""
    return file.model_copy(update={"options": {**file.options, "on_bad": "quarantine"}}) if scan.reasons else file


# ---------------------------------------------------------------- splits


def _places(scan: _Scan, *, seed: int) -> array[int]:
    """Of each good row, the position of its split in SPLITS; a group is held out whole, or not at all."""
    room = {split: min(round(share * scan.good), most) for split, (share, most) in HELD_OUT.items()}
    members: dict[int, list[int]] = {}
    for row in range(scan.good):
        members.setdefault(scan.group(row), []).append(row)

    def rank(row: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{scan.keys[row]}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    places, rest = array("b", bytes(scan.good)), list[int]()
    for group in sorted(members.values(), key=lambda rows: rank(rows[0])):
        split = next((name for name, left in room.items() if len(group) <= left), None)
        if split is None:
            rest += group
            continue
        room[split] -= len(group)
        for row in group:
            places[row] = SPLITS.index(split)
    for position, row in enumerate(sorted(rest, key=rank)):
        places[row] = position % 2
    return places


def _write_rows(file: DataSource, scan: _Scan, folder: Path, *, seed: int) -> tuple[dict[str, DataSource], dict[str, int]]:
    """The good rows in this project's own format, a file per split, and how many questions each has."""
    root = Path(os.path.commonpath([path.absolute() for path in scan.folders]))
    root = root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root
    style, places = Style(name=names_under(root)), _places(scan, seed=seed)
    counts = Counter(SPLITS[place] for place in places)
    try:
        folder.mkdir(parents=True)
        out = {split: (folder / f"{split}.jsonl").open("w", encoding="utf-8") for split in SPLITS if counts[split]}
        try:
            examples = (item for item in _items(file) if isinstance(item, Example))
            for place, example in zip(places, examples, strict=True):
                out[SPLITS[place]].write(json.dumps(write_row("polyground", example, (), style), ensure_ascii=False) + "\n")
        finally:
            for stream in out.values():
                stream.close()
    except OSError as error:
        raise StorageError(
            f"{folder}: the rows cannot be written ({error.strerror}); make room there, delete it, try again"
        ) from error
    options = {"images_root": str(root)}
    splits = {split: DataSource(source="polyground", path=folder / f"{split}.jsonl", options=options) for split in out}
    return splits, {split: counts[split] for split in out}


# ---------------------------------------------------------------- what it will take


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Of the first rows, and of the settings that the recipe gets."""

    budget: int | None
    """Pixels that the images of a prompt share; None leaves the folder's own limit."""
    images: int
    """Most images of a prompt."""
    tokens: int
    """Of the longest prompt."""
    sft: int
    """Bytes."""
    grpo: int
    fits: bool = True


def _measure(model: _Model, examples: Sequence[Example], *, memory: float | None) -> _Measured:
    """The largest budget that fits into the memory, or the usual one where no memory is said."""
    if memory is not None and memory <= 0:
        raise UsageError(f"--memory {memory:g}: give the GiB of one GPU, such as 24")
    if model.tiny:
        return _with_budget(model, examples, None)
    budgets = BUDGETS if memory is not None else (USUAL_BUDGET,)
    found = [_with_budget(model, examples, budget) for budget in budgets]
    if memory is None:
        return found[0]
    # A tenth is for what the estimate leaves out: the CUDA context and fragmentation.
    room = int(0.9 * memory * 2**30)
    fitting = next((measured for measured in found if max(measured.sft, measured.grpo) <= room), None)
    return fitting or _with_budget(model, examples, BUDGETS[-1], fits=False)


def _with_budget(model: _Model, examples: Sequence[Example], budget: int | None, *, fits: bool = True) -> _Measured:
    convention = load_convention(model.path, max_pixels_total=budget)
    counter = PromptCounter(convention)
    longest, most = Prompts(tokens=1, image_tokens=0), 0
    for example in examples:
        sizes = [image_size(image) for image in example.images]
        messages = student_messages(example, convention.grids(sizes), instruction=_instruction(model))
        length = counter.count(messages, convention.canvases(sizes))
        most = max(most, len(sizes))
        if length.total > longest.tokens:
            longest = Prompts(tokens=length.total, image_tokens=length.images)
    dtype = "float32" if model.tiny else _DTYPE
    sft = SftConfig(**_settings(model, "sft"))
    grpo = GrpoConfig(**_settings(model, "grpo"))
    return _Measured(
        budget=budget,
        images=most,
        tokens=longest.tokens,
        sft=sft_memory(model.size, sft, dtype=dtype, prompts=longest, completion=_SFT_COMPLETION).total,
        grpo=grpo_memory(model.size, grpo, dtype=dtype, prompts=longest).total,
        fits=fits,
    )


def _instruction(model: _Model) -> str:
    return "" if model.path == "tiny" else "Think first, then answer."


def _settings(model: _Model, stage: str) -> dict[str, Any]:
    """What the recipe says of training: as in recipes/tiny.yaml, or in the recipes for real models."""
    if model.tiny:
        own: dict[str, Any] = {"per_device_train_batch_size": 8, "lora_r": 32, "lora_alpha": 64, "bf16": False}
        rate = {"sft": 1e-3, "grpo": 3e-4}[stage]
        lasts: dict[str, Any] = {"sft": {"num_train_epochs": 3}, "grpo": {"max_steps": 80}}[stage]
    else:
        own = {"per_device_train_batch_size": 1, "lora_r": 64, "lora_alpha": 128, "bf16": True, "gradient_checkpointing": True}
        own["gradient_accumulation_steps"] = {"sft": 16, "grpo": 8}[stage]
        rate = {"sft": 1e-4, "grpo": 1e-5}[stage]
        lasts = {"sft": {"num_train_epochs": 1}, "grpo": {"max_steps": 200}}[stage]
    more: dict[str, Any] = {"num_generations": 8, "max_completion_length": 96 if model.tiny else 256} if stage == "grpo" else {}
    return {**lasts, "learning_rate": rate, **own, **more}


# ---------------------------------------------------------------- the teacher


def _teacher(options: argparse.Namespace) -> tuple[str, str]:
    """(address, model) of the teacher; empty where it is to be filled in later."""

    def check(answer: str) -> tuple[str, str]:
        url, _, name = answer.partition(" ")
        name = name.strip() or options.teacher_model or ""
        if url and not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no address; write http://localhost:8000/v1, or nothing for later")
        if url and not name:
            how = "add --teacher-model NAME" if options.teacher else "write its address, a blank, and the model's name"
            raise UsageError(f"the server has to be told which model: {how}")
        return url, name

    if options.teacher is None and not sys.stdin.isatty():
        return "", ""
    question = "4/4  Teacher's address and model, as in http://localhost:8000/v1 qwen-72b (empty: later): "
    return _settle(options.teacher, question, check)


# ---------------------------------------------------------------- the recipe


_NO_TEACHER = (PLACEHOLDER, "the-teacher")


def _recipe_text(
    recipe: Path,
    options: argparse.Namespace,
    model: _Model,
    splits: Mapping[str, DataSource],
    shares: Mapping[str, int],
    teacher: tuple[str, str],
    measured: _Measured,
) -> str:
    """The file, with a comment wherever a choice was made."""
    grpo = _settings(model, "grpo")
    tokens = f"{measured.tokens:,} tokens"
    parts = [
        _head(recipe, model),
        [
            f"name: {_yaml(recipe.stem)}",
            f"out: {_yaml(options.out or f'runs/{recipe.stem}')}",
            f"seed: {options.seed}",
        ],
        [
            "model:",
            f"  path: {_yaml(model.path)}",
            f"  dtype: {'float32' if model.tiny else _DTYPE}",
            *([f"  max_pixels_total: {measured.budget} # shared by the images of a prompt"] if measured.budget else []),
        ],
        ["world: {train: 0, rl: 0, validation: 0, test: 0, ood: 0, perception: 0} # nothing is simulated"],
        _data(splits, shares),
        ["prompts:", f"  instruction: {_yaml(_instruction(model))}"],
        [
            "rewards: # one scorer for the teacher's answers, rejection, RL and evaluation; docs/rewards.md",
            "  - {name: iou, weight: 0.8} # overlap with the annotation, on the right image",
            "  - {name: image, weight: 0.1} # the right image",
            "  - {name: format, weight: 0.1} # one think block, one answer block",
        ],
        _synthesis(options, teacher),
        [
            f"sft: # about {readable(measured.sft)} on one device for the longest of the first prompts ({tokens})",
            *_section(_settings(model, "sft")),
        ],
        [
            "reject: # keeps the questions that the SFT model sometimes gets right",
            *_section({"num_generations": 8, "max_completion_length": grpo["max_completion_length"]}),
        ],
        [f"grpo: # about {readable(measured.grpo)}", *_section(grpo)],
        ["evaluate:", *_section({"max_completion_length": 128 if model.tiny else 512})],
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts)


def _head(recipe: Path, model: _Model) -> list[str]:
    """What the file is, and the commands that go with it."""
    shown = shlex.quote(str(recipe))
    steps = {
        f"polyground doctor {shown}": "what this machine lacks for it",
        f"polyground check-coords {shown} train --out boxes.png": "the boxes, drawn: look before training",
        f"polyground validate {shown}": "rows, images, leakage, tokens, memory",
        f"polyground run {shown} --dry-run": "what would be done",
        f"polyground run {shown}": "",
    }
    return [
        f"# {recipe.stem}: {model.about}.",
        "# Written by `polyground init`; a key that is left out has its default, and docs/reference.md lists all of them.",
        *(f"#   {command:<{max(map(len, steps))}}   {what}".rstrip() for command, what in steps.items()),
    ]


def _data(splits: Mapping[str, DataSource], shares: Mapping[str, int]) -> list[str]:
    lines = ["data: # benchmarks of your own or public ones go under `ood` and `perception`; docs/data.md"]
    for split, file in splits.items():
        entry = {"source": file.source, "path": str(file.path), "options": dict(file.options)}
        lines += [f"  {split}: # {shares[split]:,} questions", f"    - {_yaml(entry)}"]
    return lines


def _synthesis(options: argparse.Namespace, teacher: tuple[str, str]) -> list[str]:
    url, name = teacher if teacher[0] else _NO_TEACHER
    later = "" if teacher[0] else " # CHANGE: no teacher was named; address and model are placeholders"
    return [
        "synthesize: # questions and images of `train` are sent to this server; docs/teacher.md",
        "  teacher: endpoint",
        f"  teacher_base_url: {_yaml(url)}{later}",
        f"  teacher_model: {_yaml(name)}",
        f"  api_key_env: {_yaml(options.teacher_key)} # the *name* of the environment variable that holds the key",
        f"  teacher_grid: {_yaml(options.teacher_grid)} # how the teacher writes boxes; GPT, Claude: pixels; or its model folder",
        "  samples_per_example: 2 # attempts; the best one that the scorer confirms is kept",
        "  aid: failed # questions it fails unaided it explains, shown the annotation",
    ]


def _section(settings: Mapping[str, Any]) -> list[str]:
    return [f"  {key}: {_yaml(value)}" for key, value in settings.items()]


def _yaml(value: Any) -> str:
    """The value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path}: is there already, and nothing is overwritten; name another recipe") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); name a file in a folder you may write to") from error


# ---------------------------------------------------------------- what is said at the end


def _report(
    recipe: Path,
    model: _Model,
    files: Mapping[str, DataSource],
    scans: Mapping[str, _Scan],
    shares: Mapping[str, int],
    measured: _Measured,
    teacher: tuple[str, str],
) -> str:
    lines = [f"wrote {recipe}", f"model  {model.path}: {model.about}"]
    for split, file in files.items():
        scan = scans[split]
        told = ", ".join(f"{key}: {value}" for key, value in file.options.items() if key != "name")
        counts = ", ".join(f"{count} {reason}" for reason, count in scan.reasons.most_common())
        images = ", ".join(f"{rows:,} of {count}" for count, rows in sorted(scan.images.items()))
        lines += [
            f"{split:<6} {file.path}: read as {file.source}{f' ({told})' if told else ''}",
            f"       {scan.good:,} good rows, {scan.reasons.total():,} bad{f' ({counts}), left out' if counts else ''}",
            f"       images of a question: {images}",
            *(f"       {bad}" for bad in scan.first_bad[:3]),
        ]
    rows = [[split, f"{count:,}"] for split, count in shares.items()]
    lines += ["", aligned(["split", "questions"], rows)]
    if "data" in files:
        lines += [
            "no image of validation or test is in another split, under whatever name;",
            "train and rl may share images, and share no question",
        ]
    if "data" not in files and files["train"].path == files["rl"].path:
        lines.append("train and rl are one file: RL would learn from the questions that the cold start has been shown answers to")
    if "test" not in shares:
        why = ": the questions share their images, or are few" if "data" in files else ""
        lines.append(f"nothing is held out to measure with{why}. Give --test a file of its own")
    lines += [
        "",
        "memory of one device, estimated for the longest of the first prompts "
        f"({measured.images} images, {measured.tokens:,} tokens): SFT {readable(measured.sft)}, GRPO {readable(measured.grpo)}",
    ]
    if not measured.fits:
        lines.append("that is more than there is, even with few pixels: take a smaller model, or several GPUs (docs/scaling.md)")
    if not teacher[0]:
        lines.append(f"no teacher was named: fill in teacher_base_url and teacher_model in {recipe}")
    commands = (
        f"doctor {recipe}",
        f"check-coords {recipe} train --out boxes.png",
        f"validate {recipe}",
        f"run {recipe} --dry-run",
    )
    return "\n".join([*lines, "", "next:", *(f"  polyground {command}" for command in commands)])
