"""What asking would come to, in figures that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyground.config import EndpointConfig
from polyground.conventions import load_convention, model_folder
from polyground.records import Completion, Message
from polyground.sampling.endpoint import sample_keys
from polyground.sampling.forecast import Asking, Estimate, Forecast
from polyground.sampling.responses import Prices, Responses
from polyground.sampling.servers import Reply
from polyground.tokens import PromptCounter, estimated_tokens
from toys import write_image

OPTIONS = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 500}


def asking(folder: Path, **changes: Any) -> Asking:
    config = EndpointConfig(prompt_price=1.0, completion_price=10.0)
    given: dict[str, Any] = {"model": "m", "config": config, "cache": folder / "answers", "n": 4, "options": OPTIONS, "seed": 0}
    return Asking(**given | changes)


@pytest.fixture
def prompt(tmp_path: Path) -> list[Message]:
    """20 tokens for the template, 4 of text and 10 x 5 for an image of 280 x 140 pixels: 74."""
    return [Message("user", (write_image(tmp_path / "a.png", width=280, height=140), "Where is it?"))]


def test_a_request_is_counted_once_for_all_its_completions_and_at_most_once_for_each(
    tmp_path: Path, prompt: list[Message]
) -> None:
    found = asking(tmp_path).forecast("asked", [prompt, prompt], ["a", "b"], answer=150)
    assert (found.questions, found.completions, found.requests, found.most_requests) == (2, 8, 2, 8)
    assert (found.prompt_tokens, found.most_prompt_tokens) == (148, 592)
    assert (found.completion_tokens, found.most_completion_tokens) == (1200, 4000)
    assert found.cost == pytest.approx((148 * 1 + 1200 * 10) / 1e6)
    assert found.most_cost == pytest.approx((592 * 1 + 4000 * 10) / 1e6)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("options", "answer", "tokens"),
    [
        pytest.param(OPTIONS, 150, 150, id="as-assumed"),
        pytest.param({**OPTIONS, "max_tokens": 90}, 150, 90, id="no-longer-than-the-limit"),
    ],
)
def test_an_answer_is_as_long_as_it_is_taken_for(
    tmp_path: Path, prompt: list[Message], options: dict[str, Any], answer: int, tokens: int
) -> None:
    found = asking(tmp_path, n=1, options=options).forecast("asked", [prompt], ["a"], answer=answer)
    assert found.completion_tokens == tokens


def test_kept_answers_are_left_out_and_say_how_long_the_others_will_be(tmp_path: Path, prompt: list[Message]) -> None:
    keys = sample_keys(prompt, model="m", convention=None, options=OPTIONS, seed=0, name="a", n=4)
    kept = Responses(tmp_path / "answers")
    kept.put(keys[:3], Reply(completions=(Completion(text="one two three"),) * 3, prompt_tokens=9, completion_tokens=9), "m")
    kept.close()
    found = asking(tmp_path).forecast("asked", [prompt, prompt], ["a", "b"], answer=150)
    assert (found.questions, found.completions, found.completion_tokens) == (2, 5, 15)
    keys = sample_keys(prompt, model="m", convention=None, options=OPTIONS, seed=0, name="b", n=4)
    for other in ({"seed": 1}, {"model": "o"}, {"options": {**OPTIONS, "temperature": 0.1}}):
        assert asking(tmp_path, **other).forecast("asked", [prompt], ["a"], answer=150).completions == 4


def test_a_model_folder_counts_exactly(tmp_path: Path, prompt: list[Message]) -> None:
    convention = load_convention(model_folder("tiny"))
    counter = PromptCounter(convention)
    exact = counter.count(prompt, [convention.canvas(280, 140)]).total
    given = asking(tmp_path, convention=convention)
    assert given.forecast("asked", [prompt], ["a"], answer=150).prompt_tokens == exact
    assert given.how_counted() == "exactly"


@pytest.mark.parametrize(("tokens", "total"), [(None, 74), (0, 24), (1000, 1024)])
def test_an_image_costs_what_the_recipe_says(tmp_path: Path, prompt: list[Message], tokens: int | None, total: int) -> None:
    given = asking(tmp_path, config=EndpointConfig(image_tokens=tokens), n=1)
    found = given.forecast("asked", [prompt], ["a"], answer=150)
    assert found.prompt_tokens == total
    assert found.cost is None


def test_text_to_come_is_added_to_every_prompt(tmp_path: Path, prompt: list[Message]) -> None:
    found = asking(tmp_path, n=2).forecast("judged", [prompt] * 3, ["a", "b", "c"], answer=40, extra=100)
    assert (found.prompt_tokens, found.most_prompt_tokens) == (3 * 174, 6 * 174)


def a_forecast(**changes: Any) -> Forecast:
    given: dict[str, Any] = {
        "what": "asked",
        "questions": 10,
        "completions": 20,
        "requests": 10,
        "prompt_tokens": 1000,
        "most_prompt_tokens": 2000,
        "completion_tokens": 500,
        "most_completion_tokens": 4000,
        "prices": Prices(prompt=1000.0, completion=10000.0),
    }
    return Forecast(**given | changes)


def test_an_estimate_adds_up_and_tells_its_ranges() -> None:
    judged = a_forecast(what="judged", prices=Prices(prompt=0.0))
    found = Estimate.of([(a_forecast(), "endpoint"), (judged, "judge.endpoint")], payers={}, notes=["a note"])
    assert (found.requests, found.tokens) == ((20, 40), (3000, 12000))
    assert found.cost == pytest.approx((6.0, 42.0))
    header, rows = found.table()
    assert header[1:] == ("prompts", "requests", "prompt tokens", "completion tokens", "money")
    assert list(rows[0]) == ["asked", "10", "10 - 20", "1,000 - 2,000", "500 - 4,000", "6.00 - 42.00"]
    assert list(rows[-1]) == ["together", "", "20 - 40", "2,000 - 4,000", "1,000 - 8,000", "6.00 - 42.00"]
    assert found.to_json()["kinds"][1]["cost"] == [0.0, 0.0]


def test_a_forecast_without_a_price_leaves_the_sum_open() -> None:
    found = Estimate.of([(a_forecast(), "endpoint"), (a_forecast(prices=Prices()), "endpoint")], payers={}, notes=[])
    assert found.cost is None
    assert found.table()[1][-1][-1] == "no price"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        pytest.param({"max_tokens": 1499}, ["endpoint.max_tokens 1,499 is less than 1,500 with what is spent"], id="tokens"),
        pytest.param({"max_tokens": 1500}, [], id="enough-tokens"),
        pytest.param({"max_cost": 5.9, "prompt_price": 1.0}, ["endpoint.max_cost 5.9 is less than 6.00 with"], id="money"),
        pytest.param({"max_cost": 6.1, "prompt_price": 1.0}, [], id="enough-money"),
    ],
)
def test_a_budget_that_will_not_do_is_told(budget: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    # What a judge costs is not paid from the teacher's budget.
    forecasts = [(a_forecast(), "endpoint"), (a_forecast(), "judge.endpoint")]
    found = Estimate.of(forecasts, payers={"endpoint": asking(tmp_path, config=EndpointConfig(**budget))}, notes=[])
    assert [note.startswith(part) for note, part in zip(found.notes, said, strict=True)] == [True] * len(said)


def test_what_was_spent_before_is_spent(tmp_path: Path) -> None:
    kept = Responses(tmp_path / "answers")
    kept.put(["00"], Reply(completions=(Completion(text="x"),), prompt_tokens=80, completion_tokens=20), "m")
    kept.close()
    for limit, notes in ((1600, 0), (1599, 1)):
        payer = asking(tmp_path, config=EndpointConfig(max_tokens=limit))
        assert len(Estimate.of([(a_forecast(), "endpoint")], payers={"endpoint": payer}, notes=[]).notes) == notes


def test_more_of_the_same_is_scaled() -> None:
    found = a_forecast().scaled(2.5)
    assert (found.questions, found.most_requests, found.tokens, found.most_tokens) == (25, 50, 3750, 15000)


def test_a_rule_of_thumb_for_text() -> None:
    assert [estimated_tokens(text) for text in ("", "Image 12:", "wheelbarrow")] == [0, 4, 2]
