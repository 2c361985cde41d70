"""Facts about the losses that a reader can check by hand. That they equal TRL's is in tests/training/test_trl_oracle.py."""

import math

import pytest
import torch

from polyground.losses import (
    IGNORED,
    BatchSize,
    GrpoInputs,
    GrpoSums,
    Objective,
    advantages,
    completion_loss,
    deviation,
    grpo_loss,
    importance_weights,
    k3_divergence,
    token_scores,
)

LOGPROBS = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.9]]))
MASK = torch.tensor([[1, 1], [1, 0]])
ADVANTAGES = torch.tensor([1.0, -2.0])


def group(**changes) -> GrpoInputs:
    return GrpoInputs(**{"logprobs_GT": LOGPROBS, "advantages_G": ADVANTAGES, "mask_GT": MASK, **changes})


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        pytest.param("grpo", (-1 + 2) / 2, id="grpo-averages-completions"),
        pytest.param("dapo", (-1 - 1 + 2) / 3, id="dapo-averages-tokens"),
        pytest.param("dr_grpo", (-1 - 1 + 2) / (2 * 10), id="dr-grpo-divides-by-the-budget"),
    ],
)
def test_on_policy_the_loss_is_the_mean_advantage_negated(loss_type: str, expected: float) -> None:
    objective = Objective(loss_type=loss_type, max_completion_length=10)
    result = grpo_loss(group(), objective=objective, size=BatchSize(completions=2, tokens=3))
    assert float(result.loss) == pytest.approx(expected)
    assert result.sums == GrpoSums(tokens=3.0)


# Policy over sampler: twice and half as likely, as a whole just as likely; then four times, and a token that is padding.
SAMPLED = torch.log(torch.tensor([[0.25, 1.0], [0.0625, 0.001]]))


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        pytest.param("token_truncate", (None, 3.0), [[2, 0.5], [3, 1]], id="token-clipped"),
        pytest.param("token_truncate", (0.75, 3.0), [[2, 0.75], [3, 1]], id="token-clipped-on-both-sides"),
        pytest.param("token_mask", (None, 3.0), [[2, 0.5], [0, 1]], id="token-dropped"),
        pytest.param("token_mask", (0.75, None), [[2, 0], [4, 1]], id="token-dropped-below"),
        pytest.param("sequence_truncate", (None, 3.0), [[1], [3]], id="completion-clipped"),
        pytest.param("sequence_mask", (None, 3.0), [[1], [0]], id="completion-dropped"),
        pytest.param("sequence_mask", (None, None), [[1], [4]], id="no-bounds"),
    ],
)
def test_what_another_engine_sampled_weighs_as_much_as_the_policy_would_have_sampled_it(
    mode: str, bounds: tuple[float | None, float | None], expected: list[list[float]]
) -> None:
    low, high = bounds
    objective = Objective(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high
    )
    weights, mismatch = importance_weights(LOGPROBS, SAMPLED, MASK, objective=objective)
    assert weights.tolist() == [pytest.approx(row) for row in expected]
    told = mismatch.metrics()
    counted = [*expected[0], expected[1][0]]
    assert told["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(counted) / len(counted))
    assert told["sampling/importance_sampling_ratio/max"] == pytest.approx(max(counted))
    assert told["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2 * 2 * 4) / 3)
    assert told["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4))


@pytest.mark.parametrize(("corrected", "expected"), [(True, (-1 + 0) / 2), (False, (-1 + 2) / 2)])
def test_without_the_correction_a_mismatch_is_only_told(corrected: bool, expected: float) -> None:
    objective = Objective(loss_type="grpo", vllm_importance_sampling_correction=corrected)
    result = grpo_loss(group(sampling_logprobs_GT=SAMPLED), objective=objective, size=BatchSize(completions=2, tokens=3))
    assert float(result.loss) == pytest.approx(expected)
    assert result.mismatch is not None
    assert result.mismatch.tokens == 3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_groups_given_one_by_one_add_up_to_the_loss_of_the_batch(loss_type: str) -> None:
    objective, size = Objective(loss_type=loss_type, beta=0.1), BatchSize(completions=2, tokens=3)
    reference = LOGPROBS - 0.3
    whole = grpo_loss(group(reference_logprobs_GT=reference), objective=objective, size=size).loss
    rows = [
        grpo_loss(
            GrpoInputs(
                logprobs_GT=LOGPROBS[i : i + 1],
                advantages_G=ADVANTAGES[i : i + 1],
                mask_GT=MASK[i : i + 1],
                reference_logprobs_GT=reference[i : i + 1],
            ),
            objective=objective,
            size=size,
        ).loss
        for i in range(2)
    ]
    assert float(sum(rows)) == pytest.approx(float(whole), rel=1e-4)


def test_a_good_token_that_grew_too_likely_is_clipped_and_has_no_gradient() -> None:
    logprobs = LOGPROBS.clone().requires_grad_(True)
    result = grpo_loss(
        group(logprobs_GT=logprobs, old_logprobs_GT=LOGPROBS - 1.0),
        objective=Objective(epsilon=0.2, epsilon_high=0.3),
        size=BatchSize(completions=2, tokens=3),
    )
    result.loss.backward()
    assert result.sums.clipped_high == 2.0
    assert result.sums.clipped_low == 0.0
    assert logprobs.grad[0].tolist() == [0.0, 0.0]
    assert logprobs.grad[1, 0] != 0


def test_padding_changes_nothing() -> None:
    objective, size = Objective(beta=0.1), BatchSize(completions=2, tokens=3)
    changed = LOGPROBS.clone()
    changed[1, 1] = -7.0
    losses = [
        grpo_loss(group(logprobs_GT=values, reference_logprobs_GT=LOGPROBS), objective=objective, size=size).loss
        for values in (LOGPROBS, changed)
    ]
    assert losses[0] == losses[1]


def test_a_penalty_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(group(), objective=Objective(beta=0.04), size=BatchSize(completions=2, tokens=3))


def test_k3_is_zero_for_equal_and_positive_for_different_probabilities() -> None:
    assert k3_divergence(LOGPROBS, LOGPROBS).abs().max() == 0
    assert (k3_divergence(LOGPROBS, LOGPROBS + torch.tensor([0.5, -0.5])) > 0).all()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        pytest.param("none", [[-0.5, 0.5], [0.0, 0.0]], id="none"),
        pytest.param("group", [[-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)], [0.0, 0.0]], id="group"),
        pytest.param(
            "batch",
            [[-0.5 / (deviation([0, 1, 0.1, 0.1]) + 1e-4), 0.5 / (deviation([0, 1, 0.1, 0.1]) + 1e-4)], [0, 0]],
            id="batch",
        ),
    ],
)
def test_advantages(scale: str, expected: list[list[float]]) -> None:
    values = advantages([[0.0, 1.0], [0.1, 0.1]], scale_rewards=scale)
    assert values[0] == pytest.approx(expected[0])
    assert values[1] == [0.0, 0.0]


def test_token_scores_are_taken_at_the_sampling_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0 * math.log(3.0)]])
    scores = token_scores(logits, torch.tensor([1]), temperature=2.0)
    assert float(scores.logprobs_N[0].exp()) == pytest.approx(0.75)
    assert float(scores.entropies_N[0]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_completion_loss_counts_labelled_tokens_only() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]]))
    labels = torch.tensor([[IGNORED, 0, 1]])
    expected = -(math.log(0.25) + math.log(0.9))
    assert float(completion_loss(logits, labels)) == pytest.approx(expected / 2)
    assert float(completion_loss(logits, labels, tokens=4)) == pytest.approx(expected / 4)
