"""One GRPO step, three ways: TRL as it comes, TRL tuned, and this package. Checks that they agree, then times and counts.

    python benchmarks/grpo_step.py --out benchmarks/results/NAME

writes NAME/result.json, result.md and result.png, after every cell. docs/speed.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from arms import ARMS, Options, TunedTrl, build_arms
from cases import Case, Cell, build_case
from flops import Decoder, rates, row_by_row, shared
from gate import GateError, drift, gate
from measure import SUMS, Counters, Phases, alternating, environment, medians
from peak import memory_of, peak_of
from tables import markdown, plot

from models import FAMILIES, PRESETS, model_folder
from polyground.models import load_family

_IMAGES, _GROUPS, _COMPLETION = 4, 8, 48


def sweep(side: int) -> list[Cell]:
    """A star around 4 images, G 8, C 48, and two corners where sharing has little to share."""
    middle = Cell(images=_IMAGES, groups=_GROUPS, completion=_COMPLETION, side=side)
    points: list[dict[str, Any]] = [
        *({"groups": groups} for groups in (1, 2, 4, 8, 16)),
        *({"images": images} for images in (1, 2, 8)),
        *({"completion": completion} for completion in (16, 96, 192)),
        {"images": 1, "side": 112, "completion": 256},
        {"images": 1, "side": 112, "completion": 256, "groups": 1},
    ]
    return [replace(middle, **point) for point in points]


def cells_of(options: argparse.Namespace) -> list[Cell]:
    if options.sweep:
        return sweep(options.side)
    points = itertools.product(options.images, options.groups, options.completion)
    return [
        Cell(images=n, groups=g, completion=c, side=options.side, prompts=options.prompts, ragged=options.ragged)
        for n, g, c in points
    ]


def gate_cases(cells: list[Cell], options: Options, *, count: int) -> list[Case]:
    """Small ragged cases of two prompts: one with the most images of the sweep, one with an image less."""
    cell = Cell(
        images=max(cell.images for cell in cells),
        groups=max(2, min(4, max(cell.groups for cell in cells))),
        completion=min(12, max(cell.completion for cell in cells)),
        side=max(cell.side for cell in cells),
        prompts=2,
        ragged=True,
    )
    family = load_family(options.folder)
    return [build_case(cell, family, options.work / "images", seed=seed) for seed in range(count)]


def measured(cell: Cell, arms: dict[str, Any], options: argparse.Namespace, shared_options: Options) -> dict[str, Any]:
    """Everything about one cell."""
    case = build_case(cell, load_family(shared_options.folder), shared_options.work / "images")
    found: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        found[name] = _warmed(arm, case, options)
    alive = [name for name in arms if "failed" not in found[name]]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in alive}
    for order in alternating(alive, rounds=options.rounds):
        for name in order:
            phases = Phases(arms[name].device)
            gc.collect()
            arms[name].step(case, phases, beta=options.beta)
            rounds[name].append(dict(phases.seconds))
    for name in alive:
        found[name] |= {"seconds": medians(rounds[name]), "rounds": rounds[name]}
        if options.memory:
            found[name]["memory"] = _memory(name, arms, case, options, shared_options)
    return {
        "name": cell.name(),
        "cell": cell.to_json(),
        "prompt_tokens": case.prompt_tokens // len(case.prompts),
        "arms": found,
        "ratios": {name: _ratios(found[name], found["ours"]) for name in alive if name != "ours" and "ours" in alive},
        "flops": _flops(case, found, options, shared_options),
    }


def _warmed(arm: Any, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Tunes where there is something to tune, warms up, and counts on the way."""
    found: dict[str, Any] = {}
    try:
        if isinstance(arm, TunedTrl):
            found["tuning"] = arm.tune(case, beta=options.beta, grid=options.grid, repeats=options.tuning_repeats)
        for _ in range(options.warmup):
            counters = Counters()
            with arm.counting(counters):
                arm.step(case, Phases(arm.device, counters=counters), beta=options.beta)
            found["counts"] = counters.to_json()
    except torch.OutOfMemoryError:
        found["failed"] = "out of memory"
    if "failed" in found:
        # Only now are the tensors of the failed step out of reach.
        arm.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return found | {"setting": arm.setting()}


def _memory(name: str, arms: dict[str, Any], case: Case, options: argparse.Namespace, shared_options: Options) -> dict[str, Any]:
    if shared_options.device.type == "cuda":
        for arm in arms.values():
            arm.model.zero_grad(set_to_none=True)
        return memory_of(arms[name], case, beta=options.beta)
    return peak_of(
        {
            "arm": name,
            "setting": arms[name].setting(),
            "cell": case.cell.to_json(),
            "folder": str(shared_options.folder),
            "work": str(shared_options.work),
            "dtype": shared_options.dtype,
            "lora_r": shared_options.lora_r,
            "threads": torch.get_num_threads(),
            "beta": options.beta,
        }
    )


