"""Average precision of answers that hold any number of boxes, by pycocotools; intervals by resampling the questions.

Matching and precision are those of `COCOeval`. Added here are MC-Bench's weights and groups, and the bootstrap, which weighs
the matches that pycocotools has made and matches nothing anew. The formats of benchmarks stay outside.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from polyground.errors import MissingLibraryError
from polyground.extras import install_command
from polyground.geometry import Box, iou

# Shapes: B bootstrap draws, U questions, D detections of one category, R recall levels.

Array = np.ndarray[Any, np.dtype[np.float64]]

Corner = tuple[float, float, float, float]
"""x, y, width, height in pixels, as COCO writes a box."""

MAX_DETECTIONS = 100
"""Boxes per image and category that count, the surest first (COCO)."""

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """One annotated instance."""

    category: int
    box: Corner
    area: float
    """In pixels; a segmented instance may be smaller than its box."""
    crowd: bool = False
    """A crowd region: finding it, or not, counts for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One answered box."""

    category: int
    box: Corner
    confidence: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One image of one question: what is there and what was found."""

    question: int
    """Position of the question; what the bootstrap draws."""
    truths: tuple[Truth, ...] = ()
    found: tuple[Found, ...] = ()


def average_precision(
    panels: Sequence[Panel],
    *,
    ious: Sequence[float] = (0.5,),
    weights: Literal["instances", "equal"] = "equal",
    bootstrap: int = 0,
    seed: int = 0,
) -> tuple[float, Array]:
    """Average precision over the categories that are annotated, in [0, 1], and its value in each bootstrap draw.

    `weights` says whether a category counts by its annotated instances (MC-Bench) or like every other (COCO). Equally
    confident boxes rank in the order of the panels. NaN when nothing is annotated.
    """
    evaluation = _evaluate(panels, ious)
    categories = evaluation.params.catIds
    precision_TRC = evaluation.eval["precision"][:, :, :, 0, -1]
    sizes_C = np.array([sum(truth.category == c for panel in panels for truth in panel.truths) for c in categories], dtype=float)
    values_C = np.array([_mean_known(precision_TRC[:, :, c]) for c in range(len(categories))])
    value = float(_weighted(values_C, sizes_C, weights))
    return value, _draws(evaluation, panels, weights=weights, bootstrap=bootstrap, seed=seed)


def _mean_known(precisions: Array) -> float:
    known = precisions[precisions > -1]
    return float(known.mean()) if known.size else float("nan")


def _weighted(values: Array, sizes: Array, weights: str) -> Any:
    """Mean over the last axis. By instances, a category that has only crowds still takes its share, as MC-Bench counts."""
    share = sizes if weights == "instances" else (~np.isnan(values)).astype(float)
    total = share.sum(axis=-1)
    return np.divide((np.nan_to_num(values) * share).sum(axis=-1), total, out=np.full(np.shape(total), np.nan), where=total > 0)


