"""Attention over groups that share their prompt: exact, and the prompt's keys and values are never repeated per completion.

In training a prompt attends causally to itself; all completions attend to it in one call, and each to itself in another;
the two are merged by their log-sum-exps. The backward hands every part the merged output and log-sum-exp, from which a flash
kernel rebuilds the true probabilities (the trick of ring attention, Liu et al. 2023). No mask is ever built. A decoding step
does the same with the rows that go on from each prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Shapes: S tokens of a packed row, P of one prompt, G its completions, T tokens of the longest, N of all of them together;
# H query heads, K key and value heads, D width of a head. In decoding: B prompts, R rows of all of them.

SHARED_PREFIX = "shared_prefix"
"""Name of this attention for transformers' `attn_implementation`; without a layout it is plain `sdpa`."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where one group lies in a packed row: the shared tokens, then the completions end to end."""

    prefix: int
    """Tokens all completions attend to; at least one."""
    lengths: tuple[int, ...]
    """Tokens of each completion's own part."""

    @property
    def total(self) -> int:
        """Tokens of the packed sequence: the prompt once, every completion once."""
        return self.prefix + sum(self.lengths)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: tuple[GroupLayout, ...] | None = None,
    prompts: Prompts | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Two more arguments replace the mask: `layout` says which groups the one row of `query`
    [1, H, S, D] packs; `prompts` holds what the rows of a decoding step share, and then `key` only what is each row's own.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is not None:
        if dropout:
            raise ValueError("shared-prefix attention has no dropout; set attention_dropout to 0 in config.json")
        query, key, value = _as_autocast(query, key, value)
        read = not getattr(module, _PRUNED, False)
        return packed_attention(query, key, value, layout, scale=scale, prompts_read=read).transpose(1, 2), None
    if prompts is not None:
        query, key, value = _as_autocast(query, key, value)
        return prompts.attend(query, key, value, layer=int(module.layer_idx), scale=scale).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for sdpa: rotary embeddings leave queries and keys in float32, but not values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


AttentionInterface.register(SHARED_PREFIX, attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def prune_last_layer(decoder: nn.Module) -> None:
    """Let a decoder's last layer compute only what is read when it is given a layout: the completions; prompts come out as zeros.

    Their keys and values are still computed. Layers of another make than attention, feed-forward and a norm before each are
    left as they are.
    """
    last: Any = decoder.layers[-1]
    if {name for name, _ in last.named_children()} == _PLAIN_LAYER:
        # A bound method, not a closure: a deep copy of the model must use its own weights.
        last.forward = MethodType(_pruned_layer, last)
        setattr(last.self_attn, _PRUNED, True)


_PLAIN_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PRUNED = "polyground_pruned"


def _pruned_layer(layer: Any, hidden_states: Tensor, *, layout: tuple[GroupLayout, ...] | None = None, **options: Any) -> Tensor:
    if layout is None:
        out: Tensor = type(layer).forward(layer, hidden_states, **options)
        return out
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), layout=layout, **options)
    kept = _completion_rows(layout, hidden_states.device)
    few = (hidden_states + attended).index_select(1, kept)
    few = few + layer.mlp(layer.post_attention_layernorm(few))
    return torch.zeros_like(hidden_states, dtype=few.dtype).index_copy(1, kept, few)


