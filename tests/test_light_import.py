"""Facts about what runs without torch: everything below the models, and the command line's help."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = [
    "geometry",
    "answer",
    "records",
    "config",
    "conventions",
    "imagefile",
    "storage",
    "sources",
    "rewards",
    "metrics",
    "detection",
    "benchmarks",
    "prompts",
    "exports",
    "predictions",
    "cards",
    "lmms_eval",
    "stages.export",
    "stages.export_tasks",
    "vision",
    "worlds",
    "splits",
    "memory",
    "tokens",
    "teaching",
    "curation",
    "grounder",
    "extras",
    "completion",
    "sources.recognise",
    "stages.init",
    "stages.doctor",
    "sampling.forecast",
    "stages.synthesize",
    "sampling.served",
    "stages.validate",
    "stages.check_coords",
    "stages.reject",
    "stages.evaluate",
    "stages.run",
    "app.library",
    "app.asking",
    "app.pictures",
    "app.server",
    "cli",
]

BLOCK_AND_RUN = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "accelerate", "datasets"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK_AND_RUN + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_without_torch(module: str) -> None:
    found = run_without_torch(f"importlib.import_module('polyground.{module}')")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        pytest.param(["--help"], 0, "grpo", id="help"),
        pytest.param(["--version"], 0, "polyground", id="version"),
        pytest.param(["grop"], 2, "grpo", id="misspelt-verb"),
        pytest.param(["sft", "no-such.yaml"], 2, "no-such.yaml", id="no-such-recipe"),
    ],
)
def test_the_command_line_answers_without_torch(arguments: list[str], code: int, shown: str) -> None:
    found = run_without_torch(f"from polyground.cli import main; sys.exit(main({arguments!r}))")
    assert found.returncode == code, found.stderr
    assert shown in found.stdout + found.stderr
