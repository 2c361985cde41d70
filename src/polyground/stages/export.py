"""Hand a run's predictions and results to other people's tools: COCO, FiftyOne, Label Studio, supervision, the Hugging Face hub.

It reads what `evaluate` left and writes one new folder, which appears under its name when it is whole. Nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polyground import __version__
from polyground.cards import Identity, Origin, dataset_card, model_card
from polyground.config import Recipe, load_recipe
from polyground.errors import ConfigError, DataError, StorageError, UsageError
from polyground.exports import read_image
from polyground.imagefile import image_size
from polyground.predictions import IMAGES, LAYOUTS, Asked, Picture, coco, fiftyone, hub, label_studio, supervision
from polyground.records import Example, Rollout
from polyground.runs import ROLES
from polyground.stages import benchmark_rows, model_path, read_split
from polyground.storage import (
    LOCK,
    MANIFEST,
    STATE,
    atomic_write_json,
    atomic_write_rows,
    atomic_write_text,
    read_json,
    read_manifest,
    read_rows,
    require_whole,
)

ABOUT = "export.json"
"""What a folder was made of; only a folder that has it is ever replaced."""

CARD, RESULTS = "README.md", "results.json"
LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves files of its own disk."""

OURS = (MANIFEST, STATE, LOCK, "merged_from.json")
"""Files of a model folder that speak of this machine, and stay here."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `polyground export RUN --to …` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "layouts (--to):\n" + "\n".join(f"  {name:<13} {about}" for name, about in LAYOUTS.items())
    parser.add_argument("run", metavar="RUN", type=Path, help="recipe of the run; for the simulated world, its folder is enough")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write, see below")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder (a model folder for model-card)")
    parser.add_argument("--split", action="append", metavar="NAME", help="only this split; repeatable (default: all evaluated)")
    parser.add_argument("--model", action="append", choices=ROLES, help="only this model; repeatable (default: all evaluated)")
    parser.add_argument(
        "--link", action="store_true", help="images and weights by hard links instead of copies: no space, one file"
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that this command has written before")
    studio = parser.add_argument_group("label-studio")
    studio.add_argument("--image-prefix", metavar="URL", help=f"goes before images/…; default {LOCAL_FILES}")
    cards = parser.add_argument_group("hf-dataset, model-card")
    cards.add_argument("--name", help="title of the card (default: the run's name)")
    cards.add_argument("--license", metavar="ID", help="as the hub spells it, such as apache-2.0; never guessed")
    cards.add_argument("--language", metavar="CODE", help="of the questions, such as en")
    cards.add_argument(
        "--base-model", metavar="OWNER/NAME", help="on the hub, of the model that training started from (model-card)"
    )


def run(options: argparse.Namespace) -> str:
    """Write the folder and say what is in it."""
    _require_fitting(options)
    opened = _open(options)
    if options.to == "model-card":
        return _write_model(opened, options)
    with _new_folder(options.out, force=options.force) as draft:
        counts = _WRITERS[options.to](opened, options, draft)
        about = {"polyground": __version__, "to": options.to, "models": opened.models, "splits": counts.splits}
        atomic_write_json(draft / ABOUT, about)
    return counts.text(options)


def _require_fitting(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that another layout has."""
    fitting = {
        "image_prefix": ("label-studio",),
        "name": ("hf-dataset", "model-card"),
        "license": ("hf-dataset", "model-card"),
        "language": ("hf-dataset", "model-card"),
        "base_model": ("model-card",),
    }
    for name, layouts in fitting.items():
        if getattr(options, name) is not None and options.to not in layouts:
            raise UsageError(f"--{name.replace('_', '-')} goes with --to {' or '.join(layouts)}; leave it out")
    if options.to == "model-card" and options.split:
        raise UsageError("--split: a model's card tells all splits that were evaluated; leave it out")
    if options.to == "model-card" and len(options.model or ["rl"]) > 1:
        raise UsageError("--model: a model folder holds one model; name one")


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose answers are there."""

    recipe: Recipe
    results: Mapping[str, Any]
    outcomes: Mapping[str, Any]
    models: list[str]
    splits: list[str]

    def rows(self, split: str) -> list[_Answered]:
        """Every question of a split with the replies that there are, in the order of the data."""
        annotation = benchmark_rows(self.recipe, split)
        examples = read_split(self.recipe, split) if annotation is None else list(annotation.examples)
        replies = {model: _replies(self.recipe.out / "evaluate" / model / f"{split}.jsonl") for model in self.models}
        right = {model: _flat(self.outcomes["splits"].get(split, {}).get(model, {})) for model in self.models}
        known = {example.key for example in examples}
        if strange := [key for found in replies.values() for key in found if key not in known and "~" not in key]:
            raise DataError(
                f"{self.recipe.out}: {len(strange)} replies to {split} are to questions that its data do not have "
                f"(such as {strange[0]}); give the recipe that was evaluated"
            )
        answered = {model: found for model, found in replies.items() if found}
        return [
            _Answered(
                example,
                {model: found[example.key] for model, found in answered.items() if example.key in found},
                {model: right[model][example.key] for model in answered if example.key in right[model]},
            )
            for example in examples
            if any(example.key in found for found in answered.values())
        ]


@dataclass(frozen=True, slots=True)
class _Answered:
    example: Example
    replies: Mapping[str, Rollout]
    right: Mapping[str, float]


def _open(options: argparse.Namespace) -> _Run:
    recipe = load_recipe(options.run) if options.run.is_file() else _recipe_of(options.run)
    folder = recipe.out / "evaluate"
    if not ((folder / RESULTS).is_file() and (folder / "outcomes.json").is_file()):
        raise StorageError(f"{folder}: is not evaluated; run `polyground evaluate` with its recipe first")
    results, outcomes = read_json(folder / RESULTS), read_json(folder / "outcomes.json")
    there = list(results["models"])
    if missing := [model for model in options.model or [] if model not in there]:
        raise UsageError(f"--model {missing[0]}: was not evaluated in {recipe.out}; evaluated were {', '.join(there)}")
    splits = [split for split, table in results["splits"].items() if "pooled" not in table]
    if unknown := [split for split in options.split or [] if split not in splits]:
        raise UsageError(f"--split {unknown[0]}: was not evaluated in {recipe.out}; evaluated were {', '.join(splits)}")
    models = [model for model in there if model in (options.model or there)]
    for model in models:
        require_whole(folder / model)
    return _Run(recipe, results, outcomes, models, [split for split in splits if split in (options.split or splits)])


def _recipe_of(folder: Path) -> Recipe:
    """What is needed of the recipe of a run on the simulated world. Raises for a folder that is none, or has data of its own."""
    if not folder.exists():
        raise StorageError(f"{folder}: no such recipe or run; give a recipe, or the folder of a run")
    manifests = [folder / "evaluate" / role for role in ROLES if (folder / "evaluate" / role / MANIFEST).is_file()]
    if not manifests:
        raise StorageError(
            f"{folder}: holds no answers (evaluate/MODEL/{MANIFEST}); is it the folder of a run that was evaluated?"
        )
    asked = read_manifest(manifests[0]).config
    own = [split for split, told in asked["data"].items() if not isinstance(told, Mapping)]
    if own:
        raise ConfigError(f"{folder}: {', '.join(own)} are data of your own, and a run keeps none; give its recipe instead")
    world = read_manifest(folder / "world").config["world"]
    tree = {"name": folder.absolute().name, "out": folder, "world": world, "prompts": asked["prompts"]}
    limit = {"limit_per_split": asked["evaluate"].get("limit_per_split")}
    model = {name: value for name, value in asked["model"].items() if name != "sha256"}
    try:
        return Recipe.model_validate({**tree, "model": model, "evaluate": limit})
    except ValidationError as error:
        raise StorageError(
            f"{folder}: was made by another version ({error.error_count()} keys differ); give its recipe"
        ) from error


def _replies(path: Path) -> dict[str, Rollout]:
    if not path.is_file():
        return {}
    return {rollout.example: rollout for rollout in map(Rollout.from_json, read_rows(path))}


def _flat(outcomes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {key: value for found in outcomes.values() for key, value in found.items()}


# ---------------------------------------------------------------- folders and files


@contextmanager
def _new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A draft beside the folder, which takes its place when the block ends well. Only an earlier export is ever replaced."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise StorageError(f"{out}: exists; choose another folder, or add --force to replace an earlier export")
        if not (out / ABOUT).is_file():
            raise StorageError(f"{out}: was not written by `polyground export` and is not replaced; choose another folder")
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if out.is_dir():
            shutil.rmtree(out)
        draft.rename(out)
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written ({error.strerror or error}); free space, or choose another --out"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _take(source: Path, target: Path, *, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            # What is meant is the file, wherever links lead.
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


def _asked(rows: Sequence[_Answered], split: str, options: argparse.Namespace, images: Path | None) -> list[Asked]:
    """The questions with their pictures, which are put under `images` where it is given."""
    found = []
    for position, row in enumerate(rows):
        pictures = []
        for number, image in enumerate(row.example.images, start=1):
            width, height = image_size(image)
            file = f"{split}/{position:05d}-{number}{image.suffix.lower()}"
            if images is not None:
                _take(image, images / file, link=options.link)
            pictures.append(Picture(number=number, file=file, width=width, height=height))
        found.append(Asked(example=row.example, pictures=pictures, replies=row.replies, right=row.right))
    return found


@dataclass(slots=True)
class _Counts:
    """What became of the questions and boxes."""

    splits: dict[str, int] = field(default_factory=dict)
    """Questions written, by split."""
    letters: int = 0
    """Questions that the layout cannot hold: answered by a letter."""
    unplaced: Counter[str] = field(default_factory=Counter)
    """Boxes left out by model: of which nothing says the image."""
    boxless: list[str] = field(default_factory=list)
    """Files of results without any box."""

    def count(self, split: str, rows: Sequence[Asked]) -> None:
        self.splits[split] = len(rows)
        for asked in rows:
            for model in asked.replies:
                self.unplaced[model] += asked.unplaced(asked.answer(model))

    def text(self, options: argparse.Namespace) -> str:
        lines = [
            f"export: wrote {options.out} ({options.to}): {', '.join(f'{n} of {split}' for split, n in self.splits.items())}"
        ]
        if self.letters:
            lines.append(f"left out  {self.letters} questions answered by a letter, which have no boxes")
        if unplaced := +self.unplaced:
            told = ", ".join(f"{count} of {model}" for model, count in unplaced.items())
            lines.append(f"left out  boxes that name none of several images: {told}")
        if self.boxless:
            lines.append(f"empty     {', '.join(self.boxless)}: no box was answered; pycocotools' loadRes refuses an empty list")
        return "\n".join(lines)


# ---------------------------------------------------------------- one writer per layout


def _grounded(opened: _Run, options: argparse.Namespace, draft: Path, counts: _Counts) -> Iterator[tuple[str, list[Asked]]]:
    """The questions of each split that have boxes. Raises DataError when none has."""
    for split in opened.splits:
        answered = opened.rows(split)
        grounding = [row for row in answered if row.example.target.choice is None]
        counts.letters += len(answered) - len(grounding)
        if grounding:
            rows = _asked(grounding, split, options, draft / IMAGES)
            counts.count(split, rows)
            yield split, rows
    if not counts.splits:
        raise DataError(
            f"{opened.recipe.out}: no question of {', '.join(opened.splits)} is answered by boxes; {options.to} holds boxes"
        )


def _write_coco(opened: _Run, options: argparse.Namespace, draft: Path) -> _Counts:
    counts = _Counts()
    for split, rows in _grounded(opened, options, draft, counts):
        atomic_write_json(draft / "annotations" / f"{split}.json", coco.truth(rows, name=f"{opened.recipe.name}, {split}"))
        for model in opened.models:
            found = coco.results(rows, model)
            file = f"results/{split}/{model}.json"
            atomic_write_json(draft / file, found)
            if not found:
                counts.boxless.append(file)
    return counts


def _write_supervision(opened: _Run, options: argparse.Namespace, draft: Path) -> _Counts:
    counts = _Counts()
    for split, rows in _grounded(opened, options, draft, counts):
        truth = coco.truth(rows, name=f"{opened.recipe.name}, {split}")
        for image in truth["images"]:
            image["file_name"] = image["file_name"].rpartition("/")[2]
        atomic_write_json(draft / split / "truth.json", truth)
        for model in opened.models:
            atomic_write_json(draft / split / f"{model}.json", supervision.arrays(rows, model))
    atomic_write_text(draft / CARD, supervision.README)
    return counts


def _write_fiftyone(opened: _Run, options: argparse.Namespace, draft: Path) -> _Counts:
    counts = _Counts()
    samples: list[dict[str, Any]] = []
    for split in opened.splits:
        rows = _asked(opened.rows(split), split, options, draft / IMAGES)
        counts.count(split, rows)
        samples += fiftyone.samples(split, rows)
    atomic_write_json(draft / "metadata.json", fiftyone.metadata(opened.recipe.name, opened.models))
    atomic_write_text(draft / "samples.json", json.dumps({"samples": samples}))
    atomic_write_text(draft / CARD, fiftyone.README)
    return counts


def _write_label_studio(opened: _Run, options: argparse.Namespace, draft: Path) -> _Counts:
    counts = _Counts()
    prefix = f"{LOCAL_FILES if options.image_prefix is None else options.image_prefix}{IMAGES}/"
    for split in opened.splits:
        rows = _asked(opened.rows(split), split, options, draft / IMAGES)
        counts.count(split, rows)
        for images, some in label_studio.by_images(rows).items():
            folder = draft / split / f"{images}-image{'s' if images > 1 else ''}"
            atomic_write_text(folder / "config.xml", label_studio.configuration(some))
            tasks = [label_studio.task(asked, number, prefix=prefix) for number, asked in enumerate(some, start=1)]
            atomic_write_json(folder / "tasks.json", tasks)
    return counts


def _write_hf_dataset(opened: _Run, options: argparse.Namespace, draft: Path) -> _Counts:
    counts = _Counts()
    schema = hub.schema(opened.models)
    files = {}
    for split in opened.splits:
        rows = _asked(opened.rows(split), split, options, None)
        if not rows:
            continue
        counts.count(split, rows)
        name = hub.split_name(split)
        files[name] = f"data/{name}.parquet"
        _write_parquet(draft / files[name], schema, (_hub_row(asked, opened.models) for asked in rows))
    atomic_write_rows(draft / "results" / "results.jsonl", hub.result_rows(opened.results))
    atomic_write_json(draft / RESULTS, opened.results)
    identity = _identity(opened, options, f"{opened.recipe.name} predictions")
    splits = {hub.split_name(split): count for split, count in counts.splits.items()}
    card = dataset_card(opened.results, identity, models=opened.models, splits=splits, files=files)
    atomic_write_text(draft / CARD, card)
    return counts


def _hub_row(asked: Asked, models: Sequence[str]) -> dict[str, Any]:
    return hub.row(asked, models, [read_image(image) for image in asked.example.images])


def _write_parquet(path: Path, schema: Any, rows: Iterator[dict[str, Any]], *, size: int = 100) -> None:
    """Row groups of so many rows: what the hub's viewer opens at once."""
    from pyarrow import Table
    from pyarrow.parquet import ParquetWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with ParquetWriter(path, schema) as writer:
        held: list[dict[str, Any]] = []
        for row in rows:
            held.append(row)
            if len(held) == size:
                writer.write_table(Table.from_pylist(held, schema=schema))
                held = []
        if held:
            writer.write_table(Table.from_pylist(held, schema=schema))


