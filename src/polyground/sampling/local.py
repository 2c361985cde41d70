"""Sampling from a model in this process: images encoded once per prompt, prompts prefilled once, rows decoded together.

The weights are the trainer's own, so sampled log-probabilities need no correction. Servers belong to `endpoint`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from polyground.models.family import Loaded, Prompt
from polyground.models.linear_attention import has_linear_attention
from polyground.models.shared_prefix import SHARED_PREFIX, SharedPrompts
from polyground.records import Completion, Message
from polyground.sampling import prompt_keys, sample_seed

# Shapes: B prompts of a batch, P tokens of its longest prompt, R = B * n rows being decoded, T tokens decoded at most,
# K = P + T keys, V vocabulary, 3 the rotary axes.

_WINDOW = 4
"""Batches encoded ahead: among their prompts, those of like length are put together."""

LONG = 512
"""Tokens of a prompt from which on its keys are shared by its completions: below, copies are cheaper to read."""


class LocalSampler:
    """Samples from `loaded.model` as it is at each call, whatever wraps it and whatever its adapter says.

    `batch_size` is the number of completions decoded together, rounded to whole groups. `autocast` runs the model in
    that type; weights are then cast at every step (measured: the tiny model on one CPU core becomes 3 times slower). The
    model's training switches are put back after each call, and its cached state is not touched. `share_prompts` says whether
    completions read their prompt's keys where they lie instead of each a copy; by default where that is cheaper.
    """

    def __init__(
        self, loaded: Loaded, *, batch_size: int = 64, autocast: torch.dtype | None = None, share_prompts: bool | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {batch_size}")
        self._loaded = loaded
        self._batch_size = batch_size
        self._autocast = autocast
        self._share_prompts = share_prompts
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
        keys, settings = prompt_keys(prompts, keys), _Settings(n, temperature, top_p, max_tokens, seed)
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
        return self._sample(iter(prompts), list(keys), _Settings(n, temperature, top_p, max_tokens, seed))

    def _sample(self, prompts: Iterator[Prompt], keys: Sequence[str], settings: _Settings) -> list[list[Completion]]:
        groups: list[list[Completion]] = [[] for _ in keys]
        per_batch = max(1, self._batch_size // settings.n)
        numbered = zip(range(len(keys)), prompts, strict=True)
        with torch.no_grad(), _evaluating(self._loaded.model), self._precision():
            while window := list(islice(numbered, self._per_window(settings))):
                # Prompts of equal length need neither padding nor a mask.
                window.sort(key=lambda pair: len(pair[1]))
                for start in range(0, len(window), per_batch):
                    few = window[start : start + per_batch]
                    sampled = self._decode([p for _, p in few], [keys[i] for i, _ in few], settings)
                    for (i, _), group in zip(few, sampled, strict=True):
                        groups[i] = group
        return groups

    def _per_window(self, settings: _Settings) -> int:
        return max(1, self._batch_size // settings.n) * _WINDOW

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._loaded.device.type, dtype=self._autocast) if self._autocast else nullcontext()

    def _decode(self, prompts: Sequence[Prompt], keys: Sequence[str], settings: _Settings) -> list[list[Completion]]:
        family, model, device = self._loaded.family, self._loaded.model, self._loaded.device
        decoder, embedding, lm_head = family.language_model(model), family.embedding(model), family.lm_head(model)
        rows, budget = len(prompts) * settings.n, settings.max_tokens
        logits_RV, state = self._prefill(prompts, settings)
        position_R = torch.tensor([p.next_position for p in prompts], device=device).repeat_interleave(settings.n)
        uniform_RT = _uniform(keys, settings).to(device)
        stops = torch.tensor(family.stop_token_ids, device=device)
        banned_V = torch.zeros(logits_RV.shape[-1], dtype=torch.bool, device=device)
        banned_V[torch.tensor(family.banned_token_ids, device=device)] = True

        ids_RT = torch.full((rows, budget), family.pad_token_id, device=device)
        logprobs_RT = torch.zeros(rows, budget, device=device)
        length_R = torch.full((rows,), budget, device=device)
        stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        # Which rows the cache still holds, in its order.
        alive = torch.arange(rows, device=device)

        for step in range(budget):
            logits_RV = logits_RV.float().masked_fill(banned_V, -torch.inf)
            token, logprob = _draw(logits_RV, uniform_RT[alive, step], settings)
            running = ~stopped_R[alive]
            written = alive[running]
            ids_RT[written, step] = token[running]
            logprobs_RT[written, step] = logprob[running]
            just_stopped = written[torch.isin(token[running], stops)]
            stopped_R[just_stopped] = True
            length_R[just_stopped] = step + 1
            if step + 1 == budget:
                break
            keep = (~stopped_R[alive]).nonzero().squeeze(1)
            if len(keep) == 0:
                break
            # Copying the cache costs about as much as one step on it, so finished rows wait for company.
            if len(keep) <= 0.75 * len(alive):
                alive, token = alive[keep], token[keep]
                state.keep(keep)
            logits_RV = lm_head(
                decoder(
                    inputs_embeds=embedding(token).unsqueeze(1),
                    position_ids=family.decoder_positions((position_R[alive] + step).expand(3, -1).unsqueeze(-1)),
                    past_key_values=state.cache,
                    use_cache=True,
                    **state.attention(),
                ).last_hidden_state[:, 0]
            )
        return self._completions(ids_RT, logprobs_RT, length_R, stopped_R, n=settings.n)

    def _prefill(self, prompts: Sequence[Prompt], settings: _Settings) -> tuple[Tensor, _Rows]:
        """First logits, one row per completion, and what decoding goes on from."""
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
        layers = output.past_key_values.layers
        decoder = family.language_model(model)
        share = decoder.config._attn_implementation == SHARED_PREFIX and self._shares(len(prompts), longest, valid_BP, settings)
        return output.logits[:, -1].repeat_interleave(settings.n, dim=0), _Rows(layers, valid_BP, settings, share=share)

    def _shares(self, prompts: int, longest: int, valid_BP: Tensor | None, settings: _Settings) -> bool:
        """Whether rows read their prompt's keys where they lie, rather than each a copy of its own."""
        if self._share_prompts is not None:
            return self._share_prompts
        if valid_BP is not None and self._loaded.device.type != "cpu":
            return False
        return settings.n > 1 and longest >= LONG

    def _completions(
        self, ids_RT: Tensor, logprobs_RT: Tensor, length_R: Tensor, stopped_R: Tensor, *, n: int
    ) -> list[list[Completion]]:
        columns = (ids_RT.tolist(), logprobs_RT.tolist(), length_R.tolist(), stopped_R.tolist())
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


