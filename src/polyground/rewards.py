"""Verifiable rewards: one completion is read once, then each reward turns the reading into a number in [0, 1].

Training, curation and evaluation all score here. It samples nothing, loads no model and knows no recipe.

One rule for two kinds of question: `iou`, `iou_threshold`, `image`, `count` and `choice` judge the *outcome*. On a
multiple-choice question each of them is 1 for the right letter and else 0; on a grounding question `choice` is the
`iou` reward. So one recipe serves mixed data, and every group is scored on the same scale.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from polyground.answer import NATIVE_READERS, Answer, Located, Unreadable, answers_directly, follows_contract, read_answer
from polyground.errors import ConfigError, DataError
from polyground.geometry import FULL_IMAGE, Grid, iou, match_boxes, reaches
from polyground.records import Completion, Example, Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one completion says, compared with the annotation: everything a reward may look at."""

    answer: Answer | Unreadable
    follows_contract: bool
    """The whole text is one think block and one answer block (without reasoning: the latter alone), and the answer is
    readable."""
    outcome: float
    """1 or 0 for a multiple choice (the right letter or not); for grounding the same as `iou`."""
    iou: float
    """Mean IoU over one-to-one matches, over max(predicted, gold) boxes; a box on a wrong or unnamed image matches nothing."""
    lenient_iou: float
    """The same, but a box that names no image may match on any (`Score.iou`)."""
    overlaps: tuple[tuple[float, ...], ...]
    """[predicted][gold] IoU, 0 where the image is wrong or unnamed."""
    matches: tuple[tuple[int, int], ...]
    """One-to-one pairs (predicted, gold) of positive overlap."""
    predicted: int
    """Number of boxes answered."""
    gold: int
    """Number of boxes annotated."""
    image_agreement: float | None
    """Right image numbers over max(predicted, gold), wherever on the image the boxes are; None when the annotation
    does not know the image, has no box, or the question is a multiple choice."""
    is_choice: bool
    """The question is a multiple choice."""

    @property
    def readable(self) -> bool:
        """Whether the completion holds an answer at all, right or wrong."""
        return isinstance(self.answer, Answer)

    @property
    def answers_in_boxes(self) -> bool:
        """A grounding answer, "not there" included; a letter is none."""
        return isinstance(self.answer, Answer) and self.answer.choice is None


def read(
    completion: Completion, example: Example, grids: Sequence[Grid], native: str | None = None, *, reasoning: bool = True
) -> Reading:
    """Read and match one completion; `grids` has one entry per image of the example."""
    if len(grids) != len(example.images):
        raise DataError(f"example {example.key}: {len(example.images)} images but {len(grids)} grids; pass one grid per image")
    answer = read_answer(completion.text, grids, native=native)
    keeps_form = follows_contract if reasoning else answers_directly
    contract = isinstance(answer, Answer) and keeps_form(completion.text)
    gold = example.target.boxes
    predicted = answer.boxes if isinstance(answer, Answer) else ()
    if len(example.images) == 1:
        predicted = tuple(Located(1, located.box) for located in predicted)
    is_choice = example.target.choice is not None
    in_boxes = isinstance(answer, Answer) and answer.choice is None and not is_choice
    strict = _overlaps(predicted, gold, unnamed_matches=False)
    matches = match_boxes(strict)
    strict_iou = _mean_iou(strict, len(predicted), len(gold)) if in_boxes else 0.0
    right_letter = isinstance(answer, Answer) and answer.choice == example.target.choice
    lenient = _mean_iou(_overlaps(predicted, gold, unnamed_matches=True), len(predicted), len(gold)) if in_boxes else 0.0
    return Reading(
        answer=answer,
        follows_contract=contract,
        outcome=float(right_letter) if is_choice else strict_iou,
        iou=strict_iou,
        lenient_iou=lenient,
        overlaps=strict,
        matches=tuple(matches),
        predicted=len(predicted),
        gold=len(gold),
        image_agreement=_image_agreement(predicted, gold),
        is_choice=is_choice,
    )


def _overlaps(predicted: Sequence[Located], gold: Sequence[Located], *, unnamed_matches: bool) -> tuple[tuple[float, ...], ...]:
    def fits(box: Located, truth: Located) -> bool:
        return truth.image is None or box.image == truth.image or (unnamed_matches and box.image is None)

    return tuple(tuple(iou(p.box, g.box) if fits(p, g) else 0.0 for g in gold) for p in predicted)


def _mean_iou(overlaps: Sequence[Sequence[float]], predicted: int, gold: int) -> float:
    if predicted == gold == 0:
        return 1.0
    return sum(overlaps[p][g] for p, g in match_boxes(overlaps)) / max(predicted, gold)


