"""Every knob of every stage: one recipe in YAML, dotted overrides, unknown keys refused by name.

No stage, model or torch is known here. A section is frozen once built; each knob says its meaning, default and limit.
Hyper-parameters keep TRL's names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from polyground.errors import ConfigError


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, protected_namespaces=()
    )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: what a run folder records and fingerprints."""
        return self.model_dump(mode="json")


class ModelConfig(Section):
    """The model to start from."""

    path: str = "tiny"
    """`tiny` for the model shipped with the package, else a local folder in the Hugging Face layout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the weights are loaded in. bfloat16 halves the memory; on CPU without AVX-512 BF16 it is slow."""
    max_pixels_total: int | None = Field(default=None, ge=1)
    """Pixel budget of one prompt, divided by its image count; null leaves the processor's own limit per image."""


class WorldConfig(Section):
    """The simulated world: how many questions each split holds. Used where `data` names no path for a split."""

    train: int = Field(default=2000, ge=0)
    """Questions for synthesis and supervised fine-tuning."""
    rl: int = Field(default=1000, ge=0)
    """Questions offered to rejection sampling, and from there to GRPO."""
    train_choice: int = Field(default=0, ge=0)
    """Multiple choices beside those of `train`, about one image of several; none is of a kind that `perception` asks."""
    rl_choice: int = Field(default=0, ge=0)
    """Multiple choices beside those of `rl`."""
    validation: int = Field(default=100, ge=0)
    """Questions watched while training."""
    test: int = Field(default=300, ge=0)
    """In-domain multi-image grounding questions."""
    ood: int = Field(default=200, ge=0)
    """Out-of-domain questions: unseen phrasings and scenes."""
    perception: int = Field(default=200, ge=0)
    """Multi-image perception questions, answered by a letter."""
    seed: int = Field(default=0, ge=0)
    """The same seed writes the same world."""


class DataSource(Section):
    """One annotation file and the converter that reads it."""

    source: str = Field(min_length=1)
    """Name of a converter: a module of `polyground.sources`, such as `mig_bench`."""
    path: Path
    """Annotation file or folder; a relative path starts at the working directory."""
    options: dict[str, Any] = {}
    """Passed to the converter, for example `images_root`."""


class DataConfig(Section):
    """Your own data, per split. A split without an entry comes from the simulated world."""

    train: list[DataSource] = []
    """For synthesis and supervised fine-tuning."""
    rl: list[DataSource] = []
    """For rejection sampling and GRPO."""
    validation: list[DataSource] = []
    """Watched while training."""
    test: list[DataSource] = []
    """In-domain multi-image grounding."""
    ood: list[DataSource] = []
    """Out-of-domain grounding."""
    perception: list[DataSource] = []
    """Multi-image perception, multiple choice."""


class PromptConfig(Section):
    """What the student is told besides the images and the question."""

    instruction: str = "Think first, then answer."
    """Appended to every question; empty for a model whose base never saw an instruction."""
    reasoning: bool = True
    """False teaches the answer alone, without what the teacher thought, and the reward `format` then asks for just that."""


class RewardConfig(Section):
    """One part of the reward."""

    name: str = Field(min_length=1)
    """A built-in reward (iou, iou_threshold, image, format, count, choice, length) or `file.py:function`."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the weighted sum."""
    options: dict[str, Any] = {}
    """Keyword arguments of the reward, for example `{threshold: 0.5}`."""

    def is_like(self, other: RewardConfig) -> bool:
        """The same reward with the same options, whatever its weight."""
        return (self.name, self.options) == (other.name, other.options)