def _ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    names = ("rollout", "reference", "forward", "backward", *SUMS)
    ratios = {name: theirs["seconds"][name] / ours["seconds"][name] for name in names if ours["seconds"][name] > 0}
    both = [arm.get("memory", {}).get("update_above", 0) for arm in (theirs, ours)]
    return ratios | ({"memory": both[0] / both[1]} if min(both) > 0 else {})


def _flops(case: Case, found: dict[str, Any], options: argparse.Namespace, shared_options: Options) -> dict[str, float]:
    config = json.loads((shared_options.folder / "config.json").read_text(encoding="utf-8"))
    decoder, rank = Decoder.of(config), shared_options.lora_r
    groups = [[len(c) for c in group] for group in case.completions]
    pairs = [(len(prompt), lengths) for prompt, lengths in zip(case.prompts, groups, strict=True)]
    once = math.fsum(shared(decoder, prompt, lengths, rank=rank).total for prompt, lengths in pairs)
    each = math.fsum(row_by_row(decoder, prompt, lengths, rank=rank).total for prompt, lengths in pairs)
    tokens = sum(prompt - 1 + sum(lengths) for prompt, lengths in pairs)
    flops = {
        "shared": once,
        "row_by_row": each,
        "shared_tokens": float(tokens),
        "row_by_row_tokens": float(sum(prompt * len(lengths) + sum(lengths) for prompt, lengths in pairs)),
    }
    dtype = getattr(torch, shared_options.dtype)
    for kind, rate in rates(decoder, tokens=tokens // len(pairs), dtype=dtype, device=shared_options.device).items():
        flops[f"rate_{kind}"] = rate
        for name, work in (("ours", once), ("tuned", each)):
            if "seconds" in found.get(name, {}):
                flops[f"{name}_of_{kind}"] = work / found[name]["seconds"]["update"] / rate
    return flops


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json, result.md and result.png")
    parser.add_argument("--family", choices=FAMILIES, default=None, help="default: qwen3_vl, for 3b and 7b qwen2_5_vl")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--images", type=int, nargs="+", default=[_IMAGES], help="images of the prompt")
    parser.add_argument("--side", type=int, default=448, help="pixels of an image's side; 28 pixels are one token's side")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16], help="completions per prompt, G")
    parser.add_argument("--completion", type=int, nargs="+", default=[_COMPLETION], help="tokens per completion, C")
    parser.add_argument("--sweep", action="store_true", help="the standard sweep instead of the three above")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of one step, each further one with an image less")
    parser.add_argument("--ragged", action="store_true", help="completions between C / 2 and C in the update")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL penalty; 0 leaves out the reference")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each arm")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each arm before that")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--grid", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="rows per forward the tuned arm tries")
    parser.add_argument(
        "--tuning-repeats", type=int, default=1, help="updates of each setting it tries, the best of them counting"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="no peak memory (on a CPU one process per arm)")
    parser.add_argument(
        "--gate-preset", choices=sorted(PRESETS), default=None, help="preset of the correctness gate; default: the same"
    )
    parser.add_argument(
        "--drift-steps", type=int, default=0, help="AdamW steps after which the arms' adapters are compared; 20 is a good test"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "polyground-benchmarks", help="models, images")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The gate, then cell after cell; the result so far is written after each."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    family = options.family or PRESETS[options.preset].families[0]
    device = torch.device(options.device)
    cells = cells_of(options)
    shared_options = Options(
        folder=model_folder(options.work, options.preset, family, dtype=options.dtype, device=options.device),
        work=options.work,
        device=device,
        dtype=options.dtype,
        lora_r=options.lora_r,
    )
    result: dict[str, Any] = {"environment": environment(device), "gate": [], "cells": []}
    result["environment"] |= {"family": family, "preset": options.preset, "dtype": options.dtype, "beta": options.beta}
    result["environment"] |= {"lora_r": options.lora_r, "rounds": options.rounds}
    result["environment"]["gate_preset"] = options.gate_preset or options.preset
    if options.gate_preset:
        folder = model_folder(options.work, options.gate_preset, family, dtype=options.dtype, device=options.device)
        gate_options = replace(shared_options, folder=folder)
    else:
        gate_options = shared_options
    cases = gate_cases(cells, gate_options, count=1 if options.dtype == "float32" else 4)
    result["gate"] = gate(options.arms, gate_options, cases)
    if options.drift_steps:
        result["drift"] = drift(options.arms, gate_options, cases[0], steps=options.drift_steps)
    arms = build_arms(options.arms, shared_options)
    options.out.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        result["cells"].append(measured(cell, arms, options, shared_options))
        write(result, options.out)
        print(f"{cell.name()}: done", flush=True)
    return result


def write(result: dict[str, Any], folder: Path) -> None:
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "result.md").write_text(markdown(result), encoding="utf-8")
    plot(result, folder / "result.png")


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if len(options.arms) < 2:
        parser.error("--arms needs two or more: an arm that agrees with no other is not timed")
    try:
        result = run(options)
    except GateError as error:
        raise SystemExit(f"nothing was timed, because the arms do not agree: {error}") from error
    print(markdown(result))


if __name__ == "__main__":
    main()