_WRITERS: dict[str, Callable[[_Run, argparse.Namespace, Path], _Counts]] = {
    "coco": _write_coco,
    "fiftyone": _write_fiftyone,
    "label-studio": _write_label_studio,
    "supervision": _write_supervision,
    "hf-dataset": _write_hf_dataset,
}


# ---------------------------------------------------------------- the model


def _write_model(opened: _Run, options: argparse.Namespace) -> str:
    """The card beside the weights: in the run's own model folder, or in a new one with what other programs load."""
    role = (options.model or [opened.models[-1]])[0]
    if ROLES[role] is None:
        raise UsageError("--model base: the base comes from elsewhere and has its own card; name sft or rl")
    source = Path(model_path(opened.recipe, role))
    origin = _origin(opened, role, source)
    identity = _identity(opened, options, f"{opened.recipe.name} {role}")
    in_place = options.out.is_dir() and options.out.resolve() == source.resolve()
    card = model_card(opened.results, origin, identity, beside=not in_place)
    if in_place:
        if (source / CARD).exists() and not options.force:
            raise StorageError(f"{source / CARD} exists; add --force to replace it")
        atomic_write_text(source / CARD, card)
        return f"export: wrote {source / CARD}"
    with _new_folder(options.out, force=options.force) as draft:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in OURS and not file.name.startswith("."):
                _take(file, draft / file.name, link=options.link)
        atomic_write_text(draft / CARD, card)
        atomic_write_json(draft / RESULTS, opened.results)
        atomic_write_json(draft / ABOUT, {"polyground": __version__, "to": options.to, "models": [role]})
    return f"export: wrote {options.out}: the {role} model with its card; look at both, then push them"


