"""Facts about training in several processes: two give what one gives with twice the accumulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyground.storage import read_rows
from toys import write_image

SCRIPT = Path(__file__).parent / "one_of_two.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3VLTextDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run(folder: Path, out: Path, *, processes: int, accumulation: int, environment: dict[str, str]) -> None:
    images = out.parent / "images"
    images.mkdir(exist_ok=True)
    for i, colour in enumerate(("red", "blue", "pink", "cyan")):
        write_image(images / f"{i}.png", colour, width=56 + 28 * (i % 2))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder), str(images), str(out), str(accumulation)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp2")])
def test_two_processes_train_as_one_with_twice_the_accumulation(
    toy_folder: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run(toy_folder, tmp_path / "one", processes=1, accumulation=2, environment={})
    run(toy_folder, tmp_path / "two", processes=2, accumulation=1, environment=environment)
    one, two = ([row for row in read_rows(tmp_path / name / "log.jsonl") if "grad_norm" in row] for name in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3]
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        for name in ("grad_norm", "reward", "kl", "entropy"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4)
    texts = [
        sorted((row["step"], row["example"], row["sample"], row["completion"]["text"]) for row in read_rows(path))
        for path in (tmp_path / name / "rollouts.jsonl" for name in ("one", "two"))
    ]
    assert texts[0] == texts[1]
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)

    # Killed after its last checkpoint but one, the run goes on to the same weights.
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file() == bool(environment)
    shutil.rmtree(tmp_path / "two" / "checkpoint-3")
    shutil.rmtree(tmp_path / "two" / "adapter")
    run(toy_folder, tmp_path / "two", processes=2, accumulation=1, environment=environment)
    again = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(ours[name], again[name], atol=1e-6) for name in ours)
    assert [row["step"] for row in read_rows(tmp_path / "two" / "log.jsonl") if "grad_norm" in row] == [1, 2, 3]
