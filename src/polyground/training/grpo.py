"""GRPO whose unit is the group: a prompt is encoded once, and all its completions share one packed forward and backward.

What differs from row-by-row training is the cost, not the result: loss and gradients equal TRL's (tests/training).
Sampling is any `Sampler`; scoring is the one `Scorer`; checkpoints, schedules, loggers and DDP are transformers' Trainer.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from polyground.batches import PackedGroup, pack_group
from polyground.config import GrpoConfig
from polyground.errors import ConfigError, DataError, EndpointError
from polyground.geometry import Grid
from polyground.losses import (
    BatchSize,
    GrpoInputs,
    GrpoSums,
    Mismatch,
    Objective,
    TokenScores,
    advantages,
    deviation,
    grpo_loss,
    without_variance,
)
from polyground.models import ImageFeatures, Loaded
from polyground.records import Completion, Example, Message, Rollout
from polyground.rollout import Ask, Group, Judge, rollout_groups
from polyground.sampling import Following, Sampler
from polyground.training.boards import Boards, Shown, boards_of
from polyground.training.processes import PortableTrainer, trains_on_cpu, wrap_decoder_layers
from polyground.training.remembering import Ready, Remembering
from polyground.training.runs import append_rows, prepare_model, require_packable, train, training_arguments
from polyground.training.schedule import Prepared, dealing, groups_per_step, grpo_steps, schedule_of
from polyground.training.scores import attention_note, score_groups
from polyground.training.watch import Watching, answer_metrics

logger = logging.getLogger("polyground")

# Shapes: G completions of one prompt, T tokens of the longest of them, N all their tokens laid end to end.

ROLLOUTS = "rollouts.jsonl"
"""One row per completion sampled in training: `step` (0-based), `advantage`, and the `Rollout`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lot:
    """One group made ready for the optimiser."""

    packed: PackedGroup
    features: ImageFeatures
    advantages_G: Tensor
    size: BatchSize
    """Of the optimiser batch it belongs to."""
    skipped: bool
    """Without variance, and so without gradient: counted, not computed."""
    old_logprobs_GT: Tensor | None = None
    reference_logprobs_GT: Tensor | None = None
    sampling_logprobs_GT: Tensor | None = None