def _image_agreement(predicted: Sequence[Located], gold: Sequence[Located]) -> float | None:
    if not gold or any(g.image is None for g in gold):
        return None
    shared = Counter(p.image for p in predicted) & Counter(g.image for g in gold)
    return shared.total() / max(len(predicted), len(gold))


# ---------------------------------------------------------------- the built-in rewards


def iou_reward(reading: Reading, example: Example, completion: Completion) -> float:
    """Mean IoU of one-to-one matches over max(predicted, gold) boxes; the right image is required."""
    return reading.outcome


def iou_threshold_reward(reading: Reading, example: Example, completion: Completion, *, threshold: float = 0.5) -> float:
    """Share of boxes whose IoU reaches the threshold, over max(predicted, gold); the right image is required."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"reward iou_threshold: threshold must lie in (0, 1]; got {threshold}")
    if reading.is_choice or not reading.answers_in_boxes or reading.predicted == reading.gold == 0:
        return reading.outcome
    hits = [[float(reaches(o, threshold)) for o in row] for row in reading.overlaps]
    return len(match_boxes(hits)) / max(reading.predicted, reading.gold)


def image_reward(reading: Reading, example: Example, completion: Completion) -> float:
    """Share of boxes that name the right image, over max(predicted, gold).

    Where the annotation does not know the image, any boxes earn 1: the image is not required of the model.
    """
    if reading.is_choice or not reading.answers_in_boxes or reading.gold == 0:
        return reading.outcome
    if reading.image_agreement is None:
        return float(reading.predicted > 0)
    return reading.image_agreement


def format_reward(reading: Reading, example: Example, completion: Completion) -> float:
    """1 when the whole text follows the contract and its answer can be read."""
    return float(reading.follows_contract)


def count_reward(reading: Reading, example: Example, completion: Completion) -> float:
    """min(predicted, gold) / max(predicted, gold) boxes; 1 when both are none."""
    if reading.is_choice or not reading.answers_in_boxes:
        return reading.outcome
    if reading.predicted == reading.gold:
        return 1.0
    return min(reading.predicted, reading.gold) / max(reading.predicted, reading.gold)


def choice_reward(reading: Reading, example: Example, completion: Completion) -> float:
    """1 for the right letter. On a grounding question, the `iou` reward."""
    return reading.outcome


def length_reward(
    reading: Reading,
    example: Example,
    completion: Completion,
    *,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    min_words: int = 0,
    max_words: int | None = None,
) -> float:
    """1 inside the bounds, falling in proportion below the lower one, and linearly to 0 at twice the upper one.

    An unreadable completion earns 0, so that length alone is never worth having. Words are what white space separates.
    """
    for unit, low, high in (("tokens", min_tokens, max_tokens), ("words", min_words, max_words)):
        if low < 0 or (high is not None and high < max(low, 1)):
            raise ConfigError(f"reward length: needs 0 <= min_{unit} <= max_{unit} and max_{unit} >= 1; got {low} and {high}")
    if (min_tokens or max_tokens is not None) and completion.text and not completion.token_ids:
        raise ConfigError(
            f"reward length: example {example.key} has a completion without token ids (its sampler hides them); "
            "use min_words and max_words"
        )
    if not reading.readable:
        return 0.0
    tokens = _within(len(completion.token_ids), min_tokens, max_tokens)
    return min(tokens, _within(len(completion.text.split()), min_words, max_words))


def _within(count: int, low: int, high: int | None) -> float:
    if count < low:
        return count / low
    if high is not None and count > high:
        return max(0.0, 2.0 - count / high)
    return 1.0


Reward = Callable[..., float]
"""`reward(reading, example, completion, **options)`, in [0, 1]."""

REWARDS: dict[str, Reward] = {
    "iou": iou_reward,
    "iou_threshold": iou_threshold_reward,
    "image": image_reward,
    "format": format_reward,
    "count": count_reward,
    "choice": choice_reward,
    "length": length_reward,
}


def load_reward(name: str) -> Reward:
    """The built-in reward of this name, or the function of a user's `path/to/file.py:function`."""
    if name in REWARDS:
        return REWARDS[name]
    if ".py:" not in name:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REWARDS)}"
        raise ConfigError(f"reward {name!r} is unknown ({hint}); write your own as path/to/file.py:function")
    file, _, function = name.rpartition(":")
    reward: Reward | None = getattr(_load_module(Path(file), name), function, None)
    if reward is None or not callable(reward):
        raise ConfigError(f"reward {name!r}: {file} has no function {function!r}")
    return reward


def _load_module(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"reward {name!r}: no file {path}; give the path from where the command is run")
    module_name = f"polyground_reward_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"reward {name!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"reward {name!r}: {path} cannot be imported ({error}); fix the file") from error
    return module


