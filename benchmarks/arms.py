"""The arms: TRL's trainer as it comes, TRL tuned as far as its own code path goes, and this package.

Each runs one GRPO step over a `Case`, phase by phase, and leaves its LoRA gradients behind. Left out, because it is the same
for all: rewards, the optimiser's update, the data loader's other columns.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
import transformers
from cases import Case
from measure import Counters, Phases
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from polyground.batches import PackedGroup, pack_group
from polyground.config import GrpoConfig
from polyground.conventions import read_config
from polyground.losses import BatchSize, GrpoInputs, Objective, grpo_loss
from polyground.models import Family, Prompt, load_family, load_model
from polyground.sampling.local import LocalSampler
from polyground.training.remembering import Remembering
from polyground.training.runs import add_adapter
from polyground.training.scores import score_group

TEMPERATURE = 1.0
"""TRL's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What all arms share."""

    folder: Path
    work: Path
    """Where trainers may write."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "float32"
    """`bfloat16`: weights in it, and the forwards under autocast."""
    lora_r: int = 16

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()


class Arm(ABC):
    """One way to run the step."""

    name: ClassVar[str]
    model: Any
    family: Family
    device: torch.device

    @abstractmethod
    def step(self, case: Case, phases: Phases, *, beta: float, rollout: bool = True) -> float:
        """One step; returns the loss. The rollout's tokens are thrown away: the update is on the case's own."""

    def gradients(self) -> dict[str, Tensor]:
        """Of the adapter, on the CPU."""
        return {name: p.grad.float().cpu().clone() for name, p in self.model.named_parameters() if "lora_" in name}

    def counting(self, counters: Counters) -> AbstractContextManager[None]:
        core = self.model.get_base_model().model
        return counters.counting(tower=core.visual, decoder=self.family.language_model(self.model))

    def setting(self) -> dict[str, Any]:
        """What was chosen for this arm."""
        return {}


class Ours(Arm):
    """This package: the prompt and its images once for all completions."""

    name = "ours"

    def __init__(self, options: Options, *, shared: dict[str, Tensor] | None = None) -> None:
        self._options, self.device = options, options.device
        loaded = load_model(options.folder, dtype=options.dtype, device=options.device)
        if shared is not None:
            share(loaded.model, shared)
        self.model = add_adapter(loaded.model, loaded.family, _lora(options.lora_r), seed=0)
        randomise(self.model)
        self.family = loaded.family
        self._remembering = Remembering(NeverStopping(loaded.family))
        self._loaded = replace(loaded, model=self.model, family=self._remembering)

    def step(self, case: Case, phases: Phases, *, beta: float, rollout: bool = True) -> float:
        family, cell = self._remembering, case.cell
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with self._options.precision():
            with phases("preprocess"):
                family.forget()
                prompts = [family.encode(message) for message in case.messages]
            with phases("vision"):
                features = family.encode_images_of(self.model, prompts)
            with phases("rollout"):
                if rollout:
                    self._roll_out(prompts, n=cell.groups, tokens=cell.completion)
            with phases("forward"):
                packs = [pack_group(p, group).to(self.device) for p, group in zip(prompts, case.completions, strict=True)]
            with phases("reference"), torch.no_grad():
                references: list[Tensor | None] = [None] * len(packs)
                if beta:
                    with self.model.disable_adapter():
                        references = [self._logprobs(packed, seen) for packed, seen in zip(packs, features, strict=True)]
        size = BatchSize(completions=cell.groups * len(packs), tokens=case.completion_tokens)
        total = 0.0
        for packed, seen, advantages, reference in zip(packs, features, case.advantages, references, strict=True):
            with phases("forward"), self._options.precision():
                result = grpo_loss(
                    GrpoInputs(
                        logprobs_GT=self._logprobs(packed, seen),
                        advantages_G=torch.tensor(advantages, device=self.device),
                        mask_GT=packed.mask_GT,
                        reference_logprobs_GT=reference,
                    ),
                    objective=Objective(loss_type="dapo", beta=beta),
                    size=size,
                )
            with phases("backward"):
                result.loss.backward()
            total += float(result.loss.detach())
        return total

    def _roll_out(self, prompts: Sequence[Prompt], *, n: int, tokens: int) -> None:
        sampler = LocalSampler(self._loaded, batch_size=max(64, n * len(prompts)))
        keys = [str(i) for i in range(len(prompts))]
        groups = sampler.sample_encoded(prompts, n=n, temperature=TEMPERATURE, max_tokens=tokens, seed=0, keys=keys)
        _all_decoded([len(c.token_ids) for group in groups for c in group], tokens)

    def _logprobs(self, packed: PackedGroup, features: Any) -> Tensor:
        scores = score_group(self.model, self._remembering, packed, features, temperature=TEMPERATURE)
        return packed.unpack(scores.logprobs_N)


class NeverStopping:
    """A family that samples no end of turn, so that every completion has its full length."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.banned_token_ids = tuple(sorted({*family.banned_token_ids, *family.stop_token_ids}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