def require_pycocotools() -> tuple[Any, Any]:
    """`COCO` and `COCOeval`; raises ConfigError where they are not installed."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingLibraryError(f"average precision needs pycocotools; {install_command('eval')}") from error
    return COCO, COCOeval


def _evaluate(panels: Sequence[Panel], ious: Sequence[float]) -> Any:
    COCO, COCOeval = require_pycocotools()
    categories = sorted({truth.category for panel in panels for truth in panel.truths})
    # Identities start at 1: to pycocotools, matched with 0 is not matched.
    truths = [(image, truth) for image, panel in enumerate(panels, start=1) for truth in panel.truths]
    found = [(image, box) for image, panel in enumerate(panels, start=1) for box in panel.found]
    gold = COCO()
    gold.dataset = {
        "images": [{"id": image} for image in range(1, len(panels) + 1)],
        "categories": [{"id": category} for category in categories],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": truth.category,
                "bbox": list(truth.box),
                "area": truth.area,
                "iscrowd": int(truth.crowd),
            }
            for number, (image, truth) in enumerate(truths, start=1)
        ],
    }
    answered = COCO()
    answered.dataset = {
        **gold.dataset,
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": box.category,
                "bbox": list(box.box),
                "area": box.box[2] * box.box[3],
                "score": box.confidence,
                "iscrowd": 0,
            }
            for number, (image, box) in enumerate(found, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells its progress there
        gold.createIndex()
        answered.createIndex()
        evaluation = COCOeval(gold, answered, "bbox")
        evaluation.params.iouThrs = np.asarray(ious, dtype=float)
        evaluation.params.areaRng = [evaluation.params.areaRng[0]]
        evaluation.params.areaRngLbl = [evaluation.params.areaRngLbl[0]]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _draws(evaluation: Any, panels: Sequence[Panel], *, weights: str, bootstrap: int, seed: int) -> Array:
    """[B] the same average precision with the questions drawn anew."""
    questions = sorted({panel.question for panel in panels})
    if not bootstrap or not questions:
        return np.zeros(0)
    place = {question: position for position, question in enumerate(questions)}
    by_category: dict[int, list[Any]] = defaultdict(list)
    for entry in evaluation.evalImgs:
        if entry is not None:
            by_category[entry["category_id"]].append((place[panels[entry["image_id"] - 1].question], entry))
    matches = [_Matches(by_category[category], len(evaluation.params.iouThrs)) for category in evaluation.params.catIds]
    rng = np.random.default_rng(seed)
    counts_BU = rng.multinomial(len(questions), np.full(len(questions), 1 / len(questions)), size=bootstrap)
    values_BC = np.array([[found.average_precision(counts_U) for found in matches] for counts_U in counts_BU], dtype=float)
    sizes_BC = np.array([[found.instances(counts_U) for found in matches] for counts_U in counts_BU], dtype=float)
    draws_B: Array = _weighted(values_BC, sizes_BC, weights)
    return draws_B


class _Matches:
    """The matches of one category, ready to be weighed by how often each question is drawn."""

    def __init__(self, entries: Sequence[tuple[int, Any]], thresholds: int) -> None:
        """`entries` are pycocotools' results by image, each with the position of its question."""
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in entries)])
        order = np.argsort(-scores, kind="mergesort")
        none_TD = np.zeros((thresholds, 0))
        matched_TD = np.concatenate([none_TD, *(entry["dtMatches"] for _, entry in entries)], axis=1)[:, order] > 0
        counts_TD = np.concatenate([none_TD, *(entry["dtIgnore"] for _, entry in entries)], axis=1)[:, order] == 0
        self.right_TD, self.wrong_TD = matched_TD & counts_TD, ~matched_TD & counts_TD
        self.question_D = np.array([question for question, entry in entries for _ in entry["dtScores"]], dtype=int)[order]
        self.question_G = np.array([question for question, entry in entries for _ in entry["gtIds"]], dtype=int)
        self.counts_G = np.concatenate([np.zeros(0), *(entry["gtIgnore"] for _, entry in entries)]) == 0

    def instances(self, counts_U: Any) -> float:
        """Annotated instances, crowds included."""
        return float(counts_U[self.question_G].sum())

    def average_precision(self, counts_U: Any) -> float:
        gold = float(counts_U[self.question_G][self.counts_G].sum())
        if not gold:
            return float("nan")
        weight_D = counts_U[self.question_D]
        areas = []
        for right_D, wrong_D in zip(self.right_TD, self.wrong_TD, strict=True):
            right, wrong = np.cumsum(right_D * weight_D), np.cumsum(wrong_D * weight_D)
            precision = right / (right + wrong + np.spacing(1))
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
            areas.append(envelope[np.searchsorted(right / gold, _RECALLS, side="left")].mean())
        return float(np.mean(areas))


# ---------------------------------------------------------------- groups of one description


def regroup(panels: Sequence[Panel]) -> list[Panel]:
    """The panels of one MC-Bench description with every answered box in the annotated group that the answer fits best.

    A description such as "the pairs of twins" annotates one group per pair; their numbers mean nothing. An answer in the
    contract names no groups, so all its boxes are one, and it fits a group by the mean IoU of one-to-one matches in the images
    together; the first of equals wins. The instances of the other groups are missed. Descriptions without a second group
    are left alone.
    """
    groups = sorted({truth.category for panel in panels for truth in panel.truths})
    if 2 not in groups or not any(panel.found for panel in panels):
        return list(panels)
    best = max(groups, key=lambda group: _fit(panels, group))
    return [replace(panel, found=tuple(replace(box, category=best) for box in panel.found)) for panel in panels]


def _fit(panels: Sequence[Panel], group: int) -> float:
    from scipy.optimize import linear_sum_assignment

    matched: list[float] = []
    for panel in panels:
        truths = [truth.box for truth in panel.truths if truth.category == group]
        overlaps = np.array([[_iou(box.box, truth) for truth in truths] for box in panel.found], dtype=float)
        if overlaps.size:
            rows, columns = linear_sum_assignment(overlaps, maximize=True)
            matched += overlaps[rows, columns].tolist()
    return sum(matched) / len(matched) if matched else 0.0


def _iou(a: Corner, b: Corner) -> float:
    """The project's IoU, of pixel boxes: a common scale changes no overlap."""
    left, top = min(a[0], b[0]), min(a[1], b[1])
    side = max(a[0] + a[2], b[0] + b[2], a[1] + a[3], b[1] + b[3]) - min(left, top)
    first, second = (
        Box((x - left) / side, (y - top) / side, min(1.0, (x + w - left) / side), min(1.0, (y + h - top) / side))
        for x, y, w, h in (a, b)
    )
    return iou(first, second)
