"""The peak memory of one arm's step on a CPU: a process of its own, because resident memory belongs to a whole process.

Called by grpo_step with the arm, its options and the cell as one JSON argument; prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def peak_of(request: dict[str, Any]) -> dict[str, Any]:
    """Run this file on the request."""
    done = subprocess.run([sys.executable, __file__, json.dumps(request)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def memory_of(arm: Any, case: Any, *, beta: float) -> dict[str, Any]:
    """Bytes before the step, at its peak, and between the two; by phase as well."""
    from measure import Phases, memory_now

    phases = Phases(arm.device, memory=True)
    base = memory_now(arm.device)
    arm.step(case, phases, beta=beta)
    peak = max(phases.peak.values())
    update = max(phases.peak["forward"], phases.peak["backward"])
    return {"base": base, "peak": peak, "above": peak - base, "update_above": update - base, "by_phase": dict(phases.peak)}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    from arms import Options, TunedTrl, build_arms
    from cases import Cell, build_case

    work = Path(request["work"])
    options = Options(folder=Path(request["folder"]), work=work, dtype=request["dtype"], lora_r=request["lora_r"])
    arm = build_arms([request["arm"]], options)[request["arm"]]
    if isinstance(arm, TunedTrl):
        arm.choose(rows=request["setting"]["rows"], checkpointing=request["setting"]["gradient_checkpointing"])
    case = build_case(Cell(**request["cell"]), arm.family, work / "images")
    print(json.dumps(memory_of(arm, case, beta=request["beta"])))


if __name__ == "__main__":
    main()