class Trl(Arm):
    """TRL's GRPOTrainer, at its defaults: 8 rows per forward, gradient checkpointing.

    Its own functions compute log-probabilities and the loss; data loading and rollout do what its steps do, in their number:
    every row of a group decodes its images, the image processor runs twice over all rows, `generate` prefills each row. The
    vision tower runs inside rollout, reference and forward, so there is no phase of its own.
    """

    name = "stock"
    checkpointing = True
    rows = 8
    """Rows per forward and backward."""

    def __init__(self, options: Options, *, shared: dict[str, Tensor] | None = None) -> None:
        self._options, self.device = options, options.device
        self.family: Any = load_family(options.folder)
        weights = getattr(transformers, read_config(options.folder)["architectures"][0])
        model = weights.from_pretrained(options.folder, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
        if shared is not None:
            share(model, shared)
        self._trainer = _trainer(model, self.family, options, checkpointing=self.checkpointing)
        self.model = self._trainer.model
        randomise(self.model)
        self._checkpoint(self.checkpointing)

    def step(self, case: Case, phases: Phases, *, beta: float, rollout: bool = True) -> float:
        model, trainer = self.model, self._trainer
        model.train()
        model.zero_grad(set_to_none=True)
        trainer.beta = beta
        with phases("preprocess"):
            batch = self._batch(case)
        with phases("rollout"):
            if rollout:
                self._roll_out(batch, tokens=case.cell.completion)
        with phases("reference"):
            if beta:
                batch["ref_per_token_logps"] = self._reference(batch)
        total = 0.0
        for start in range(0, len(batch["prompt_ids"]), self.rows):
            chunk = _rows(batch, start, start + self.rows)
            with phases("forward"), self._options.precision(), self._forward():
                loss = trainer._compute_loss(model, chunk)
            with phases("backward"):
                loss.backward()
            total += float(loss.detach())
        return total

    def setting(self) -> dict[str, Any]:
        return {"rows": self.rows, "gradient_checkpointing": self.checkpointing}

    def _forward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _batch(self, case: Case) -> dict[str, Any]:
        """Prompts padded left, completions padded right, every image repeated, as TRL's batches are."""
        prompts = [prompt for prompt in case.prompts for _ in range(case.cell.groups)]
        images = [paths for paths in case.images for _ in range(case.cell.groups)]
        completions = [completion for group in case.completions for completion in group]
        # A dataset decodes the images of a row each time the row is read; a group is the same row, G times.
        pictures = [[_decoded(path) for path in paths] for paths in images]
        # Once for the rollout and once more for the log-probabilities.
        for _ in range(2):
            seen = self.family.image_processor(images=pictures, return_tensors="pt")
        P, T = max(map(len, prompts)), max(map(len, completions))
        pad = self.family.pad_token_id
        prompt_ids, completion_ids = torch.full((len(prompts), P), pad), torch.full((len(prompts), T), pad)
        prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_ids[i, P - len(prompt) :] = prompt.input_ids
            prompt_mask[i, P - len(prompt) :] = 1
            completion_ids[i, : len(completion)] = torch.tensor(completion)
            completion_mask[i, : len(completion)] = 1
        kinds = torch.cat([prompt_ids == self.model.config.image_token_id, torch.zeros_like(completion_ids).bool()], dim=1)
        tensors = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([a for group in case.advantages for a in group]),
            "num_items_in_batch": completion_mask.sum(),
            "pixel_values": seen["pixel_values"],
            "image_grid_thw": seen["image_grid_thw"],
            "mm_token_type_ids": kinds.int(),
        }
        return {name: value.to(self.device) for name, value in tensors.items()} | {"num_images": [len(i) for i in images]}

    def _roll_out(self, batch: dict[str, Any], *, tokens: int) -> None:
        config = copy.deepcopy(self._trainer.generation_config)
        config.update(max_new_tokens=tokens, min_new_tokens=tokens, suppress_tokens=[self.model.config.image_token_id])
        width = batch["prompt_ids"].shape[1]
        with self._not_checkpointing(), torch.no_grad(), self._options.precision():
            ids = self.model.generate(
                input_ids=batch["prompt_ids"],
                attention_mask=batch["prompt_mask"],
                pixel_values=batch["pixel_values"],
                image_grid_thw=batch["image_grid_thw"],
                mm_token_type_ids=batch["mm_token_type_ids"][:, :width],
                generation_config=config,
            )
        _all_decoded([ids.shape[1] - width], tokens)

    def _reference(self, batch: dict[str, Any]) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        vision = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        with self._not_checkpointing(), torch.no_grad(), self.model.disable_adapter(), self._options.precision(), self._forward():
            logprobs, _, _ = self._trainer._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1], batch_size=self.rows, **vision
            )
        return logprobs

    def _checkpoint(self, on: bool) -> None:
        base = self.model.get_base_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if on:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()

    @contextmanager
    def _not_checkpointing(self) -> Iterator[None]:
        """As TRL does for rollouts and log-probabilities without gradient."""
        self._checkpoint(False)
        try:
            yield
        finally:
            self._checkpoint(self.checkpointing)


