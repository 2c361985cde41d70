"""Decoding with shapes that never change, so that on a GPU a step is recorded once (a CUDA graph) and played back per token.

Every prompt has as many slots as it began with rows; a slot holds one row, and slots halve in number as rows finish. The
step is a function of tensors that stay where they are and asks the host nothing. It runs unrecorded on a CPU, where the
tests compare it with `decoding`; `recording` is what has not been run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.cache_utils import Cache, DynamicLayer

from polyground.models.linear_attention import has_linear_attention
from polyground.models.shared_prefix import SHARED_PREFIX
from polyground.sampling.decoding import Parts, Prefilled, shared_attention
from polyground.sampling.drawing import Settings, Written
from polyground.sampling.recording import Recorder

# Shapes: B prompts, M slots of each, R = B * M slots; P keys of a prompt, T keys of a row's own, S = P + T of both; H query
# heads, K key and value heads, D width of a head; V vocabulary.

logger = logging.getLogger("polyground")

LOOK_EVERY = 8
"""Steps between two looks at which rows have stopped: a look waits for the device."""

_OWN = 256
"""Keys of its own that a row begins with room for, where it may come to so many; the room doubles when it is full."""

_FEWEST = 8
"""Slots below which no recording is made anew: so few rows take no longer than fewer."""

_WORTH = 32
"""Steps still to come from which on another recording is made; one costs as much as a few steps unrecorded, which are
several times slower than recorded ones (an estimate)."""


def obstacle(decoder: nn.Module) -> str | None:
    """Why this decoder cannot run with shapes that never change; None when it can."""
    config: Any = decoder.config
    if has_linear_attention(decoder):
        return "some of its layers carry a recurrent state"
    if config._attn_implementation != SHARED_PREFIX:
        return f"it was loaded with {config._attn_implementation} attention"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    rotary = {str(module.rope_type) for module in decoder.modules() if hasattr(module, "rope_type")}
    if any(name in kind for kind in rotary for name in ("dynamic", "longrope")):
        return "its rotary positions depend on how long a row is"
    if any(isinstance(module, FSDPModule) for module in decoder.modules()):
        return "its weights are shared out over processes"
    devices = {str(parameter.device) for parameter in decoder.parameters()}
    if len(devices) > 1:
        return f"it lies on {', '.join(sorted(devices))}"
    return None


@lru_cache
def note_once(text: str) -> None:
    """Log what the user should know, once per process."""
    logger.info(text)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one recording is made for."""

    prompts: int
    each: int
    """Slots of one prompt."""
    prompt_keys: int
    own_keys: int

    @property
    def slots(self) -> int:
        """Rows that are decoded together."""
        return self.prompts * self.each


