"""The two objectives, as plain functions of tensors: next-token loss on completions (SFT) and GRPO in TRL's three forms.

A loss is a *sum over what is given, divided by the size of the whole optimiser batch*: groups may be given one at a time,
in any split, and their losses added. Nothing here knows about models, tokens' text or rewards' meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

# Shapes: G completions of one prompt, T tokens of the longest completion, N completion tokens of a group laid end to end,
# V vocabulary.

LossType = Literal["grpo", "dapo", "dr_grpo"]
ScaleRewards = Literal["group", "batch", "none"]
ImportanceSampling = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

IGNORED = -100
"""The label of a token that is given, not learnt."""

_EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as TRL does."""


# Supervised ---------------------------------------------------------------------------------------------------------------


def completion_loss(logits_BTV: Tensor, labels_BT: Tensor, *, tokens: Tensor | int | None = None) -> Tensor:
    """Negative log-likelihood in nats, summed over labelled tokens and divided by `tokens` (default: their number here).

    `labels_BT[b, t]` is what `logits_BTV[b, t]` should have predicted (already shifted), `IGNORED` where nothing is learnt.
    """
    total = torch.nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, -2), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (labels_BT != IGNORED).sum() if tokens is None else torch.as_tensor(tokens, device=total.device)
    return total / count.clamp(min=1)


# Policy -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The settings of one GRPO run that the loss depends on; names and meanings are TRL's."""

    loss_type: LossType = "dapo"
    """`grpo`: mean over completions of their token means. `dapo`: mean over all tokens. `dr_grpo`: sum over a fixed length."""
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """The upper clip; `epsilon` when None."""
    max_completion_length: int = 128
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: ImportanceSampling = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSize:
    """How much one optimiser step holds, groups without variance included. Under several processes: their average."""

    completions: float
    tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoInputs:
    """One group under the policy."""

    logprobs_GT: Tensor
    """Nats, with gradient, at the sampling temperature."""
    advantages_G: Tensor
    mask_GT: Tensor
    """1 on completion tokens, 0 on padding."""
    old_logprobs_GT: Tensor | None = None
    """Under the policy that sampled; None on the first pass over a rollout, when it is this one."""
    reference_logprobs_GT: Tensor | None = None
    """Under the reference; needed when beta is not 0."""
    sampling_logprobs_GT: Tensor | None = None
    """As another engine told them that has sampled, perhaps from older weights; None where this one has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """How far the engine that sampled is from the policy. Parts add up."""

    tokens: float = 0.0
    gap: float = 0.0
    """Sum over tokens of |log p - log q|, in nats."""
    gap_max: float = 0.0
    weights: float = 0.0
    """How many: one per token, or per completion in the modes by sequence."""
    weight: float = 0.0
    """Their sum."""
    weight_min: float = math.inf
    weight_max: float = -math.inf

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            tokens=self.tokens + other.tokens,
            gap=self.gap + other.gap,
            gap_max=max(self.gap_max, other.gap_max),
            weights=self.weights + other.weights,
            weight=self.weight + other.weight,
            weight_min=min(self.weight_min, other.weight_min),
            weight_max=max(self.weight_max, other.weight_max),
        )

    def metrics(self) -> dict[str, float]:
        """By TRL's names; none without tokens."""
        if not self.tokens:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": self.gap / self.tokens,
            "sampling/sampling_logp_difference/max": self.gap_max,
            "sampling/importance_sampling_ratio/min": self.weight_min,
            "sampling/importance_sampling_ratio/mean": self.weight / self.weights,
            "sampling/importance_sampling_ratio/max": self.weight_max,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSums:
    """What a group adds to the metrics of its step: sums over tokens, so that groups of any length can be added up."""

    tokens: float = 0.0
    kl: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0

    def __add__(self, other: GrpoSums) -> GrpoSums:
        return GrpoSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoLoss:
    """What one group adds to a step."""

    loss: Tensor
    """This group's share of the loss of the step: the shares of all groups add up to it."""
    sums: GrpoSums
    mismatch: Mismatch | None = None
    """Where another engine has sampled."""


def grpo_loss(inputs: GrpoInputs, *, objective: Objective, size: BatchSize) -> GrpoLoss:
    """The clipped surrogate with a KL penalty (k3 estimator), equal to TRL 1.16's token-level loss."""
    mask_GT = inputs.mask_GT.to(inputs.logprobs_GT.dtype)
    advantages_G1 = inputs.advantages_G.unsqueeze(-1)
    old_GT = inputs.logprobs_GT.detach() if inputs.old_logprobs_GT is None else inputs.old_logprobs_GT
    low, high = 1 - objective.epsilon, 1 + _high(objective)

    ratio_GT = (inputs.logprobs_GT - old_GT).exp()
    loss_GT = -torch.minimum(ratio_GT * advantages_G1, ratio_GT.clamp(low, high) * advantages_G1)
    mismatch = None
    if inputs.sampling_logprobs_GT is not None:
        weights, mismatch = importance_weights(old_GT, inputs.sampling_logprobs_GT, mask_GT, objective=objective)
        if objective.vllm_importance_sampling_correction:
            loss_GT = loss_GT * weights
    kl_GT = torch.zeros_like(loss_GT)
    if objective.beta:
        if inputs.reference_logprobs_GT is None:
            raise ValueError("beta is not 0: the loss needs the reference log-probabilities")
        # The ratio is 1 on-policy, but its gradient makes that of the penalty unbiased (DeepSeek-V3.2; TRL's default).
        kl_GT = k3_divergence(inputs.logprobs_GT, inputs.reference_logprobs_GT) * ratio_GT
        loss_GT = loss_GT + objective.beta * kl_GT

    return GrpoLoss(
        loss=_reduced(loss_GT * mask_GT, mask_GT, objective=objective, size=size),
        sums=GrpoSums(
            tokens=float(mask_GT.sum()),
            kl=float((kl_GT.detach() * mask_GT).sum()),
            clipped_low=float((((ratio_GT < low) & (advantages_G1 < 0)) * mask_GT).sum()),
            clipped_high=float((((ratio_GT > high) & (advantages_G1 > 0)) * mask_GT).sum()),
        ),
        mismatch=mismatch,
    )


