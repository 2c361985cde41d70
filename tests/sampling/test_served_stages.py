"""Rejection sampling and evaluation of a model behind a server: resumed without paying twice, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fault_server import FaultServer, serving
from pydantic import ValidationError

from polyground.config import EvaluateConfig, GrpoConfig, Recipe, RejectConfig, load_recipe
from polyground.errors import BudgetError, ConfigError, EndpointError
from polyground.stages import evaluate, reject, world
from polyground.storage import RunFolder, read_json, read_rows

TEXT = '<think>Image 1 shows it quite well.</think><answer>[{"image": 1, "bbox_2d": [0, 0, 1000, 1000]}]</answer>'
QUESTIONS = 10
# The stand-in counts words, not tokens.
ENDPOINT = {"concurrency": 2, "check_prompt_tokens": False, "retries": 0}


def recipe_for(out: Path, server: FaultServer | None, **changes: Any) -> Recipe:
    url = "http://127.0.0.1:9/v1" if server is None else server.url
    tree: dict[str, Any] = {
        "out": str(out),
        "world": {"train": 0, "rl": QUESTIONS, "validation": 0, "test": QUESTIONS, "ood": 0, "perception": 0},
        "reject": {"sampler": "endpoint", "num_generations": 2, "min_pass_rate": None, "max_pass_rate": None},
        "grpo": {"start": "base"},
        "evaluate": {"sampler": "endpoint", "models": ["base"], "bootstrap": 0},
        "servers": {
            "base": {"base_url": url, "model": "m"},
            "endpoint": ENDPOINT,
        },
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return Recipe.model_validate(tree)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    world.run(recipe_for(tmp_path, None))
    return tmp_path


def test_rejection_sampling_on_a_server_goes_on_where_it_stopped_and_says_what_it_took(built: Path) -> None:
    with serving(["ok", "ok", "ok", *["404"] * 4], text=TEXT) as server:
        with pytest.raises(EndpointError, match=r"answers/reject; the same command goes on"):
            reject.run(recipe_for(built, server))
        server.script = []
        summary = reject.run(recipe_for(built, server))
        assert len(server.answered) == QUESTIONS
        assert server.answered[0]["n"] == 2
    assert summary["asked"] == QUESTIONS
    assert summary["endpoint"]["requests"] == QUESTIONS
    assert summary["endpoint"]["reused"] == 6
    groups = list(read_rows(built / "reject" / "rollouts.jsonl"))
    assert {rollout["completion"]["text"] for group in groups for rollout in group["rollouts"]} == {TEXT}


def test_a_forbidden_prompt_counts_as_unreadable_answers(built: Path) -> None:
    with serving(["400-content_filter"], text=TEXT) as server:
        summary = reject.run(recipe_for(built, server, servers={"endpoint": {"concurrency": 1, "check_prompt_tokens": False}}))
    assert summary["endpoint"]["refused"] == 1
    groups = list(read_rows(built / "reject" / "rollouts.jsonl"))
    unreadable = [r["score"]["unreadable"] for group in groups for r in group["rollouts"] if r["completion"]["text"] == ""]
    assert unreadable == ["missing"] * 2


def test_a_base_that_answers_in_its_own_form_is_read_and_images_go_as_the_model_takes_them(built: Path) -> None:
    with serving(text='[{"bbox_2d": [0, 0, 1000, 1000], "label": "it"}]') as server:
        evaluate.run(recipe_for(built, server))
        request = server.answered[0]
    assert request["temperature"] == 0
    manifest = read_json(built / "evaluate" / "base" / "manifest.json")
    assert manifest["summary"]["endpoint"]["requests"] == QUESTIONS
    results = read_json(built / "evaluate" / "results.json")
    assert results["tags"]["decoding"]["sampler"] == "served"
    rows = list(read_rows(built / "evaluate" / "base" / "test.jsonl"))
    assert {row["score"]["unreadable"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("stage", "rows"), [(reject, "reject/rollouts.jsonl"), (evaluate, "evaluate/base/test.jsonl")], ids=["reject", "evaluate"]
)
def test_parts_on_a_server_make_the_rows_of_one_process_and_the_whole_asks_nothing(
    built: Path, tmp_path_factory: pytest.TempPathFactory, stage: ModuleType, rows: str
) -> None:
    with serving(text=TEXT) as server:
        recipe = recipe_for(built, server, servers={"endpoint": {**ENDPOINT, "prompt_price": 1.0}})
        for part in ("1/2", "0/2"):
            stage.run(recipe.model_copy(update={"shard": part}))
        assert len(server.answered) == QUESTIONS
        stage.run(recipe)
        assert len(server.answered) == QUESTIONS
        calm = tmp_path_factory.mktemp("calm")
        shutil.copytree(built / "world", calm / "world")
        stage.run(recipe.model_copy(update={"out": calm}))
    assert _keys(built / rows) == _keys(calm / rows)
    told, alone = (read_json((out / rows).parent / "manifest.json")["summary"]["endpoint"] for out in (built, calm))
    assert told == {name: alone[name] for name in ("requests", "prompt_tokens", "completion_tokens", "cost")}


def _keys(path: Path) -> list[str]:
    return [row.get("key") or row["example"] for row in read_rows(path)]


def test_a_spent_budget_names_the_key_to_raise(built: Path) -> None:
    with serving(text=TEXT) as server, pytest.raises(BudgetError, match=r"raise servers\.endpoint\.max_tokens"):
        reject.run(recipe_for(built, server, servers={"endpoint": {**ENDPOINT, "max_tokens": 1}}))


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from polyground.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["reject", "evaluate"])
def test_a_served_model_is_sampled_without_torch(built: Path, verb: str) -> None:
    with serving(text=TEXT) as server:
        path = built / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_for(built, server).to_json()), encoding="utf-8")
        assert load_recipe(path).reject.sampler == "endpoint"
        ended = subprocess.run(
            [sys.executable, "-c", BLOCKED, verb, str(path)], capture_output=True, text=True, check=False, env=os.environ
        )
    assert ended.returncode == 0, ended.stderr


def test_a_model_that_is_nowhere_served_is_named_before_anything_is_asked(built: Path) -> None:
    with RunFolder(built / "sft-merged", "merge", {}) as merged:
        merged.finish({})
    with serving(text=TEXT) as server:
        with pytest.raises(ConfigError, match=r"asks the sft model; say in servers\.sft"):
            evaluate.run(recipe_for(built, server, evaluate={"models": None}))
        assert server.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"grpo": {"start": "sft"}}, r"reject\.sampler: endpoint asks the sft model", id="reject"),
        pytest.param({"evaluate": {"models": ["rl"]}}, r"evaluate\.sampler: endpoint asks the rl model", id="evaluate"),
        pytest.param(
            {"reject": {"sampler": "local"}, "grpo": {"start": "sft", "rollout": "endpoint"}},
            r"grpo\.rollout.* the sft",
            id="grpo",
        ),
        pytest.param({"servers": {"endpoint": {"on_budget": "finish"}}}, "finish is for synthesis", id="unfinished"),
        pytest.param(
            {"servers": {"base": {"base_url": "http://a/v1", "model": "m", "api_key_env": "sk-1"}}}, "never the key", id="key"
        ),
    ],
)
def test_recipes_that_name_no_server_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_for(tmp_path, None, **changes)


def test_who_samples_decides_rows_but_which_server_does_not() -> None:
    local = RejectConfig().deciding()
    assert "sampler" not in local
    assert (
        RejectConfig(sampler="vllm").deciding() == RejectConfig(sampler="endpoint").deciding() == {**local, "sampler": "served"}
    )
    assert not {name for name in GrpoConfig().deciding() if name.startswith("vllm_") or name in ("rollout", "max_staleness")}
    served = GrpoConfig(rollout="vllm").deciding()
    assert served == GrpoConfig(rollout="endpoint").deciding()
    assert served["vllm_importance_sampling_mode"] == "sequence_mask"
    assert EvaluateConfig().sampler == "local"
