"""What both LoRA trainers share: the adapter, the `TrainingArguments`, logs on disk, and resuming at the exact step."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from polyground.config import TrainingConfig
from polyground.errors import ConfigError, DataError, PolygroundError, StorageError
from polyground.models import Family
from polyground.models.lora import compute_in_one_piece
from polyground.models.saving import saving
from polyground.models.shared_prefix import SHARED_PREFIX
from polyground.storage import RowWriter, atomic_write_json, atomic_write_text, read_json, read_rows
from polyground.training.view import View

logger = logging.getLogger("polyground")

SEAL = "whole.json"
"""In a checkpoint: SHA-256 of each of its files, and how long the rows of its steps are."""

LOG = "log.jsonl"
"""One row per log line of the trainer: `step` and what was measured since the one before."""

WARNINGS = "warnings.jsonl"
"""One row per warning of a run that was watched: `step`, `kind`, `text`. Empty where nothing was found."""

ADAPTER, MODEL = "adapter", "model"
"""Where a stage's folder holds what was learnt: a LoRA adapter, or the whole model (`use_peft: false`)."""


def prepare_model(model: Any, family: Family, config: TrainingConfig, *, seed: int) -> Any:
    """The model with what is to be trained switched on: a fresh adapter, or the language model's own weights."""
    if config.use_peft:
        return add_adapter(model, family, config, seed=seed)
    set_seed(seed)
    model.requires_grad_(True)
    family.freeze_vision(model)
    return model


def add_adapter(model: Any, family: Family, config: TrainingConfig, *, seed: int) -> PeftModel:
    """A fresh LoRA adapter on the language model's linear layers; with it disabled, the model is what it was."""
    set_seed(seed)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=family.lora_targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    compute_in_one_piece(adapted)
    if config.gradient_checkpointing:
        # Hooks the text embedding only: hooking every input would send gradients through the frozen vision tower.
        family.embedding(adapted).register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    return adapted


def require_packable(model: Any) -> None:
    """Refuse attention functions that misread a packed group. `eager` adds a bool mask as numbers, silently wrong."""
    found = model.config.get_text_config()._attn_implementation
    if found not in ("sdpa", SHARED_PREFIX):
        raise ConfigError(f"grpo: attention {found!r} cannot train packed groups; load the model with models.load_model")


def training_arguments(config: TrainingConfig, out: Path, *, seed: int, max_steps: int, use_cpu: bool) -> TrainingArguments:
    """The recipe's knobs in transformers' words."""
    require_loggers(config.report_to)
    recompute: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(out),
        seed=seed,
        data_seed=seed,
        max_steps=max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=math.ceil(config.warmup_ratio * max_steps),
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        bf16=config.bf16,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        # `Seal` deletes the older ones. transformers would before the new one is sealed, and goes by their dates.
        save_total_limit=None,
        report_to=list(config.report_to) or "none",
        use_cpu=use_cpu,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_num_workers=config.dataloader_num_workers,
        # Workers are not kept from one pass to the next: the random numbers drawn would differ from those of a resumed run.
        # Nothing changes a model's buffers; and processes may differ in how many forwards a step takes.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        **(recompute if config.gradient_checkpointing else {}),
    )


def require_loggers(names: Sequence[str]) -> None:
    """Refuse a logger that transformers does not know, or that is not installed, before anything is trained."""
    if list(names) in (["all"], ["none"]):
        return
    try:
        get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise ConfigError(f"report_to: {error} An empty list logs to files only.") from error
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        raise ConfigError(
            f"report_to: {', '.join(missing)} cannot be imported; run `pip install {' '.join(missing)}`, or take it out of "
            "report_to (an empty list logs to files only)"
        )


class LogRows(TrainerCallback):
    """Writes every log line of the trainer to a JSON Lines file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with RowWriter(self._path) as rows:
                rows.append({"step": state.global_step, **{key: value for key, value in logs.items() if key != "step"}})


def raising(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, up to one that is an error: a worker process that raised it would change its type and bury its words."""
    for batch in batches:
        if isinstance(batch, PolygroundError):
            raise batch
        yield batch


class Seal(TrainerCallback):
    """Writes into every checkpoint, last of all, what its files hash to; only then deletes those before the newest `limit`."""

    def __init__(self, wait: Callable[[], None], rows: Sequence[str], *, limit: int | None) -> None:
        self._wait = wait
        self._rows = rows
        self._limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._wait()  # other processes write files of their own
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            # The rows of its steps are not made again: a file that lost some of them fits an earlier checkpoint only.
            files = {f"../{name}": checkpoint.parent / name for name in self._rows}
            lengths = {name: f"{path.stat().st_size} bytes" for name, path in files.items() if path.is_file()}
            atomic_write_json(checkpoint / SEAL, {**_digests(checkpoint), **lengths})
            for old in _newest_first(checkpoint.parent)[self._limit :] if self._limit else ():
                shutil.rmtree(old, ignore_errors=True)  # the next save tries again


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps: no clock is asked."""
    return sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True)


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file but the seal, by its path in the checkpoint."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                found[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still as it was; any other is passed over."""
    return next((path for path in _newest_first(folder) if _is_as_sealed(path)), None)