class EndpointConfig(Section):
    """How servers are asked: none of it decides a row, so that all of it may change between two attempts at a stage."""

    concurrency: int = Field(default=8, ge=1)
    """Prompts under way at once, over all addresses."""
    retries: int = Field(default=5, ge=0)
    """How often a request that failed for a passing reason (408, 409, 429, 5xx, connection, time-out, garbage) is tried again."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds one try may take."""
    outage: float = Field(default=600.0, ge=0)
    """Seconds that all addresses may be silent, after having answered before, until the stage stops."""
    prompt_price: float | None = Field(default=None, ge=0)
    """Money per million prompt tokens, for the cost in the summary and for max_cost; null where it is not known."""
    completion_price: float | None = Field(default=None, ge=0)
    """Money per million completion tokens."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of prompts and completions, earlier attempts included, after which no request is started; null for no limit."""
    max_cost: float | None = Field(default=None, gt=0)
    """As max_tokens, in money at these prices. Requests under way are paid beyond it: at most `concurrency`."""
    on_budget: Literal["stop", "finish"] = "stop"
    """What a spent budget does: `stop` leaves the stage to be gone on with under a larger one; `finish` completes it with what
    was kept."""
    cache: Path | None = None
    """Folder of the answers, which are never paid for twice; null keeps them in `answers/` beside the folders of the stages.
    Several runs may share one; a budget then counts what all of them spent."""
    check_prompt_tokens: bool = True
    """Compare the first answer's count of prompt tokens with our own, where the grid is a model folder; false goes on whatever
    it says."""
    image_tokens: int | None = Field(default=None, ge=0)
    """Tokens an image is taken for in the estimate of the cost, where the grid is no model folder; null takes one for every
    28 x 28 pixels of it."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("max_cost needs a prompt_price or a completion_price, per million tokens")
        return self


class JudgeConfig(Section):
    """A model that marks reasoning from 1 to 5: whether it is seen in the images, whether the answer follows, whether it is the
    reasoning of somebody who did not know the answer."""

    model: str | None = None
    """Name of the model on its server; null for the teacher itself, at the teacher's address and on its budget."""
    base_url: str | list[str] | None = None
    """Address of the judge's server; a list of them shares the work."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the judge's key."""
    endpoint: EndpointConfig = EndpointConfig()
    """How a judge of its own is asked: as the teacher's `endpoint`, with prices and a budget of its own."""
    grid: str = Field(default="per_mille", min_length=1)
    """How a judge of its own reads boxes: as the teacher's `teacher_grid`."""
    max_pixels_total: int | None = Field(default=None, ge=1)
    """Pixels that the images of one request share, where the grid is a model folder."""
    min_mark: float = Field(default=4.0, ge=1, le=5)
    """Reasoning with a lower mark, in any of the three, is dropped."""
    samples: int = Field(default=1, ge=1)
    """Replies per reasoning; each mark is their mean. More than one need a temperature above 0."""
    candidates: int = Field(default=1, ge=1)
    """Confirmed attempts judged per question, the best score first; the one with the best marks is kept."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the replies."""
    max_completion_length: int = Field(default=512, ge=1)
    """Tokens a reply may take."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable_name(cls, value: str | None) -> str | None:
        return _variable_name(value)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.model is None) != (not self.base_url):
            raise ValueError("a judge of its own needs base_url and model; without both, the teacher judges")
        if self.model is None and self.api_key_env is not None:
            raise ValueError("api_key_env is for a judge of its own; give its base_url and model, or leave it out")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0: the replies would all be the same")
        return self


Sampling = Literal["local", "vllm", "endpoint"]
"""Who draws completions: a model in this process, a vLLM server that the stage starts, or servers that are there already."""


class ServedConfig(Section):
    """Where a model of the figure is served."""

    base_url: str | list[str] = Field(min_length=1)
    """Address of the server, ending in /v1; a list of them shares the work."""
    model: str = Field(min_length=1)
    """Name of the model on that server."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable_name(cls, value: str | None) -> str | None:
        return _variable_name(value)


class VllmConfig(Section):
    """A vLLM server of its own for each model a stage samples, on loopback, stopped when the stage ends."""

    python: Path | None = None
    """Interpreter of the environment that vLLM is installed in; null for the one that runs this program."""
    options: dict[str, Any] = {}
    """Arguments of vLLM's server, such as `{max_model_len: 8192, tensor_parallel_size: 2}`; they come after the stage's own."""
    environment: dict[str, str] = {}
    """Environment variables of that server, such as `{CUDA_VISIBLE_DEVICES: "1"}`."""
    start_timeout: float = Field(default=900.0, gt=0)
    """Seconds it may take to load the model."""

    @field_validator("options")
    @classmethod
    def _leaves_alone_what_is_set(cls, value: dict[str, Any]) -> dict[str, Any]:
        set_by_stage = {"model", "served_model_name", "host", "port", "enable_lora", "logprobs_mode"}
        if taken := sorted(name for name in value if name.strip("-").replace("-", "_") in set_by_stage):
            raise ValueError(f"{', '.join(taken)}: set by the stage itself; take it out")
        return value


