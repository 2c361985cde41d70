"""Sampling from a model in this process: images encoded once per prompt, prompts prefilled once, rows decoded together.

The weights are the trainer's own, so sampled log-probabilities need no correction. Servers belong to `endpoint`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Literal

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from polyground.models.family import Loaded, Prompt
from polyground.models.linear_attention import has_linear_attention
from polyground.models.lora import merged_for_rollout
from polyground.models.shared_prefix import SHARED_PREFIX
from polyground.records import Completion, Message
from polyground.sampling import prompt_keys
from polyground.sampling.decoding import Parts, Prefilled, decode
from polyground.sampling.drawing import Settings, Written, uniform
from polyground.sampling.recording import recorder_for
from polyground.sampling.static import StaticDecoder, note_once, obstacle

# Shapes: B prompts of a batch, P tokens of its longest prompt, 3 the rotary axes.

Decoding = Literal["auto", "growing", "static"]
"""`growing`: shapes follow the rows (module `decoding`). `static`: they stay, and steps are recorded on a GPU (`static`)."""

_WINDOW = 4
"""Batches encoded ahead: among their prompts, those of like length are put together."""

LONG = 512
"""Tokens of a prompt from which on its keys are shared by its completions: below, copies are cheaper to read."""

SHORT = 32
"""Tokens below which a completion is decoded before a recording of its steps would have paid."""


class LocalSampler:
    """Samples from `loaded.model` as it is at each call, whatever wraps it and whatever its adapter says.

    `batch_size` is the number of completions decoded together, rounded to whole groups. `autocast` runs the model in
    that type; weights are then cast at every step (measured: the tiny model on one CPU core becomes 3 times slower). The
    model's training switches are put back after each call, and its cached state is not touched. `share_prompts` says whether
    completions read their prompt's keys where they lie instead of each a copy; by default where that is cheaper. `decoding`
    says how: by default on a GPU in recorded steps wherever the model allows it, in which prompts are always shared.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = 64,
        autocast: torch.dtype | None = None,
        share_prompts: bool | None = None,
        decoding: Decoding = "auto",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}")
        self._loaded = loaded
        self._batch_size = batch_size
        self._autocast = autocast
        self._share_prompts = share_prompts
        self._decoding = decoding
        self._ahead = _Ahead(loaded.family.encode)

    def prepare(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Start to read and encode what the next `sample` will ask for; an error is raised there, in its turn."""
        self._ahead.start(prompts)

    def sample(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        n: int,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        keys: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        keys, settings = prompt_keys(prompts, keys), Settings(n, temperature, top_p, max_tokens, seed)
        encoded = self._ahead.encoded(prompts, most=self._per_window(settings))
        return self._sample(encoded, keys, settings)

    def sample_encoded(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        keys: Sequence[str],
    ) -> list[list[Completion]]:
        """The same for prompts that are tensors already, as a trainer has them."""
        return self._sample(iter(prompts), list(keys), Settings(n, temperature, top_p, max_tokens, seed))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        tell: Callable[[str], None],
    ) -> Completion:
        """The one completion that `sample` gives of this prompt alone, told while it grows: its text so far, token by token.

        `tell` is called in the caller's thread; what it raises ends the sampling.
        """
        settings = Settings(1, temperature, top_p, max_tokens, seed)
        family = self._loaded.family
        prompt = family.encode(messages)
        with torch.no_grad(), _evaluating(self._loaded.model), self._precision(), merged_for_rollout(self._loaded.model):
            written = self._written(1, settings)
            prefilled = self._prefill([prompt])
            written.start(uniform(prompt_keys([messages], None), settings))

            def look() -> None:
                length = int(written.length_R[0])
                tell(family.decode(written.ids_RT[0, :length].tolist()))

            decode(Parts.of(self._loaded), prefilled, written, settings, share=False, look=look)
            return self._completions(written, 1, n=1)[0][0]

    def _sample(self, prompts: Iterator[Prompt], keys: Sequence[str], settings: Settings) -> list[list[Completion]]:
        groups: list[list[Completion]] = [[] for _ in keys]
        per_batch = max(1, self._batch_size // settings.n)
        numbered = zip(range(len(keys)), prompts, strict=True)
        with torch.no_grad(), _evaluating(self._loaded.model), self._precision(), merged_for_rollout(self._loaded.model):
            parts = Parts.of(self._loaded)
            static = self._static(parts, settings)
            written = self._written(min(per_batch, len(keys)) * settings.n, settings)
            while window := list(islice(numbered, self._per_window(settings))):
                # Prompts of equal length need neither padding nor a mask. The longest first: its memory will do for all.
                window.sort(key=lambda pair: len(pair[1]), reverse=True)
                for start in range(0, len(window), per_batch):
                    few = window[start : start + per_batch]
                    prefilled = self._prefill([prompt for _, prompt in few])
                    written.start(uniform([keys[i] for i, _ in few], settings))
                    if static is None:
                        decode(parts, prefilled, written, settings, share=self._shares(prefilled, settings))
                    else:
                        static.decode(prefilled, written)
                    sampled = self._completions(written, len(few) * settings.n, n=settings.n)
                    for (i, _), group in zip(few, sampled, strict=True):
                        groups[i] = group
        return groups

    def _per_window(self, settings: Settings) -> int:
        return max(1, self._batch_size // settings.n) * _WINDOW

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._loaded.device.type, dtype=self._autocast) if self._autocast else nullcontext()

    def _static(self, parts: Parts, settings: Settings) -> StaticDecoder | None:
        """What decodes with shapes that never change, for one call; None where caches grow instead."""
        if self._decoding == "growing" or (self._decoding == "auto" and self._loaded.device.type != "cuda"):
            return None
        why_not = obstacle(parts.decoder)
        if self._decoding == "auto" and (why_not or settings.max_tokens < SHORT):
            if why_not:
                note_once(f"decoding steps of this model are not recorded: {why_not}")
            return None
        if why_not:
            raise ValueError(f"this model cannot be decoded with a static cache: {why_not}; leave `decoding` at 'auto'")
        return StaticDecoder(parts, settings, recorder=recorder_for(self._loaded.device))

    def _written(self, rows: int, settings: Settings) -> Written:
        family = self._loaded.family
        return Written(
            rows,
            settings,
            stops=family.stop_token_ids,
            banned=family.banned_token_ids,
            pad=family.pad_token_id,
            device=self._loaded.device,
        )

    def _prefill(self, prompts: Sequence[Prompt]) -> Prefilled:
        family, model, device = self._loaded.family, self._loaded.model, self._loaded.device
        longest = max(len(p) for p in prompts)
        ids_BP = torch.full((len(prompts), longest), family.pad_token_id)
        positions_3BP = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        valid_BP = torch.ones(len(prompts), longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            padding = longest - len(prompt)
            ids_BP[i, padding:] = prompt.input_ids
            positions_3BP[:, i, padding:] = prompt.position_ids
            valid_BP[i, :padding] = False
        valid_BP = None if bool(valid_BP.all()) else valid_BP.to(device)
        output = family.forward(
            model,
            input_ids=ids_BP.to(device),
            position_ids=positions_3BP.to(device),
            features=family.encode_images_of(model, prompts),
            attention_mask=valid_BP,
            past_key_values=_empty_cache(family.language_model(model)),
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefilled(
            length=longest,
            logits_BV=output.logits[:, -1],
            position_B=torch.tensor([p.next_position for p in prompts], device=device),
            layers=output.past_key_values.layers,
            valid_BP=valid_BP,
        )

    def _shares(self, prefilled: Prefilled, settings: Settings) -> bool:
        """Whether rows read their prompt's keys where they lie, rather than each a copy of its own."""
        if self._loaded.family.language_model(self._loaded.model).config._attn_implementation != SHARED_PREFIX:
            return False
        if self._share_prompts is not None:
            return self._share_prompts
        return settings.n > 1 and prefilled.length >= LONG

    def _completions(self, written: Written, rows: int, *, n: int) -> list[list[Completion]]:
        tensors = (written.ids_RT, written.logprobs_RT, written.length_R, written.stopped_R)
        columns = (tensor[:rows].tolist() for tensor in tensors)
        completions = [
            Completion(
                text=self._loaded.family.decode(ids[:length]),
                token_ids=tuple(ids[:length]),
                logprobs=tuple(logprobs[:length]),
                truncated=not stopped,
            )
            for ids, logprobs, length, stopped in zip(*columns, strict=True)
        ]
        return [completions[i : i + n] for i in range(0, len(completions), n)]


def _empty_cache(decoder: nn.Module) -> DynamicCache:
    # With the configuration a sliding window would drop keys, whose columns the key mask still counts.
    return DynamicCache(config=decoder.config) if has_linear_attention(decoder) else DynamicCache()


class _Ahead:
    """Encodes prompts in one thread of its own while the model decodes others: Pillow and torch let go of the interpreter.

    One thread, so that a family is never asked for two prompts at a time.
    """

    def __init__(self, encode: Callable[[Sequence[Message]], Prompt]) -> None:
        self._encode = encode
        self._thread: ThreadPoolExecutor | None = None
        self._started: dict[tuple[Message, ...], Future[Prompt]] = {}

    def start(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Begin with these; what was begun before and is not among them is given up."""
        wanted = [tuple(messages) for messages in prompts]
        for messages in self._started.keys() - set(wanted):
            self._started.pop(messages).cancel()
        for messages in wanted:
            if messages not in self._started:
                self._started[messages] = self._submit(messages)

    def encoded(self, prompts: Sequence[Sequence[Message]], *, most: int) -> Iterator[Prompt]:
        """The prompts in order, at most so many encoded before they are taken."""
        waiting: deque[Future[Prompt]] = deque()
        rest = iter(prompts)
        try:
            while True:
                waiting.extend(self._begun(tuple(messages)) for messages in islice(rest, most - len(waiting)))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _begun(self, messages: tuple[Message, ...]) -> Future[Prompt]:
        return self._started.pop(messages, None) or self._submit(messages)

    def _submit(self, messages: tuple[Message, ...]) -> Future[Prompt]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        return self._thread.submit(self._encode, messages)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own switch put back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