@lru_cache(maxsize=64)
def _completion_rows(layout: tuple[GroupLayout, ...], device: torch.device) -> Tensor:
    """Where the completions lie in the packed row."""
    spans = zip(_spans(layout), layout, strict=True)
    return torch.cat([torch.arange(span.start + group.prefix, span.stop) for span, group in spans]).to(device)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: tuple[GroupLayout, ...], *, scale: float, prompts_read: bool = True
) -> Tensor:
    """[1, H, S, D] of a packed row; keys and values are [1, K, S, D], H a multiple of K. Zeros for prompts that nobody reads."""
    total = sum(group.total for group in layout)
    if query.shape[0] != 1 or query.shape[2] != total:
        raise ValueError(f"the layout is of one row of {total} tokens; got {query.shape[0]} rows of {query.shape[2]}")
    spans = list(_spans(layout))
    outputs = [
        _SharedPrefix.apply(query[:, :, span], key[:, :, span], value[:, :, span], group, scale, prompts_read)
        for span, group in zip(spans, layout, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _spans(layout: tuple[GroupLayout, ...]) -> Iterator[slice]:
    start = 0
    for group in layout:
        yield slice(start, start + group.total)
        start += group.total


class _SharedPrefix(torch.autograd.Function):
    """Attention of one group, [1, H, P + N, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: GroupLayout, scale: float, prompt_read: bool
    ) -> Tensor:
        view = _view(group, query.shape[1], key.shape[1], query.device)
        prompt = _Attended(torch.zeros_like(view.prompt(query)), query.new_zeros(0))
        if prompt_read:
            prompt = _attend(
                view.prompt(query), view.repeated(view.prompt(key)), view.repeated(view.prompt(value)), scale, causal=True
            )
        others = _attend(view.folded(view.own(query)), view.prompt(key), view.prompt(value), scale, causal=False)
        owns = _attend(
            view.padded(view.own(query)),
            view.repeated(view.padded(view.own(key))),
            view.repeated(view.padded(view.own(value))),
            scale,
            causal=True,
        )
        to_prompt, to_prompt_lse = view.unfolded(others.out), view.unfolded(others.lse)
        to_self, to_self_lse = view.unpadded(owns.out), view.unpadded(owns.lse)
        lse = torch.logaddexp(to_prompt_lse, to_self_lse)
        merged = to_prompt * (to_prompt_lse - lse).exp()[..., None] + to_self * (to_self_lse - lse).exp()[..., None]
        out = torch.cat([prompt.out, merged.to(query.dtype)], dim=2)
        ctx.save_for_backward(query, key, value, out, prompt.lse, lse)
        ctx.view, ctx.scale, ctx.prompt_read = view, scale, prompt_read
        ctx.kernels = (prompt.state, others.state, owns.state)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, prompt_lse, lse = ctx.saved_tensors
        view, scale, [grad] = ctx.view, ctx.scale, grads
        states = ctx.kernels
        prompt: tuple[Tensor, ...] = tuple(torch.zeros_like(view.prompt(x)) for x in (query, key, value))
        if ctx.prompt_read:
            found = _differentiate(
                view.prompt(grad),
                view.prompt(query),
                view.repeated(view.prompt(key)),
                view.repeated(view.prompt(value)),
                view.prompt(out),
                prompt_lse,
                states[0],
                scale,
                causal=True,
            )
            prompt = (found[0], view.summed(found[1]), view.summed(found[2]))
        others = _differentiate(
            view.folded(view.own(grad)),
            view.folded(view.own(query)),
            view.prompt(key),
            view.prompt(value),
            view.folded(view.own(out)),
            view.folded(lse),
            states[1],
            scale,
            causal=False,
        )
        owns = _differentiate(
            view.padded(view.own(grad)),
            view.padded(view.own(query)),
            view.repeated(view.padded(view.own(key))),
            view.repeated(view.padded(view.own(value))),
            view.padded(view.own(out)),
            view.padded(lse),
            states[2],
            scale,
            causal=True,
        )
        d_query = torch.cat([prompt[0], view.unfolded(others[0]) + view.unpadded(owns[0])], dim=2)
        d_key, d_value = (torch.cat([prompt[i] + others[i], view.unpadded(view.summed(owns[i]))], dim=2) for i in (1, 2))
        return d_query, d_key, d_value, None, None, None


class _View:
    """The parts of a group's tensors, [1, heads, P + N, …], as the kernels want them."""

    def __init__(self, group: GroupLayout, *, heads: int, key_heads: int, device: torch.device) -> None:
        self._prefix, self._rows = group.prefix, len(group.lengths)
        self._key_heads, self._repeats = key_heads, heads // key_heads
        longest, total = max(group.lengths), sum(group.lengths)
        lengths = torch.tensor(group.lengths)
        starts = lengths.cumsum(0) - lengths
        steps = torch.arange(longest)
        # Padding points at a row of zeros laid behind the last token.
        place_GT = torch.where(steps < lengths[:, None], starts[:, None] + steps, total)
        self._place = place_GT.flatten().to(device)
        self._kept = (place_GT.flatten() < total).nonzero().squeeze(1).to(device)
        self._ragged = bool((lengths != longest).any())

    def prompt(self, x: Tensor) -> Tensor:
        return x[:, :, : self._prefix]

    def own(self, x: Tensor) -> Tensor:
        return x[:, :, self._prefix :]

    def repeated(self, x: Tensor) -> Tensor:
        """Key heads repeated to query heads."""
        return x if self._repeats == 1 else x.repeat_interleave(self._repeats, dim=1)

    def summed(self, x: Tensor) -> Tensor:
        """Gradients of repeated heads, summed."""
        return x if self._repeats == 1 else x.unflatten(1, (self._key_heads, self._repeats)).sum(2)

    def folded(self, x: Tensor) -> Tensor:
        """[1, K, repeats * N, …]: queries of one key head laid behind one another, so that keys need no repeating."""
        return x.unflatten(1, (self._key_heads, self._repeats)).flatten(2, 3)

    def unfolded(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self._repeats, -1)).flatten(1, 2)

    def padded(self, x: Tensor) -> Tensor:
        """[G, heads, T, …] of [1, heads, N, …]."""
        x = x[0]
        if self._ragged:
            x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1).index_select(1, self._place)
        return x.unflatten(1, (self._rows, -1)).transpose(0, 1)

    def unpadded(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1, 2)
        return (x.index_select(1, self._kept) if self._ragged else x).unsqueeze(0)