class GrpoTrainer(PortableTrainer):
    """transformers' Trainer whose batches are groups it samples itself, from the policy it trains."""

    def __init__(
        self,
        model: Any,
        *,
        args: Any,
        config: GrpoConfig,
        examples: Sequence[Example],
        family: Remembering,
        sampler: Sampler,
        ask: Ask,
        judge: Judge,
        seed: int,
    ) -> None:
        require_packable(model)
        # Without an adapter to switch off, the starting policy is a model of its own.
        apart = config.beta and not config.use_peft
        self._start = copy.deepcopy(model).to(args.device).requires_grad_(False).eval() if apart else None
        schedule = schedule_of(examples, config, args, seed=seed, deal=dealing(examples, family, ask, args))
        self._prepared = Prepared(schedule, family, ask, ahead=args.dataloader_num_workers > 0, cached=config.image_cache_mib > 0)
        super().__init__(model=model, args=args, train_dataset=self._prepared, data_collator=list)
        if self.zero_stage == 3:
            raise ConfigError(
                "grpo: rollouts need the weights whole, or the adapter where a server samples; ZeRO-3 gives neither; use "
                "recipes/accelerate/fsdp.yaml, deepspeed-zero2.yaml or ddp.yaml"
            )
        # `BatchSize` spans the accumulation window: losses of micro-batches are summed, not averaged.
        self.loss_is_scaled_for_ga = True
        self.config = config
        self.objective = Objective(**{field.name: getattr(config, field.name) for field in fields(Objective)})
        self._boards = Boards(
            boards_of(self.callback_handler.callbacks),
            groups=config.report_groups,
            save_steps=int(args.save_steps),
            num_iterations=config.num_iterations,
        )
        self.add_callback(self._boards)
        self._family, self._sampler, self._ask, self._judge, self._seed = family, sampler, ask, judge, seed
        self.attention = ""
        """How the first packed row was attended to; see `attention_note`."""
        self._answers: dict[int, tuple[Sequence[Message], Sequence[Grid]]] = {}
        """By id of the example, for those of the step."""
        self._held: list[Lot] = []
        self._sums = GrpoSums()
        self._entropy = 0.0
        self._mismatch = Mismatch()
        self._compared = not isinstance(sampler, Following)
        """Whether the other engine's log-probabilities were found to mean the same as ours."""
        self._metrics: dict[str, list[float]] = defaultdict(list)

    # What Trainer asks for -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The groups of one optimiser step, sampled together when their turn begins and reused `num_iterations` times."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if step % self.config.num_iterations == 0:
            self._held = self._roll_out([ready for batch in batches for ready in batch], step=step)
        lots = iter(self._held)
        return [{"lots": [next(lots) for _ in batch]} for batch in batches], None

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        lots = inputs["lots"]
        used = [lot for lot in lots if not lot.skipped]
        if not used and self.args.world_size > 1:
            # Every process must run a backward for gradients to be averaged; this one's is exactly zero.
            used = lots[:1]
        if not used:
            return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0
        return torch.stack(self._losses(model, used)).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._measured()}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # Groups under the policy -----------------------------------------------------------------------------------------

    def _losses(self, model: Any, lots: Sequence[Lot]) -> list[Tensor]:
        return [self._loss(lot, scores) for lot, scores in zip(lots, self._score(model, lots), strict=True)]

    def _score(self, model: Any, lots: Sequence[Lot]) -> list[TokenScores]:
        if not self.attention:
            decoder = self._family.language_model(model)
            self.attention = attention_note(decoder, [lot.packed for lot in lots], self.config.prefix_attention)
            logger.info("prefix attention: %s", self.attention)
        return score_groups(
            model,
            self._family,
            [lot.packed for lot in lots],
            [lot.features for lot in lots],
            temperature=self.config.temperature,
            attention=self.config.prefix_attention,
        )

    def _loss(self, lot: Lot, scores: TokenScores) -> Tensor:
        result = grpo_loss(
            GrpoInputs(
                logprobs_GT=lot.packed.unpack(scores.logprobs_N),
                advantages_G=lot.advantages_G,
                mask_GT=lot.packed.mask_GT,
                old_logprobs_GT=lot.old_logprobs_GT,
                reference_logprobs_GT=lot.reference_logprobs_GT,
                sampling_logprobs_GT=lot.sampling_logprobs_GT,
            ),
            objective=self.objective,
            size=lot.size,
        )
        self._sums += result.sums
        if result.mismatch is not None:
            self._mismatch += result.mismatch
        self._entropy += float(scores.entropies_N.sum())
        return result.loss

    # Rollouts --------------------------------------------------------------------------------------------------------

    def _roll_out(self, prepared: Sequence[Ready], *, step: int) -> list[Lot]:
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        self._family.forget()
        self._answers = {}
        if isinstance(self._sampler, Following):
            self._metrics["sampling/staleness"].append(float(self._sampler.follow(step)))
        for ready in prepared:
            self._family.expect(ready)
            if ready.asked is not None:
                self._answers[id(ready.example)] = ready.asked
        examples = [ready.example for ready in prepared]
        # A server holds the weights for itself: here they may stay in pieces.
        samples_here = not isinstance(self._sampler, Following)
        with torch.no_grad(), self.accelerator.autocast(), self._family.gathered(model) if samples_here else nullcontext():
            groups = list(
                rollout_groups(
                    examples,
                    sampler=self._sampler,
                    ask=self._asked,
                    judge=self._judge,
                    n=self.config.num_generations,
                    temperature=self.config.temperature,
                    top_p=self.config.top_p,
                    max_tokens=self.config.max_completion_length,
                    seed=step_seed(self._seed, step),
                    batch=len(examples),
                )
            )
            lots = self._lots(model, groups)
        self._prepared.tell(prepared)
        self._record([ready.place for ready in prepared], groups, lots, step=step)
        return lots

    def _asked(self, example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        """How it is put to the policy; told once per step, since it may read the sizes of image files."""
        if id(example) not in self._answers:
            self._answers[id(example)] = self._ask(example)
        return self._answers[id(example)]

    def _lots(self, model: Any, groups: Sequence[Group]) -> list[Lot]:
        rewards = [list(group.totals) for group in groups]
        spread = (
            deviation(self._gathered([r for group in rewards for r in group])) if self.config.scale_rewards == "batch" else None
        )
        values = advantages(rewards, scale_rewards=self.config.scale_rewards, spread=spread)
        if self.config.difficulty_weighting:
            values = [[a * difficulty_weight(group) for a in row] for group, row in zip(groups, values, strict=True)]
        lengths = [len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts]
        # Under several processes gradients are averaged, so each divides by the average size.
        tokens = sum(self._gathered([float(sum(lengths))])) / self.args.world_size
        size = BatchSize(completions=len(lengths), tokens=tokens)
        # Processes have different images to encode, and what is put together for one must be asked for by all.
        with self._family.gathered(model, decoder=False):
            lots = [self._lot(model, group, row, size) for group, row in zip(groups, values, strict=True)]
        return [self._compared_with(model, lot) for lot in lots]

    def _lot(self, model: Any, group: Group, values: Sequence[float], size: BatchSize) -> Lot:
        device = self.args.device
        messages, _ = self._asked(group.example)
        prompt = self._family.encode(messages)
        lot = Lot(
            packed=pack_group(prompt, [rollout.completion.token_ids for rollout in group.rollouts]).to(device),
            features=self._family.encode_images(model, prompt),
            advantages_G=torch.tensor(values, device=device),
            size=size,
            # With a KL penalty such a group still has a gradient: leaving it out would not be exact. Under FSDP and ZeRO all
            # processes must run the same forwards.
            skipped=(
                self.config.skip_zero_variance
                and self.config.beta == 0
                and without_variance(group.totals)
                and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            ),
        )
        if isinstance(self._sampler, Following):
            told = [logprob for rollout in group.rollouts for logprob in rollout.completion.logprobs]
            lot = replace(lot, sampling_logprobs_GT=lot.packed.unpack(torch.tensor(told, device=device)))
        return lot

    def _compared_with(self, model: Any, lot: Lot) -> Lot:
        """The lot with the log-probabilities its loss compares with: of the policy as it was, and of the starting policy."""
        if not self._compared:
            self._compare(model, lot)
        if lot.skipped:
            return lot
        if self.config.num_iterations > 1:
            lot = replace(lot, old_logprobs_GT=self._logprobs(model, lot))
        if self.config.beta:
            with model.disable_adapter() if self._start is None else nullcontext():
                lot = replace(lot, reference_logprobs_GT=self._logprobs(model if self._start is None else self._start, lot))
        return lot

    def _logprobs(self, model: Any, lot: Lot) -> Tensor:
        [scores] = self._score(model, [lot])
        return lot.packed.unpack(scores.logprobs_N)

    def _compare(self, model: Any, lot: Lot) -> None:
        """Once: an engine that tells log-probabilities before the temperature would have every loss weighed wrongly."""
        self._compared = True
        if self.config.temperature == 1 or lot.sampling_logprobs_GT is None:
            return
        ours = self._logprobs(model, lot)
        [plain] = score_groups(
            model, self._family, [lot.packed], [lot.features], temperature=1.0, attention=self.config.prefix_attention
        )
        count = lot.packed.mask_GT.sum()
        gap, raw_gap = (
            float((logprobs_GT - lot.sampling_logprobs_GT).abs().sum() / count)
            for logprobs_GT in (ours, lot.packed.unpack(plain.logprobs_N))
        )
        if gap > 0.02 and raw_gap < gap / 2:
            raise EndpointError(
                f"the server's log-probabilities are those before the temperature ({raw_gap:.3f} nats a token from ours at 1, "
                f"{gap:.3f} at {self.config.temperature:g}); start vLLM with --logprobs-mode processed_logprobs"
            )

    def _gathered(self, values: Sequence[float]) -> list[float]:
        if self.args.world_size == 1:
            return list(values)
        return self.accelerator.gather(torch.tensor(values, dtype=torch.float64, device=self.args.device)).tolist()

    # What is said of it ----------------------------------------------------------------------------------------------

    def _record(self, places: Sequence[int], groups: Sequence[Group], lots: Sequence[Lot], *, step: int) -> None:
        told = self._told(
            [
                (place, _light(group), lot.advantages_G.tolist(), lot.skipped)
                for place, group, lot in zip(places, groups, lots, strict=True)
            ]
        )
        if not self.is_world_process_zero():
            return
        told.sort(key=lambda entry: entry[0])
        rows = [
            {"step": step, "advantage": advantage, **_slim(rollout).to_json()}
            for _, group, values, _ in told
            for rollout, advantage in zip(group.rollouts, values, strict=True)
        ]
        append_rows(Path(self.args.output_dir) / ROLLOUTS, rows)
        if self._boards.wants(step):
            self._boards.take([Shown(group, values) for _, group, values, _ in told])
        for key, value in group_metrics([group for _, group, _, _ in told]).items():
            self._metrics[key].append(value)
        self._metrics["frac_groups_skipped"].append(sum(skipped for *_, skipped in told) / len(told))

    def _told(self, own: list[Any]) -> list[Any]:
        """What all processes have to tell of a step, at the first of them, which writes files and logs; nothing at the others."""
        if self.args.world_size == 1:
            return own
        parts: list[Any] | None = [None] * self.args.world_size if self.args.process_index == 0 else None
        torch.distributed.gather_object(own, parts, dst=0)
        return [entry for part in parts or () for entry in part]

    def _measured(self) -> dict[str, float]:
        """Everything since the last log line; then the count starts again."""
        sums = self._sums
        own = torch.tensor([sums.tokens, sums.kl, sums.clipped_low, sums.clipped_high, self._entropy], dtype=torch.float64)
        tokens, kl, low, high, entropy = self.accelerator.reduce(own.to(self.args.device), reduction="sum").tolist()
        measured = {key: math.fsum(values) / len(values) for key, values in self._metrics.items()}
        if tokens:
            measured |= {
                "entropy": entropy / tokens,
                "clip_ratio/low_mean": low / tokens,
                "clip_ratio/high_mean": high / tokens,
                "clip_ratio/region_mean": (low + high) / tokens,
            }
            if self.objective.beta:
                measured["kl"] = kl / tokens
        if isinstance(self._sampler, Following):
            measured |= sum(self._told([self._mismatch]), Mismatch()).metrics()
        self._sums, self._entropy, self._mismatch = GrpoSums(), 0.0, Mismatch()
        self._metrics.clear()
        return measured


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What one set of rollouts says of the policy. Names are TRL's where TRL has one."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    totals = [rollout.score.total for rollout in rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    images = [rollout.score.image_correct for rollout in rollouts if rollout.score.image_correct is not None]
    metrics = {
        "reward": fmean(totals),
        "reward_std": fmean([deviation(group.totals) for group in groups]),
        "frac_reward_zero_std": fmean([float(without_variance(group.totals)) for group in groups]),
        "iou": fmean([rollout.score.iou for rollout in rollouts]),
        "unreadable": fmean([float(rollout.score.unreadable is not None) for rollout in rollouts]),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean([float(rollout.completion.truncated) for rollout in rollouts]),
    }
    for name in rollouts[0].score.parts:
        values = [rollout.score.parts[name] for rollout in rollouts]
        metrics |= {f"rewards/{name}/mean": fmean(values), f"rewards/{name}/std": deviation(values)}
    if images:
        metrics["image_accuracy"] = fmean(images)
    return metrics | answer_metrics(groups)


def difficulty_weight(group: Group) -> float:
    """exp(1 - mean IoU) of the group, in [1, e]: hard questions pull harder (UniVG-R1)."""
    return math.exp(1 - fmean([rollout.score.iou for rollout in group.rollouts]))


def step_seed(seed: int, step: int) -> int:
    """The sampling seed of a step: neither what came before nor a resume changes it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:4], "big") >> 1


def train_grpo(
    loaded: Loaded,
    examples: Sequence[Example],
    config: GrpoConfig,
    *,
    sampler: Any,
    ask: Ask,
    judge: Judge,
    out: Path,
    seed: int,
) -> dict[str, Any]:
    """Train on the examples and save to `out/adapter`, or the whole model to `out/model`; goes on from the last checkpoint.

    `sampler(loaded)` gives the sampler of a model; it is called with the policy, adapter included.
    """
    if not examples:
        raise DataError(f"{out}: there is no question to train on; run reject and look at its pass rates")
    wrap_decoder_layers(loaded.model, loaded.family)
    model = prepare_model(loaded.model, loaded.family, config, seed=seed)
    args = training_arguments(config, out, seed=seed, max_steps=1, use_cpu=trains_on_cpu(loaded))
    args.max_steps = grpo_steps(len(examples), config, per_step=groups_per_step(args))
    args.warmup_steps = math.ceil(config.warmup_ratio * args.max_steps)
    family = Remembering(loaded.family, cache_mib=config.image_cache_mib)
    trainer = GrpoTrainer(
        model,
        args=args,
        config=config,
        examples=examples,
        family=family,
        sampler=sampler(replace(loaded, model=model, family=family)),
        ask=ask,
        judge=judge,
        seed=seed,
    )
    watching = Watching(out)
    trainer.add_callback(watching)
    summary = {
        "examples": len(examples),
        **train(trainer, out, save_total_limit=config.save_total_limit, by_step=(ROLLOUTS,)),
        "warnings": watching.count(),
    }
    return summary | ({"prefix_attention": trainer.attention} if trainer.attention else {})


def _light(group: Group) -> Group:
    """Without log-probabilities, which nothing that is told of a group is made of."""
    return replace(group, rollouts=tuple(rollout.without_logprobs() for rollout in group.rollouts))


def _slim(rollout: Rollout) -> Rollout:
    # Token ids and log-probabilities are most of the bytes, and nothing reads them again.
    completion = Completion(text=rollout.completion.text, truncated=rollout.completion.truncated)
    return replace(rollout, completion=completion)
