"""What this machine has and lacks: libraries, GPU, memory, disk; with a recipe, what that recipe needs of them.

Starts without torch, and says what to install. What is missing and needed makes the exit code 2; all else is only told.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyground import __version__
from polyground.config import Recipe, load_recipe
from polyground.errors import PolygroundError, StorageError
from polyground.extras import BASE, EXTRAS, Extra, install_command
from polyground.memory import Prompts, grpo_memory, many, model_size, readable, sft_memory
from polyground.stages import PLACEHOLDER, own_splits

OLDEST_PYTHON = (3, 11)
LITTLE_DISK = 20 * 2**30
"""Less free space is worth a word: merged models, checkpoints and rollouts of a 7B run need more."""

_ASSUMED = Prompts(tokens=3000, image_tokens=2800)
"""Where no data is looked at: four images of 700 tokens; `polyground validate` measures."""
_VERSION = re.compile(r"\d+")


class SickError(PolygroundError):
    """Something needed is missing or broken; the message is the whole examination."""

    page = "how-to.md#install"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination."""

    part: str
    state: str
    """`ok`, `note` (works, but) or `missing`."""
    text: str
    remedy: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="look at what this recipe needs: extras, model, data, memory, disk")
    parser.add_argument(
        "--light", action="store_true", help="training is not planned here: convert, validate, score and served models only"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what is found to this file too")


def run(options: argparse.Namespace) -> str:
    """Look, and say what was found. Raises SickError, with the whole text, when something needed is missing."""
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    needed = ["train"] if recipe is None and not options.light else [] if recipe is None else sorted(_needed_extras(recipe))
    device = _Device()
    findings = [*_python(), *_base(), *_extras(needed), *_torchvision(), *_gpu(device, needed), *_machine()]
    if recipe is not None:
        findings += [*_recipe_files(recipe), *_recipe_memory(recipe, device)]
    findings += _disk(Path.cwd() if recipe is None else recipe.out)
    if options.json is not None:
        _write_json(options.json, findings)
    text = _report(findings)
    if any(finding.state == "missing" for finding in findings):
        raise SickError(text)
    return text


def _report(findings: Sequence[Finding]) -> str:
    marks = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}
    width = max(len(finding.part) for finding in findings)
    lines = [f"this machine, as polyground {__version__} finds it", ""]
    for finding in findings:
        lines.append(f"  {marks[finding.state]}  {finding.part:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"  {'':<7}  {'':<{width}}  -> {finding.remedy}")
    missing = sum(finding.state == "missing" for finding in findings)
    end = "nothing needed is missing" if not missing else f"{missing} things are missing; the arrows say what to do"
    return "\n".join([*lines, "", end if missing != 1 else "one thing is missing; its arrow says what to do"])


def _write_json(path: Path, findings: Sequence[Finding]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another --json") from error


# ---------------------------------------------------------------- libraries


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("python", "missing", f"{version}, older than {wanted}", f"install Python {wanted} or later")
    else:
        yield Finding("python", "ok", f"{version} ({platform.system()} {platform.machine()}), {sys.prefix}")


def _base() -> Iterator[Finding]:
    wrong = [problem for name, least in BASE.libraries.items() if (problem := _problem(BASE, name, least))]
    if wrong:
        yield Finding("base", "missing", "; ".join(wrong), install_command())
    else:
        yield Finding("base", "ok", ", ".join(f"{name} {_version(name)}" for name in BASE.libraries))


def _extras(needed: Sequence[str]) -> Iterator[Finding]:
    for name, extra in EXTRAS.items():
        wrong = [problem for library, least in extra.libraries.items() if (problem := _problem(extra, library, least))]
        if not wrong:
            shown = ", ".join(f"{library} {_version(library)}" for library in extra.libraries)
            yield Finding(name, "ok", shown)
        elif name in needed:
            yield Finding(name, "missing", f"needed for {extra.about}: {'; '.join(wrong)}", install_command(name))
        else:
            yield Finding(name, "note", f"not needed unless for {extra.about}: {'; '.join(wrong)}", install_command(name))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _problem(extra: Extra, distribution: str, least: str) -> str | None:
    """Why a library will not do; None where it will. It is not imported: that would take torch's seconds."""
    version = _version(distribution)
    if version is None or find_spec(extra.module(distribution)) is None:
        return f"{distribution} is not installed"
    return f"{distribution} {version} is older than {least}" if is_older(version, least) else None


def is_older(version: str, least: str) -> bool:
    """Whether a version comes before another, by the numbers before any letter.

    >>> is_older("5.9.0", "5.18"), is_older("2.13.0+cpu", "2.6"), is_older("10", "10.0")
    (True, False, False)
    """
    found, wanted = (tuple(map(int, _VERSION.findall(re.split(r"[a-z+]", text)[0]))) for text in (version, least))
    length = max(len(found), len(wanted))
    return found + (0,) * (length - len(found)) < wanted + (0,) * (length - len(wanted))


def _torchvision() -> Iterator[Finding]:
    """It is not needed, but where it is installed and broken, transformers breaks with it."""
    if _version("torchvision") is None:
        yield Finding("torchvision", "ok", "not installed, and not needed: images are resized without it, to the same pixels")
        return
    if _version("torch") is None:
        yield Finding("torchvision", "note", "installed without torch", "pip uninstall torchvision")
        return
    error = _import_error("torchvision")
    if error is None:
        yield Finding("torchvision", "ok", f"{_version('torchvision')}, loads beside torch {_version('torch')}")
    else:
        yield Finding(
            "torchvision",
            "missing",
            f"{_version('torchvision')} does not load beside torch {_version('torch')} ({error}), and transformers fails with it",
            "pip uninstall torchvision (it is not needed), or install the build that goes with this torch",
        )


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported; broken builds raise more than ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


# ---------------------------------------------------------------- the machine


class _Device:
    """What torch sees, asked for once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.memory: list[int] = []
        """Bytes of each GPU."""
        self.error: str | None = None
        self.cuda: str | None = None
        """The CUDA version torch was built for."""
        self.bfloat16 = False
        self.loaded = False
        if _version("torch") is None:
            return
        self.error = _import_error("torch")
        if self.error is None:
            self._ask()

    def _ask(self) -> None:
        import torch

        self.loaded = True
        self.cuda = torch.version.cuda or getattr(torch.version, "hip", None)
        with warnings.catch_warnings():
            # A driver that is too old is told by a warning; `is_available` is then false.
            warnings.simplefilter("ignore")
            if not torch.cuda.is_available():
                return
            for number in range(torch.cuda.device_count()):
                found = torch.cuda.get_device_properties(number)
                self.names.append(found.name)
                self.memory.append(int(found.total_memory))
            self.bfloat16 = bool(torch.cuda.is_bf16_supported())


def _gpu(device: _Device, needed: Sequence[str]) -> Iterator[Finding]:
    if device.error is not None:
        state = "missing" if "train" in needed else "note"
        yield Finding(
            "torch", state, f"installed, but does not load ({device.error})", f"install it anew: {install_command('train')}"
        )
        return
    card = _nvidia_card()
    if device.names:
        listed = ", ".join(f"{name} {readable(size)}" for name, size in zip(device.names, device.memory, strict=True))
        yield Finding("gpu", "ok", f"{listed}; torch is built for CUDA {device.cuda}")
        if not device.bfloat16:
            yield Finding("gpu", "note", "no bfloat16 in hardware", "set bf16: false and dtype: float32 in the recipe")
    elif card and device.loaded:
        why = "is built without CUDA" if device.cuda is None else f"is built for CUDA {device.cuda} and does not see it"
        yield Finding(
            "gpu",
            "note",
            f"{card}, but this torch {why}",
            "install the torch build for your driver (`nvidia-smi` tells its CUDA version; pytorch.org lists the builds)",
        )
    else:
        there = card or "none"
        yield Finding("gpu", "note", f"{there}: fine for the tiny model, for data, for scoring, and for models on servers")


def _nvidia_card() -> str:
    """What the driver calls the first card, whatever torch says; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        query = [program, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip().splitlines()[0].strip() if found.returncode == 0 and found.stdout.strip() else ""


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, free = memory_of_host()
    shown = "not known" if total is None else readable(total) + ("" if free is None else f", {readable(free)} of it free")
    yield Finding("cpu", "ok", f"{cores} core{'' if cores == 1 else 's'} that may be used; memory {shown}")


def memory_of_host(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """(all, free) bytes of memory: the host's, or a container's limit where that is less. None where it cannot be told."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, None
    rows = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, free = rows.get("MemTotal"), rows.get("MemAvailable")
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            allowed = int((root / limit).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if total is not None and allowed < total:
            total, free = allowed, None if free is None else min(free, allowed)
    return total, free


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield Finding("disk", "missing", f"{there} cannot be written to", "choose another `out`, or another folder to work in")
    elif free < LITTLE_DISK:
        yield Finding("disk", "note", f"{readable(free)} free at {there}: enough for the tiny model, little for a real one")
    else:
        yield Finding("disk", "ok", f"{readable(free)} free at {there}")


# ---------------------------------------------------------------- what a recipe needs


def _needed_extras(recipe: Recipe) -> set[str]:
    needed = {"train"}
    served = (recipe.reject.sampler, recipe.evaluate.sampler, recipe.grpo.rollout)
    if recipe.synthesize.teacher == "endpoint" or recipe.synthesize.judge is not None or any(name != "local" for name in served):
        needed.add("serve")
    if any(file.source in ("mc_bench", "odinw") for files in own_splits(recipe).values() for file in files):
        needed.add("eval")
    return needed


def _recipe_files(recipe: Recipe) -> Iterator[Finding]:
    path = recipe.model.path
    if path != "tiny" and not (Path(path) / "config.json").is_file():
        yield Finding("model", "missing", f"{path} is no model folder", "download the model there, or change model.path")
    else:
        size = model_size(path)
        yield Finding("model", "ok", f"{path}: {size.model_type}, {many(size.parameters)} parameters")
    gone = [f"data.{split} {file.path}" for split, files in own_splits(recipe).items() for file in files if _is_gone(file.path)]
    if gone:
        yield Finding(
            "data", "missing", f"not there: {', '.join(gone[:5])}{' …' if len(gone) > 5 else ''}", "change the paths in `data`"
        )
    elif own_splits(recipe):
        yield Finding("data", "ok", "every annotation file is there; `polyground validate` reads them")
    for role, variable in _keys(recipe).items():
        if variable not in os.environ:
            yield Finding("key", "missing", f"the environment variable {variable} ({role}) is not set", f"export {variable}=…")
    if (recipe.synthesize.teacher_base_url or "") == PLACEHOLDER:
        yield Finding("teacher", "missing", "its address is a placeholder", "set synthesize.teacher_base_url and teacher_model")


def _is_gone(path: Path) -> bool:
    return not str(path).startswith("hub:") and not path.exists()


def _keys(recipe: Recipe) -> Mapping[str, str]:
    """Names of the environment variables that hold keys, by who is asked; their values are not looked at."""
    judge = recipe.synthesize.judge
    named = {
        "synthesize.api_key_env": recipe.synthesize.api_key_env if recipe.synthesize.teacher == "endpoint" else None,
        "synthesize.judge.api_key_env": None if judge is None else judge.api_key_env,
    }
    for role in ("base", "sft", "rl"):
        served = getattr(recipe.servers, role)
        named[f"servers.{role}.api_key_env"] = None if served is None else served.api_key_env
    return {role: variable for role, variable in named.items() if variable is not None}


def _recipe_memory(recipe: Recipe, device: _Device) -> Iterator[Finding]:
    """Whether training fits the smallest GPU, or without one the host's memory, for prompts of a usual length."""
    try:
        size = model_size(recipe.model.path)
    except PolygroundError:
        return  # told already
    dtype = recipe.model.dtype
    prompts = Prompts(tokens=500, image_tokens=400) if recipe.model.path == "tiny" else _ASSUMED
    estimates: dict[str, Callable[[], Any]] = {
        "SFT": lambda: sft_memory(size, recipe.sft, dtype=dtype, prompts=prompts, completion=200),
        "GRPO": lambda: grpo_memory(size, recipe.grpo, dtype=dtype, prompts=prompts),
    }
    totals = {name: estimate().total for name, estimate in estimates.items()}
    room = min(device.memory) if device.memory else memory_of_host()[0]
    where = "the GPU" if device.memory else "this machine, which has no GPU"
    shown = ", ".join(f"{name} {readable(total)}" for name, total in totals.items())
    text = f"{shown} for prompts of {prompts.tokens:,} tokens"
    if room is not None and max(totals.values()) > room:
        remedy = "fewer pixels (model.max_pixels_total), gradient_checkpointing: true, FSDP (docs/scaling.md), or a smaller model"
        yield Finding("memory", "note", f"{text}: more than the {readable(room)} of {where}", remedy)
    else:
        yield Finding("memory", "ok", f"{text}; `polyground validate` measures your prompts")