class ServersConfig(Section):
    """Who answers where `reject.sampler`, `evaluate.sampler` or `grpo.rollout` is not `local`."""

    base: ServedConfig | None = None
    """Where the base is served; needed by a stage that samples it with `endpoint`."""
    sft: ServedConfig | None = None
    """Where the merged SFT model is served; GRPO's adapter is loaded beside the model it starts from."""
    rl: ServedConfig | None = None
    """Where the merged RL model is served; only `evaluate` asks it."""
    endpoint: EndpointConfig = EndpointConfig()
    """How servers are asked, `vllm` ones too; the keys are those of `synthesize.endpoint`."""
    vllm: VllmConfig = VllmConfig()
    """The servers that stages start by themselves."""

    @model_validator(mode="after")
    def _stops_on_budget(self) -> Self:
        if self.endpoint.on_budget == "finish":
            raise ValueError("endpoint.on_budget: finish is for synthesis; other stages need all their answers")
        return self


def _variable_name(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
        raise ValueError("must be the *name* of an environment variable, such as OPENAI_API_KEY, never the key itself")
    return value


def _without_local(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """What decides rows: that servers were asked, not which, and not even the key where the model was in this process."""
    rest = {name: value for name, value in tree.items() if name != key}
    return rest if tree[key] == "local" else {**rest, key: "served"}


class SynthesizeConfig(Section):
    """Chain-of-thought rows from a teacher, filtered by the scorer."""

    teacher: Literal["scripted", "endpoint"] = "scripted"
    """`scripted` reads the simulated world's own facts; `endpoint` asks an OpenAI-compatible server."""
    teacher_base_url: str | list[str] | None = None
    """Address of the server, for example http://localhost:8000/v1; a list of them shares the work."""
    teacher_model: str | None = None
    """Name of the model on that server."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    endpoint: EndpointConfig = EndpointConfig()
    """How the server is asked: `endpoint.concurrency`, retries, prices, a budget; the reference lists the keys."""
    teacher_grid: str = Field(default="per_mille", min_length=1)
    """How an endpoint teacher reads and writes boxes: per_mille (0-1000), unit (0-1), pixels (of the image as sent),
    per_mille_yxyx (0-1000, y first), or the folder of the model served (its config.json and preprocessor_config.json are
    enough): then as its family does, on images resized before they are sent."""
    teacher_max_pixels_total: int | None = Field(default=None, ge=1)
    """Pixels that the images of one request share, where teacher_grid is a model folder; null leaves the folder's own limit."""
    error_rate: float = Field(default=0.15, ge=0, le=1)
    """Share of the scripted teacher's answers that are wrong on purpose, so that the filter has work to do."""
    brief_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the scripted teacher's right answers that go straight to the conclusion, without listing what is seen."""
    aid: Literal["never", "failed", "always"] = "never"
    """Whether an endpoint teacher is shown the annotation and asked to reason as if it had not been: `never` (unaided),
    `failed` for the questions of which no unaided attempt is kept, `always`. Where the annotation names no image: never."""
    task_advice: dict[str, str] = {}
    """What an endpoint teacher is told to look for, by task, in place of the built-in texts; `*` is for tasks that have none."""
    samples_per_example: int = Field(default=1, ge=1)
    """Teacher attempts per example; the best one that passes is kept. With `aid: failed`, as many once more."""
    self_consistency: float | None = Field(default=None, gt=0, le=1)
    """Share of the unaided attempts, itself among them, that must come to the answer of the one that is kept (the same letter, or
    boxes that overlap by pass_iou); null asks for none. Needs more than one attempt."""
    judge: JudgeConfig | None = None
    """A model that marks what the filters leave: `judge.min_mark` and more, listed in the reference. `{}` lets the teacher judge
    itself; null for no judge."""
    temperature: float = Field(default=0.7, ge=0)
    """Of an endpoint teacher."""
    max_completion_length: int = Field(default=512, ge=1)
    """Tokens an endpoint teacher may spend."""
    pass_iou: float = Field(default=0.5, gt=0, le=1)
    """A row is kept when its answer overlaps the annotation at least this much."""
    min_words: int = Field(default=3, ge=0)
    """Shorter reasoning is dropped."""
    max_words: int = Field(default=400, ge=1)
    """Longer reasoning is dropped."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many examples; null uses all."""

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable_name(cls, value: str | None) -> str | None:
        return _variable_name(value)

    @field_validator("task_advice")
    @classmethod
    def _shows_no_image(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := next((task for task, text in value.items() if "<image>" in text), None):
            raise ValueError(f"the text of {wrong} holds <image>, which would be taken for the place of one; take it out")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}; no reasoning could be kept")
        if self.teacher == "endpoint" and not (self.teacher_base_url and self.teacher_model):
            raise ValueError("teacher: endpoint needs teacher_base_url and teacher_model")
        if self.teacher == "scripted" and (self.aid != "never" or self.task_advice):
            raise ValueError(
                "teacher: scripted knows the answer and reads no prompt; aid and task_advice are for teacher: endpoint"
            )
        if self.self_consistency is not None:
            self._can_be_compared()
        if self.judge is not None:
            self._has_a_judge(self.judge)
        if self.teacher == "scripted" and self.teacher_grid != "per_mille":
            raise ValueError(f"teacher: scripted writes per_mille; teacher_grid {self.teacher_grid} is for teacher: endpoint")
        return self

    def _can_be_compared(self) -> None:
        if self.samples_per_example < 2:
            raise ValueError("self_consistency compares attempts; set samples_per_example to 2 or more")
        if self.aid == "always":
            raise ValueError("self_consistency compares unaided attempts; with aid: always every one repeats the annotation")
        if self.teacher == "endpoint" and self.temperature == 0:
            raise ValueError("self_consistency needs a temperature above 0: the attempts would all be the same")

    def _has_a_judge(self, judge: JudgeConfig) -> None:
        if self.teacher == "scripted" and judge.model is None:
            raise ValueError("teacher: scripted cannot judge; give judge.base_url and judge.model")
        if judge.endpoint.on_budget == "finish" and self.endpoint.on_budget == "stop":
            raise ValueError("judge.endpoint.on_budget: finish needs endpoint.on_budget: finish, which decides for the stage")


class TrainingConfig(Section):
    """What supervised fine-tuning and GRPO share: optimiser, LoRA, logging, checkpoints."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """Peak learning rate of the LoRA weights."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimiser steps; -1 takes the length from the epochs."""
    per_device_train_batch_size: int = Field(default=4, ge=1)
    """Rows per device and forward (supervised fine-tuning), or groups per device and forward (GRPO)."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forwards per optimiser step."""
    use_peft: bool = True
    """Train a LoRA adapter; false trains all weights of the language model. Either way the vision tower is frozen."""
    lora_r: int = Field(default=64, ge=1)
    """Rank of the adapter; 64 is VLM-R1's LoRA recipe."""
    lora_alpha: int = Field(default=128, ge=1)
    """The adapter is scaled by lora_alpha / lora_r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 never clips."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay."""
    bf16: bool = False
    """Autocast to bfloat16 in the forward."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between log lines."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints: at most so many steps are repeated after a kill."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Older checkpoints are deleted; null keeps all."""
    report_to: list[str] = ["tensorboard"]
    """Loggers, by transformers' names, such as tensorboard, wandb, trackio, swanlab; an empty list for none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Processes that decode and preprocess images ahead of the step; 0 leaves that to the training process. Each holds up to two
    batches of pixels."""

    def deciding(self, *, processes: int = 1) -> dict[str, Any]:
        """What decides the weights: how they are logged, kept and fed may change when a run is taken up again.

        So may the number of processes, if an optimiser step stays as large: two count as one with twice the accumulation.
        """
        free = {"save_total_limit", "report_to", "report_groups", "dataloader_num_workers", "image_cache_mib"}
        decides = {name: value for name, value in self.to_json().items() if name not in free}
        return decides | {"gradient_accumulation_steps": self.gradient_accumulation_steps * processes}


class SftConfig(TrainingConfig):
    """Cold start: supervised fine-tuning with LoRA on the synthesised rows."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows; ignored where max_steps is set."""


class MergeConfig(Section):
    """Adapter into weights, with a parity check."""

    tolerance: float = Field(default=1e-3, gt=0)
    """Largest allowed difference between the log-probabilities of adapter and merged model (float32)."""


class RejectConfig(Section):
    """Rejection sampling: keep the questions whose pass rate lies strictly inside a band."""

    num_generations: int = Field(default=8, ge=2)
    """Completions per question. One alone has no rate."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled completions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampled completions; 1 keeps the whole distribution."""
    max_completion_length: int = Field(default=128, ge=1)
    """Tokens per completion."""
    min_pass_rate: float | None = Field(default=0.0, ge=0, lt=1)
    """Exclusive: 0 drops what never passes; null drops nothing."""
    max_pass_rate: float | None = Field(default=1.0, gt=0, le=1)
    """Exclusive: 1 drops what always passes; null drops nothing."""
    pass_iou: float = Field(default=0.5, gt=0, le=1)
    """A completion passes when its answer overlaps the annotation at least this much."""
    balance: bool = True
    """Cap every task at the same number of rows."""
    limit: int | None = Field(default=None, ge=1)
    """Sample only the first so many questions; null takes all."""
    batch: int = Field(default=8, ge=1)
    """Questions sampled together."""
    sampler: Sampling = "local"
    """Who samples: `local` loads the model here, `vllm` starts a server with it, `endpoint` asks the one named in `servers`."""

    def deciding(self) -> dict[str, Any]:
        """What decides the rows."""
        return _without_local(self.to_json(), "sampler")

    def keeps(self, rate: float) -> bool:
        """Whether a pass rate lies strictly between the bounds, where there are any."""
        above = self.min_pass_rate is None or rate > self.min_pass_rate
        return above and (self.max_pass_rate is None or rate < self.max_pass_rate)

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if self.min_pass_rate is not None and self.max_pass_rate is not None and self.min_pass_rate >= self.max_pass_rate:
            raise ValueError(f"min_pass_rate {self.min_pass_rate} must be below max_pass_rate {self.max_pass_rate}")
        return self


def _worth_something(rewards: list[RewardConfig]) -> list[RewardConfig]:
    if not any(reward.weight > 0 for reward in rewards):
        raise ValueError("needs at least one reward with a weight above 0")
    if repeated := sorted({reward.name for reward in rewards if sum(reward.is_like(other) for other in rewards) > 1}):
        raise ValueError(f"each reward may stand once with the same options; repeated: {', '.join(repeated)}")
    return rewards


PrefixAttention = Literal["auto", "shared", "mask"]

ImportanceSampling = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GrpoConfig(TrainingConfig):
    """Reinforcement learning from rule rewards, one group of completions per question."""

    start: Literal["sft", "base"] = "sft"
    """The model it starts from, which rejection sampling then samples too; `base` goes without a cold start."""
    rewards: list[RewardConfig] | None = None
    """What RL alone is rewarded for, where that is to differ from the recipe's one score; null for no difference."""
    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """Peak learning rate of the LoRA weights; 1e-5 is VLM-R1's LoRA recipe."""
    max_steps: int = Field(default=200, ge=-1)
    """Optimiser steps; -1 makes one pass over the questions."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 never clips."""
    num_generations: int = Field(default=8, ge=2)
    """Completions per question. A baseline needs at least two."""
    max_completion_length: int = Field(default=128, ge=1)
    """Tokens per completion; a longer one is cut and scored as it stands."""
    temperature: float = Field(default=0.9, gt=0)
    """Of the rollouts; log-probabilities are taken at this temperature too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the rollouts. Below 1 the log-probabilities are not those of the sampling distribution."""
    beta: float = Field(default=0.04, ge=0)
    """Weight of the divergence from the starting policy; 0 needs no reference forward."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """The importance ratio is kept above 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """The importance ratio is kept below 1 + epsilon_high; null uses epsilon."""
    scale_rewards: Literal["group", "none", "batch"] = "group"
    """What the centred rewards are divided by: the group's deviation, nothing, or the batch's."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """How token losses are averaged: per completion, per token of the batch, or by the constant token budget."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimiser passes over each set of rollouts."""
    difficulty_weighting: bool = False
    """Weigh a group's loss by how hard its question is (UniVG-R1)."""
    prefix_attention: PrefixAttention = "auto"
    """How completions attend to the prompt they share: `shared` never repeats its keys, `mask` lays a dense mask over the packed
    group; `auto` takes what is cheaper. The numbers are the same."""
    skip_zero_variance: bool = True
    """Leave out groups whose rewards all agree: they cost a forward and teach nothing."""
    image_cache_mib: int = Field(default=0, ge=0)
    """Host memory, per process, for image features kept from one pass over the questions to the next; 0 keeps none. A prompt
    found there (by the bytes of its images, its text and the pixel budget) is neither decoded nor given to the vision tower."""
    report_groups: int = Field(default=2, ge=0)
    """Groups of the first step and of each with a checkpoint that go to the loggers as pictures and tables; 0 for none."""
    rollout: Sampling = "local"
    """Who samples the policy: `local` the model in training, `vllm` a server that the stage starts, `endpoint` the one named in
    `servers`. To servers the policy travels as its LoRA adapter."""
    max_staleness: int = Field(default=0, ge=0)
    """Optimiser steps by which the adapter on a server may lag behind the policy when a step is sampled; 0 sends each."""
    vllm_importance_sampling_correction: bool = True
    """Weigh losses by how much likelier the policy makes what a server has sampled than the server said."""
    vllm_importance_sampling_mode: ImportanceSampling = "sequence_mask"
    """A token's weight is its own or its completion's (`sequence`), outside the bounds clipped (`truncate`) or 0 (`mask`)."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    """Upper bound of that weight; null for none."""
    vllm_importance_sampling_clip_min: float | None = Field(default=None, ge=0)
    """Lower bound of that weight; null for none."""

    def deciding(self, *, processes: int = 1) -> dict[str, Any]:
        """The keys that decide what is learnt: those of a served policy do not, where sampling is local."""
        decides = _without_local(super().deciding(processes=processes), "rollout")
        if self.rollout == "local":
            return {name: value for name, value in decides.items() if name != "max_staleness" and not name.startswith("vllm_")}
        return decides

    @property
    def steps_per_adapter(self) -> int:
        """Optimiser steps between two adapters that travel: whole sets of rollouts, as many as `max_staleness` allows."""
        return (self.max_staleness // self.num_iterations + 1) * self.num_iterations

    @field_validator("rewards")
    @classmethod
    def _are_worth_something(cls, value: list[RewardConfig] | None) -> list[RewardConfig] | None:
        return None if value is None else _worth_something(value)

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _reads_booleans(cls, value: object) -> object:
        # TRL also takes booleans here, and `null` is how one says "none" in YAML.
        if value is None or value is False:
            return "none"
        return "group" if value is True else value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(f"epsilon_high {self.epsilon_high} must not be below epsilon {self.epsilon}")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(f"vllm_importance_sampling_clip_min {low} must be below vllm_importance_sampling_clip_max {high}")
        if self.rollout != "local":
            if not self.use_peft:
                raise ValueError(
                    f"rollout: {self.rollout} needs use_peft: true; to servers the policy travels as its LoRA adapter"
                )
            if self.save_steps % self.steps_per_adapter:
                raise ValueError(
                    f"save_steps {self.save_steps} must be a multiple of {self.steps_per_adapter}, the steps one adapter is "
                    "sampled for (max_staleness, num_iterations): a run could not be resumed in between"
                )
        return self


class EvaluateConfig(Section):
    """Greedy answers of base, SFT and RL model on every evaluation split, with intervals."""

    max_completion_length: int = Field(default=128, ge=1)
    """Tokens per answer."""
    batch_size: int = Field(default=16, ge=1)
    """Questions answered together."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples behind each 95 % interval; 0 gives no intervals."""
    ious: tuple[float, ...] = (0.5, 0.7, 0.3)
    """Accuracy thresholds; the first is the headline."""
    limit_per_split: int | None = Field(default=None, ge=1)
    """Answer only the first so many questions of a split; null answers all."""
    instruction: Literal["recipe", "reasoned", "direct", "native"] = "recipe"
    """What follows a question: `recipe` for prompts.instruction, else a text of `prompt_texts/instructions.yaml` by its name."""
    circular: bool = False
    """Ask every multiple choice once per rotation of its choices; it is right only when all are right."""
    compat: str | None = None
    """Tell a peer's quirk beside the headline of the benchmarks that know it, such as `migician-stretch`."""
    models: list[Literal["base", "sft", "rl"]] | None = Field(default=None, min_length=1)
    """Which models answer, as far as they exist; null for all."""
    splits: list[str] | None = Field(default=None, min_length=1)
    """What is answered: names of splits, or of their groups (`test`, `ood`, `perception`); null for these three. Choices
    between settings are made on `[validation]`."""
    sampler: Sampling = "local"
    """Who answers: `local` loads each model here, `vllm` starts a server with it, `endpoint` asks those named in `servers`."""

    @field_validator("ious")
    @classmethod
    def _are_thresholds(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < iou <= 1 for iou in value):
            raise ValueError("needs at least one threshold, each above 0 and at most 1")
        return value


class ReportConfig(Section):
    """The one HTML page."""

    title: str = ""
    """Heading of the page; empty uses the recipe's name."""
    gallery_size: int = Field(default=24, ge=0)
    """Answers drawn in the gallery."""
    image_side: int = Field(default=224, ge=32, le=2048)
    """Longer side of a gallery image, in pixels."""


Verb = Literal["world", "synthesize", "sft", "merge", "reject", "grpo", "evaluate", "report"]


class Recipe(Section):
    """A whole run: what `polyground run RECIPE` does, and what each stage reads its section from."""

    name: str = Field(default="run", min_length=1)
    """Names the run in reports and logs."""
    out: Path = Path("runs/run")
    """Folder that holds one folder per stage; a relative path starts at the working directory."""
    seed: int = Field(default=0, ge=0)
    """The same seed gives the same rows."""
    stages: list[Verb] | None = Field(default=None, min_length=1)
    """What `run` does, in order; null for the whole figure."""
    reuse: list[Path] = []
    """Folders of other runs. A stage that one of them has finished under the very same configuration and inputs is taken over
    from there (by hard links, so that it costs neither time nor space) instead of being done again."""
    shard: str | None = Field(default=None, pattern=r"^\d{1,6}/\d{1,6}$")
    """Do only a part of `synthesize`, `reject` or `evaluate`: `0/4` is the first of four. The same verb without it then puts
    the parts together. null: under `torchrun` or `accelerate launch` each process does its part, else one process does all."""
    model: ModelConfig = ModelConfig()
    world: WorldConfig = WorldConfig()
    data: DataConfig = DataConfig()
    prompts: PromptConfig = PromptConfig()
    rewards: list[RewardConfig] = [
        RewardConfig(name="iou", weight=0.8),
        RewardConfig(name="image", weight=0.1),
        RewardConfig(name="format", weight=0.1),
    ]
    """Parts of the one score, used by synthesis, rejection sampling, GRPO and evaluation."""
    synthesize: SynthesizeConfig = SynthesizeConfig()
    sft: SftConfig = SftConfig()
    merge: MergeConfig = MergeConfig()
    reject: RejectConfig = RejectConfig()
    grpo: GrpoConfig = GrpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    servers: ServersConfig = ServersConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("rewards")
    @classmethod
    def _are_worth_something(cls, value: list[RewardConfig]) -> list[RewardConfig]:
        return _worth_something(value)

    @field_validator("shard")
    @classmethod
    def _is_one_of_them(cls, value: str | None) -> str | None:
        if value is not None and not int(value.partition("/")[0]) < int(value.partition("/")[2]):
            raise ValueError("parts are counted from 0: the last of four is 3/4")
        return value

    @model_validator(mode="after")
    def _has_servers(self) -> Self:
        start = self.grpo.start
        asked: dict[str, Sequence[str]] = {
            "reject.sampler": [start] if self.reject.sampler == "endpoint" else [],
            "grpo.rollout": [start] if self.grpo.rollout == "endpoint" else [],
            "evaluate.sampler": (self.evaluate.models or []) if self.evaluate.sampler == "endpoint" else [],
        }
        for key, roles in asked.items():
            for role in roles:
                if getattr(self.servers, role) is None:
                    raise ValueError(f"{key}: endpoint asks the {role} model; say in servers.{role} where it is served")
        return self


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, section: str | None = None) -> Recipe:
    """The recipe of a YAML file with overrides from the command line applied.

    An override is `--sft.learning_rate 1e-4`, `--sft.learning_rate=1e-4`, or `--learning_rate 1e-4`; `key=value` needs
    no dashes. A bare key is looked up in the recipe first, then in `section` (the verb). Values are YAML. Raises ConfigError.
    """
    path = Path(path)
    tree = read_yaml(path)
    if "arms" in tree:
        raise ConfigError(f"{path}: is a study of several runs, not a recipe; run `polyground results {path}`")
    overridden: dict[tuple[str | int, ...], str] = {}
    for key, value in _split_overrides(overrides):
        where = _resolve(key, section)
        _place(tree, where, _yaml_value(key, value), key)
        overridden[where] = key
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, path, Recipe, overridden)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back to an equal one."""
    return yaml.dump(recipe.to_json(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def show_recipe(recipe: Recipe) -> str:
    """As `dump_recipe`, to be shown to others: addresses without user, password and query, where keys may stand."""
    return re.sub(r"(https?://)(?:[^/\s'\"@]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?", r"\1\2", dump_recipe(recipe))


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a word, no list and no mapping", key_node.start_mark
                )
            if key_node.value in seen and key_node.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would take for a number."""


