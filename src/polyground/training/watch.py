"""What a step's answers say of the policy beyond its reward, and plain words when a run starts to collapse or to game its reward.

Warnings are a function of the logged lines alone: the same log gives the same warnings, so a resumed run repeats none. Thresholds
are wide on purpose: a warning should be worth stopping for. Nothing here changes the training.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyground.answer import Answer, Located, Unreadable
from polyground.records import Example, Rollout
from polyground.rollout import Group
from polyground.storage import RowWriter, atomic_write_text, read_rows
from polyground.training.runs import LOG, WARNINGS

logger = logging.getLogger("polyground")

WINDOW_STEPS, WINDOW_LINES = 20, 3
"""Medians are over the log lines of so many steps, and over so many lines at least. Of 240 runs of 200 steps that changed nothing
(completions of a real run drawn anew, 4 to 64 a step) one was warned about; with 10 steps, 30."""

ENTROPY_SHARE, ENTROPY_FLOOR = 0.1, 0.01
"""Of the start, and in nats per token. At 0.01 nats a completion of 60 tokens has exp(0.6), fewer than two, likely forms: a group
is one text many times."""
NO_VARIANCE = 0.8
"""Share of groups without variance: four of five rollouts teach nothing."""
REWARD_RISE, IOU_SHARE = 0.08, 0.1
"""A rise of the reward this large, of which the IoU has taken part by less than a tenth: shaping alone can pay so much."""
AREA_GROWTH, AREA_RATIO = 2.0, 1.5
"""Times the start, and times the annotated area: boxes that begin too small may grow to their size unremarked."""
COUNT_RATIO = 2.0
"""Boxes answered per box annotated. A second guess is the first to pay; two for each box are a habit."""
SHARE_RISE = 0.15
"""Rise of a share of completions (empty, unreadable, wrong image): one in seven answers lost that the start still gave."""
UNREADABLE = 0.5
"""Share of completions still without a usable answer once the run is two windows old: half of the work is lost."""
REASONING_SHARE, REASONING_CHARACTERS = 1 / 3, 20
"""Of the start; a start shorter than so many characters is no reasoning that could vanish."""
REASONING_MISSING = 0.3
"""Rise of the share of completions without any reasoning."""
CUT_OFF = 0.2
"""Share of completions that met the token budget: they are scored as unreadable, and the policy is taught to be short."""
ENGINES_APART = 0.5
"""Mean weight of what a server has sampled: below, half of the work is lost, or its gradient is that of another policy."""
KL = 1.0
"""Nats per token: under the starting policy the tokens are e times less likely each, on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """One thing that looks wrong, said once in a run."""

    step: int
    """After which it was seen."""
    kind: str
    text: str
    """What is seen, why it matters, what to try."""


# ---- what the answers of a step say


def answer_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Reasons for unreadable answers, boxes against the annotated ones, reasoning; and the outcome by task.

    Shares are of the completions they can be said of, and a name is left out where there is none: boxes are compared on
    questions with annotated boxes, images on those with several images of which the right one is known.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    thoughts = [len(thought_of(rollout.completion.text)) for rollout in rollouts]
    metrics = {
        f"unreadable/{reason}": fmean([float(rollout.score.unreadable == reason) for rollout in rollouts])
        for reason in Unreadable
    }
    metrics |= {"reasoning/mean_length": fmean(thoughts), "reasoning/missing": fmean([float(length == 0) for length in thoughts])}
    return metrics | _box_metrics(groups) | _task_metrics(rollouts)


def thought_of(text: str) -> str:
    """The reasoning of a completion, whether or not the rest can be read: a closed think block, or one that was cut short.

    >>> thought_of("<think>It moved.</think><answer>[]</answer>"), thought_of("<think>It mo"), thought_of("<answer>[]</answer>")
    ('It moved.', 'It mo', '')
    """
    closed, tag, _ = text.rpartition("</think>")
    # Templates may open the block in the prompt; a block that is not closed is opened in the completion.
    thought = closed if tag else text.partition("<think>")[2]
    return re.sub("</?think>", " ", thought).strip()


