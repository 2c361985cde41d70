"""Decoding rows from prefilled prompts with caches that grow: one step per token, finished rows let go.

The plain way, for every family and device; `static` does the same with shapes that never change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from polyground.models.family import Loaded
from polyground.models.shared_prefix import SharedPrompts
from polyground.sampling.drawing import Settings, Written

# Shapes: B prompts of a batch, P tokens of its longest prompt, R = B * n rows being decoded, V vocabulary.


@dataclass(frozen=True, slots=True, eq=False)
class Prefilled:
    """Prompts as the model has read them."""

    length: int
    """P, of the longest."""
    logits_BV: Tensor
    """What follows each."""
    position_B: Tensor
    """Position of the first completion token."""
    layers: list[Any]
    """The cache's layers; decoding copies what it needs and takes them out. Keys and values are [B, K, P, D], padded on the
    left."""
    valid_BP: Tensor | None
    """Which tokens are no padding; None when all are."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a decoding step calls of a model."""

    decoder: nn.Module
    embedding: nn.Module
    lm_head: nn.Module
    positions: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, loaded: Loaded) -> Self:
        """The parts of an open model that a decoding step calls."""
        family, model = loaded.family, loaded.model
        return cls(family.language_model(model), family.embedding(model), family.lm_head(model), family.decoder_positions)

    def logits(self, token_R: Tensor, position_R: Tensor, cache: Cache, attention: dict[str, Any]) -> Tensor:
        """[R, V] after one more token of each row."""
        hidden = self.decoder(
            inputs_embeds=self.embedding(token_R).unsqueeze(1),
            position_ids=self.positions(position_R.expand(3, -1).unsqueeze(-1)),
            past_key_values=cache,
            use_cache=True,
            **attention,
        ).last_hidden_state
        out: Tensor = self.lm_head(hidden[:, 0])
        return out


def shared_attention(prompts: Any, device: torch.device) -> dict[str, Any]:
    """The decoder's arguments for rows that read their prompts through `prompts.attend`."""
    # No mask is read beside `prompts`, but without one transformers would build its own.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "prompts": prompts}


def decode(
    parts: Parts,
    prefilled: Prefilled,
    written: Written,
    settings: Settings,
    *,
    share: bool,
    look: Callable[[], None] | None = None,
) -> None:
    """Decode all rows of the prompts into `written`; with `share`, rows read their prompt's keys where they lie.
    Empties `prefilled.layers`. `look` is called after every token of theirs."""
    rows = len(prefilled.logits_BV) * settings.n
    state = _Rows(prefilled, settings, share=share)
    prefilled.layers.clear()
    # Which rows the cache still holds, in its order.
    alive = torch.arange(rows, device=prefilled.logits_BV.device)
    position = prefilled.position_B.repeat_interleave(settings.n)
    token = written.take(prefilled.logits_BV.repeat_interleave(settings.n, dim=0), alive, 0)
    for step in range(1, settings.max_tokens):
        if look is not None:
            look()
        keep = (~written.stopped_R[alive]).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        # Copying the cache costs about as much as one step on it, so finished rows wait for company.
        if len(keep) <= 0.75 * len(alive):
            alive, token, position = alive[keep], token[keep], position[keep]
            state.keep(keep)
        logits_RV = parts.logits(token, position, state.cache, state.attention())
        token = written.take(logits_RV, alive, step)
        position = position + 1


class _Rows:
    """What the rows being decoded have read so far."""

    def __init__(self, prefilled: Prefilled, settings: Settings, *, share: bool) -> None:
        n, room, layers, valid_BP = settings.n, settings.max_tokens, prefilled.layers, prefilled.valid_BP
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
            return shared_attention(self._shared, self._shared.device)
        if self._valid_RP is None:
            return {"attention_mask": None}
        decoded = self.cache.get_seq_length() + 1 - self._valid_RP.shape[1]
        return {"attention_mask": nn.functional.pad(self._valid_RP, (0, decoded), value=True)[:, None, None]}


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