# PyYAML follows YAML 1.1, in which a float needs a dot: without this, 1e-4 would be a string.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one. Raises ConfigError, with `what` for what it should hold."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such {what}{_near(path)}; the ones that come with the project are in recipes/") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file you may read") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # Something like a date that no calendar has is a ValueError.
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend the file there") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of sections; this file holds a {type(tree).__name__}")
    return tree


def _near(path: Path) -> str:
    """A YAML file beside it of nearly this name, where there is one."""
    names = [other.name for other in path.parent.glob("*.y*ml")]
    found = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / found[0]}?)" if found else ""


def _split_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not key or not (equals or word.startswith("--")):
            raise ConfigError(f"{word!r} is not an override; write --section.key value")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE or --{key}=VALUE")
            value = following
        yield key.replace("-", "_"), value


def _yaml_value(key: str, value: str) -> Any:
    try:
        return yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--{key}: {value!r} is not a YAML value; quote it, as in --{key} \"'text'\"") from error


def _resolve(key: str, section: str | None) -> tuple[str | int, ...]:
    """The full path of an override's key."""
    parts: tuple[str | int, ...] = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    if parts[0] in Recipe.model_fields:
        return parts
    known = _section_fields(section)
    if section is not None and parts[0] in known:
        return (section, *parts)
    candidates = [*Recipe.model_fields, *known, *_dotted_keys()]
    raise ConfigError(f"--{key}: no such key{_nearest(key, candidates)}; `polyground VERB --help` lists the keys of a section")