def importance_weights(
    policy_GT: Tensor, sampling_GT: Tensor, mask_GT: Tensor, *, objective: Objective
) -> tuple[Tensor, Mismatch]:
    """What each token's loss is multiplied by, since it was drawn from q and not from the policy p: p / q within bounds.

    [G, T], or [G, 1] in the modes by sequence, whose ratio is that of the whole completion. Equal to TRL 1.16's.
    """
    inside_GT = mask_GT.bool()
    gap_GT = (policy_GT.detach() - sampling_GT).masked_fill(~inside_GT, 0.0)
    by_sequence = objective.vllm_importance_sampling_mode.startswith("sequence")
    weights = (gap_GT.sum(-1, keepdim=True) if by_sequence else gap_GT).exp()
    low, high = objective.vllm_importance_sampling_clip_min, objective.vllm_importance_sampling_clip_max
    if objective.vllm_importance_sampling_mode.endswith("truncate"):
        weights = weights if low is None and high is None else weights.clamp(low, high)
    else:
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        weights = weights.masked_fill((weights < low) | (weights > high), 0.0)
    told = weights.flatten() if by_sequence else weights[inside_GT]
    return weights, Mismatch(
        tokens=float(mask_GT.sum()),
        gap=float(gap_GT.abs().sum()),
        gap_max=float(gap_GT.abs().max()),
        weights=float(told.numel()),
        weight=float(told.sum()),
        weight_min=float(told.min()),
        weight_max=float(told.max()),
    )


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: never negative, unbiased on the policy's own samples."""
    gap = reference_logprobs - logprobs
    return gap.exp() - gap - 1


def _high(objective: Objective) -> float:
    return objective.epsilon if objective.epsilon_high is None else objective.epsilon_high


def _reduced(loss_GT: Tensor, mask_GT: Tensor, *, objective: Objective, size: BatchSize) -> Tensor:
    match objective.loss_type:
        case "grpo":
            return (loss_GT.sum(-1) / mask_GT.sum(-1).clamp(min=1)).sum() / size.completions
        case "dapo":
            return loss_GT.sum() / max(size.tokens, 1)
        case "dr_grpo":
            return loss_GT.sum() / (size.completions * objective.max_completion_length)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """How likely N tokens were, and how open the choice was."""

    logprobs_N: Tensor
    """Nats, of the given tokens."""
    entropies_N: Tensor
    """Nats, of the distribution each token was drawn from; without gradient."""


def token_scores(logits_NV: Tensor, tokens_N: Tensor, *, temperature: float) -> TokenScores:
    """Log-probability of each token and entropy of its distribution, at the temperature it was sampled with."""
    logits_NV = logits_NV.float() / temperature
    total_N = logits_NV.logsumexp(-1)
    logprobs_N = logits_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1) - total_N
    with torch.no_grad():
        entropies_N = total_N - (logits_NV.softmax(-1) * logits_NV).sum(-1)
    return TokenScores(logprobs_N, entropies_N)


# Advantages ---------------------------------------------------------------------------------------------------------------


def advantages(
    groups: Sequence[Sequence[float]], *, scale_rewards: ScaleRewards = "group", spread: float | None = None
) -> list[list[float]]:
    """How much better each reward is than its group's mean, in units of the group's or the whole batch's deviation.

    `spread` is the deviation of the whole batch when it is larger than what is given here (several processes). A group
    whose rewards all agree has advantage exactly 0.

    >>> advantages([[0.0, 1.0], [0.5, 0.5]], scale_rewards="none")
    [[-0.5, 0.5], [0.0, 0.0]]
    """
    if scale_rewards == "batch" and spread is None:
        spread = deviation([reward for group in groups for reward in group])
    return [_group_advantages(group, scale_rewards=scale_rewards, spread=spread) for group in groups]


def _group_advantages(group: Sequence[float], *, scale_rewards: ScaleRewards, spread: float | None) -> list[float]:
    if without_variance(group):
        return [0.0] * len(group)
    mean = math.fsum(group) / len(group)
    match scale_rewards:
        case "none":
            unit = 1.0
        case "group":
            unit = deviation(group) + _EPSILON
        case "batch":
            unit = (spread or 0.0) + _EPSILON
    return [(reward - mean) / unit for reward in group]


def without_variance(group: Sequence[float]) -> bool:
    """True when all rewards of a group agree: it has nothing to teach (beyond the KL penalty)."""
    return max(group) - min(group) < 1e-8


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
