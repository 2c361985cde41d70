"""The frozen rows that flow between stages, each to and from JSON. No behaviour beyond that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyground.answer import Answer, Located
from polyground.geometry import Box


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question about one or more images, with its annotated answer."""

    key: str
    """Unique in its dataset; stable across runs."""
    task: str
    images: tuple[Path, ...]
    question: str
    """May hold `<image>` where an image belongs (else all images come first) and `<box>` where a box is asked about."""
    target: Answer
    """Every box names its image, except where the annotation does not know it."""
    question_boxes: tuple[Located, ...] = ()
    """One per `<box>` in the question, in order; written on the model's grid by `prompts`."""
    choices: tuple[str, ...] = ()
    """The options of a multiple-choice question, in letter order; empty for grounding."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the source knows besides (dataset version, scene, split). Never shown to a model."""

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "task": self.task,
            "images": [str(p) for p in self.images],
            "question": self.question,
            "target": answer_to_json(self.target),
            "question_boxes": [_located_to_json(b) for b in self.question_boxes],
            "choices": list(self.choices),
            "meta": dict(self.meta),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Example:
        return cls(
            key=row["key"],
            task=row["task"],
            images=tuple(Path(p) for p in row["images"]),
            question=row["question"],
            target=answer_from_json(row["target"]),
            question_boxes=tuple(_located_from_json(b) for b in row.get("question_boxes", ())),
            choices=tuple(row.get("choices", ())),
            meta=row.get("meta", {}),
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    parts: tuple[str | Path, ...]
    """Text is a `str`, an image is a `Path`; their order is the order the model sees."""

    @property
    def images(self) -> tuple[Path, ...]:
        """The image files among its parts, in order."""
        return tuple(part for part in self.parts if isinstance(part, Path))

    def to_json(self) -> dict[str, Any]:
        parts = [{"type": "image", "path": str(p)} if isinstance(p, Path) else {"type": "text", "text": p} for p in self.parts]
        return {"role": self.role, "content": parts}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Message:
        return cls(row["role"], tuple(Path(p["path"]) if p["type"] == "image" else p["text"] for p in row["content"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled continuation of a prompt."""

    text: str
    """Decoded without the end token; think and answer tags kept."""
    token_ids: tuple[int, ...] = ()
    """[T] completion tokens only, the end token included when it was sampled; empty from samplers that hide them."""
    logprobs: tuple[float, ...] = ()
    """[T] nats, under the policy that sampled them, at the sampling temperature; empty where unknown."""
    truncated: bool = False
    """True when the token budget ran out before an end token."""

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": list(self.logprobs),
            "truncated": self.truncated,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Completion:
        return cls(
            text=row["text"], token_ids=tuple(row["token_ids"]), logprobs=tuple(row["logprobs"]), truncated=row["truncated"]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What the one scorer says of one completion."""

    total: float
    """Weighted sum of the parts: the RL reward."""
    parts: Mapping[str, float]
    """Each reward's own value, before its weight, by name."""
    iou: float = 0.0
    """Mean IoU over one-to-one matches, over max(predicted, gold) boxes, images ignored where the answer names none
    or the annotation knows none; in [0, 1]. For a multiple choice: 1 when right."""
    image_correct: float | None = None
    """Image numbers that are right, over max(predicted, gold) boxes, wherever on the image the boxes are; None when the
    annotation does not know the image or the task has no boxes."""
    unreadable: str | None = None
    """The reason (`answer.Unreadable`) when there is no usable answer."""
    answer: Answer | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "parts": dict(self.parts),
            "iou": self.iou,
            "image_correct": self.image_correct,
            "unreadable": self.unreadable,
            "answer": None if self.answer is None else answer_to_json(self.answer),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Score:
        answer = row["answer"]
        return cls(**{**row, "answer": None if answer is None else answer_from_json(answer)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion of one example, scored."""

    example: str
    """Key of the example it answers."""
    task: str
    completion: Completion
    score: Score
    sample: int = 0
    """Its position in the group."""

    def without_logprobs(self) -> Rollout:
        """For keeping and telling: they are most of the bytes, and only the training step reads them."""
        return replace(self, completion=replace(self.completion, logprobs=()))

    def to_json(self) -> dict[str, Any]:
        return {
            "example": self.example,
            "task": self.task,
            "sample": self.sample,
            "completion": self.completion.to_json(),
            "score": self.score.to_json(),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rollout:
        return cls(
            example=row["example"],
            task=row["task"],
            sample=row["sample"],
            completion=Completion.from_json(row["completion"]),
            score=Score.from_json(row["score"]),
        )


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """`{"choice": letter}`, or `{"boxes": [...]}` on unit coordinates; an empty list says "not there"."""
    if answer.choice is not None:
        return {"choice": answer.choice}
    return {"boxes": [_located_to_json(b) for b in answer.boxes]}


def answer_from_json(row: Mapping[str, Any]) -> Answer:
    """What `answer_to_json` has written."""
    if "choice" in row:
        return Answer(choice=row["choice"])
    return Answer(tuple(_located_from_json(b) for b in row["boxes"]))


def _located_to_json(located: Located) -> dict[str, Any]:
    box = located.box
    row: dict[str, Any] = {"image": located.image, "box": [box.x0, box.y0, box.x1, box.y1]}
    return row if located.confidence == 1 else {**row, "confidence": located.confidence}


def _located_from_json(row: Mapping[str, Any]) -> Located:
    return Located(row["image"], Box(*row["box"]), row.get("confidence", 1.0))
