"""How things are measured: seconds and peak memory by phase, counts by hooks, the machine and its matrix-product rate."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

PHASES = ("preprocess", "vision", "rollout", "reference", "forward", "backward")
"""Of a step, in their order. `vision` is the tower run on its own: an arm that runs it inside other phases has none."""

SUMS = {"update": ("forward", "backward"), "update+vision": ("vision", "forward", "backward"), "step": PHASES}
"""What phases add up to."""

COUNTED = (
    "image_decodes",
    "processor_images",
    "vision_images",
    "vision_images_backward",
    "language_tokens",
    "language_tokens_backward",
)
"""Images decoded, images through the image processor, images through the vision tower and back, and tokens (padding included)
through the language model, recomputed ones counted again, and back."""


class Phases:
    """Times what runs inside `with phases("rollout"):`; keeps the peak memory and the counts of each phase on demand."""

    def __init__(self, device: torch.device, *, counters: Counters | None = None, memory: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self._device, self._counters, self._memory = device, counters, memory

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._memory:
            reset_peak(self._device)
        if self._counters is not None:
            self._counters.phase = name
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start
        if self._memory:
            self.peak[name] = max(self.peak[name], peak_memory(self._device))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ---------------------------------------------------------------- counts


class Counters:
    """Counts by phase while `counting` is entered."""

    def __init__(self) -> None:
        self.phase = ""
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, what: str, number: int) -> None:
        self.counts[self.phase][what] += number

    def total(self, what: str) -> int:
        return sum(counts[what] for counts in self.counts.values())

    def to_json(self) -> dict[str, dict[str, int]]:
        return {phase: {what: counts[what] for what in COUNTED if counts[what]} for phase, counts in self.counts.items()}

    @contextmanager
    def counting(self, *, tower: nn.Module, decoder: nn.Module) -> Iterator[None]:
        """Hooks on a model's vision tower and language model, on PIL's decoding and on the image processor."""
        layers: Any = decoder.layers
        hooks = [
            tower.register_forward_hook(self._saw_images, with_kwargs=True),
            # Inside the layer: a recomputation under checkpointing goes through it again, but not through the layer's own hooks.
            layers[0].input_layernorm.register_forward_hook(self._saw_tokens),
            layers[-1].register_forward_hook(self._will_see_tokens_backward),
        ]
        with self._around(ImageFile.ImageFile, "load", self._decodes), self._around(BaseImageProcessor, "__call__", self._takes):
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    @contextmanager
    def _around(self, owner: Any, name: str, before: Callable[..., None]) -> Iterator[None]:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            before(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def _decodes(self, image: ImageFile.ImageFile, *_: object, **__: object) -> None:
        # Called before every use of the pixels; tiles are left to read only the first time.
        self.add("image_decodes", int(bool(image.tile)))

    def _takes(self, _processor: object, images: Any = None, *_: object, **__: object) -> None:
        self.add("processor_images", _leaves(images))

    def _saw_images(self, _tower: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        images = len(grids)
        self.add("vision_images", images)
        rows = output.pooler_output
        if isinstance(rows, Tensor) and rows.requires_grad:
            rows.register_hook(lambda _gradient: self.add("vision_images_backward", images))

    def _saw_tokens(self, _norm: nn.Module, _args: object, output: Tensor) -> None:
        self.add("language_tokens", output.shape[0] * output.shape[1])

    def _will_see_tokens_backward(self, _layer: nn.Module, _args: object, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        tokens = states.shape[0] * states.shape[1]
        if states.requires_grad:
            states.register_hook(lambda _gradient: self.add("language_tokens_backward", tokens))


def _leaves(images: Any) -> int:
    return sum(map(_leaves, images)) if isinstance(images, list | tuple) else 1


# ---------------------------------------------------------------- memory


def reset_peak(device: torch.device) -> None:
    """Start a new peak. On a CPU that is the process's, which Linux forgets on request."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at most since `reset_peak`: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def memory_now(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# ---------------------------------------------------------------- rounds


def alternating(names: Sequence[str], *, rounds: int) -> Iterator[list[str]]:
    """The order of the arms in each round: forwards, backwards, forwards, … so that a drift of the machine hits all alike."""
    for i in range(rounds):
        yield list(names) if i % 2 == 0 else list(reversed(names))


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each phase, and of each sum of phases (not the sum of their medians)."""
    whole = [{**one, **{name: sum(one.get(p, 0.0) for p in parts) for name, parts in SUMS.items()}} for one in rounds]
    return {name: statistics.median(one.get(name, 0.0) for one in whole) for name in (*PHASES, *SUMS)}


# ---------------------------------------------------------------- the machine


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    found = {
        "command": " ".join(["python", *map(str, sys.argv)]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load": os.getloadavg()[0],
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "matmul_precision": torch.get_float32_matmul_precision()}
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def product_rate(rows: int, inner: int, columns: int, *, dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """Floating-point operations per second of [rows, inner] x [inner, columns], the median over repetitions."""
    left, right = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    torch.mm(left, right)
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        timer = Phases(device)
        with timer("product"):
            torch.mm(left, right)
        taken.append(timer.seconds["product"])
    return 2 * rows * inner * columns / statistics.median(taken)