def rung(capacity: int, needed: int) -> int:
    """The smallest of capacity, its half, its quarter and so on (rounded up) that holds `needed`: few shapes serve all.

    >>> [rung(12, needed) for needed in (12, 7, 6, 4, 3, 1)]
    [12, 12, 6, 6, 3, 1]
    """
    while capacity > 1 and -(-capacity // 2) >= needed:
        capacity = -(-capacity // 2)
    return capacity


def _aligned(length: int) -> int:
    """Rounded up to eight: matrix products of half precision on a GPU want the rows of a matrix to begin at 16 bytes."""
    return -(-length // 8) * 8


class StaticDecoder:
    """Decodes batch after batch for one call of the sampler. The model must stay as it is, down to where its weights lie:
    a recording knows nothing else, and is therefore not kept for the next call.
    """

    def __init__(self, parts: Parts, settings: Settings, *, recorder: Recorder | None) -> None:
        self._parts, self._settings, self._recorder = parts, settings, recorder
        self._memory: _Memory | None = None
        self._player: _Player | None = None

    def decode(self, prefilled: Prefilled, written: Written) -> None:
        """Decode all rows of the prompts into `written`, which must be the same for every batch; empties `prefilled.layers`."""
        memory, player = self._ready(prefilled, written)
        memory.begin(prefilled, rows=len(prefilled.logits_BV) * self._settings.n, spare=written.spare)
        prefilled.layers.clear()
        first = prefilled.logits_BV.index_select(0, memory.prompt_of_slot())
        memory.token.copy_(written.take(first, memory.row, 0))
        for step in range(1, self._settings.max_tokens):
            if (step - 1) % LOOK_EVERY == 0:
                alive = [not over for over in written.stopped_R[memory.row].tolist()]
                if not any(alive):
                    return
                self._compact(memory, player, alive, step=step)
            if step > memory.shape.own_keys:
                memory.move(memory.every_slot(), own_keys=step)
            player.step()

    def _ready(self, prefilled: Prefilled, written: Written) -> tuple[_Memory, _Player]:
        """Memory that holds the batch; what was recorded for smaller memory is gone."""
        if self._memory is None or self._player is None or not self._memory.holds(prefilled):
            # The old memory is let go before the new one is taken.
            self._player = self._memory = None
            self._memory = _Memory(prefilled, self._settings)
            self._player = _Player(partial(self._run, self._memory, written), self._memory, self._recorder)
        return self._memory, self._player

    def _run(self, memory: _Memory, written: Written) -> None:
        device = memory.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Weights cast once for all steps would lie in memory that no recording owns.
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            _step(self._parts, memory, written)

    def _compact(self, memory: _Memory, player: _Player, alive: Sequence[bool], *, step: int) -> None:
        """Go on with fewer slots when half of them would do and it pays."""
        groups = [
            [slot for slot in range(start, start + memory.shape.each) if alive[slot]]
            for start in range(0, len(alive), memory.shape.each)
        ]
        groups = [group for group in groups if group]
        smaller = memory.fitting(len(groups), max(map(len, groups)))
        if smaller.slots > memory.shape.slots / 2:
            return
        pays = memory.shape.slots > _FEWEST and self._settings.max_tokens - step >= _WORTH
        if player.recorder is None or player.recorded(smaller) or pays:
            memory.move(groups, prompts=smaller.prompts, each=smaller.each)


class _Memory:
    """All that changes from step to step, in buffers as large as the first batch needs; shapes are views of their beginnings."""

    def __init__(self, prefilled: Prefilled, settings: Settings) -> None:
        keys = [layer.keys for layer in prefilled.layers]
        prompts, self._heads, length, self._width = keys[0].shape
        device = keys[0].device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else keys[0].dtype
        most = Shape(prompts, settings.n, _aligned(length), _aligned(settings.max_tokens))
        rows, unit = most.slots, self._heads * self._width
        # Keys and values of each layer.
        self._prompt = [torch.zeros(2, prompts * most.prompt_keys * unit, dtype=dtype, device=device) for _ in keys]
        self._own = [torch.zeros(2, rows * most.own_keys * unit, dtype=dtype, device=device) for _ in keys]
        self._bias = torch.zeros(prompts * most.prompt_keys, device=device)
        self._row, self._token, self._position = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        """[1] the token last drawn, counted from 0."""
        self.shape = self._most = most

    @property
    def device(self) -> torch.device:
        return self.column.device

    def holds(self, prefilled: Prefilled) -> bool:
        return len(prefilled.logits_BV) <= self._most.prompts and prefilled.length <= self._most.prompt_keys

    def fitting(self, prompts: int, each: int) -> Shape:
        """The shape for so many prompts and rows of each, lengths as they are now."""
        now, most = self.shape, self._most
        return Shape(rung(most.prompts, prompts), rung(most.each, each), now.prompt_keys, now.own_keys)

    def begin(self, prefilled: Prefilled, *, rows: int, spare: int) -> None:
        """The rows of a new batch; slots beyond them hold the spare row."""
        most = self._most
        prompts, length = len(prefilled.logits_BV), prefilled.length
        self.shape = Shape(
            rung(most.prompts, prompts),
            most.each,
            rung(most.prompt_keys, length),
            rung(most.own_keys, min(_OWN, most.own_keys)),
        )
        self._spare = spare
        padding = self.shape.prompt_keys - length
        for i, layer in enumerate(prefilled.layers):
            for buffer, states in zip(self.prompt(i), (layer.keys, layer.values), strict=True):
                # Zeros, not memory as found: a NaN there would come through even a masked column.
                buffer.zero_()
                buffer[:prompts, :, padding:] = states
            self._own[i].zero_()
        self.bias.fill_(-torch.inf)
        self.bias[:prompts, padding:] = 0
        if prefilled.valid_BP is not None:
            self.bias[:prompts, padding:].masked_fill_(~prefilled.valid_BP, -torch.inf)
        # A prompt that is not there attends to zeros: without any key there would be no softmax.
        self.bias[prompts:] = 0
        self.row.fill_(spare)
        self.row[:rows] = torch.arange(rows, device=self.device)
        self.position.zero_()
        self.position[:rows] = prefilled.position_B.repeat_interleave(most.each)
        self._prompts = prompts
        self.column.zero_()

    def every_slot(self) -> list[list[int]]:
        return [list(range(i, i + self.shape.each)) for i in range(0, self.shape.slots, self.shape.each)]

    def prompt_of_slot(self) -> Tensor:
        """[R] which prompt of the batch each slot goes on from; the last for slots of none."""
        prompt = torch.arange(self.shape.prompts, device=self.device).clamp(max=self._prompts - 1)
        return prompt.repeat_interleave(self.shape.each)

    def move(
        self,
        groups: Sequence[Sequence[int]],
        *,
        prompts: int | None = None,
        each: int | None = None,
        own_keys: int | None = None,
    ) -> None:
        """Go on in another shape with these slots, prompt by prompt; what they do not fill holds the spare row."""
        old = self.shape
        new = Shape(
            prompts or old.prompts,
            each or old.each,
            old.prompt_keys,
            rung(self._most.own_keys, own_keys) if own_keys else old.own_keys,
        )
        wanted = [*groups, *[[]] * (new.prompts - len(groups))]
        # A missing slot is a copy of the first, under the spare row's number.
        slots = [[*group, *[groups[0][0]] * (new.each - len(group))] for group in wanted]
        filled = [[i < len(group) for i in range(new.each)] for group in wanted]
        slot_R = torch.tensor(slots, device=self.device).flatten()
        filled_R = torch.tensor(filled, device=self.device).flatten()
        prompt_B = slot_R[:: new.each] // old.each
        stay = [group[0] // old.each for group in slots] == list(range(old.prompts))
        row, token, position, bias = self.row[slot_R], self.token[slot_R], self.position[slot_R], self.bias[prompt_B]
        kept = min(old.own_keys, new.own_keys)
        for i in range(len(self._own)):
            # One layer at a time: the copies are as large as what is kept of it.
            own = [states[slot_R, :, :kept] for states in self._own_in(old, i)]
            read = None if stay else [states[prompt_B] for states in self._prompt_in(old, i)]
            self._own[i].zero_()
            for buffer, states in zip(self._own_in(new, i), own, strict=True):
                buffer[:, :, :kept] = states
            if read is not None:
                for buffer, states in zip(self._prompt_in(new, i), read, strict=True):
                    buffer.copy_(states)
        self.shape = new
        self.row.copy_(row.masked_fill(~filled_R, self._spare))
        self.token.copy_(token)
        self.position.copy_(position)
        self.bias.copy_(bias)

    @property
    def row(self) -> Tensor:
        """[R] number of the row in each slot."""
        return self._row[: self.shape.slots]

    @property
    def token(self) -> Tensor:
        """[R] token last drawn."""
        return self._token[: self.shape.slots]

    @property
    def position(self) -> Tensor:
        """[R] of a row's first completion token."""
        return self._position[: self.shape.slots]

    @property
    def bias(self) -> Tensor:
        """[B, P] what is added to the scores of a prompt's keys."""
        return self._bias[: self.shape.prompts * self.shape.prompt_keys].view(self.shape.prompts, -1)

    def prompt(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, P, D]."""
        return self._prompt_in(self.shape, layer)

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, T, D]."""
        return self._own_in(self.shape, layer)

    @property
    def layers(self) -> int:
        return len(self._own)

    def _prompt_in(self, shape: Shape, layer: int) -> tuple[Tensor, Tensor]:
        return self._view(self._prompt[layer], shape.prompts, shape.prompt_keys)

    def _own_in(self, shape: Shape, layer: int) -> tuple[Tensor, Tensor]:
        return self._view(self._own[layer], shape.slots, shape.own_keys)

    def _view(self, memory: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
        size = rows * self._heads * length * self._width
        keys, values = (part[:size].view(rows, self._heads, length, self._width) for part in memory)
        return keys, values


def _step(parts: Parts, memory: _Memory, written: Written) -> None:
    """One token more in every slot, by operations that are the same at every step."""
    shape, column, device = memory.shape, memory.column, memory.device
    unread_T = torch.arange(shape.own_keys, device=device) > column
    own_bias_T = torch.zeros(shape.own_keys, device=device).masked_fill(unread_T, -torch.inf)
    bias_BS = torch.cat([memory.bias, own_bias_T.expand(shape.prompts, -1)], dim=-1)
    cache = Cache(layers=[_Column(*memory.own(i), column) for i in range(memory.layers)])
    attention = shared_attention(_Slots(memory, bias_BS), device)
    logits_RV = parts.logits(memory.token, memory.position + column, cache, attention)
    token = written.take(logits_RV, memory.row, column + 1)
    memory.token.copy_(token)
    column.add_(1)


class _Column(DynamicLayer):
    """Keys and values of one layer, of which a step writes one column and hands out all."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._column, value_states.to(self.values.dtype))
        return self.keys, self.values


class _Slots:
    """What the slots of a step read: their prompt's keys where they lie, and their own; hidden keys by a bias, not by a slice."""

    def __init__(self, memory: _Memory, bias_BS: Tensor) -> None:
        self._memory, self._bias_BS = memory, bias_BS

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float) -> Tensor:
        """[R, H, 1, D]; `key` and `value` [R, K, T, D] are the slots' own. One softmax in float32 over all that a slot reads."""
        shape, heads = self._memory.shape, key.shape[1]
        prompt_key, prompt_value = self._memory.prompt(layer)
        # Query heads of one key head are asked together, and for the prompt all of its slots: [B, K, M * queries, D].
        own_query = query.reshape(shape.slots, heads, -1, query.shape[-1])
        prompt_query = _by_prompt(own_query, shape).flatten(2, 3)
        to_prompt = _product(prompt_query, prompt_key.transpose(-1, -2)).unflatten(2, (shape.each, -1))
        to_own = _by_prompt(_product(own_query, key.transpose(-1, -2)), shape)
        scores_BKMqS = torch.add(self._bias_BS[:, None, None, None], torch.cat([to_prompt, to_own], dim=-1), alpha=scale)
        weights = scores_BKMqS.softmax(-1).to(value.dtype)
        prompt_weights, own_weights = weights.split([shape.prompt_keys, shape.own_keys], dim=-1)
        from_prompt = _product(prompt_weights.flatten(2, 3), prompt_value).unflatten(2, (shape.each, -1))
        from_own = _product(own_weights.transpose(1, 2).flatten(0, 1), value)
        return (_by_slot(from_prompt) + from_own).reshape(query.shape).to(query.dtype)


def _by_prompt(x: Tensor, shape: Shape) -> Tensor:
    """[B, K, M, …] of [R, K, …]."""
    return x.unflatten(0, (shape.prompts, shape.each)).transpose(1, 2)


def _by_slot(x: Tensor) -> Tensor:
    """[R, K, …] of [B, K, M, …]."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, K, m, n] in float32 of [B, K, m, k] and [B, K, k, n] in one type, whichever it is."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type != "cpu" and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


class _Player:
    """Runs the step: as it is, or once per shape as it is, then recorded."""

    def __init__(self, step: Callable[[], None], memory: _Memory, recorder: Recorder | None) -> None:
        self._step, self._memory = step, memory
        self.recorder = recorder
        self._warm: set[Shape] = set()
        self._recordings: dict[Shape, Callable[[], None]] = {}

    def recorded(self, shape: Shape) -> bool:
        return shape in self._recordings

    def step(self) -> None:
        shape = self._memory.shape
        if self.recorder is None:
            self._step()
        elif shape not in self._warm:
            self._warm.add(shape)
            if not self.recorder.warm_up(self._step):
                self.recorder = None
        else:
            if shape not in self._recordings:
                self._recordings[shape] = self.recorder.record(self._step)
            self._recordings[shape]()
