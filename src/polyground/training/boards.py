"""Groups of a GRPO step for the loggers of `report_to`: their images with the boxes drawn, and a table of their answers.

Figures are transformers' business and go to every logger it knows. Pictures and tables have no common form: they go to
TensorBoard, Weights & Biases, Trackio and SwanLab, through the runs that transformers has opened there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyground.errors import DataError, visible
from polyground.geometry import Box
from polyground.losses import without_variance
from polyground.records import Rollout
from polyground.rollout import Group
from polyground.vision import contact_sheet, draw_boxes, load_image, text_strip

logger = logging.getLogger("polyground")

SIDE = 336
"""Of one image on a sheet, in pixels."""

TRUTH, BETTER, WORSE, EVEN = "#0b7a3e", "#1864ab", "#d9480f", "#5c6573"
"""Colours of boxes: annotated; of answers above their group's mean, below, and with no advantage."""

LONGEST = 2000
"""Characters of a completion in a table."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A group and what each of its answers was worth."""

    group: Group
    advantages: Sequence[float]


class Board(Protocol):
    """Where a logger takes pictures and tables."""

    def show(self, name: str, sheet: Image.Image, caption: str, table: Answers, step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a group as a table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | float]]


class Boards(TrainerCallback):
    """Shows `groups` groups of the first step and of every step with a checkpoint; the trainer hands them over."""

    def __init__(self, boards: Sequence[Board], *, groups: int, save_steps: int, num_iterations: int) -> None:
        self._boards = boards
        self._groups, self._save_steps, self._num_iterations = groups, save_steps, num_iterations
        self._held: list[Shown] = []

    def wants(self, step: int) -> bool:
        """Whether the rollouts made before this step (0-based) are to be shown."""
        checkpoint = (step + self._num_iterations) // self._save_steps > step // self._save_steps
        return bool(self._boards and self._groups) and (step == 0 or checkpoint)

    def take(self, groups: Sequence[Shown]) -> None:
        """Keep some groups until the step is done: those whose rewards differ first, tasks taking turns."""
        self._held = chosen(groups, size=self._groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        held, self._held = self._held, []
        for place, shown in enumerate(held, start=1):
            try:
                picture = sheet(shown)
            except DataError as error:
                # A picture for people is no reason to stop a training.
                logger.warning("groups/%d is not shown to %s: %s", place, ", ".join(args.report_to or ()), error)
                continue
            example = shown.group.example
            caption = f"{visible(example.task)} · {visible(example.key)}"
            for board in self._boards:
                board.show(f"groups/{place}", picture, caption, answers(shown), state.global_step)


def chosen(groups: Sequence[Shown], *, size: int) -> list[Shown]:
    """`size` groups: one of each task before a second of any, those whose rewards differ first."""
    turns: dict[str, int] = {}
    ranked = []
    for place, shown in enumerate(sorted(groups, key=lambda shown: without_variance(shown.group.totals))):
        task = shown.group.example.task
        turns[task] = turns.get(task, -1) + 1
        ranked.append(((without_variance(shown.group.totals), turns[task], place), shown))
    return [shown for _, shown in sorted(ranked, key=lambda item: item[0])[:size]]


def boards_of(callbacks: Sequence[Any]) -> list[Board]:
    """One board for each logger among a trainer's callbacks that takes pictures."""
    kinds: dict[str, Callable[[Any], Board]] = {
        "TensorBoardCallback": TensorBoard,
        "WandbCallback": lambda callback: TablesAndImages(callback._wandb),
        "TrackioCallback": lambda callback: TablesAndImages(callback._trackio),
        "SwanLabCallback": SwanLab,
    }
    found = ((callback, kinds.get(type(callback).__name__)) for callback in callbacks)
    return [kind(callback) for callback, kind in found if kind is not None]


# ---- what is shown


def sheet(shown: Shown) -> Image.Image:
    """The question, and its images with the annotated boxes and those of all answers, each with its number and its reward."""
    example = shown.group.example
    gold = next((located.image for located in example.target.boxes if located.image is not None), None) or 1
    boxes: dict[int, list[tuple[Box, str, str]]] = {}
    for located in example.target.boxes:
        boxes.setdefault(located.image or gold, []).append((located.box, "truth", TRUTH))
    for rollout, advantage in _worst_first(shown):
        answer = rollout.score.answer
        for located in answer.boxes if answer else ():
            label = f"{rollout.sample}: {rollout.score.total:.2f}"
            boxes.setdefault(located.image or gold, []).append((located.box, label, _colour(advantage)))
    images = [
        draw_boxes(load_image(path), boxes.get(number, []), min_side=SIDE, halo=True)
        for number, path in enumerate(example.images, start=1)
    ]
    captions = [f"image {number}" for number in range(1, len(images) + 1)]
    pictures = contact_sheet(images, captions, columns=3, side=SIDE)
    choices = "".join(f"  ({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(example.choices))
    asked = text_strip(visible(example.question + choices), width=pictures.width)
    page = Image.new("RGB", (pictures.width, asked.height + pictures.height), "white")
    page.paste(asked, (0, 0))
    page.paste(pictures, (0, asked.height))
    return page


def answers(shown: Shown) -> Answers:
    """Of each answer: reward and its parts, advantage, overlap, right images, why it could not be read, length and text."""
    rollouts = shown.group.rollouts
    parts = list(rollouts[0].score.parts)
    header = ["answer", "reward", *parts, "advantage", "IoU", "right image", "unreadable", "tokens", "text"]
    rows = [
        [
            rollout.sample,
            round(rollout.score.total, 4),
            *(round(rollout.score.parts[part], 4) for part in parts),
            round(advantage, 4),
            round(rollout.score.iou, 4),
            "" if rollout.score.image_correct is None else round(rollout.score.image_correct, 4),
            rollout.score.unreadable or "",
            len(rollout.completion.token_ids),
            visible(rollout.completion.text, keep="\n")[:LONGEST],
        ]
        for rollout, advantage in zip(rollouts, shown.advantages, strict=True)
    ]
    return Answers(header, rows)


def markdown(table: Answers) -> str:
    """The table in Markdown; what a model wrote stands in it as text."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str | float) -> str:
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|!":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "<br>")


def _worst_first(shown: Shown) -> Iterator[tuple[Rollout, float]]:
    # The best lies on top.
    yield from sorted(zip(shown.group.rollouts, shown.advantages, strict=True), key=lambda pair: pair[0].score.total)


def _colour(advantage: float) -> str:
    return BETTER if advantage > 0 else WORSE if advantage < 0 else EVEN


# ---- where it is shown


class TensorBoard:
    """Under IMAGES and TEXT."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def show(self, name: str, sheet: Image.Image, caption: str, table: Answers, step: int) -> None:
        writer = self._callback.tb_writer
        if writer is not None:
            writer.add_image(f"{name}/images", np.asarray(sheet), step, dataformats="HWC")
            writer.add_text(f"{name}/answers", f"{_cell(caption)}\n\n{markdown(table)}", step)


class TablesAndImages:
    """As an Image and a Table of the run, by Weights & Biases or by Trackio, which takes the same calls."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def show(self, name: str, sheet: Image.Image, caption: str, table: Answers, step: int) -> None:
        rows = self._library.Table(columns=list(table.header), data=_texts(table))
        shown = {f"{name}/images": self._library.Image(sheet, caption=caption), f"{name}/answers": rows}
        self._library.log({**shown, "train/global_step": step})


class SwanLab:
    """As an Image and an ECharts table of the experiment."""

    def __init__(self, callback: Any) -> None:
        self._swanlab = callback._swanlab

    def show(self, name: str, sheet: Image.Image, caption: str, table: Answers, step: int) -> None:
        rows = self._swanlab.echarts.Table()
        rows.add(list(table.header), _texts(table))
        shown: Mapping[str, Any] = {f"{name}/images": self._swanlab.Image(sheet, caption=caption), f"{name}/answers": rows}
        self._swanlab.log(shown, step=step)


def _texts(table: Answers) -> list[list[str | float]]:
    """Rows whose columns have one type each: tables there refuse a number beside a word."""
    mixed = [len({isinstance(row[place], str) for row in table.rows}) > 1 for place in range(len(table.header))]
    return [[str(value) if mixed[place] else value for place, value in enumerate(row)] for row in table.rows]