def _identity(opened: _Run, options: argparse.Namespace, name: str) -> Identity:
    return Identity(name=options.name or name, license=options.license, base_model=options.base_model, language=options.language)


def _origin(opened: _Run, role: str, source: Path) -> Origin:
    """What the manifests of the run say made this model."""
    told = opened.results["tags"]["models"].get(role, {})
    facts: list[tuple[str, str]] = []
    for stage in ("synthesize", "sft", "reject", "grpo"):
        if role == "sft" and stage in ("reject", "grpo"):
            continue
        if (opened.recipe.out / stage / MANIFEST).is_file():
            facts += _facts_of(opened.recipe.out / stage, stage)
    manifest = read_manifest(source)
    if (difference := manifest.summary.get("max_logprob_difference")) is not None:
        facts.append(("merge: largest change of a log-probability", f"{difference:.2g}"))
    config = read_json(source / "config.json")
    return Origin(
        role=role,
        model_type=str(config.get("model_type")),
        facts=facts,
        instruction=str(opened.results["tags"].get("instruction") or ""),
        grid=str(told.get("grid", "")),
    )


_TOLD = {
    "sft": ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "grpo": (
        *("learning_rate", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "temperature"),
        *("max_completion_length", "beta", "epsilon", "loss_type", "scale_rewards"),
    ),
}
_LORA = ("lora_r", "lora_alpha")
_COUNTED = {"synthesize": ("kept",), "sft": ("rows", "steps"), "reject": ("kept",), "grpo": ("examples", "steps")}


def _facts_of(folder: Path, stage: str) -> list[tuple[str, str]]:
    """The knobs of a stage that decide its model, and how much it had."""
    manifest = read_manifest(folder)
    section = manifest.config.get(stage)
    knobs = section if isinstance(section, Mapping) else {}
    wanted = (*_TOLD.get(stage, ()), *(_LORA if knobs.get("use_peft") else ()))
    # A number of steps below 0 leaves it to the epochs.
    facts = [(f"{stage}: {name}", str(knobs[name])) for name in wanted if knobs.get(name) not in (None, -1)]
    if stage == "grpo":
        rewards = manifest.config.get("rewards") or []
        facts.append(("grpo: rewards", ", ".join(f"{reward['weight']:g} × {_reward(reward['name'])}" for reward in rewards)))
    counted = [(f"{stage}: {name}", f"{manifest.summary[name]:,}") for name in _COUNTED[stage] if name in manifest.summary]
    if "seed" in manifest.config:
        facts.append((f"{stage}: seed", str(manifest.config["seed"])))
    return [*facts, *counted]


def _reward(name: str) -> str:
    """A reward's name; of one in a file, not where the file lies."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).name}:{function}" if colon else name
