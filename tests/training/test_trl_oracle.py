"""TRL is the oracle: the same completions and advantages give the same loss, metrics and LoRA gradients, in fp32."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from stand_ins import Babbler, ask, families
from torch import Tensor

from polyground.batches import PackedGroup, pack_group
from polyground.config import GrpoConfig
from polyground.losses import BatchSize, GrpoInputs, GrpoSums, Objective, advantages, grpo_loss
from polyground.models import Loaded, Prompt
from polyground.records import Example
from polyground.training.scores import score_group

trl = pytest.importorskip("trl")

G, TEMPERATURE, BUDGET = 3, 0.8, 7
REWARDS = [[0.0, 1.0, 0.5], [0.2, 0.2, 0.9], [1.0, 0.1, 0.3], [0.4, 0.6, 0.0]]


class Case:
    """Four prompts of 1, 2, 3 and 6 images with three ragged completions each, and one model in both arms' hands."""

    def __init__(self, toy: Loaded, examples: list[Example], *, out: Path, beta: float, loss_type: str, **options) -> None:
        self.family = toy.family
        self.prompts: list[Prompt] = [toy.family.encode(ask(example)[0]) for example in examples]
        keys = [example.key for example in examples]
        sampled = Babbler().sample([], n=G, temperature=1.0, max_tokens=BUDGET, seed=1, keys=keys)
        self.completions = [[list(c.token_ids) for c in group] for group in sampled]
        self.values = advantages(REWARDS)
        self.trainer = trl.GRPOTrainer(
            model=copy.deepcopy(toy.model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=str(out),
                per_device_train_batch_size=G * len(examples),
                num_generations=G,
                max_completion_length=BUDGET,
                temperature=TEMPERATURE,
                beta=beta,
                loss_type=loss_type,
                epsilon=0.2,
                epsilon_high=0.25,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                **options,
            ),
            train_dataset=_dataset(),
            processing_class=toy.family.tokenizer,
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=toy.family.lora_targets, task_type="CAUSAL_LM"),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model
        torch.manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        self.model.train()

    def rows(self) -> dict[str, Tensor]:
        """The batch as TRL has it: prompts padded left, completions padded right, every image repeated."""
        prompts = [prompt for prompt in self.prompts for _ in range(G)]
        completions = [c for group in self.completions for c in group]
        P, T = max(len(p) for p in prompts), max(map(len, completions))
        pad = self.family.pad_token_id
        image = self.model.config.image_token_id
        prompt_ids = torch.full((len(prompts), P), pad)
        completion_ids, completion_mask = torch.full((len(prompts), T), pad), torch.zeros(len(prompts), T, dtype=torch.long)
        prompt_mask = torch.zeros_like(prompt_ids)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_ids[i, P - len(prompt) :] = prompt.input_ids
            prompt_mask[i, P - len(prompt) :] = 1
            completion_ids[i, : len(completion)] = torch.tensor(completion)
            completion_mask[i, : len(completion)] = 1
        kinds = torch.cat([prompt_ids == image, torch.zeros_like(completion_ids, dtype=torch.bool)], dim=1).int()
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([a for group in self.values for a in group]),
            "num_items_in_batch": completion_mask.sum(),
            "pixel_values": torch.cat([p.vision["pixel_values"] for p in prompts]),
            "image_grid_thw": torch.cat([p.vision["image_grid_thw"] for p in prompts]),
            "num_images": [len(p.vision["image_grid_thw"]) for p in prompts],
            "mm_token_type_ids": kinds,
        }

    def theirs(self, *, off_policy: float, reference: bool, **more: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        inputs = self.rows() | more
        vision = {k: inputs[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logprobs, _, _ = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, keep, **vision)
            if reference:
                with self.model.disable_adapter():
                    inputs["ref_per_token_logps"], _, _ = self.trainer._get_per_token_logps_and_entropies(
                        self.model, ids, mask, keep, **vision
                    )
            if off_policy:
                inputs["old_per_token_logps"] = logprobs + drift(logprobs.shape, off_policy)
        self.model.zero_grad()
        loss = self.trainer._compute_loss(self.model, inputs)
        loss.backward()
        return loss.detach(), self.gradients(), logprobs * inputs["completion_mask"]

    def ours(
        self, objective: Objective, *, off_policy: float, sampled: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor], GrpoSums, float]:
        size = BatchSize(
            completions=sum(map(len, self.completions)), tokens=sum(len(c) for group in self.completions for c in group)
        )
        longest = max(len(c) for group in self.completions for c in group)
        shift, away = (drift((size.completions, longest), scale) for scale in (off_policy, sampled))
        self.model.zero_grad()
        total, sums, entropy, logprobs = torch.zeros(()), GrpoSums(), 0.0, []
        for i, (prompt, completions, values) in enumerate(zip(self.prompts, self.completions, self.values, strict=True)):
            packed = pack_group(prompt, completions)
            reference = self.reference(packed, prompt) if objective.beta else None
            features = self.family.encode_images(self.model, prompt)
            scores = score_group(self.model, self.family, packed, features, temperature=TEMPERATURE)
            current = packed.unpack(scores.logprobs_N)
            result = grpo_loss(
                GrpoInputs(
                    logprobs_GT=current,
                    advantages_G=torch.tensor(values),
                    mask_GT=packed.mask_GT,
                    old_logprobs_GT=current.detach() + shift[G * i : G * (i + 1), : current.shape[1]] if off_policy else None,
                    reference_logprobs_GT=reference,
                    sampling_logprobs_GT=current.detach() + away[G * i : G * (i + 1), : current.shape[1]] if sampled else None,
                ),
                objective=objective,
                size=size,
            )
            result.loss.backward()
            total, sums, entropy = total + result.loss.detach(), sums + result.sums, entropy + float(scores.entropies_N.sum())
            logprobs += list(scores.logprobs_N.detach().split(list(packed.lengths)))
        return total, self.gradients(), logprobs, sums, entropy

    def reference(self, packed: PackedGroup, prompt: Prompt) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            features = self.family.encode_images(self.model, prompt)
            return packed.unpack(score_group(self.model, self.family, packed, features, temperature=TEMPERATURE).logprobs_N)

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if "lora_" in n and p.grad is not None}