def _box_metrics(groups: Sequence[Group]) -> dict[str, float]:
    asked = [(group.example, rollout) for group in groups if group.example.target.boxes for rollout in group.rollouts]
    answered = [(example, answer) for example, rollout in asked if (answer := _in_boxes(rollout)) is not None]
    metrics = {}
    if asked:
        empty = sum(not answer.boxes for _, answer in answered)
        metrics["boxes/empty"] = empty / len(asked)
    if answered:
        count = sum(len(answer.boxes) for _, answer in answered)
        metrics["boxes/mean_count"] = count / len(answered)
        metrics["boxes/count_ratio"] = count / sum(len(example.target.boxes) for example, _ in answered)
    drawn = [(example, answer) for example, answer in answered if answer.boxes]
    if drawn:
        # A ratio of sums: a large box on a question about a small one does not drown the others.
        area = sum(_area(answer.boxes) for _, answer in drawn)
        metrics["boxes/mean_area"] = area / len(drawn)
        metrics["boxes/area_ratio"] = area / sum(_area(example.target.boxes) for example, _ in drawn)
    named = [_names_a_wrong_image(example, answer) for example, answer in drawn if _image_matters(example)]
    return metrics | ({"wrong_image": fmean(named)} if named else {})


def _in_boxes(rollout: Rollout) -> Answer | None:
    answer = rollout.score.answer
    return answer if answer is not None and answer.choice is None else None


def _area(boxes: Sequence[Located]) -> float:
    return fmean([located.box.area for located in boxes])


def _image_matters(example: Example) -> bool:
    return len(example.images) > 1 and all(located.image is not None for located in example.target.boxes)


def _names_a_wrong_image(example: Example, answer: Answer) -> float:
    right = {located.image for located in example.target.boxes}
    return float(any(located.image not in right for located in answer.boxes))


def _task_metrics(rollouts: Iterable[Rollout]) -> dict[str, float]:
    by_task: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_task[rollout.task].append(rollout)
    metrics = {}
    for task, own in sorted(by_task.items()):
        metrics[f"tasks/{task}/reward"] = fmean([rollout.score.total for rollout in own])
        metrics[f"tasks/{task}/iou"] = fmean([rollout.score.iou for rollout in own])
        metrics[f"tasks/{task}/unreadable"] = fmean([float(rollout.score.unreadable is not None) for rollout in own])
    return metrics


# ---- what the curves say


class Watch:
    """Sees every line of a training log once and says, once for each kind, what looks wrong.

    The end of the run so far is compared with its beginning: medians over the first and the last `window` values of a
    curve. Levels are judged from one window on, changes from two, so that a short run is left in peace.
    """

    def __init__(self, *, window: int = WINDOW_STEPS) -> None:
        self._window = window
        self._first: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=window))
        self._seen: dict[str, int] = defaultdict(int)
        self._said: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take in one line (`step` and figures); the warnings that are new with it."""
        broken = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        for key, value in row.items():
            if isinstance(value, int | float) and key not in broken:
                self._seen[key] += 1
                self._last[key].append(value)
                if self._seen[key] <= self._window:
                    self._first[key].append(value)
        texts = {kind: rule(self) for kind, rule in RULES.items() if kind not in self._said}
        if broken and "not_finite" not in self._said:
            texts["not_finite"] = (
                f"{' and '.join(broken)} is no finite number: the weights may be spoilt from here on. "
                "Go back to an earlier checkpoint; lower learning_rate and max_grad_norm; load the model in float32."
            )
        alarms = [Alarm(step=int(row["step"]), kind=kind, text=text) for kind, text in texts.items() if text]
        self._said |= {alarm.kind for alarm in alarms}
        return alarms

    def begin(self, key: str) -> float | None:
        """The curve's level at the start; None until the start and the present no longer overlap."""
        return median(self._first[key]) if self._seen[key] >= 2 * self._window else None

    def now(self, key: str) -> float | None:
        """The curve's present level; None before there are enough values to judge by."""
        return median(self._last[key]) if self._seen[key] >= self._window else None

    def change(self, key: str) -> tuple[float, float] | None:
        """(level at the start, present level), where both are known."""
        begin, now = self.begin(key), self.now(key)
        return None if begin is None or now is None else (begin, now)

    def rise(self, key: str) -> tuple[float, float] | None:
        """The change, if it stands out from the scatter: three quarters of the values lie above three quarters of the first."""
        change = self.change(key)
        if change is None or quantiles(self._last[key])[0] <= quantiles(self._first[key])[2]:
            return None
        return change

    def keys(self, prefix: str, suffix: str = "") -> list[str]:
        """The curves there are of such a name."""
        return [key for key in self._seen if key.startswith(prefix) and key.endswith(suffix)]


