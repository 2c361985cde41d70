"""Writes the simulated world to disk: image files with annotation in public formats, and the scene facts beside it.

Grounding splits are in MIG-Bench's original layout, perception sets in BLINK's and MMIU's. The same seed writes the same
world; a complete split is left alone. No image of a split is an image of another.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polyground.errors import DataError, StorageError
from polyground.geometry import Box
from polyground.storage import atomic_write_json, atomic_write_text, read_json
from polyground.worlds.language import CHOOSE, TASKS
from polyground.worlds.perception import BLINK_TASKS, MMIU_TASKS, PRACTICE_TASKS, ChoiceQuestion, ask_choice
from polyground.worlds.scenes import Scene, describe
from polyground.worlds.tasks import SEVERAL_IMAGES, Draw, Picture, Question, ask

ANNOTATIONS = {"mig_bench": "MIG_data.json", "blink": "blink.jsonl", "mmiu": "mmiu.json"}
"""File name of the annotation by its format, which is also the name of the reader in `sources`."""
SCENES = "scenes.jsonl"
"""One row per question of a split that is for training, in the annotation's order: what the scripted teacher knows."""

WORLD_VERSION = 2
"""Goes up when the same seed would write other questions or images: results on different worlds do not compare."""

_ABOUT = "about.json"
_ATTEMPTS = 100
"""Draws of one question before its images count as exhausted."""

Progress = Callable[[str, int, int], None]
"""Called with the split, the questions written and the questions wanted."""


class WorldSizes(Protocol):
    """How many questions the splits have; `ood` and `perception` are for each of their sets. 0 leaves a split out."""

    @property
    def train(self) -> int: ...
    @property
    def rl(self) -> int: ...
    @property
    def train_choice(self) -> int: ...
    @property
    def rl_choice(self) -> int: ...
    @property
    def validation(self) -> int: ...
    @property
    def test(self) -> int: ...
    @property
    def ood(self) -> int: ...
    @property
    def perception(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """What a split is about and how it is written."""

    size: str
    """The attribute of `WorldSizes` that says how many questions it has."""
    source: str = "mig_bench"
    """The format, by the name of its reader in `sources`."""
    tasks: tuple[str, ...] = TASKS
    draw: Draw = field(default_factory=Draw)


SPLITS: Mapping[str, SplitPlan] = {
    "train": SplitPlan(size="train"),
    "rl": SplitPlan(size="rl"),
    "train_choice": SplitPlan(size="train_choice", source="blink", tasks=PRACTICE_TASKS),
    "rl_choice": SplitPlan(size="rl_choice", source="blink", tasks=PRACTICE_TASKS),
    "validation": SplitPlan(size="validation"),
    "test": SplitPlan(size="test"),
    "ood_pairs": SplitPlan(size="ood", draw=Draw(target="held_out", others="any")),
    "ood_more": SplitPlan(size="ood", tasks=SEVERAL_IMAGES, draw=Draw(images=(5, 6))),
    "ood_phrasing": SplitPlan(size="ood", draw=Draw(unseen_language=True)),
    "ood_clutter": SplitPlan(size="ood", draw=Draw(clutter=40)),
    "perception_blink": SplitPlan(size="perception", source="blink", tasks=BLINK_TASKS),
    "perception_mmiu": SplitPlan(size="perception", source="mmiu", tasks=MMIU_TASKS),
}
"""All splits, in the order they are written. Only the four `ood_` splits leave the domain of training."""


CHOICE = "_choice"
"""Ends the name of a split with the multiple choices that go with the split named before it."""


def build_world(config: WorldSizes, out: str | Path, progress: Progress | None = None) -> dict[str, Path]:
    """Write every split that has a size, and give the annotation files by split. Complete splits are not written again.

    Raises StorageError where a split was written with another size or seed, or the disk is full.
    """
    out = Path(out)
    annotations: dict[str, Path] = {}
    seen: set[str] = set()
    """Hashes of the images of earlier splits."""
    for split, plan in SPLITS.items():
        size = int(getattr(config, plan.size))
        if size == 0:
            continue
        folder = out / split
        if not _complete(folder, plan, size=size, seed=config.seed):
            _write_split(folder, split, plan, size=size, seed=config.seed, seen=seen, progress=progress)
        seen.update(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "images").iterdir()))
        annotations[split] = annotation_path(out, split)
    return annotations


def annotation_path(out: str | Path, split: str) -> Path:
    """Where a split's annotation lies, written or not; its format is `SPLITS[split].source`."""
    return Path(out) / split / ANNOTATIONS[SPLITS[split].source]


def _complete(folder: Path, plan: SplitPlan, *, size: int, seed: int) -> bool:
    # The annotation is written last, so it is there only when all its images are.
    if not (folder / ANNOTATIONS[plan.source]).exists():
        return False
    about = read_json(folder / _ABOUT)
    if (about.get("questions"), about.get("seed"), about.get("version")) != (size, seed, WORLD_VERSION):
        found = f"{about.get('questions')} questions of seed {about.get('seed')} in version {about.get('version', 1)}"
        raise StorageError(
            f"{folder}: holds {found}, but {size} of seed {seed} in version {WORLD_VERSION} are asked for; "
            "delete the folder or choose another"
        )
    # A file that lost its end since is made again: the same seed gives the same rows.
    lengths: dict[str, int] = about.get("bytes", {})
    return all((folder / name).is_file() and (folder / name).stat().st_size == length for name, length in lengths.items())


