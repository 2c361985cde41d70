"""Synthesis with a served teacher: budgets, resumption, and what the summary tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_server import FAULTS, FaultServer, serving
from pydantic import ValidationError

from polyground.config import EndpointConfig, Recipe
from polyground.errors import BudgetError, ConfigError, EndpointError
from polyground.stages import synthesize, world
from polyground.storage import read_rows

TEXT = '<think>Image 1 shows it quite well.</think><answer>[{"image": 1, "bbox_2d": [0, 0, 1000, 1000]}]</answer>'
"""Right, at a threshold near 0, wherever the target lies on image 1."""
QUESTIONS = 12


def recipe_for(out: Path, *servers: FaultServer, **endpoint: Any) -> Recipe:
    """A recipe whose data file is the train split of the simulated world at `out / "world"`."""
    small = {"train": QUESTIONS, "rl": 0, "validation": 0, "test": 0, "ood": 0, "perception": 0}
    return Recipe.model_validate(
        {
            "out": out,
            "world": small,
            "synthesize": {
                "teacher": "endpoint",
                "teacher_base_url": [server.url for server in servers] or "http://127.0.0.1:9/v1",
                "teacher_model": "m",
                "pass_iou": 1e-6,
                "endpoint": {"concurrency": 2, **endpoint},
            },
        }
    )


def rows(out: Path) -> list[Any]:
    kept, rejected = (list(read_rows(out / "synthesize" / f"{name}.jsonl")) for name in ("kept", "rejected"))
    return [{**row, "images": None} for row in kept], rejected


@pytest.fixture
def built(tmp_path: Path) -> Path:
    world.run(recipe_for(tmp_path))
    return tmp_path


def test_a_faulty_teacher_gives_the_rows_of_a_calm_one_and_the_summary_says_what_it_took(built: Path, tmp_path: Path) -> None:
    quick = [fault for fault in FAULTS if fault in {"half", "dies", "garbage"}]
    with serving(quick, text=TEXT) as server:
        summary = synthesize.run(recipe_for(built, server, prompt_price=1.0))
    assert summary["asked"] == QUESTIONS == summary["kept"] + sum(summary["dropped"].values())
    endpoint = summary["endpoint"]
    assert (endpoint["requests"], endpoint["tries"], endpoint["reused"]) == (QUESTIONS, QUESTIONS + 3, 0)
    assert endpoint["cost"] == pytest.approx(endpoint["prompt_tokens"] / 1e6)
    assert endpoint["cost"] > 0
    assert sum(endpoint["failed_tries"].values()) == 3
    other = tmp_path / "calm"
    world.run(recipe_for(other))
    with serving(text=TEXT) as calm:
        synthesize.run(recipe_for(other, calm))
    assert rows(other) == rows(built)


def test_a_spent_budget_stops_the_stage_and_a_larger_one_at_another_address_goes_on(built: Path) -> None:
    with serving(text=TEXT) as server:
        with pytest.raises(BudgetError, match=r"raise endpoint\.max_tokens.* are kept in .*answers"):
            synthesize.run(recipe_for(built, server, max_tokens=200))
        paid = len(server.requests)
        assert 0 < paid < QUESTIONS
    with serving(text=TEXT) as one, serving(text=TEXT) as other:
        summary = synthesize.run(recipe_for(built, one, other))
        assert len(one.requests) + len(other.requests) == QUESTIONS - paid
    assert (summary["asked"], summary["endpoint"]["requests"]) == (QUESTIONS, QUESTIONS)


def test_a_spent_budget_may_also_finish_the_stage_with_what_was_kept(built: Path) -> None:
    with serving(text=TEXT) as server:
        # One question at a time, or it is chance whether the first, which TEXT answers rightly, is paid for.
        summary = synthesize.run(recipe_for(built, server, max_tokens=1_000, on_budget="finish", concurrency=1))
    # Though no batch was answered to its end.
    assert 1 < summary["asked"] == len(server.requests) < QUESTIONS
    assert summary["asked"] == summary["kept"] + sum(summary["dropped"].values())
    assert summary["stopped"].startswith("the budget of 1,000 tokens is spent")


def test_an_endpoint_that_stops_answering_stops_the_stage_and_the_same_command_goes_on(built: Path) -> None:
    with serving(["ok", "ok", "ok", *["404"] * 9], text=TEXT) as server:
        with pytest.raises(EndpointError, match="the same command goes on"):
            synthesize.run(recipe_for(built, server))
        server.script = []
        assert synthesize.run(recipe_for(built, server))["asked"] == QUESTIONS
        assert len(server.answered) == QUESTIONS


@pytest.mark.parametrize(
    ("section", "message"),
    [
        pytest.param({"max_cost": 1.0}, "max_cost needs a prompt_price", id="no-price"),
        pytest.param({"concurrency": 0}, "greater than or equal to 1", id="nobody-asks"),
    ],
)
def test_settings_that_cannot_work_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EndpointConfig(**section)


def test_an_empty_list_of_addresses_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValidationError, ConfigError), match="teacher_base_url"):
        synthesize.run(
            Recipe.model_validate(
                {"out": tmp_path, "synthesize": {"teacher": "endpoint", "teacher_base_url": [], "teacher_model": "m"}}
            )
        )
