"""Examples written as the rows other trainers read: one writer per layout, and what each layout cannot hold.

A prompt is laid out as `prompts` lays it out, so a model trained elsewhere is asked as it is asked here. Files, folders and
the choice of a grid belong to the convert stage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from polyground.answer import Answer, Located, write_answer, write_native
from polyground.conventions import GRIDS, GridRule
from polyground.errors import DataError, MissingLibraryError
from polyground.extras import install_command
from polyground.geometry import Grid
from polyground.imagefile import check_image, open_image
from polyground.prompts import student_messages
from polyground.records import Example, Message
from polyground.sources.reading import RowError

NORM1 = Grid(width=1, height=1, decimals=6)
"""ms-swift's `norm1`: 0-1, exact enough for it to turn into pixels of any image."""

CONTRACT = "contract"
"""The form of an answer that this project trains: `<think>…</think><answer>…</answer>`."""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_MEDIA = ("<video>", "<audio>")
_OBJECTS = ("<bbox>", "<ref-object>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """What is the same for every row of one file."""

    name: Callable[[Path], str] = str
    """How a row names an image file (`names_under`)."""
    instruction: str = ""
    """Appended to every question, as in a recipe's prompts."""
    form: str = CONTRACT
    """How answers are written: the contract, or a key of `answer.NATIVE_WRITERS` to keep to what a family does untrained."""
    think: str = ""
    """Stands in the think block of examples without reasoning; empty for no think block."""


Row = dict[str, Any]
Writer = Callable[[Example, Sequence[Grid], Style], Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One target layout."""

    write: Writer
    about: str
    """One line for a command's help."""
    suffixes: tuple[str, ...]
    """Endings its files may have: `.jsonl`, `.json` (one list) or `.parquet`."""
    grids: Mapping[str, GridRule] = field(default_factory=lambda: GRIDS)
    """Grids by name that boxes can be written on; empty where boxes are kept as they are."""
    grid: str | None = None
    """The grid that is meant when none is named; None where one must be."""
    native: bool = False
    """True when answers can also be written in a family's native form."""
    registered: bool = False
    """True when the trainer finds the file through a dataset_info.json beside it."""


def names_under(folder: Path) -> Callable[[Path], str]:
    """Names images relative to a folder where they lie under it, and by their absolute path elsewhere."""
    here = str(Path.cwd())
    root = os.path.normpath(Path.cwd() / folder)
    below = root if root.endswith(os.sep) else root + os.sep

    def name(image: Path) -> str:
        path = os.path.normpath(image if image.is_absolute() else f"{here}{os.sep}{image}")
        return path[len(below) :].replace(os.sep, "/") if path.startswith(below) else path

    return name


def write_row(name: str, example: Example, grids: Sequence[Grid], style: Style) -> Row:
    """The example as a row of this format; `grids` has one entry per image.

    Raises RowError, with a countable reason, for what the format cannot hold: placeholder_mismatch, placeholder (a text with
    the format's own marks), unnamed_image, unsaid_image, nothing_there, bad_image, too_many_choices, tagged_reasoning, malformed;
    ImageError for an image that `verl` cannot embed.
    """
    return FORMATS[name].write(_checked(example), grids, style)


def has_boxes(example: Example) -> bool:
    """Whether writing the example takes a grid."""
    return bool(example.target.boxes or example.question_boxes)


def dataset_info(file_name: str) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json for a file in the `sharegpt` format."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }


# ---------------------------------------------------------------- one writer per layout


def _polyground(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    return {**example.to_json(), "images": [style.name(image) for image in example.images]}


def _sharegpt(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    asked, answered = _text(_prompt(example, grids, style)), _completion(example, grids, style)
    _refuse_markers(_MEDIA, asked, answered)
    return {
        "id": example.key,
        "task": example.task,
        "images": [style.name(image) for image in example.images],
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}],
    }


def _vlm_r1(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    row = _sharegpt(example, grids, style)
    row["image"] = row.pop("images")
    return row


def _swift(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    """Every box is `<bbox>` in the text and four numbers in `objects`: ms-swift writes it as the model it trains would."""
    _refuse_markers(_OBJECTS, example.question, *example.choices, _reasoning(example, style))
    boxes = [*example.question_boxes, *example.target.boxes]
    _require_image(boxes, "a box")
    unplaced = replace(example, question=example.question.replace("<box>", "<bbox>"), question_boxes=())
    asked = _text(_prompt(unplaced, grids, style))
    answered = _thought(_reasoning(example, style), _tagged(_marked_answer(example.target, grids)))
    _refuse_markers(_MEDIA, asked, answered)
    row: Row = {
        "id": example.key,
        "task": example.task,
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
        "images": [style.name(image) for image in example.images],
    }
    if boxes:
        images = [(located.image or 1) - 1 for located in boxes]
        row["objects"] = {
            "ref": [],
            "bbox": [list(grids[image].write(located.box)) for image, located in zip(images, boxes, strict=True)],
            "bbox_type": "norm1" if grids[0] == NORM1 else "real",
            "image_id": images,
        }
    return row


def _trl(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    message = _prompt(example, grids, style)
    parts = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in message.parts]
    answered = _completion(example, grids, style)
    return {
        "id": example.key,
        "task": example.task,
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answered}]}],
        # TRL hands every column but prompt and completion to a GRPO reward.
        "solution": _tagged(write_answer(example.target, grids)),
        "images": [style.name(image) for image in example.images],
    }