class TunedTrl(Trl):
    """The best of TRL without rewriting its step.

    Patch embedding as a matrix product, vision tower without gradient, output layer on completion tokens only, and the best
    of a grid over rows per forward and gradient checkpointing.
    """

    name = "tuned"
    checkpointing = False
    rows = 1

    def __init__(self, options: Options, *, shared: dict[str, Tensor] | None = None) -> None:
        from trl.trainer import utils

        if not (hasattr(utils, "_use_triton") and hasattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE")):
            raise SystemExit("the tuned arm reaches into trl 1.16; install that version")
        super().__init__(options, shared=shared)
        tower = self.model.get_base_model().model.visual
        tower.patch_embed.forward = MethodType(_project, tower.patch_embed)
        tower.forward = torch.no_grad()(tower.forward)

    def choose(self, *, rows: int, checkpointing: bool) -> None:
        self.rows, self.checkpointing = rows, checkpointing
        self._checkpoint(checkpointing)

    def tune(self, case: Case, *, beta: float, grid: Sequence[int] = (1, 2, 4, 8, 16), repeats: int = 1) -> dict[str, float]:
        """Take the fastest update of the grid; returns the seconds of each setting, infinite where memory ran out."""
        total = len(case.prompts) * case.cell.groups
        settings = [(rows, on) for rows in sorted({min(rows, total) for rows in grid}) for on in (False, True)]
        tried = {setting: self._tried(case, *setting, beta=beta, repeats=repeats) for setting in settings}
        rows, checkpointing = min(tried, key=lambda setting: tried[setting])
        self.choose(rows=rows, checkpointing=checkpointing)
        return {f"rows {rows}{', checkpointing' if on else ''}": seconds for (rows, on), seconds in tried.items()}

    def _tried(self, case: Case, rows: int, checkpointing: bool, *, beta: float, repeats: int) -> float:
        self.choose(rows=rows, checkpointing=checkpointing)
        seconds = []
        for _ in range(repeats):
            phases = Phases(self.device)
            full = False
            try:
                self.step(case, phases, beta=beta, rollout=False)
            except torch.OutOfMemoryError:
                full = True
            if full:
                # Only now are the tensors of the failed step out of reach.
                self.model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                return float("inf")
            seconds.append(phases.seconds["reference"] + phases.seconds["forward"] + phases.seconds["backward"])
        return min(seconds)

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Without Triton TRL projects every position to the vocabulary, in chunks wider than a small one; this stops both."""
        from trl.trainer import utils

        before = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
        vocabulary = self.model.config.get_text_config().vocab_size
        # Read by the choice of positions only: the kernels themselves look up their own.
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = lambda device: True, min(before[1], vocabulary)
        try:
            yield
        finally:
            utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


ARMS: dict[str, Callable[..., Arm]] = {arm.name: arm for arm in (Trl, TunedTrl, Ours)}


def build_arms(names: Sequence[str], options: Options) -> dict[str, Any]:
    """The arms by name, on one copy of the frozen weights, with equal adapters."""
    shared: dict[str, Tensor] = {}
    # Ours first: it brings the weights to the device, where the others find them.
    built = {name: ARMS[name](options, shared=shared) for name in sorted(names, key=lambda name: name != Ours.name)}
    return {name: built[name] for name in names}


def share(model: nn.Module, shared: dict[str, Tensor]) -> None:
    """Let equal parameters of several models lie in the same memory."""
    for name, parameter in model.named_parameters():
        held = shared.setdefault(name, parameter.data)
        if held.shape == parameter.shape and held.dtype == parameter.dtype:
            parameter.data = held


def randomise(model: nn.Module) -> None:
    """Adapters that do something, the same in every arm: a fresh one is zero, and so is half of its gradient."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 2**31)
            std = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _lora(rank: int) -> GrpoConfig:
    return GrpoConfig(lora_r=rank, lora_alpha=2 * rank)


def _trainer(model: Any, family: Any, options: Options, *, checkpointing: bool) -> Any:
    import trl
    from datasets import Dataset

    config = _lora(options.lora_r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=str(options.work / "trl"),
                gradient_checkpointing=checkpointing,
                bf16=False,  # autocast is entered around the calls, the same for all arms
                use_cpu=options.device.type == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_list([{"prompt": "x"}]),
            processing_class=family.tokenizer,
            peft_config=LoraConfig(
                r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=family.lora_targets, task_type="CAUSAL_LM"
            ),
        )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some rows of a batch, with their images."""
    counts = batch["num_images"]
    first, last = sum(counts[:start]), sum(counts[:stop])
    patches = [0, *batch["image_grid_thw"].prod(-1).cumsum(0).tolist()]
    part = {name: value[start:stop] for name, value in batch.items() if name != "num_items_in_batch"}
    return part | {
        "num_items_in_batch": batch["num_items_in_batch"],
        "pixel_values": batch["pixel_values"][patches[first] : patches[last]],
        "image_grid_thw": batch["image_grid_thw"][first:last],
    }


def _decoded(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


def _all_decoded(lengths: Sequence[int], tokens: int) -> None:
    if any(length != tokens for length in lengths):
        raise RuntimeError(f"the rollout should have decoded {tokens} tokens per completion; got {sorted(set(lengths))}")


def _project(embed: Any, patches: Tensor) -> Tensor:
    """The patch embedding's convolution as the matrix product it is."""
    weight = embed.proj.weight.flatten(1)
    return nn.functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, embed.proj.bias)