def _is_as_sealed(checkpoint: Path) -> bool:
    """Whether every file still has its hash. Without a seal nobody knows: the process was killed before it, whatever is there."""
    if not (checkpoint / SEAL).is_file():
        return False
    try:
        sealed = read_json(checkpoint / SEAL)
    except DataError:
        sealed = None
    sealed = sealed if isinstance(sealed, dict) else {SEAL: ""}
    found = _digests(checkpoint)
    damaged = [name for name, told in sealed.items() if not _fits(checkpoint, name, str(told), found)]
    if damaged:
        logger.warning("%s: passed over, %s is damaged; it is made again from the one before", checkpoint, ", ".join(damaged[:3]))
    return not damaged


def _fits(checkpoint: Path, name: str, told: str, digests: Mapping[str, str]) -> bool:
    """Whether a file has its hash; a file of rows beside the checkpoint has grown since, and must only not be shorter."""
    if not name.startswith("../"):
        return digests.get(name) == told
    rows, length = checkpoint.parent / name.removeprefix("../"), told.partition(" ")[0]
    return rows.is_file() and length.isdigit() and rows.stat().st_size >= int(length)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that the folder's name says; -1 where it says none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add many rows with one wait for the disk; a torn end is cut by `cut_rows` on resuming."""
    try:
        with path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); make room there and run the same command again"
        ) from error


def cut_rows(path: Path, *, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the rows of steps that are about to be done again."""
    if not path.exists():
        return
    RowWriter(path).close()  # cuts a torn last line
    rows = list(read_rows(path))
    kept = [row for row in rows if keep(row)]
    if len(kept) < len(rows):
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def train(trainer: Trainer, out: Path, *, save_total_limit: int | None, by_step: tuple[str, ...] = ()) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint under `out` if there is one, and save what was learnt.

    The newest `save_total_limit` checkpoints are kept, all where it is None. `by_step` names further files of rows that carry
    the step (0-based) they were made in. Returns steps and loss.
    """
    checkpoint = last_checkpoint(out)
    trainer.accelerator.wait_for_everyone()  # what is removed below, others may be reading
    done = checkpoint_step(checkpoint) if checkpoint else 0
    total = trainer.args.max_steps
    if done > total:
        raise StorageError(f"{checkpoint}: holds {done} steps, more than max_steps {total}; raise max_steps or delete {out}")
    if trainer.is_world_process_zero():
        cut_rows(out / LOG, keep=lambda row: row["step"] <= done)
        for name in by_step:
            cut_rows(out / name, keep=lambda row: row["step"] < done)
        for stale in out.glob("checkpoint-*"):
            # Damaged or half-written: its steps are done again, and written over it file by file it would be neither.
            if checkpoint_step(stale) > done:
                shutil.rmtree(stale)
    trainer.add_callback(LogRows(out / LOG))
    trainer.add_callback(Seal(trainer.accelerator.wait_for_everyone, (LOG, *by_step), limit=save_total_limit))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    view = View(out.name, log=out / LOG, warnings=out / WARNINGS)
    trainer.add_callback(view)
    if done == total:
        logger.warning("%s: 0 steps left (all %d are in %s); only what was learnt is saved again", out, total, checkpoint)
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        if checkpoint:
            passes = read_json(checkpoint / "trainer_state.json").get("epoch") or 0.5
            where = f", which ended pass {passes:.0f} over the data" if abs(passes - round(passes)) < 1e-6 else ""
            logger.warning("%s: resuming after step %d of %d%s", out, done, total, where)
        try:
            with saving(out):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            view.close()
    if trainer.is_fsdp_enabled:
        # Whatever checkpoints are: what was learnt is not left in pieces.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    learnt = out / (ADAPTER if isinstance(trainer.model, PeftModel) else MODEL)
    with saving(learnt):
        trainer.save_model(str(learnt))
    if trainer.is_world_process_zero():
        # A pickle that nobody reads: what is kept of a training is safetensors and JSON.
        (learnt / "training_args.bin").unlink(missing_ok=True)
    history = [row for row in read_rows(out / LOG) if "loss" in row] if (out / LOG).exists() else []
    return {"steps": total, "loss": history[-1]["loss"] if history else None}
