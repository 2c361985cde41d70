"""Log-probabilities of whole groups, from packed forward passes in which the completions of a prompt share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyground.batches import PackedGroup, join_groups
from polyground.config import PrefixAttention
from polyground.losses import TokenScores, token_scores
from polyground.models import ImageFeatures
from polyground.models.linear_attention import has_linear_attention, packed_mask
from polyground.models.shared_prefix import SHARED_PREFIX

SHORT = 512
"""Packed rows of fewer tokens are cheaper under a mask on a CPU."""


def score_group(
    model: Any,
    family: Any,
    packed: PackedGroup,
    features: ImageFeatures,
    *,
    temperature: float,
    attention: PrefixAttention = "auto",
) -> TokenScores:
    """Log-probabilities and entropies of all completion tokens of a group, from one packed forward pass."""
    [scores] = score_groups(model, family, [packed], [features], temperature=temperature, attention=attention)
    return scores


def score_groups(
    model: Any,
    family: Any,
    groups: Sequence[PackedGroup],
    features: Sequence[ImageFeatures],
    *,
    temperature: float,
    attention: PrefixAttention = "auto",
) -> list[TokenScores]:
    """The same for several groups, in one pass where their attention allows; the results do not depend on it."""
    decoder = family.language_model(model)
    if not shares_prefix(decoder, groups, attention):
        return [
            _scores(model, family, group, [seen], temperature, mask=group.mask_11SS)
            for group, seen in zip(groups, features, strict=True)
        ]
    if has_linear_attention(decoder):
        return [_scores(model, family, group, [seen], temperature) for group, seen in zip(groups, features, strict=True)]
    scores = _scores(model, family, join_groups(groups), features, temperature)
    counts = [sum(group.lengths) for group in groups]
    parts = zip(scores.logprobs_N.split(counts), scores.entropies_N.split(counts), strict=True)
    return [TokenScores(logprobs_N, entropies_N) for logprobs_N, entropies_N in parts]


def _scores(
    model: Any,
    family: Any,
    packed: PackedGroup,
    features: Sequence[ImageFeatures],
    temperature: float,
    *,
    mask: Tensor | None = None,
) -> TokenScores:
    options: dict[str, Any] = {} if mask is not None else {"layout": packed.layout}
    # With a layout no mask is read, but without one transformers would build a causal mask of its own.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids_1S.device) if mask is None else mask
    outputs = family.forward(
        model,
        input_ids=packed.input_ids_1S,
        position_ids=packed.positions_31S,
        features=features,
        attention_mask=packed_mask(family.language_model(model), mask, lengths=packed.lengths),
        logits_to_keep=packed.keep_N,
        use_cache=False,
        **options,
    )
    return token_scores(outputs.logits[0], packed.targets_N, temperature=temperature)


def shares_prefix(decoder: Any, groups: Sequence[PackedGroup], attention: PrefixAttention) -> bool:
    """Whether the forward of these groups uses shared-prefix attention (`models.shared_prefix`) rather than dense masks.

    `auto` takes it wherever it is there, except for so few tokens on a CPU that a mask costs less than the pieces.
    """
    there = decoder.config._attn_implementation == SHARED_PREFIX and all(lot.prefix for group in groups for lot in group.layout)
    if attention == "auto":
        return there and (_tokens(groups) >= SHORT or groups[0].input_ids_1S.device.type != "cpu")
    return there and attention == "shared"


def attention_note(decoder: Any, groups: Sequence[PackedGroup], attention: PrefixAttention) -> str:
    """Which attention these groups get, and why."""
    chosen = "shared" if shares_prefix(decoder, groups, attention) else "mask"
    found = decoder.config._attn_implementation
    if attention != "mask" and found != SHARED_PREFIX:
        return f"{chosen} (the model was loaded with {found})"
    device = groups[0].input_ids_1S.device.type
    why = f"; rows of {_tokens(groups):,} tokens on {device}" if attention == "auto" else ""
    return f"{chosen} ({attention}{why})"


def _tokens(groups: Sequence[PackedGroup]) -> int:
    return sum(group.input_ids_1S.shape[1] for group in groups)
