"""Linear attention over a packed group: the shared prompt is read once, and every completion goes on from what it left.

Layers of this kind (Gated DeltaNet in Qwen3.5) hold what they have read in a recurrent state and in the last inputs of a
convolution, not in keys that a mask could hide. So they are told where the prompt ends and the completions begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

# Shapes: S tokens of a packed group, G completions of which the longest has T tokens, H hidden, C channels of the
# convolution.


@dataclass(frozen=True, slots=True)
class Branches:
    """Takes the place of a linear-attention layer's mask: a shared beginning, then branches that go on from its end."""

    lengths: tuple[int, ...]
    """[G] tokens of each branch; what stands before them is shared."""


def has_linear_attention(language_model: nn.Module) -> bool:
    """Whether some layers of a decoder carry a recurrent state."""
    config: Any = language_model.config
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def packed_mask(language_model: nn.Module, mask_11SS: Tensor, *, lengths: Sequence[int]) -> Any:
    """The `attention_mask` of a packed group (`batches.pack_group`) whose completions have these lengths.

    It travels as an argument, not through the module, so that layers recomputed in the backward pass are given it again.
    """
    if not has_linear_attention(language_model):
        return mask_11SS
    return {"full_attention": mask_11SS, "linear_attention": Branches(tuple(lengths))}


def let_states_branch(model: nn.Module) -> None:
    """Make the linear-attention layers of a model understand `Branches`; with any other mask they do what they did."""
    for module in model.modules():
        if isinstance(module, Qwen3_5GatedDeltaNet):
            # A bound method, not a closure: a deep copy of the model must use its own weights.
            module.forward = MethodType(_forward, module)


def _forward(
    layer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | Branches | None = None, **options: Any
) -> Tensor:
    plain = type(layer).forward
    if not isinstance(attention_mask, Branches):
        out: Tensor = plain(layer, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **options)
        return out
    lengths = list(attention_mask.lengths)
    shared, total = hidden_states.shape[1] - sum(lengths), sum(lengths)
    beginning_1PH, rest_1NH = hidden_states.split([shared, total], dim=1)
    state = _State()
    # A prompt of one token leaves nothing to share.
    before = [plain(layer, beginning_1PH, cache_params=state, **options)] if shared else []
    # Padding stands behind the tokens that are read, and the state it leaves is not used.
    branches_GTH = pad_sequence(list(rest_1NH[0].split(lengths)), batch_first=True)
    if branches_GTH.shape[1] == 1:
        # Single tokens would go to the kernels for decoding, which change the state in place and have no gradient.
        branches_GTH = nn.functional.pad(branches_GTH, (0, 0, 0, 1))
    after_GTH = plain(layer, branches_GTH, cache_params=state.repeated(len(lengths)), **options)
    after_NH = torch.cat([row[:length] for row, length in zip(after_GTH, lengths, strict=True)])
    return torch.cat([*before, after_NH[None]], dim=1)


class _State:
    """What one layer hands on, in the words of transformers' `Cache`; that one copies in place, which stops gradients."""

    def __init__(self, inputs_BCK: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        self._inputs_BCK = inputs_BCK
        self._recurrent = recurrent

    def repeated(self, count: int) -> _State:
        """The state of one row, for as many rows."""
        states = (self._inputs_BCK, self._recurrent)
        return _State(*(None if state is None else state.expand(count, *state.shape[1:]) for state in states))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._inputs_BCK

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._recurrent

    def update_conv_state(self, inputs_BCS: Tensor, layer_idx: int, *, conv_kernel_size: int, state_idx: int = 0) -> Tensor:
        if self._inputs_BCK is not None:
            inputs_BCS = torch.cat([self._inputs_BCK, inputs_BCS], dim=-1)
        # One fewer than the kernel is wide, or all there are: the convolution itself puts zeros before the first.
        self._inputs_BCK = inputs_BCS[..., max(0, inputs_BCS.shape[-1] - conv_kernel_size + 1) :]
        return inputs_BCS

    def update_recurrent_state(self, recurrent: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self._recurrent = recurrent
        return recurrent