def _write_split(
    folder: Path, split: str, plan: SplitPlan, *, size: int, seed: int, seen: set[str], progress: Progress | None
) -> None:
    images = folder / "images"
    rows: list[dict[str, Any]] = []
    scenes: list[dict[str, Any]] = []
    positions: Counter[str] = Counter()
    try:
        images.mkdir(parents=True, exist_ok=True)
        # What an interrupted or larger build left behind is no image of this split.
        for stale in images.iterdir():
            stale.unlink()
        for index in range(size):
            task = plan.tasks[index % len(plan.tasks)]
            question, files = _fresh_question(f"{seed}/{split}/{index}", task, plan, seen)
            names = [f"images/{index:06d}_{number}.png" for number in range(1, len(files) + 1)]
            for name, data in zip(names, files, strict=True):
                (folder / name).write_bytes(data)
            if isinstance(question, Question):
                rows.append(_mig_row(question, names))
                scenes.append(scene_row(question, names, key=f"{task}/{positions[task]}"))
            else:
                write = _blink_row if plan.source == "blink" else _mmiu_row
                rows.append(write(question, names, f"{split}_{task}_{positions[task]}"))
                if question.image is not None:
                    scenes.append(choice_row(question, names, key=f"{task}/{positions[task]}"))
            positions[task] += 1
            if progress is not None:
                progress(split, index + 1, size)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error}); free space or choose another folder, then run again"
        ) from error
    annotation = folder / ANNOTATIONS[plan.source]
    texts = {SCENES: "".join(json.dumps(row) + "\n" for row in scenes)} if scenes else {}
    if annotation.suffix == ".jsonl":
        texts[annotation.name] = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        texts[annotation.name] = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    about = {"split": split, "source": plan.source, "questions": size, "seed": seed, "version": WORLD_VERSION}
    atomic_write_json(folder / _ABOUT, {**about, "bytes": {name: len(text.encode()) for name, text in texts.items()}})
    for name, text in texts.items():
        atomic_write_text(folder / name, text)


def _fresh_question(seed: str, task: str, plan: SplitPlan, seen: set[str]) -> tuple[Question | ChoiceQuestion, list[bytes]]:
    """A question none of whose images is in an earlier split, and its PNG files."""
    for attempt in range(_ATTEMPTS):
        rng = random.Random(f"{seed}/{attempt}")
        question = ask(rng, task, plan.draw) if plan.source == "mig_bench" else ask_choice(rng, task, plan.draw)
        files = [_png(picture) for picture in question.pictures]
        if not any(hashlib.sha256(data).hexdigest() in seen for data in files):
            return question, files
    raise DataError(
        f"question {seed} of task {task}: {_ATTEMPTS} draws gave only images of other splits; ask for a smaller world"
    )


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    picture.draw().save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


# --- rows ---------------------------------------------------------------------------------------------------------


def _mig_row(question: Question, names: Sequence[str]) -> dict[str, Any]:
    return {
        "task": question.task,
        "images": list(names),
        "question": question.text,
        "answer": _corners(question.item.box),
        "additional_info": question.additional_info,
        "need_format": True,
    }


def _blink_row(question: ChoiceQuestion, names: Sequence[str], idx: str) -> dict[str, Any]:
    lettered = [f"({letter}) {choice}" for letter, choice in zip("ABCDEF", question.choices, strict=False)]
    shown = {f"image_{n}": names[n - 1] if n <= len(names) else None for n in range(1, 5)}
    return {
        "idx": idx,
        "question": question.text,
        "sub_task": question.task,
        **shown,
        "choices": list(question.choices),
        "answer": f"({question.letter})",
        "prompt": "\n".join([question.text, CHOOSE, *lettered]),
    }


def _mmiu_row(question: ChoiceQuestion, names: Sequence[str], idx: str) -> dict[str, Any]:
    options = "\n".join(f"{letter}: {choice}" for letter, choice in zip("ABCDEF", question.choices, strict=False))
    return {
        "task": question.task,
        "options": options,
        "question": question.text,
        "context": f"{CHOOSE}\n{options}",
        "input_image_path": list(names),
        "output": question.letter,
    }


def scene_row(question: Question, names: Sequence[str], *, key: str) -> dict[str, Any]:
    """The facts behind one question, as the scripted teacher reads them; `key` is task and position, as at the end of the
    example's key."""
    pictures = [
        {"path": name, "items": _item_rows(picture.scene)} for name, picture in zip(names, question.pictures, strict=True)
    ]
    target = question.pictures[question.image - 1].scene.items.index(question.item)
    return {
        "key": key,
        "task": question.task,
        "images": pictures,
        "target": {"image": question.image, "item": target},
        "facts": dict(question.facts),
        "looked_at": list(question.looked_at),
    }


def choice_row(question: ChoiceQuestion, names: Sequence[str], *, key: str) -> dict[str, Any]:
    """The same for a multiple choice about one of its images."""
    pictures = [
        {"path": name, "items": _item_rows(picture.scene)} for name, picture in zip(names, question.pictures, strict=True)
    ]
    return {
        "key": key,
        "task": question.task,
        "images": pictures,
        "target": {"image": question.image, "choice": question.letter},
        "choices": list(question.choices),
        "facts": dict(question.facts),
        "looked_at": [question.image],
    }


def _item_rows(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "phrase": describe(item, scene),
            "shape": item.shape,
            "colour": item.colour,
            "size": item.size,
            "texture": item.texture,
            "box": _corners(item.box),
        }
        for item in scene.items
    ]


def _corners(box: Box) -> list[float]:
    # Three decimals, as in MIG-Bench: less than a tenth of a pixel here. Always written as fractions, 0 as 0.0.
    return [round(float(corner), 3) for corner in (box.x0, box.y0, box.x1, box.y1)]
