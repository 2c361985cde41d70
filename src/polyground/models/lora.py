"""LoRA's linear layers computed in one piece: what peft computes, without the wide tensors in between.

peft adds `s * B(A(x))` to the frozen layer's result step by step. Here one function knows the whole and its gradients, and in
float32 adds s B A to the weight where that is less work. Weights, names and files of an adapter stay peft's, and whatever is more
than a plain adapter on a plain layer stays with peft's own forward (`plain_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.functional import linear

# Shapes: S tokens, I inputs and O outputs of the layer, R the adapter's rank.

MERGED_BYTES = 2**28
"""Weights up to this size together are merged for a rollout: steps on larger ones wait for their reading, not for the adapter."""


def compute_in_one_piece(model: nn.Module) -> int:
    """Let peft's LoRA layers over linear layers compute themselves in one piece; returns how many do."""
    layers = [module for module in model.modules() if type(module) is PeftLinear]
    for layer in layers:
        # A class, not a closure: a deep copy of the model must use its own weights.
        layer.__class__ = OnePieceLinear
    return len(layers)


@contextmanager
def merged_for_rollout(model: nn.Module) -> Iterator[None]:
    """Inside, without gradient, layers in one piece multiply by W + s B A, computed once; the frozen weights are not touched.

    Weights and adapter must not change meanwhile. Only for float32 without autocast, where nothing is rounded away, and on a
    CPU: a GPU's recorded steps would go on reading the weights of an earlier rollout.
    """
    layers = [(layer, found) for layer in _in_one_piece(model) if (found := plain_adapter(layer)) and _is_mergeable(found)]
    if sum(found.weight.nbytes for _, found in layers) > MERGED_BYTES:
        layers = []
    with torch.no_grad():
        for layer, found in layers:
            layer.merged_weight = torch.addmm(found.weight, found.up, found.down, alpha=found.scale)
    try:
        yield
    finally:
        for layer, _ in layers:
            layer.merged_weight = None


@dataclass(frozen=True, slots=True)
class PlainAdapter:
    """`x W^T + b + s (x A^T) B^T`."""

    weight: Tensor
    """[O, I], frozen."""
    bias: Tensor | None
    """[O], frozen."""
    down: Tensor
    """A, [R, I]."""
    up: Tensor
    """B, [O, R]."""
    scale: float


def plain_adapter(layer: PeftLinear) -> PlainAdapter | None:
    """What the layer multiplies by, where that is all it does; None where peft's own forward must be asked.

    Asked are: no adapter or several, disabled or merged ones, variants such as DoRA, dropout in training, biases of an adapter, a
    base that is quantised, split over devices, hooked, trained itself, or not a linear layer.
    """
    if layer.disable_adapters or layer.merged_adapters or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    base, down, up, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not (_is_plain(base) and _is_plain(down) and _is_plain(up)) or down.bias is not None or up.bias is not None:
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)):
        return None
    found = PlainAdapter(base.weight, base.bias, down.weight, up.weight, layer.scaling[name])
    frozen = not (found.weight.requires_grad or (found.bias is not None and found.bias.requires_grad))
    return found if frozen and found.weight.device == found.down.device == found.up.device else None


def _is_plain(module: Any) -> bool:
    """A linear layer as torch made it; who changes what one computes does so by its class, its forward, its hooks or weight."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and type(module.weight) in (nn.Parameter, Tensor)
    )


class OnePieceLinear(PeftLinear):
    """peft's layer with another forward; none is ever built, layers of peft become such."""

    merged_weight: Tensor | None = None
    """W + s B A while a rollout lasts."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_weight is not None and not (self.disable_adapters or torch.is_grad_enabled() or _autocasts(x)):
            return linear(x, self.merged_weight, self.base_layer.bias)
        found = None if args or kwargs else plain_adapter(self)
        if found is None or found.weight.device != x.device:
            return self._as_peft(x, *args, **kwargs)
        weight, bias, down, up, scale = found.weight, found.bias, found.down, found.up, found.scale
        if _autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        elif not x.dtype == weight.dtype == down.dtype == up.dtype:
            # An adapter in float32 on weights in bfloat16: peft computes each in its own type.
            return self._as_peft(x)
        # Flattened out here: a view that an autograd function returned could not be changed in place by others.
        x_SI = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (x.requires_grad or down.requires_grad or up.requires_grad):
            y_SO = _OnePiece.apply(x_SI, weight, bias, down, up, scale)
        else:
            y_SO, _ = _product(x_SI, weight, bias, down, up, scale)
        out: Tensor = y_SO.view(*x.shape[:-1], weight.shape[0])
        return out

    def _as_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x, *args, **kwargs)
        return out


def _in_one_piece(model: nn.Module) -> Iterator[OnePieceLinear]:
    return (module for module in model.modules() if isinstance(module, OnePieceLinear))


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _is_mergeable(found: PlainAdapter) -> bool:
    exact = found.weight.dtype == found.up.dtype == found.down.dtype in _EXACT
    return exact and found.weight.device.type == "cpu" and not _autocasts(found.weight)


_EXACT = (torch.float32, torch.float64)
"""In these W + s B A keeps what B A has to say; bfloat16 would round most of it away."""


def _merges(x_SI: Tensor, weight: Tensor) -> bool:
    """Whether B A may be added to the weight, and that is less work than taking every token through B and A."""
    outputs, inputs = weight.shape
    return weight.dtype in _EXACT and x_SI.shape[0] * (inputs + outputs) > inputs * outputs


def _product(
    x_SI: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and x A^T where it was needed on the way."""
    if _merges(x_SI, weight):
        return linear(x_SI, torch.addmm(weight, up, down, alpha=scale), bias), None
    narrow_SR = x_SI @ down.t()
    return linear(x_SI, weight, bias).addmm_(narrow_SR, up.t(), alpha=scale), narrow_SR


class _OnePiece(torch.autograd.Function):
    """`_product` with its gradients; weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        y_SO, narrow_SR = _product(x_SI, weight, bias, down, up, scale)
        ctx.save_for_backward(x_SI, weight, down, up, narrow_SR)
        ctx.scale = scale
        return y_SO

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, weight, down, up, narrow_SR = ctx.saved_tensors
        wants_x, _, _, wants_down, wants_up, _ = ctx.needs_input_grad
        scale, merges = ctx.scale, _merges(x_SI, weight)
        grad_x = grad_down = grad_up = None
        # Whoever calls backward may do so under autocast: all is of one type already.
        with torch.autocast(grad_SO.device.type, enabled=False):
            if wants_down or (wants_x and not merges):
                back_SR = grad_SO @ up
            if wants_x and merges:
                grad_x = grad_SO @ torch.addmm(weight, up, down, alpha=scale)
            elif wants_x:
                grad_x = (grad_SO @ weight).addmm_(back_SR, down, alpha=scale)
            if wants_down:
                grad_down = (back_SR.t() @ x_SI).mul_(scale)
            if wants_up:
                narrow_SR = x_SI @ down.t() if narrow_SR is None else narrow_SR
                grad_up = (grad_SO.t() @ narrow_SR).mul_(scale)
        return grad_x, None, None, grad_down, grad_up, None
