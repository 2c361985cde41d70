"""Pretraining steps as arrays, prepared by one worker process while the model trains. No torch here: the worker stays light."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from polyground.worlds.pretraining import Mix, Sample, sample_step
from polyground.worlds.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, render

# Shapes: S scenes of a step, K patches of an image (in the merger's order), B rows, T tokens, V image tokens of all rows.

SIDE, PATCH, MERGE = 112, 14, 2
CELLS = SIDE // PATCH
TOKENS_PER_IMAGE = (CELLS // MERGE) ** 2
IGNORED = -100
_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_BOX = re.compile(r'"bbox_2d": \[(\d+), (\d+), (\d+), (\d+)\]')


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """What lies in each patch of each scene: the targets of the dense loss."""

    present_SK: NDArray[np.bool_]
    """True where an object has its centre in the patch."""
    classes_SK4: NDArray[np.int64]
    """Colour, shape, size and texture of that object."""
    edges_SK4: NDArray[np.float32]
    """Its edges in sides of the image, so that a token knows where in the image it lies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Some of a step's samples, padded on the right."""

    input_ids_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]
    """The token itself where it is learned, IGNORED elsewhere (not shifted)."""
    positions_3BT: NDArray[np.int64]
    images: NDArray[np.int64]
    """Position in the step's scenes of each image shown, row after row."""
    located_N: NDArray[np.int64]
    """Where, in B * T, a token opens a learned box or ends a phrase that means one object."""
    boxes_N4: NDArray[np.float32]
    """The box opened, or that of the object meant; edges in sides of the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    pixels_SKD: NDArray[np.uint8]
    """Patches, each as channels x height x width."""
    cells: Cells
    parts: tuple[Rows, ...]
    samples: int


def patches(image: Image.Image) -> NDArray[np.uint8]:
    """[K, 3 * PATCH * PATCH] of an image, in the order of Qwen2VLImageProcessor (one of its two equal frames)."""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    half = CELLS // MERGE
    split = small.reshape(half, MERGE, PATCH, half, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(split.reshape(CELLS * CELLS, 3 * PATCH * PATCH))


def cell_index(row: int, column: int) -> int:
    """Where the patch at (row, column) stands in the merger's order."""
    half = CELLS // MERGE
    return ((row // MERGE * half + column // MERGE) * MERGE + row % MERGE) * MERGE + column % MERGE


def label_cells(scenes: list[Scene]) -> Cells:
    present = np.zeros((len(scenes), CELLS * CELLS), dtype=np.bool_)
    classes = np.zeros((len(scenes), CELLS * CELLS, 4), dtype=np.int64)
    edges = np.zeros((len(scenes), CELLS * CELLS, 4), dtype=np.float32)
    for s, scene in enumerate(scenes):
        for item in scene.items:
            x, y = item.box.center
            row, column = int(y * CELLS), int(x * CELLS)
            k = cell_index(row, column)
            present[s, k] = True
            words = ((COLOURS, item.colour), (SHAPES, item.shape), (SIZES, item.size), (TEXTURES, item.texture))
            classes[s, k] = [bank.index(word) for bank, word in words]
            edges[s, k] = (item.box.x0, item.box.y0, item.box.x1, item.box.y1)
    return Cells(present_SK=present, classes_SK4=classes, edges_SK4=edges)


class Encoder:
    """Turns samples into token rows with the positions Qwen3-VL gives them."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self.image_id, self.end_id, self.pad_id = (
            self.ids(token)[0] for token in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>")
        )

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def prompt(self, images: int, question: str) -> str:
        pad = "<|vision_start|>" + "<|image_pad|>" * TOKENS_PER_IMAGE + "<|vision_end|>"
        shown = pad if images == 1 else "\n".join(f"Image {n}: {pad}" for n in range(1, images + 1))
        return f"<|im_start|>user\n{shown}\n{question}{_TURN}"

    def row(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids and labels of one sample."""
        learned = [*self.ids(sample.completion), self.end_id]
        if not sample.images:
            return [self.end_id, *learned], [IGNORED, *learned]
        prompt = self.ids(self.prompt(len(sample.images), sample.prompt))
        return prompt + learned, [IGNORED] * len(prompt) + learned

    def located(self, sample: Sample) -> list[tuple[int, Sequence[float]]]:
        """Tokens of a sample's row that open a learned box or end a phrase that means one object, each with that box."""
        if not sample.images:
            return []  # boxes of plain text are of no image
        prompt = self.prompt(len(sample.images), sample.prompt)
        found: list[tuple[int, Sequence[float]]] = []
        ends = [(match.start(1) - 1, [float(n) / 1000 for n in match.groups()]) for match in _BOX.finditer(sample.completion)]
        ends = [(len(prompt) + at, box) for at, box in ends]
        whole, at = prompt + sample.completion, len(prompt) - len(sample.prompt) - len(_TURN)
        for phrase, box in sample.named:
            at = whole.index(phrase, at) + len(phrase)
            ends.append((at - 1, (box.x0, box.y0, box.x1, box.y1)))
        encodings = [self._tokenizer.encode(text, add_special_tokens=False) for text in (prompt, sample.completion)]
        for character, box_edges in ends:
            behind = character >= len(prompt)
            token = encodings[behind].char_to_token(character - len(prompt) * behind)
            found.append((token + len(encodings[0].ids) * behind, box_edges))
        return found

    def positions(self, ids: list[int]) -> NDArray[np.int64]:
        """[3, T]: time, height and width; an image's tokens share their time and span a square."""
        half = CELLS // MERGE
        grid = np.stack([np.zeros(TOKENS_PER_IMAGE, dtype=np.int64), *np.divmod(np.arange(TOKENS_PER_IMAGE), half)])
        out = np.zeros((3, len(ids)), dtype=np.int64)
        at = t = 0
        while t < len(ids):
            if ids[t] == self.image_id:
                out[:, t : t + TOKENS_PER_IMAGE] = grid + at
                at, t = at + half, t + TOKENS_PER_IMAGE
            else:
                out[:, t] = at
                at, t = at + 1, t + 1
        return out

    def pad(self, samples: list[Sample]) -> Rows:
        rows = [self.row(sample) for sample in samples]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        positions = np.zeros((3, len(rows), longest), dtype=np.int64)
        for b, (ids, learned) in enumerate(rows):
            input_ids[b, : len(ids)], labels[b, : len(ids)], positions[:, b, : len(ids)] = ids, learned, self.positions(ids)
        images = np.array([k for sample in samples for k in sample.images], dtype=np.int64)
        located = [(b * longest + token, box) for b, s in enumerate(samples) for token, box in self.located(s)]
        return Rows(
            input_ids_BT=input_ids,
            labels_BT=labels,
            positions_3BT=positions,
            images=images,
            located_N=np.array([at for at, _ in located], dtype=np.int64),
            boxes_N4=np.array([box for _, box in located], dtype=np.float32).reshape(-1, 4),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the worker prepares for each step."""

    tokenizer: Path
    seed: int
    scenes: int
    samples: int
    parts: int
    """Rows are sorted by length and cut into so many parts, to save padding."""
    mix: Mix


def prepare(plan: Plan, encoder: Encoder, step: int) -> Step:
    """The arrays of one step; the same plan and number always give the same ones."""
    scenes, samples = sample_step(Random(f"{plan.seed}/{step}"), scenes=plan.scenes, samples=plan.samples, mix=plan.mix)
    ordered = sorted(samples, key=lambda sample: len(encoder.row(sample)[0]))
    size = max(1, -(-len(ordered) // plan.parts))
    return Step(
        pixels_SKD=np.stack([patches(render(scene)) for scene in scenes]),
        cells=label_cells(scenes),
        parts=tuple(encoder.pad(ordered[k : k + size]) for k in range(0, len(ordered), size)),
        samples=len(samples) or len(scenes),
    )


def _work(plan: Plan, first: int, last: int, queue: multiprocessing.Queue[Step]) -> None:
    encoder = Encoder(plan.tokenizer)
    for step in range(first, last):
        queue.put(prepare(plan, encoder, step))


def steps_ahead(plan: Plan, first: int, last: int) -> Iterator[Step]:
    """Steps `first` up to `last`, drawn by a worker process a few steps ahead."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[Step] = context.Queue(maxsize=6)
    worker = context.Process(target=_work, args=(plan, first, last, queue), daemon=True)
    worker.start()
    try:
        for _ in range(first, last):
            while True:
                try:
                    yield queue.get(timeout=30)
                    break
                except Empty:
                    if not worker.is_alive():
                        raise RuntimeError(f"the drawing worker ended with exit code {worker.exitcode}") from None
    finally:
        worker.terminate()