def _section_fields(section: str | None) -> list[str]:
    field = Recipe.model_fields.get(section or "")
    annotation = field.annotation if field else None
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _dotted_keys() -> list[str]:
    return [f"{section}.{key}" for section in Recipe.model_fields for key in _section_fields(section)]


def _nearest(key: str, candidates: Sequence[str]) -> str:
    """`; did you mean …` or nothing. A right key without its section is recognised too."""
    leaf = key.rpartition(".")[2]
    same_leaf = [c for c in candidates if c.rpartition(".")[2] == leaf]
    found = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6) if not same_leaf else same_leaf[:2]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _place(tree: dict[str, Any], where: tuple[str | int, ...], value: Any, key: str) -> None:
    """Set one value in the raw recipe, making the mappings on the way."""
    here: Any = tree
    if where[0] == "rewards" and len(where) > 1 and tree.get("rewards") is None:
        tree["rewards"] = [reward.to_json() for reward in Recipe().rewards]
    for position, part in enumerate(where):
        last = position == len(where) - 1
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise ConfigError(
                    f"--{key}: the list there has {len(here)} entries; write its position, counted from 0, instead of {part!r}"
                )
        elif not isinstance(here, dict):
            parent = ".".join(map(str, where[:position]))
            raise ConfigError(f"--{key}: {parent} is a single value ({here!r}) and has no key {part!r}; set --{parent} itself")
        if last:
            here[part] = value
        else:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[part]