def _entropy_collapse(watch: Watch) -> str | None:
    match watch.change("entropy"):
        case (begin, now) if now < ENTROPY_SHARE * begin or now < ENTROPY_FLOOR < begin:
            return (
                f"Entropy fell from {begin:.2g} to {now:.2g} nats per token: the completions of a group are nearly copies, and "
                "there is little left to choose from. Try a lower learning_rate, a higher temperature, epsilon_high above "
                "epsilon, or beta above 0; an earlier checkpoint may be the better model."
            )
    return None


def _no_variance(watch: Watch) -> str | None:
    now = watch.now("frac_reward_zero_std")
    if now is None or now <= NO_VARIANCE:
        return None
    return (
        f"In {_percent(now)} of the groups all rewards agree: they have no advantage and teach nothing. The questions are too "
        "easy or too hard for the policy as it is now. Try rejection sampling with a narrower band of pass rates, more "
        "num_generations, or a higher temperature."
    )


def _reward_without_iou(watch: Watch) -> str | None:
    reward, overlap = watch.rise("reward"), watch.change("iou")
    if reward is None or overlap is None:
        return None
    rise = reward[1] - reward[0]
    if rise < REWARD_RISE or overlap[1] - overlap[0] >= IOU_SHARE * rise:
        return None
    return (
        f"The reward rose from {reward[0]:.2f} to {reward[1]:.2f} while the IoU went from {overlap[0]:.2f} to {overlap[1]:.2f}: "
        f"the policy is paid for something other than the right box{_risen_most(watch)}. Read its rows in rollouts.jsonl and "
        "lower the weight of that part."
    )


def _risen_most(watch: Watch) -> str:
    changes = {key: change for key in watch.keys("rewards/", "/mean") if (change := watch.change(key)) is not None}
    if not changes:
        return ""
    key = max(changes, key=lambda key: changes[key][1] - changes[key][0])
    begin, now = changes[key]
    name = key.removeprefix("rewards/").removesuffix("/mean")
    return f" (most of all {name}, from {begin:.2f} to {now:.2f})"


def _boxes_growing(watch: Watch) -> str | None:
    match watch.rise("boxes/area_ratio"):
        case (begin, now) if now >= AREA_RATIO and now >= AREA_GROWTH * begin:
            return (
                f"The boxes grew from {begin:.2g} to {now:.2g} times the annotated area: a large box is never quite wrong, and "
                "the policy may be learning to cover rather than to find. Try the iou_threshold reward, which pays nothing for a "
                "loose box, or a lower weight of whatever pays without overlap."
            )
    return None


def _many_boxes(watch: Watch) -> str | None:
    now = watch.now("boxes/count_ratio")
    if now is None or now <= COUNT_RATIO:
        return None
    return (
        f"Answers hold {now:.1f} boxes for each annotated one: the policy guesses instead of deciding. The iou reward divides by "
        "the larger count, so look for a reward of your own that does not; try the count reward."
    )


def _empty_answers(watch: Watch) -> str | None:
    return _risen(
        watch,
        "boxes/empty",
        "Empty answers to questions that have a box rose from {begin} to {now}: saying that nothing is there has become the safe "
        "thing to say. Try fewer questions whose answer is empty, a part such as count or image that an empty answer does not "
        "earn, or beta above 0.",
    )


def _unreadable(watch: Watch) -> str | None:
    reasons = {key: watch.now(key) or 0.0 for key in watch.keys("unreadable/")}
    most = max(reasons, key=lambda key: reasons[key], default="")
    reason = f" (most often {most.partition('/')[2].replace('_', ' ')})" if most and reasons[most] > 0 else ""
    risen = _risen(
        watch,
        "unreadable",
        f"Unreadable answers rose from {{begin}} to {{now}}{reason}: the policy is losing the form it was taught. Try beta above "
        "0, a higher weight of format, a lower learning_rate, or a longer cold start.",
    )
    match watch.change("unreadable"):
        case (_, now) if risen is None and now >= UNREADABLE:
            return (
                f"{_percent(now)} of the answers still cannot be read{reason}: they earn nothing, whatever they mean. Try a "
                "longer cold start, and look at the form that rollouts.jsonl shows."
            )
    return risen


