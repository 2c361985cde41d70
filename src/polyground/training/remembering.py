"""A family that encodes nothing twice: prompts and image features of a step, and on request features of earlier passes."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from polyground.errors import PolygroundError
from polyground.geometry import Grid
from polyground.models import Family, ImageFeatures, Prompt
from polyground.records import Example, Message
from polyground.rollout import Ask


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ready:
    """An example on its way to a step, with what a worker process has done for it."""

    example: Example
    number: int
    """Its place among the examples."""
    place: int = 0
    """Its place in the step, whichever process has it."""
    asked: tuple[tuple[Message, ...], tuple[Grid, ...]] | None = None
    identity: str | None = None
    """Names the prompt by its contents; see `Remembering.identity`."""
    prompt: Prompt | None = None
    error: PolygroundError | None = None
    """Why there is no prompt."""


class FeatureCache:
    """Prompts without their pixels and what the vision tower made of these, in host memory; the longest unused go first."""

    def __init__(self, mib: int) -> None:
        self._room = mib * 2**20
        self._kept: OrderedDict[str, tuple[Prompt, ImageFeatures]] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0

    def __bool__(self) -> bool:
        return self._room > 0

    def __contains__(self, identity: object) -> bool:
        return identity in self._kept

    def get(self, identity: str) -> tuple[Prompt, ImageFeatures] | None:
        """What is kept of this prompt, which then counts as used last; None where nothing is."""
        with self._lock:
            if identity in self._kept:
                self._kept.move_to_end(identity)
            return self._kept.get(identity)

    def put(self, identity: str, prompt: Prompt, features: ImageFeatures) -> None:
        """Keep a copy in host memory; the longest unused make room. What is larger than all the room is not kept."""
        kept = (prompt, _moved(features, torch.device("cpu"), copy=True))
        if _bytes(*kept) > self._room:
            return
        with self._lock:
            if identity in self._kept:
                return
            self._kept[identity] = kept
            self.bytes += _bytes(*kept)
            while self.bytes > self._room:
                _, old = self._kept.popitem(last=False)
                self.bytes -= _bytes(*old)


class Remembering:
    """A family that encodes a prompt and its images once per step, however many ask: the sampler, the reference, the update.

    Its prompts carry no pixels: these wait apart until the vision tower has seen them, and are let go then. With a cache,
    features are kept beyond the step. Exact because the vision tower is frozen.
    """

    def __init__(self, family: Family, *, cache_mib: int = 0) -> None:
        self._family = family
        self._cache = FeatureCache(cache_mib)
        self._ready: dict[tuple[Message, ...], Ready] = {}
        self._prompts: dict[tuple[Message, ...], Prompt] = {}
        self._identities: dict[int, str] = {}
        self._unseen: dict[int, Prompt] = {}
        """The prompts with their pixels, by the id of the one without."""
        self._from_cache: dict[int, ImageFeatures] = {}
        self._features: dict[int, tuple[Prompt, ImageFeatures]] = {}
        """By id; the prompt is kept so that no other takes its id."""
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, messages: Sequence[Message]) -> Prompt:
        key = tuple(messages)
        if key not in self._prompts:
            self._prompts[key] = self._encoded(key)
        return self._prompts[key]

    def encode_images(self, model: Any, prompt: Prompt) -> ImageFeatures:
        return self.encode_images_of(model, [prompt])[0]

    def encode_images_of(self, model: Any, prompts: Sequence[Prompt]) -> list[ImageFeatures]:
        """Of each prompt: those of the cache or of this step where they are there, the rest encoded together."""
        device = next(model.parameters()).device
        for prompt in prompts:
            if (features := self._from_cache.pop(id(prompt), None)) is not None:
                self._features[id(prompt)] = (prompt, _moved(features, device))
        missing = [prompt for prompt in dict.fromkeys(prompts) if id(prompt) not in self._features]
        if missing:
            whole = [self._unseen.get(id(prompt), prompt) for prompt in missing]
            for prompt, features in zip(missing, self._family.encode_images_of(model, whole), strict=True):
                self._features[id(prompt)] = (prompt, features)
                self._unseen.pop(id(prompt), None)
                if prompt.image_tokens and (identity := self._identities.get(id(prompt))):
                    self._cache.put(identity, prompt, features)
        return [self._features[id(prompt)][1] for prompt in prompts]

    def forget(self) -> None:
        """Let go of all but the cache; called before each new set of rollouts."""
        for held in (self._ready, self._prompts, self._identities, self._unseen, self._from_cache, self._features):
            held.clear()

    # Ahead of the step ------------------------------------------------------------------------------------------------

    def prepare(self, example: Example, ask: Ask, *, number: int, held: bool, place: int = 0) -> Ready:
        """What can be done for an example without the model, in a worker process; `held` says the cache has its features.

        An error is handed on as a value, to be raised where its prompt is asked for.
        """
        ready = Ready(example=example, number=number, place=place)
        try:
            messages, grids = ask(example)
            ready = replace(ready, asked=(tuple(messages), tuple(grids)), identity=self.identity(messages))
            return ready if held else replace(ready, prompt=self._family.encode(messages))
        except PolygroundError as error:
            return replace(ready, error=error)

    def expect(self, ready: Ready) -> None:
        """Take what a worker process has prepared."""
        if ready.asked is not None:
            self._ready[ready.asked[0]] = ready

    def holds(self, identity: str | None) -> bool:
        """Whether the cache has the features of a prompt."""
        return identity in self._cache

    def identity(self, messages: Sequence[Message]) -> str | None:
        """A name for a prompt made from its text, the bytes of its images and their pixel budget; None without a cache."""
        if not self._cache:
            return None
        images = [part for message in messages for part in message.images]
        try:
            parts = [
                [message.role, [part if isinstance(part, str) else [self._digest(part)] for part in message.parts]]
                for message in messages
            ]
        except OSError:
            return None  # whoever decodes the image says what is wrong with it
        named = json.dumps([self._family.convention.pixel_budget(len(images)), parts])
        return hashlib.sha256(named.encode()).hexdigest()

    def _digest(self, path: Path) -> str:
        """Of the file's bytes, which are read again when its size or time changes."""
        status = path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        known = self._digests.get(path)
        if known is None or known[0] != stamp:
            with path.open("rb") as file:
                known = self._digests[path] = (stamp, hashlib.file_digest(file, "sha256").hexdigest())
        return known[1]

    def _encoded(self, messages: tuple[Message, ...]) -> Prompt:
        ready = self._ready.pop(messages, None)
        if ready is not None and ready.error is not None:
            raise ready.error
        identity = ready.identity if ready is not None else self.identity(messages)
        if identity is not None and (kept := self._cache.get(identity)) is not None:
            prompt, self._from_cache[id(kept[0])] = kept
            return prompt
        whole = ready.prompt if ready is not None and ready.prompt is not None else self._family.encode(messages)
        # Copies: what comes from a worker process lies in shared memory, of which each piece holds a file open.
        prompt = replace(whole, input_ids=whole.input_ids.clone(), position_ids=whole.position_ids.clone(), vision={})
        self._unseen[id(prompt)] = whole
        if identity is not None:
            self._identities[id(prompt)] = identity
        return prompt


def _moved(features: ImageFeatures, device: torch.device, *, copy: bool = False) -> ImageFeatures:
    embeds, *deepstack = (tensor.to(device, copy=copy) for tensor in (features.embeds, *features.deepstack))
    return ImageFeatures(embeds, tuple(deepstack))


def _bytes(prompt: Prompt, features: ImageFeatures) -> int:
    tensors: tuple[Tensor, ...] = (prompt.input_ids, prompt.position_ids, features.embeds, *features.deepstack)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
