"""Facts about training in several processes: two give what one gives with twice the accumulation, and take up its checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from adapter_server import serving_adapters
from safetensors.torch import load_file

from polyground.storage import read_rows
from toys import write_image

SCRIPT = Path(__file__).parent / "one_of_two.py"
CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
VERBS = ("sft", "grpo")
STEPS = {"sft": 6, "grpo": 4}

pytestmark = pytest.mark.slow


def fsdp() -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/fsdp.yaml` tells its processes of FSDP."""
    words = ["--config_file", str(CONFIGS / "fsdp.yaml"), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def run(folder: Path, images: Path, jobs: list[dict], *, processes: int, environment: dict[str, str] | None = None) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FSDP_", "ACCELERATE_"))}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder), str(images), json.dumps(jobs)],
        env=own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each training in one process, in two under DDP and in two under FSDP, and each gone on from where another was at step 2."""
    out = tmp_path_factory.mktemp("runs")
    images = out / "images"
    images.mkdir()
    for i, colour in enumerate(("red", "blue", "pink", "cyan")):
        write_image(images / f"{i}.png", colour, width=56 + 28 * (i % 2))

    def job(verb: str, name: str, *, accumulation: int, start: str | None = None) -> dict:
        begun = {} if start is None else {"start": str(out / f"{verb}-{start}")}
        return {"verb": verb, "out": str(out / f"{verb}-{name}"), "accumulation": accumulation, **begun}

    run(toy_folder, images, [job(verb, "one", accumulation=2) for verb in VERBS], processes=1)
    for kind, environment in (("ddp", {}), ("fsdp", fsdp())):
        jobs = [job(verb, kind, accumulation=1) for verb in VERBS]
        jobs += [job(verb, f"{start}-{kind}", accumulation=1, start=start) for verb in VERBS for start in ("one", kind)]
        run(toy_folder, images, jobs, processes=2, environment=environment)
    back = [job(verb, f"{kind}-one", accumulation=2, start=kind) for verb in VERBS for kind in ("ddp", "fsdp")]
    run(toy_folder, images, back, processes=1)
    return out


@pytest.fixture(scope="module")
def served_runs(runs: Path, toy_folder: Path) -> Path:
    """GRPO as in `runs` but for its rollouts, which a server samples twice for four steps."""
    for kind, environment, processes in (("one", None, 1), ("ddp", None, 2), ("fsdp", fsdp(), 2)):
        out = runs / f"served-{kind}"
        with serving_adapters(toy_folder, runs / f"sent-{kind}") as server:
            job = {"verb": "grpo", "out": str(out), "accumulation": 3 - processes, "url": server.url}
            run(toy_folder, runs / "images", [job], processes=processes, environment=environment)
            assert [what for what, _ in server.told] == ["load", "load", "unload", "unload"]
    return runs


def lines(out: Path) -> list[dict]:
    return [row for row in read_rows(out / "log.jsonl") if "grad_norm" in row]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def texts(out: Path) -> list[tuple]:
    return [(row["step"], row["example"], row["sample"], row["completion"]["text"]) for row in read_rows(out / "rollouts.jsonl")]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("verb", VERBS)
def test_two_processes_train_as_one_with_twice_the_accumulation(runs: Path, verb: str, kind: str) -> None:
    one, two = lines(runs / f"{verb}-one"), lines(runs / f"{verb}-{kind}")
    assert [row["step"] for row in two] == list(range(1, STEPS[verb] + 1))
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert set(alone) == set(shared)
        # The pass a step belongs to counts idle rows.
        for name in set(alone) - {"loss", "epoch"}:
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
    ours, theirs = adapter(runs / f"{verb}-{kind}"), adapter(runs / f"{verb}-one")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert any(tensor.abs().max() > 1e-2 for name, tensor in ours.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_rollouts_stand_in_the_order_of_one_process(runs: Path, kind: str) -> None:
    assert texts(runs / f"grpo-{kind}") == texts(runs / "grpo-one")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_from_a_server_what_one_learns(served_runs: Path, kind: str) -> None:
    one, two = served_runs / "served-one", served_runs / f"served-{kind}"
    assert texts(two) == texts(one)
    for alone, shared in zip(lines(one), lines(two), strict=True):
        assert set(alone) == set(shared)
        for name in set(alone) - {"epoch"}:
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
    assert max(row["kl"] for row in lines(two)) > 1e-4
    assert all(torch.allclose(adapter(two)[name], tensor, atol=1e-4) for name, tensor in adapter(one).items())


@pytest.mark.parametrize("path", ["ddp-ddp", "fsdp-fsdp", "one-ddp", "one-fsdp", "ddp-one", "fsdp-one"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_is_taken_up_by_any_number_of_processes(runs: Path, verb: str, path: str) -> None:
    whole, resumed = adapter(runs / f"{verb}-one"), adapter(runs / f"{verb}-{path}")
    assert all(torch.allclose(resumed[name], whole[name], atol=1e-4) for name in whole)
    assert [row["step"] for row in lines(runs / f"{verb}-{path}")] == list(range(1, STEPS[verb] + 1))


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkpoint_tells_nothing_of_who_shared_out_the_weights(runs: Path, verb: str) -> None:
    kinds = [
        sorted(path.name for path in (runs / f"{verb}-{kind}" / "checkpoint-2").iterdir() if "rng_state" not in path.name)
        for kind in ("one", "ddp", "fsdp")
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    states = [
        torch.load(runs / f"{verb}-{kind}" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
        for kind in ("one", "fsdp")
    ]
    for mine, others in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.allclose(mine["exp_avg"], others["exp_avg"], atol=1e-5)