def drift(shape: tuple[int, ...], scale: float) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * scale


def _dataset():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "x"}])


@families
@pytest.mark.parametrize("off_policy", [pytest.param(0.0, id="on-policy"), pytest.param(0.4, id="off-policy")])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradients_equal_trl(
    toy: Loaded, examples: list[Example], tmp_path: Path, loss_type: str, beta: float, off_policy: float
) -> None:
    case = Case(toy, examples, out=tmp_path, beta=beta, loss_type=loss_type)
    loss, gradients, logprobs = case.theirs(off_policy=off_policy, reference=beta > 0)
    objective = Objective(loss_type=loss_type, beta=beta, epsilon=0.2, epsilon_high=0.25, max_completion_length=BUDGET)
    our_loss, our_gradients, our_logprobs, sums, entropy = case.ours(objective, off_policy=off_policy)

    for theirs, ours in zip(logprobs, our_logprobs, strict=True):
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-5, atol=2e-6)
    assert float(our_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert our_gradients.keys() == gradients.keys()
    assert relative(our_gradients, gradients) < 1e-5

    metrics = {name: values[-1] for name, values in case.trainer._metrics["train"].items()}
    assert entropy / sums.tokens == pytest.approx(metrics["entropy"], rel=1e-5)
    assert sums.clipped_low / sums.tokens == pytest.approx(metrics["clip_ratio/low_mean"])
    assert sums.clipped_high / sums.tokens == pytest.approx(metrics["clip_ratio/high_mean"])
    assert (sums.clipped_low > 0) == (off_policy > 0)
    if beta:
        assert sums.kl / sums.tokens == pytest.approx(metrics["kl"], rel=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_weights_of_another_engines_samples_equal_trl(
    toy: Loaded, examples: list[Example], tmp_path: Path, mode: str
) -> None:
    case = Case(toy, examples, out=tmp_path, beta=0.04, loss_type="grpo", vllm_importance_sampling_mode=mode)
    # As TRL's trainer does after sampling with vLLM, which this machine cannot give it.
    completions = case.rows()["completion_mask"]
    gap = -drift(tuple(completions.shape), 0.8) * completions
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    ratio = ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.masked_fill(ratio > 3.0, 0.0)
    case.trainer.use_vllm = True
    assert case.trainer.vllm_importance_sampling_correction
    loss, gradients, _ = case.theirs(off_policy=0.0, reference=True, importance_sampling_ratio=ratio)
    objective = Objective(loss_type="grpo", beta=0.04, epsilon=0.2, epsilon_high=0.25, vllm_importance_sampling_mode=mode)
    our_loss, our_gradients, *_ = case.ours(objective, off_policy=0.0, sampled=0.8)
    assert float(our_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
    assert relative(our_gradients, gradients) < 1e-5
    plain, *_ = case.ours(Objective(loss_type="grpo", beta=0.04, epsilon=0.2, epsilon_high=0.25), off_policy=0.0)
    assert abs(float(plain) - float(our_loss)) > 1e-3


def test_what_may_be_set_of_the_correction_is_what_trl_starts_with() -> None:
    theirs = trl.GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    for name, value in GrpoConfig().to_json().items():
        if name.startswith("vllm_importance_sampling"):
            assert getattr(theirs, name) == value, name


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Distance of all gradients together, relative to their length."""
    gap = sum(float((ours[n] - theirs[n]).double().pow(2).sum()) for n in theirs)
    return (gap / sum(float(theirs[n].double().pow(2).sum()) for n in theirs)) ** 0.5
