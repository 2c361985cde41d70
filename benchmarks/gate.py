"""Before anything is timed: all arms must have the same loss and the same LoRA gradients."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from arms import Options, Ours, TunedTrl, build_arms
from cases import Case
from measure import Phases
from torch import Tensor

BETAS = (0.0, 0.04)
TOLERANCE = 1e-5
"""Relative, in float32."""
FURTHER = 1.2
"""How much further from float32 than the tuned arm ours may be in bfloat16."""


class GateError(Exception):
    """The arms do not compute the same thing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one arm computed."""

    loss: float
    gradients: dict[str, Tensor]


def gate(names: Sequence[str], options: Options, cases: Sequence[Case], *, tolerance: float = TOLERANCE) -> list[dict[str, Any]]:
    """Compare the arms on each case with and without a KL penalty; raises GateError where they differ."""
    exact = outcomes(names, replace(options, dtype="float32"), cases)
    records = []
    for key, found in exact.items():
        pairs = {name: (outcome, found[names[0]]) for name, outcome in found.items() if name != names[0]}
        records.append(_record(key, pairs, dtype="float32"))
    for record in records:
        if max(*record["loss"].values(), *record["gradients"].values()) > tolerance:
            raise GateError(f"{record['case']}, beta {record['beta']}: relative to {names[0]}, beyond {tolerance:g}: {record}")
    if options.dtype != "float32":
        rounded = outcomes(names, options, cases)
        further = [
            _record(key, {name: (outcome, exact[key][name]) for name, outcome in found.items()}, dtype=options.dtype)
            for key, found in rounded.items()
        ]
        _require_as_close(further)
        records += further
    return records


def _require_as_close(records: Sequence[dict[str, Any]]) -> None:
    """Rounding is a matter of luck in one case: the arms' distances over all cases are compared."""
    spread = {name: _root_mean_square([r["gradients"][name] for r in records]) for name in records[0]["gradients"]}
    theirs, found = spread.get(TunedTrl.name), spread.get(Ours.name)
    if theirs is not None and found is not None and found > FURTHER * theirs:
        raise GateError(
            f"in {records[0]['dtype']} ours is more than {FURTHER} times as far from float32 as the tuned arm: {spread}"
        )


def drift(names: Sequence[str], options: Options, case: Case, *, steps: int) -> dict[str, float]:
    """How far the adapters are apart after so many AdamW steps, relative to how far they went; in float32."""
    arms = build_arms(names, replace(options, dtype="float32"))
    moved = {name: _moved(arm, case, steps=steps) for name, arm in arms.items()}
    return {name: relative(change, moved[names[0]]) for name, change in moved.items() if name != names[0]}


def _moved(arm: Any, case: Case, *, steps: int) -> dict[str, Tensor]:
    adapter = {name: p for name, p in arm.model.named_parameters() if "lora_" in name}
    before = {name: p.detach().cpu().clone() for name, p in adapter.items()}
    optimiser = torch.optim.AdamW(adapter.values(), lr=1e-5, weight_decay=0.0)
    for _ in range(steps):
        arm.step(case, Phases(arm.device), beta=BETAS[-1], rollout=False)
        optimiser.step()
    return {name: p.detach().cpu() - before[name] for name, p in adapter.items()}


def outcomes(names: Sequence[str], options: Options, cases: Sequence[Case]) -> dict[tuple[str, float], dict[str, Outcome]]:
    """By case and beta, then by arm. The arms are let go of afterwards."""
    arms = build_arms(names, options)
    found = {}
    for i, case in enumerate(cases):
        for beta in BETAS:
            found[f"{case.cell.name()} ({i + 1})", beta] = {name: _outcome(arm, case, beta) for name, arm in arms.items()}
    arms.clear()
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def relative(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Distance of all gradients together, relative to their length."""
    if ours.keys() != theirs.keys():
        raise GateError(f"gradients of different parameters: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    gap = sum(float((ours[name] - theirs[name]).double().pow(2).sum()) for name in theirs)
    return float((gap / sum(float(theirs[name].double().pow(2).sum()) for name in theirs)) ** 0.5)


def _outcome(arm: Any, case: Case, beta: float) -> Outcome:
    loss = arm.step(case, Phases(arm.device), beta=beta, rollout=False)
    return Outcome(loss=loss, gradients=arm.gradients())


def _record(key: tuple[str, float], pairs: Mapping[str, tuple[Outcome, Outcome]], *, dtype: str) -> dict[str, Any]:
    case, beta = key
    return {
        "case": case,
        "beta": beta,
        "dtype": dtype,
        "loss": {name: abs(one.loss - other.loss) / abs(other.loss) for name, (one, other) in pairs.items()},
        "gradients": {name: relative(one.gradients, other.gradients) for name, (one, other) in pairs.items()},
    }


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))
