"""Pretraining steps as arrays, prepared by one worker process while the model trains. No torch here: the worker stays light."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
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

# Shapes: S scenes of a step, K patches of an image (in the merger's order), M merged tokens of an image, B rows, T tokens,
# N objects that tokens of the rows name or box, P tokens about them.

SIDE, PATCH, MERGE = 112, 14, 2
CELLS = SIDE // PATCH
TOKENS_PER_IMAGE = (CELLS // MERGE) ** 2
IGNORED = -100
_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_BOX = re.compile(r'"bbox_2d": \[(\d+), (\d+), (\d+), (\d+)\](?:, "label": "([a-z ]+)")?')


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a row, first to last, that are about one object of an image."""

    first: int
    last: int
    knows: int
    """The token that knows which object is meant: it opens the box, or ends the phrase."""
    image: int
    """The image of the row, from 1."""
    edges: tuple[float, ...]
    """The object's box in sides of the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What each merged token of each scene has in it: the targets of the dense loss."""

    present_SM: NDArray[np.bool_]
    """True where an object has its centre in the token's square."""
    classes_SM4: NDArray[np.int64]
    """Colour, shape, size and texture of that object; of the largest, where there are two."""
    edges_SM4: NDArray[np.float32]
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
    about_P2: NDArray[np.int64]
    """Row and place in it of every token that is about one object: the tokens of its box, its label or its phrase."""
    at_P: NDArray[np.int64]
    """The place in the same row of the image token that holds the centre of that object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step is made of: S patches in rows."""

    pixels_SKD: NDArray[np.uint8]
    """Patches, each as channels x height x width."""
    seen: Seen
    parts: tuple[Rows, ...]
    samples: int


def patches(image: Image.Image) -> NDArray[np.uint8]:
    """[K, 3 * PATCH * PATCH] of an image, in the order of Qwen2VLImageProcessor (one of its two equal frames)."""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    half = CELLS // MERGE
    split = small.reshape(half, MERGE, PATCH, half, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(split.reshape(CELLS * CELLS, 3 * PATCH * PATCH))


def token_at(x: float, y: float) -> int:
    """The merged token of an image that sees the point (x, y), in sides of the image."""
    half = CELLS // MERGE
    return int(y * half) * half + int(x * half)


def label_tokens(scenes: list[Scene]) -> Seen:
    """Of every merged token: whether an object's centre is in it, what it is, its box; of two objects the larger counts."""
    present = np.zeros((len(scenes), TOKENS_PER_IMAGE), dtype=np.bool_)
    classes = np.zeros((len(scenes), TOKENS_PER_IMAGE, 4), dtype=np.int64)
    edges = np.zeros((len(scenes), TOKENS_PER_IMAGE, 4), dtype=np.float32)
    for s, scene in enumerate(scenes):
        for item in sorted(scene.items, key=lambda item: item.box.area):
            m = token_at(*item.box.center)
            present[s, m] = True
            words = ((COLOURS, item.colour), (SHAPES, item.shape), (SIZES, item.size), (TEXTURES, item.texture))
            classes[s, m] = [bank.index(word) for bank, word in words]
            edges[s, m] = (item.box.x0, item.box.y0, item.box.x1, item.box.y1)
    return Seen(present_SM=present, classes_SM4=classes, edges_SM4=edges)


class Encoder:
    """Turns samples into token rows with the positions Qwen3-VL gives them."""

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self.image_id, self.end_id, self.pad_id = (
            self.ids(token)[0] for token in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>")
        )

    def ids(self, text: str) -> list[int]:
        """Token ids, with nothing put around the text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids)

    def prompt(self, images: int, question: str) -> str:
        """A user's turn of so many images and the question, up to where the answer begins."""
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

    def spans(self, sample: Sample) -> list[Span]:
        """Tokens of a sample's row that are about one object: its phrase, or its box and label in a native answer."""
        if not sample.images:
            return []  # boxes of plain text are of no image
        prompt = self.prompt(len(sample.images), sample.prompt)
        texts = (prompt, sample.completion)
        encodings = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]

        def token(character: int) -> int:
            behind = character >= len(prompt)
            at = encodings[behind].char_to_token(character - len(prompt) * behind)
            if at is None:
                raise ValueError(f"no token holds {texts[behind][character - len(prompt) * behind]!r}")
            return at + len(encodings[0].ids) * behind

        found = []
        for match in _BOX.finditer(sample.completion):
            opens, ends = (token(len(prompt) + at) for at in (match.start(1) - 1, match.end(match.lastindex or 0) - 1))
            edges = tuple(float(n) / 1000 for n in match.groups()[:4])
            found.append(Span(opens, ends, opens, sample.boxed, edges))
        whole, at = prompt + sample.completion, len(prompt) - len(sample.prompt) - len(_TURN)
        for phrase, image, box in sample.named:
            at = whole.index(phrase, at) + len(phrase)
            last = token(at - 1)
            # The token before an answer's phrase chooses its first word; in a question only the end of a phrase knows enough.
            first = token(at - len(phrase)) - 1 if at > len(prompt) else last
            found.append(Span(first, last, last, image, (box.x0, box.y0, box.x1, box.y1)))
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
        """One batch, padded on the right to its longest row; labels are `IGNORED` on prompts and padding."""
        rows = [self.row(sample) for sample in samples]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        positions = np.zeros((3, len(rows), longest), dtype=np.int64)
        for b, (ids, learned) in enumerate(rows):
            input_ids[b, : len(ids)], labels[b, : len(ids)], positions[:, b, : len(ids)] = ids, learned, self.positions(ids)
        images = np.array([k for sample in samples for k in sample.images], dtype=np.int64)
        spans = [(b, span) for b, sample in enumerate(samples) for span in self.spans(sample)]
        about = [(b, t, self._seen_at(rows[b][0], span)) for b, span in spans for t in range(span.first, span.last + 1)]
        return Rows(
            input_ids_BT=input_ids,
            labels_BT=labels,
            positions_3BT=positions,
            images=images,
            located_N=np.array([b * longest + span.knows for b, span in spans], dtype=np.int64),
            boxes_N4=np.array([span.edges for _, span in spans], dtype=np.float32).reshape(-1, 4),
            about_P2=np.array([(b, t) for b, t, _ in about], dtype=np.int64).reshape(-1, 2),
            at_P=np.array([at for _, _, at in about], dtype=np.int64),
        )

    def _seen_at(self, ids: list[int], span: Span) -> int:
        x0, y0, x1, y1 = span.edges
        starts = [t for t, one in enumerate(ids) if one == self.image_id and ids[t - 1] != self.image_id]
        return starts[span.image - 1] + token_at((x0 + x1) / 2, (y0 + y1) / 2)


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
        seen=label_tokens(scenes),
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