class _Rows:
    """What the rows being decoded have read so far."""

    def __init__(self, layers: Sequence[Any], valid_BP: Tensor | None, settings: _Settings, *, share: bool) -> None:
        n, room = settings.n, settings.max_tokens
        self._shared: SharedPrompts | None = None
        self._valid_RP: Tensor | None = None
        if share:
            read = {
                i: (layer.keys, layer.values) for i, layer in enumerate(layers) if not isinstance(layer, LinearAttentionLayer)
            }
            self._shared = SharedPrompts(read, repeats=n, valid_BP=valid_BP)
        elif valid_BP is not None:
            self._valid_RP = valid_BP.repeat_interleave(n, dim=0)
        self.cache = Cache(layers=[_for_decoding(layer, repeats=n, room=room, own=share) for layer in layers])

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        if self._shared is not None:
            self._shared.keep(rows)
        if self._valid_RP is not None:
            self._valid_RP = self._valid_RP[rows]

    def attention(self) -> dict[str, Any]:
        """The decoder's arguments that say what the next token of each row may look at."""
        if self._shared is not None:
            # No mask is read beside `prompts`, but without one transformers would build its own.
            anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._shared.device)
            return {"attention_mask": anything, "prompts": self._shared}
        if self._valid_RP is None:
            return {"attention_mask": None}
        decoded = self.cache.get_seq_length() + 1 - self._valid_RP.shape[1]
        return {"attention_mask": nn.functional.pad(self._valid_RP, (0, decoded), value=True)[:, None, None]}