def _reasoning_vanishing(watch: Watch) -> str | None:
    length = watch.change("reasoning/mean_length")
    missing = watch.change("reasoning/missing")
    if length is None or length[0] < REASONING_CHARACTERS:
        return None
    lost = missing is not None and missing[1] - missing[0] >= REASONING_MISSING
    if length[1] >= REASONING_SHARE * length[0] and not lost:
        return None
    without = "" if missing is None else f", and {_percent(missing[1])} of the completions have none"
    return (
        f"The reasoning shrank from {length[0]:.0f} to {length[1]:.0f} characters{without}: the answer is now given without the "
        "steps it was to rest on. Where reasoning is wanted, try the length reward with min_words, a higher weight of "
        "format, or beta above 0; where the results hold, it was not needed."
    )


def _cut_off(watch: Watch) -> str | None:
    now = watch.now("completions/clipped_ratio")
    if now is None or now <= CUT_OFF:
        return None
    return (
        f"{_percent(now)} of the completions meet the token budget before they end: right reasoning is punished for its length. "
        "Raise max_completion_length, or add the length reward if the policy rambles."
    )


def _far_from_the_start(watch: Watch) -> str | None:
    now = watch.now("kl")
    if now is None or now <= KL:
        return None
    return (
        f"The KL to the starting policy is {now:.2g} nats per token: the policy has left what SFT taught it, and what it knew "
        "beyond these questions may be gone. Try a lower learning_rate or a higher beta; an earlier checkpoint may be better."
    )


def _engines_apart(watch: Watch) -> str | None:
    now, gap = (watch.now(f"sampling/{name}/mean") for name in ("importance_sampling_ratio", "sampling_logp_difference"))
    if now is None or gap is None or now >= ENGINES_APART:
        return None
    return (
        f"What the server samples weighs {now:.2g} on average: its log-probabilities are {gap:.2g} nats per token from the "
        "policy's, and most of the rollouts teach nothing. Try max_staleness 0, the server in the dtype of the training, or "
        "vllm_importance_sampling_mode token_truncate."
    )


def _wrong_images(watch: Watch) -> str | None:
    return _risen(
        watch,
        "wrong_image",
        "Answers that name a wrong image rose from {begin} to {now}: the policy is losing track of which image it speaks of. "
        "Check that the image numbers of the training questions are right; try a higher weight of the image reward.",
    )


def _risen(watch: Watch, key: str, text: str) -> str | None:
    match watch.rise(key):
        case (begin, now) if now - begin >= SHARE_RISE:
            return text.format(begin=_percent(begin), now=_percent(now))
    return None


RULES: Mapping[str, Callable[[Watch], str | None]] = {
    "entropy_collapse": _entropy_collapse,
    "no_variance": _no_variance,
    "reward_without_iou": _reward_without_iou,
    "boxes_growing": _boxes_growing,
    "many_boxes": _many_boxes,
    "empty_answers": _empty_answers,
    "unreadable": _unreadable,
    "reasoning_vanishing": _reasoning_vanishing,
    "cut_off": _cut_off,
    "kl": _far_from_the_start,
    "wrong_image": _wrong_images,
    "engines_apart": _engines_apart,
}
"""What is looked for, by the kind of its warning; `not_finite` is looked for besides, in every line."""


class Watching(TrainerCallback):
    """Watches a training as its log is written: a line to the logger and a row to `warnings.jsonl` for every warning."""

    def __init__(self, out: Path) -> None:
        self._log, self._path = out / LOG, out / WARNINGS
        self._watch = Watch()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        # What is left of the log of an earlier attempt is seen again, and its warnings are written as they were.
        self._watch = Watch(window=window_lines(int(args.logging_steps)))
        rows = read_rows(self._log) if self._log.exists() else ()
        alarms = [alarm for row in rows if "loss" in row for alarm in self._watch.see(row)]
        atomic_write_text(self._path, "".join(json.dumps(asdict(alarm)) + "\n" for alarm in alarms))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        for alarm in self._watch.see({**logs, "step": state.global_step}):
            logger.warning("%s: step %d: %s", self._path.parent, alarm.step, alarm.text)
            with RowWriter(self._path) as rows:
                rows.append(asdict(alarm))

    def count(self) -> int:
        """Warnings so far, earlier attempts included."""
        return sum(1 for _ in read_rows(self._path)) if self._path.exists() else 0


def window_lines(logging_steps: int) -> int:
    """How many log lines make a window, where each speaks for so many steps.

    >>> [window_lines(steps) for steps in (1, 5, 10)]
    [20, 4, 3]
    """
    return max(WINDOW_LINES, math.ceil(WINDOW_STEPS / logging_steps))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