@lru_cache(maxsize=64)
def _view(group: GroupLayout, heads: int, key_heads: int, device: torch.device) -> _View:
    """All layers of a forward, and its backward, look at a group in the same way."""
    return _View(group, heads=heads, key_heads=key_heads, device=device)


# ---------------------------------------------------------------- decoding


class Prompts(Protocol):
    """What the rows of a decoding step share."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float) -> Tensor:
        """[R, H, 1, D] of one decoding step; `key` and `value` [R, K, t, D] are what each row has added to its prompt."""
        ...


class SharedPrompts:
    """The keys and values of prefilled prompts, read by all rows that go on from them; no gradient."""

    def __init__(self, layers: Mapping[int, tuple[Tensor, Tensor]], *, repeats: int, valid_BP: Tensor | None = None) -> None:
        """`layers` are (keys, values) [B, K, P, D] by layer; rows are `repeats` of each prompt, prompt after prompt."""
        self._layers = {layer: _as_autocast(key, value) for layer, (key, value) in layers.items()}
        prompts, _, _, _ = next(iter(self._layers.values()))[0].shape
        self._bias_B11P = None
        if valid_BP is not None:
            self._bias_B11P = torch.zeros_like(valid_BP, dtype=torch.float32).masked_fill(~valid_BP, -torch.inf)[:, None, None]
        device = next(iter(self._layers.values()))[0].device
        self._prompt_of_R = torch.arange(prompts, device=device).repeat_interleave(repeats)
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; prompts without rows are let go when they are half of all."""
        self._prompt_of_R = self._prompt_of_R[rows]
        alive, renumbered = self._prompt_of_R.unique(return_inverse=True)
        if 2 * len(alive) <= self._prompts:
            self._layers = {layer: (key[alive], value[alive]) for layer, (key, value) in self._layers.items()}
            self._bias_B11P = None if self._bias_B11P is None else self._bias_B11P[alive]
            self._prompt_of_R = renumbered
        self._arrange()

    @property
    def device(self) -> torch.device:
        return self._prompt_of_R.device

    @property
    def _prompts(self) -> int:
        return int(next(iter(self._layers.values()))[0].shape[0])

    def _arrange(self) -> None:
        """Where each row stands among the rows of its prompt: rows are asked together, prompt by prompt."""
        rows = self._prompt_of_R
        counts = torch.bincount(rows, minlength=self._prompts)
        self._most = int(counts.max())
        self._full = bool((counts == self._most).all())
        order = rows.argsort(stable=True)
        first_B = counts.cumsum(0) - counts
        rank_R = torch.empty_like(rows)
        rank_R[order] = torch.arange(len(rows), device=rows.device) - first_B[rows[order]]
        self._place_R = rows * self._most + rank_R
        self._in_order = self._full and bool((self._place_R == torch.arange(len(rows), device=rows.device)).all())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, scale: float) -> Tensor:
        """[R, H, 1, D] of one decoding step; `key` and `value` [R, K, t, D] are what each row has added to its prompt."""
        shared_key, shared_value = self._layers[layer]
        heads, width, key_heads = query.shape[1], query.shape[3], key.shape[1]
        own_query = query.reshape(-1, key_heads, heads // key_heads, width)
        own = _attend(own_query, key, value, scale, causal=False)
        shared = _attend(self._gathered(own_query), shared_key, shared_value, scale, causal=False, bias=self._bias_B11P)
        out, lse = self._scattered(shared.out, len(query)), self._scattered(shared.lse[..., None], len(query))[..., 0]
        total = torch.logaddexp(lse, own.lse)
        merged = out * (lse - total).exp()[..., None] + own.out * (own.lse - total).exp()[..., None]
        return merged.reshape(query.shape).to(query.dtype)

    def _gathered(self, query: Tensor) -> Tensor:
        """[B, K, most * queries, D] of [R, K, queries, D]."""
        _, key_heads, queries, width = query.shape
        if not self._in_order:
            laid = query.new_zeros(self._prompts * self._most, key_heads, queries, width)
            laid[self._place_R] = query
            query = laid
        return query.view(self._prompts, self._most, key_heads, queries, width).transpose(1, 2).flatten(2, 3)

    def _scattered(self, found: Tensor, rows: int) -> Tensor:
        """[R, K, queries, …] of [B, K, most * queries, …]."""
        laid = found.unflatten(2, (self._most, -1)).transpose(1, 2).flatten(0, 1)
        return laid if self._in_order else laid[self._place_R]


# ---------------------------------------------------------------- kernels that give their log-sum-exp


@dataclass(frozen=True, slots=True, eq=False)
class _Attended:
    out: Tensor
    lse: Tensor
    """[B, H, L] float, natural logarithm."""
    state: tuple[Any, ...] = ()
    """What the kernel's own backward wants besides."""


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool, bias: Tensor | None = None) -> _Attended:
    """`bias` is added to the scores, and goes without `causal`."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        bias = None if bias is None else bias.to(query.dtype)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return _Attended(out, lse)
    if bias is not None:
        return attend_written_out(query, key, value, scale, bias)
    if query.dtype in (torch.float16, torch.bfloat16):
        out, lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return _Attended(out, lse, (starts_q, starts_k, longest_q, longest_k, seed, offset))
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal, scale=scale)
    # This kernel rounds the length of its log-sum-exp up to whole blocks.
    return _Attended(out, lse[..., : query.shape[2]], (lse.shape[-1], seed, offset))


def attend_written_out(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> _Attended:
    """Attention in float32 without a kernel of its own, where none takes a bias and gives its log-sum-exp; no gradient."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.add(bias, query.float() @ key.float().transpose(-1, -2), alpha=scale)
        return _Attended((scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1))


def _differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    state: tuple[Any, ...],
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value given the *merged* output and log-sum-exp."""
    aten = torch.ops.aten
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    if query.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    elif query.dtype in (torch.float16, torch.bfloat16):
        starts_q, starts_k, longest_q, longest_k, seed, offset = state
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse, starts_q, starts_k, longest_q, longest_k, 0.0, causal, seed, offset, scale=scale
        )
    else:
        blocks, seed, offset = state
        lse = nn.functional.pad(lse, (0, blocks - lse.shape[-1]), value=torch.inf)
        found = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, out, lse, seed, offset, 0.0, [True, True, True, False], causal, scale=scale
        )
    return found[0], found[1], found[2]