# ---------------------------------------------------------------- the scorer


class RewardSpec(Protocol):
    """What a recipe says of one reward."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Part:
    label: str
    reward: Reward
    weight: float
    options: Mapping[str, Any]


class Scorer:
    """The one scorer: every reward of a recipe, each checked for its name and options when built."""

    def __init__(self, rewards: Sequence[RewardSpec], *, native: str | None = None, reasoning: bool = True) -> None:
        """`native` names the form an untrained family answers in (`answer.NATIVE_READERS`); None reads the contract only.

        Without `reasoning` the form asked for is an answer block alone.
        """
        if native is not None and native not in NATIVE_READERS:
            raise ConfigError(f"native answer form {native!r} is unknown; known: {', '.join(NATIVE_READERS)}")
        self.native = native
        self.reasoning = reasoning
        self._parts = tuple(
            _Part(label, load_reward(spec.name), float(spec.weight), dict(spec.options))
            for label, spec in zip(_labels(rewards), rewards, strict=True)
        )
        for part in self._parts:
            _check_options(part)

    def score(self, completion: Completion | str, example: Example, grids: Sequence[Grid]) -> Score:
        """Read once, reward many times; the parts are kept beside their weighted sum. A `str` is a completion's text."""
        completion = Completion(text=completion) if isinstance(completion, str) else completion
        reading = read(completion, example, grids, self.native, reasoning=self.reasoning)
        parts = {part.label: _value(part, reading, example, completion) for part in self._parts}
        return Score(
            total=sum(part.weight * parts[part.label] for part in self._parts),
            parts=parts,
            iou=reading.outcome if reading.is_choice else reading.lenient_iou,
            image_correct=reading.image_agreement,
            unreadable=reading.answer.value if isinstance(reading.answer, Unreadable) else None,
            answer=reading.answer if isinstance(reading.answer, Answer) else None,
        )


def outcome(score: Score, example: Example) -> float:
    """How right the answer is, shaping aside, in [0, 1]: the IoU, or 1 for the right letter.

    As strict as the `iou` reward: an answer that names no image earns nothing on a prompt of several images, unless
    the annotation does not know the image either.
    """
    unnamed = score.answer is not None and any(located.image is None for located in score.answer.boxes)
    if unnamed and len(example.images) > 1 and score.image_correct is not None:
        return 0.0
    return score.iou


def passed(score: Score, threshold: float = 0.5) -> bool:
    """True when the answer is fit to learn from, shaping aside: the IoU reaches the threshold and every image that the
    annotation knows is named right; or the letter is right."""
    return reaches(score.iou, threshold) and score.image_correct in (None, 1.0)


def _labels(rewards: Sequence[RewardSpec]) -> list[str]:
    repeated = {name for name, times in Counter(spec.name for spec in rewards).items() if times > 1}
    labels = []
    for spec in rewards:
        options = ", ".join(f"{key}={value}" for key, value in sorted(spec.options.items()))
        labels.append(f"{spec.name}({options})" if spec.name in repeated and options else spec.name)
    for label, times in Counter(labels).items():
        if times > 1:
            raise ConfigError(f"reward {label!r} is listed {times} times; keep one and add up the weights")
    return labels


_PROBE = Example(key="probe", task="probe", images=(Path("probe.png"),), question="", target=Answer((Located(1, FULL_IMAGE),)))
_PROBE_COMPLETION = Completion(text='<think>.</think><answer>[{"bbox_2d": [0, 0, 1, 1]}]</answer>', token_ids=(0,))


def _check_options(part: _Part) -> None:
    """Refuse a bad option before any model is loaded; a built-in reward is tried on a probe, so its values are checked too."""
    if not math.isfinite(part.weight):
        raise ConfigError(f"reward {part.label!r}: weight must be a finite number; got {part.weight}")
    reading = read(_PROBE_COMPLETION, _PROBE, [Grid(width=1, height=1)])
    try:
        inspect.signature(part.reward).bind(reading, _PROBE, _PROBE_COMPLETION, **part.options)
        if part.reward in REWARDS.values():
            part.reward(reading, _PROBE, _PROBE_COMPLETION, **part.options)
    except TypeError as error:
        raise ConfigError(
            f"reward {part.label!r} cannot be called as reward(reading, example, completion, **{dict(part.options)}): {error}"
        ) from error


def _value(part: _Part, reading: Reading, example: Example, completion: Completion) -> float:
    value = part.reward(reading, example, completion, **part.options)
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ConfigError(
            f"reward {part.label!r} returned {value!r} for example {example.key}; "
            "a reward is a number in [0, 1]; scale it with its weight"
        )
    return float(value)
