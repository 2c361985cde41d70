"""Facts about what is needed to leave one machine: configurations that accelerate reads, examples that run what there is."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from polyground import models
from polyground.cli import STAGES
from polyground.config import Recipe, load_recipe
from polyground.stages import open_model
from polyground.training.processes import trains_on_cpu

ROOT = Path(__file__).parents[1]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
CLUSTER = sorted((ROOT / "recipes" / "cluster").glob("*.sbatch"))


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_script(scaling: ModuleType) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, table in scaling.TABLES.items():
        found = re.search(f"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.DOTALL)
        assert found is not None, name
        assert found[1] == scaling.markdown(table()), f"{name}: run `python scripts/scaling.py --write`"


@pytest.mark.parametrize(("name", "billions"), [("7B", 8.3), ("32B", 33.5), ("72B", 73.4)])
def test_models_have_the_sizes_they_are_called_after(scaling: ModuleType, name: str, billions: float) -> None:
    assert scaling.sizes()[name].parameters == pytest.approx(billions * 1e9, rel=0.005)


def launched(path: Path) -> Any:
    """What `accelerate launch` makes of a configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))[0]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed-zero2": "DEEPSPEED", "deepspeed-zero3": "DEEPSPEED"}
    assert str(getattr(read.distributed_type, "value", read.distributed_type)) == kinds[path.stem]
    assert read.num_processes == 8
    told = launched(path)
    assert (told.use_fsdp, told.use_deepspeed) == (path.stem == "fsdp", path.stem.startswith("deepspeed"))
    if told.use_deepspeed:
        assert int(told.zero_stage) == int(path.stem[-1])


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_a_model_that_is_shared_out_for_training_is_never_whole_on_a_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    told = launched(path)
    told.deepspeed_fields_from_accelerate_config = ""  # the launcher's next step sets it
    environment = prepare_deepspeed_cmd_env(told)[1] if told.use_deepspeed else prepare_multi_gpu_env(told)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    opened: list[str] = []
    monkeypatch.setattr(models, "best_device", lambda: "cuda:3")
    monkeypatch.setattr(models, "load_model", lambda *_, device, **__: opened.append(device))
    for training in (True, False):
        open_model(Recipe(), "base", training=training)
    in_pieces = path.stem in ("fsdp", "deepspeed-zero3")
    assert opened == ["cpu" if in_pieces else "cuda:3", "cuda:3"]
    waiting = SimpleNamespace(device=torch.device("cpu"))
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert trains_on_cpu(waiting) != (in_pieces and cuda)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_the_recipe_and_not_the_launcher_decides_precision_and_steps(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert tree["mixed_precision"] == "no"
    if "deepspeed_config" in tree:
        assert tree["deepspeed_config"]["gradient_accumulation_steps"] == "auto"
        assert tree["deepspeed_config"]["gradient_clipping"] == "auto"


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_an_example_is_a_script_that_names_what_there_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(path)], check=False).returncode == 0
    assert "set -euo pipefail" in text
    for named in re.findall(r"recipes/[\w./-]+", text):
        assert (ROOT / named).is_file(), named
    for recipe in set(re.findall(r"recipes/[\w.-]+\.yaml", text)):
        load_recipe(ROOT / recipe)
    verbs = set(re.findall(r"polyground (\w+) (?:\"\$|recipes)", text)) | set(re.findall(r"\.sbatch (\w+) recipes", text))
    assert verbs <= set(STAGES)


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_a_server_of_an_example_listens_to_its_own_machine_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("vllm serve") == text.count("--host 127.0.0.1")