def _verl(example: Example, grids: Sequence[Grid], style: Style) -> Row:
    """Columns of verl and of EasyR1 in one row; images are embedded, the one form that both read."""
    asked = _text(_prompt(example, grids, style))
    _require_image(example.target.boxes, "the answer")
    answered = write_answer(example.target, grids)
    _refuse_markers(("<video>",), asked)
    for text in (example.key, example.task, asked):
        _require_encodable(text)
    return {
        "id": example.key,
        "task": example.task,
        "data_source": str(example.meta.get("source", "polyground")),
        "prompt": [{"role": "user", "content": asked}],
        "problem": asked,
        "answer": answered,
        "images": [{"bytes": read_image(image), "path": image.name} for image in example.images],
        "ability": example.task,
        "reward_model": {"style": "rule", "ground_truth": answered},
        "extra_info": {"id": example.key},
    }


def verl_schema() -> Any:
    """The parquet schema of verl rows (a `pyarrow.Schema`). Raises DataError without pyarrow."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingLibraryError(f"writing parquet needs pyarrow; {install_command('train')}") from error
    text = pa.string()
    return pa.schema(
        {
            "id": text,
            "task": text,
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "problem": text,
            "answer": text,
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"id": text}),
        }
    )


def read_image(path: Path) -> bytes:
    """An image file as it is; raises ImageError for one that is missing or no image."""
    check_image(path, decode=False)
    open_image(path).close()
    return path.read_bytes()


# ---------------------------------------------------------------- prompt and answer


def _prompt(example: Example, grids: Sequence[Grid], style: Style) -> Message:
    if len(example.choices) > len(ascii_uppercase):
        raise RowError("too_many_choices", f"{len(example.choices)} choices, but there are only 26 letters")
    _refuse_markers(("<image>", "<box>"), *example.choices)
    try:
        [message] = student_messages(example, grids, instruction=style.instruction)
    except DataError as error:
        raise RowError("malformed", str(error)) from error
    return message


def _text(message: Message) -> str:
    return "".join("<image>" if isinstance(part, Path) else part for part in message.parts)


def _completion(example: Example, grids: Sequence[Grid], style: Style) -> str:
    _require_image(example.target.boxes, "the answer")
    plain = style.form == CONTRACT
    answer = _tagged(write_answer(example.target, grids)) if plain else _native(example, grids, style.form)
    return _thought(_reasoning(example, style), answer)


def _native(example: Example, grids: Sequence[Grid], form: str) -> str:
    target = example.target
    if target.choice is None and not target.boxes:
        raise RowError("nothing_there", f"the form {form} cannot say that nothing is there")
    if target.boxes and len(example.images) > 1 and form != "qwen_json":
        raise RowError("unsaid_image", f"the form {form} cannot say which of {len(example.images)} images a box is in")
    return write_native(target, grids, native=form)


def _tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def _thought(think: str, answer: str) -> str:
    """An answer without reasoning gets no think block rather than an empty one, which would teach not to think."""
    return f"<think>{think}</think>{answer}" if think else answer


def _reasoning(example: Example, style: Style) -> str:
    reasoning = str(example.meta.get("reasoning") or style.think).strip()
    if any(tag in reasoning for tag in _TAGS):
        raise RowError("tagged_reasoning", "the reasoning holds think or answer tags of its own")
    _refuse_markers(("<image>",), reasoning)
    return reasoning


def _marked_answer(answer: Answer, grids: Sequence[Grid]) -> str:
    """As `write_answer`, each box a `<bbox>`."""
    if answer.choice is not None or not answer.boxes:
        return write_answer(answer, grids)
    rows: list[Row] = []
    for located in answer.boxes:
        row = {"image": located.image, "bbox_2d": "<bbox>"}
        rows.append(row if located.confidence == 1 else {**row, "confidence": located.confidence})
    return json.dumps(rows).replace('"<bbox>"', "<bbox>")


# ---------------------------------------------------------------- what a layout cannot hold


def _checked(example: Example) -> Example:
    """The example, boxes of a single image named as its; raises RowError where it says too little or contradicts itself."""
    count = len(example.images)
    if (marks := example.question.count("<image>")) not in (0, count):
        raise RowError("placeholder_mismatch", f"the question has {marks} <image>, the example {count} images")
    if (marks := example.question.count("<box>")) != len(example.question_boxes):
        detail = f"the question has {marks} <box>, the example {len(example.question_boxes)} question boxes"
        raise RowError("placeholder_mismatch", detail)
    target = replace(example.target, boxes=tuple(_named(located, count) for located in example.target.boxes))
    marked = tuple(_named(located, count) for located in example.question_boxes)
    return replace(example, target=target, question_boxes=marked)


def _named(located: Located, images: int) -> Located:
    if located.image is None and images == 1:
        return replace(located, image=1)
    if located.image is not None and not 1 <= located.image <= images:
        raise RowError("bad_image", f"a box is in image {located.image} of {images}")
    return located


def _require_image(boxes: Iterable[Located], what: str) -> None:
    if any(located.image is None for located in boxes):
        raise RowError("unnamed_image", f"the format names the image of every box; the annotation does not know that of {what}")


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed", f"a text holds half a character ({error.reason}), which parquet cannot") from error


def _refuse_markers(markers: Sequence[str], *texts: str) -> None:
    for marker in markers:
        if any(marker in text for text in texts):
            raise RowError("placeholder", f"a text holds {marker}, which stands for something else there")


FORMATS: dict[str, Format] = {
    "polyground": Format(
        write=_polyground, about="this project's own rows, nothing lost; no grid", suffixes=(".jsonl",), grids={}
    ),
    "sharegpt": Format(
        write=_sharegpt,
        about="LLaMA-Factory: conversations + images, and the dataset_info.json entry",
        suffixes=(".json", ".jsonl"),
        native=True,
        registered=True,
    ),
    "vlm_r1": Format(
        write=_vlm_r1,
        about="VLM-R1 and Qwen's fine-tuning: image + conversations",
        suffixes=(".jsonl", ".json"),
        native=True,
    ),
    "swift": Format(
        write=_swift,
        about="ms-swift: messages + images + objects; --grid unit (norm1, the default) or pixels (real)",
        suffixes=(".jsonl", ".json"),
        grids={"unit": lambda width, height: NORM1, "pixels": GRIDS["pixels"]},
        grid="unit",
    ),
    "trl": Format(
        write=_trl,
        about="TRL: prompt + completion with image parts, images, solution",
        suffixes=(".jsonl", ".json"),
        native=True,
    ),
    "verl": Format(write=_verl, about="verl and EasyR1: parquet with embedded images, needs pyarrow", suffixes=(".parquet",)),
}
"""Layouts by the name `--to` takes."""
