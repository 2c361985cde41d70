"""An adapter merged into its base model, written as a folder of its own and checked against the adapter it came from.

The folder appears only when it is complete and right: it is written aside, opened again, compared and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyground.config import Recipe
from polyground.errors import ModelError, StorageError
from polyground.models import Loaded, load_model, model_folder, save_processor_files
from polyground.models.saving import saving
from polyground.records import Message
from polyground.stages import adopt, model_identity, model_path, require, start_folders, upstream
from polyground.storage import MANIFEST, RunFolder, sole

ORIGIN = "merged_from.json"
"""Written into the merged folder: where it came from, the adapter's configuration and the parity check."""

_QUESTION = 'Which image shows the red star? <think>Image 2.</think><answer>[{"image": 2, "bbox_2d": [100, 200, 500, 750]}]'


ADAPTERS = {"sft": "sft-merged", "grpo": "grpo-merged"}
"""By training stage: the folder that the merged model goes to."""


def run(recipe: Recipe) -> dict[str, Any]:
    """Merge each adapter there is into the model it was trained on; raises StorageError when there is none yet."""
    there = [stage for stage in ADAPTERS if (recipe.out / stage / MANIFEST).is_file()]
    if recipe.grpo.start == "sft" or not there:
        require(recipe, "sft" if recipe.grpo.start == "sft" else "grpo")
    return {ADAPTERS[stage]: _merge_stage(recipe, stage, out=recipe.out / ADAPTERS[stage]) for stage in there}


def _merge_stage(recipe: Recipe, stage: str, *, out: Path) -> dict[str, Any]:
    role = recipe.grpo.start if stage == "grpo" else "base"
    inputs = upstream(recipe, stage, *(start_folders(recipe) if stage == "grpo" else ()))
    identity = {"merge": recipe.merge.to_json(), "model": model_identity(recipe), "inputs": inputs}
    adopt(recipe, out.name, "merge", identity)
    if not (out / MANIFEST).is_file():
        base, trained = model_path(recipe, role), recipe.out / stage
        with sole(out, "merge"):
            if (trained / "model").is_dir():
                summary = copy_model(base, trained / "model", out)
            else:
                made = merge_adapter(base, trained / "adapter", out, tolerance=recipe.merge.tolerance, dtype=recipe.model.dtype)
                summary = {name: made[name] for name in ("base", "adapter", "dtype", "tolerance", "max_logprob_difference")}
            with RunFolder(out, "merge", identity) as folder:
                folder.finish(summary)
    with RunFolder(out, "merge", identity) as folder:
        return dict(folder.summary)


def merge_adapter(
    base_path: str | Path, adapter_path: str | Path, out: str | Path, *, tolerance: float = 1e-3, dtype: str = "float32"
) -> dict[str, Any]:
    """Merge and return what `merged_from.json` says; a complete folder of the same base and adapter is left as it is.

    `tolerance` bounds the difference of any log-probability between the base with its adapter and the merged folder.
    `dtype` is what the weights are merged and stored in; `auto` keeps the base's own.
    """
    adapter, out = Path(adapter_path), Path(out)
    origin = _origin(base_path, adapter, dtype)
    if out.exists():
        return _finished(out, origin)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    with saving(partial):
        partial.mkdir(parents=True)

    loaded = load_model(base_path, dtype=dtype, adapter=adapter)
    expected = _logprobs(loaded)
    with saving(partial):
        loaded.model.merge_and_unload(safe_merge=True).save_pretrained(partial, safe_serialization=True)
        save_processor_files(base_path, partial)
    del loaded

    difference = float((_logprobs(load_model(partial, dtype=dtype)) - expected).abs().max())
    if not difference <= tolerance:
        shutil.rmtree(partial)
        raise ModelError(
            f"{out}: merging changed a log-probability by {difference:.2g}, more than merge.tolerance {tolerance:.2g}; "
            "merge in float32 or raise the tolerance"
        )
    summary = {**origin, "tolerance": tolerance, "max_logprob_difference": difference}
    with saving(partial):
        (partial / ORIGIN).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    return summary


def copy_model(base_path: str | Path, trained: Path, out: Path) -> dict[str, Any]:
    """A model trained as a whole, with the processor files of the model it started from; there is nothing to merge."""
    origin = {"base": str(base_path), "model": str(trained), "model_sha256": _sha256(*sorted(trained.glob("*.safetensors")))}
    if out.exists():
        return _finished(out, origin, ("model_sha256",))
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    with saving(partial):
        shutil.copytree(trained, partial, ignore=shutil.ignore_patterns("*.bin"))
        save_processor_files(base_path, partial)
        load_model(partial)  # refuses what cannot be used
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    return origin


def _origin(base_path: str | Path, adapter: Path, dtype: str) -> dict[str, Any]:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise ModelError(f"{adapter}: no {file.name}; give the folder of a peft adapter saved with safetensors")
    return {
        "base": str(base_path),
        "base_sha256": _sha256(*sorted(model_folder(base_path).glob("*.safetensors"))),
        "adapter": str(adapter),
        "adapter_sha256": _sha256(weights),
        "adapter_config": json.loads(config.read_text(encoding="utf-8")),
        "dtype": dtype,
    }


def _finished(
    out: Path, origin: dict[str, Any], names: tuple[str, ...] = ("base_sha256", "adapter_sha256", "dtype")
) -> dict[str, Any]:
    remedy = "remove the folder or give another `out`"
    try:
        summary = json.loads((out / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{out}: exists but is not a merged model ({error}); {remedy}") from error
    # Contents, not paths: a moved run is the same run.
    for name in names:
        if summary.get(name) != origin[name]:
            raise StorageError(f"{out}: was merged from another {name.removesuffix('_sha256')}; {remedy}")
    return dict(summary)


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def _logprobs(loaded: Loaded) -> Tensor:
    """[T, V] of a prompt with two images."""
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(folder) / f"{colour}.png" for colour in ("white", "red")]
        for image in images:
            Image.new("RGB", (112, 112), image.stem).save(image)
        prompt = loaded.family.encode([Message("user", ("Image 1: ", images[0], "\nImage 2: ", images[1], "\n", _QUESTION))])
    output = loaded.family.forward(
        loaded.model,
        input_ids=prompt.input_ids[None],
        position_ids=prompt.position_ids[:, None],
        features=[loaded.family.encode_images(loaded.model, prompt)],
    )
    return torch.as_tensor(output.logits[0]).float().log_softmax(-1)