def explain(
    error: ValidationError,
    path: Path,
    section: type[Section],
    overridden: Mapping[tuple[str | int, ...], str] = MappingProxyType({}),
) -> str:
    """One line per mistake in a file that was to hold this section: place, key, value, remedy."""
    what = section.__name__.lower()
    lines = []
    for problem in error.errors(include_url=False):
        where = problem["loc"]
        origin = next((f"--{key}" for place, key in overridden.items() if place[: len(where)] == where[: len(place)]), str(path))
        dotted = ".".join(map(str, where)) or what
        if problem["type"] == "extra_forbidden":
            siblings = _fields_at(section, where[:-1])
            parent = ".".join(map(str, where[:-1])) or f"a {what}"
            nearby = [".".join(map(str, (*where[:-1], sibling))) for sibling in siblings]
            hint = _nearest(dotted, nearby) or _nearest(str(where[-1]), _dotted_keys() if section is Recipe else [])
            lines.append(f"{origin}: {dotted} is not a known key{hint or f'; {parent} knows ' + ', '.join(siblings)}")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:] if message[1:2].islower() else message
        # The field may hold a real secret by mistake; a whole section as the value helps nobody.
        value = "" if where[-1:] == ("api_key_env",) or isinstance(problem["input"], dict | Section) else _value(problem["input"])
        lines.append(f"{origin}: {dotted}{value}: {message}; correct this value")
    return "\n".join(lines)


def _value(value: object) -> str:
    text = repr(value)
    return f" = {text if len(text) <= 80 else text[:77] + '...'}"


def _fields_at(section: type[Section], where: Sequence[str | int]) -> list[str]:
    """Known keys of the section at a path of another."""
    model: type[BaseModel] = section
    for part in where:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _inner_section(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, tuple, Union, UnionType):
        return next((found for a in get_args(annotation) if (found := _inner_section(a))), None)
    return None