@dataclass(frozen=True, slots=True)
class _Settings:
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n and max_tokens must be >= 1; got {self.n} and {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1]; got {self.temperature} and {self.top_p}")


def _empty_cache(decoder: nn.Module) -> DynamicCache:
    # With the configuration a sliding window would drop keys, whose columns the key mask still counts.
    return DynamicCache(config=decoder.config) if has_linear_attention(decoder) else DynamicCache()


def _for_decoding(layer: Any, *, repeats: int, room: int, own: bool) -> _RoomyLayer | _RepeatedState:
    """A prefilled layer with every row repeated, and `room` for more keys where it has keys; with `own`, for those alone."""
    if isinstance(layer, LinearAttentionLayer):
        return _RepeatedState.of(layer, repeats=repeats)
    return _RoomyLayer.of(layer, repeats=repeats, room=room, own=own)


class _RepeatedState(LinearAttentionLayer):
    """What one linear-attention layer remembers of each row: of one size, however long the row."""

    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]

    @classmethod
    def of(cls, layer: LinearAttentionLayer, *, repeats: int) -> _RepeatedState:
        repeated = cls()
        repeated.__dict__.update(layer.__dict__)
        repeated._map(lambda state: state.repeat_interleave(repeats, dim=0))
        return repeated

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.conv_states = {i: None if state is None else change(state) for i, state in self.conv_states.items()}
        self.recurrent_states = {i: None if state is None else change(state) for i, state in self.recurrent_states.items()}


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room to grow, so that a decoding step writes one column only."""

    keys: Tensor
    values: Tensor
    length: int

    @classmethod
    def of(cls, layer: DynamicLayer, *, repeats: int, room: int, own: bool) -> _RoomyLayer:
        """A prefilled layer with every row repeated and `room` more columns; with `own`, only the room."""
        roomy = cls()
        roomy.lazy_initialization(layer.keys, layer.values)
        keys, values = (states[:, :, :0] if own else states for states in (layer.keys, layer.values))
        roomy.length = keys.shape[-2]
        roomy.keys = _with_room(keys, repeats, room)
        roomy.values = _with_room(values, repeats, room)
        return roomy

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_select_indices(self, indices: Tensor) -> None:
        # Rows may leave before the first column is written, which the base class takes for an empty cache.
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_seq_length(self) -> int:
        return self.length


def _with_room(states: Tensor, repeats: int, room: int) -> Tensor:
    rows, heads, length, width = states.shape
    # Zeros, not memory as found: a NaN there would come through even a masked column.
    buffer = states.new_zeros(rows * repeats, heads, length + room, width)
    buffer[:, :, :length] = states.repeat_interleave(repeats, dim=0)
    return buffer


def _uniform(keys: Sequence[str], settings: _Settings) -> Tensor:
    """[R, T] numbers in [0, 1), each row from a generator of its own: batching cannot change them."""
    if settings.temperature == 0:
        return torch.zeros(len(keys) * settings.n, settings.max_tokens)
    generators = [torch.Generator().manual_seed(sample_seed(settings.seed, key, i)) for key in keys for i in range(settings.n)]
    return torch.stack([torch.rand(settings.max_tokens, generator=g, dtype=torch.float64) for g in generators])


def _draw(logits_RV: Tensor, uniform_R: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability at the temperature, before top-p (greedy: at temperature 1)."""
    if settings.temperature == 0:
        token = logits_RV.argmax(-1)
        return token, logits_RV.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs_RV = (logits_RV / settings.temperature).log_softmax(-1)
    probs_RV = logprobs_RV.exp()
    if settings.top_p < 1:
        probs_RV = _nucleus(probs_RV, settings.top_p)
    mass_RV = probs_RV.double().cumsum(-1)
    # `right` passes over tokens of no probability, even when the uniform number is 0.
    token = torch.searchsorted(mass_RV, (uniform_R * mass_RV[:, -1])[:, None], right=True)[:, 0]
    return token, logprobs_RV.gather(-1, token[:, None])[:, 0]


def _nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach `top_p`, the others set to 0; not normalised."""
    ordered, order = probs_RV.sort(dim=-1, descending=True)
    before = nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    ordered = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probs_RV).scatter(-1, order, ordered)


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
