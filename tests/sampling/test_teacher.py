"""A served teacher end to end: unaided, shown the annotation, compared with itself, judged; and what it is to cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_server import FaultServer, serving

from polyground.cli import main
from polyground.config import Recipe, SynthesizeConfig
from polyground.errors import BudgetError, EndpointError
from polyground.records import Example
from polyground.stages import read_split, synthesize, world
from polyground.storage import read_rows
from polyground.worlds.build import annotation_path

QUESTIONS = 12
CANARY = {"TEACHER_CANARY": "sk-canary-teacher-0123456789", "JUDGE_CANARY": "sk-canary-judge-0123456789"}


def completion(think: str, answer: str) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


UNAIDED = completion("Image 1 shows it quite well.", '[{"image": 1, "bbox_2d": [0, 0, 1000, 1000]}]')
"""Right, at a threshold near 0, wherever the target lies on image 1."""
GOOD = '<answer>{"seen": 5, "follows": 5, "own": 5}</answer>'
POOR = '<answer>{"seen": 5, "follows": 2, "own": 5}</answer>'


def asked_text(request: dict[str, Any]) -> str:
    return str(request["messages"][0]["content"][-1]["text"])


def kind_of(request: dict[str, Any]) -> str:
    text = asked_text(request)
    return "judge" if "Judge the reasoning" in text else "explain" if "The annotation of this question" in text else "ask"


def kinds(server: FaultServer) -> dict[str, int]:
    return dict(Counter(map(kind_of, server.requests)))


def told(request: dict[str, Any]) -> str:
    """The annotation in a prompt that shows it."""
    found = re.search(r"for your eyes only, is: (.*)", asked_text(request))
    assert found is not None
    return found[1]


def teacher(**texts: Callable[[dict[str, Any], int], str] | str) -> Callable[[dict[str, Any], int], str]:
    """A model that knows image 1 only, explains what it is told and finds everything good, but for what is said here."""

    def says(request: dict[str, Any], number: int) -> str:
        kind = kind_of(request)
        if kind in texts:
            text = texts[kind]
            return text if isinstance(text, str) else text(request, number)
        if kind == "explain":
            return completion("It is the one that is not like the others.", told(request))
        return GOOD if kind == "judge" else UNAIDED

    return says


@pytest.fixture
def served() -> Iterator[FaultServer]:
    with serving() as server:
        server.says = teacher()
        yield server


@pytest.fixture(scope="module")
def annotation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train split of the simulated world, as a data file of a user's own."""
    out = tmp_path_factory.mktemp("data")
    sizes = {"train": QUESTIONS, "rl": 0, "validation": 0, "test": 0, "ood": 0, "perception": 0}
    world.run(Recipe.model_validate({"out": out, "world": sizes}))
    return annotation_path(out / "world", "train")


def tree_at(annotation: Path, out: Path, server: FaultServer | None, **options: Any) -> dict[str, Any]:
    """A recipe of synthesis with a served teacher; without a server, at an address where nobody listens."""
    endpoint = {"concurrency": 2, "retries": 2, **options.pop("endpoint", {})}
    return {
        "out": str(out),
        "data": {"train": [{"source": "mig_bench", "path": str(annotation), "options": {"name": "w"}}]},
        "synthesize": {
            "teacher": "endpoint",
            "teacher_base_url": server.url if server else "http://127.0.0.1:9/v1",
            "teacher_model": "m",
            "pass_iou": 1e-6,
            "endpoint": endpoint,
            **options,
        },
    }


@pytest.fixture
def recipe_at(annotation: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    return partial(tree_at, annotation, tmp_path / "run")


Options = Callable[..., dict[str, Any]]


def synthesized(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The summary and the rows of both files."""
    summary = dict(synthesize.run(Recipe.model_validate(tree)))
    files = [Path(tree["out"]) / "synthesize" / f"{name}.jsonl" for name in ("kept", "rejected")]
    kept, rejected = (list(read_rows(file)) if file.is_file() else [] for file in files)
    return summary, kept, rejected


@pytest.fixture
def examples(recipe_at: Options) -> list[Example]:
    return read_split(Recipe.model_validate(recipe_at(None)), "train")


def known(examples: list[Example]) -> int:
    """Questions that the teacher answers rightly unaided."""
    found = sum(example.target.boxes[0].image == 1 for example in examples)
    assert 0 < found < QUESTIONS
    return found


def test_an_unaided_teacher_is_told_its_task_and_never_the_annotation(
    served: FaultServer, recipe_at: Options, examples: list[Example]
) -> None:
    summary, kept, _ = synthesized(recipe_at(served, task_advice={"region": "Look for corners."}))
    assert kinds(served) == {"ask": QUESTIONS}
    assert (summary["kept"], "kept_aided" in summary) == (known(examples), False)
    assert not any(row["aided"] for row in kept)
    texts = [asked_text(request) for request in served.requests]
    regions = sum(example.task == "region" for example in examples)
    assert sum("Look for corners." in text for text in texts) == regions > 0
    assert sum("one another in time" in text for text in texts) == sum(e.task == "object_tracking" for e in examples) > 0


def test_the_annotation_is_shown_for_the_questions_that_the_teacher_fails(
    served: FaultServer, recipe_at: Options, examples: list[Example]
) -> None:
    summary, kept, rejected = synthesized(recipe_at(served, aid="failed"))
    failed = QUESTIONS - known(examples)
    assert kinds(served) == {"ask": QUESTIONS, "explain": failed}
    assert (summary["kept"], summary["kept_aided"], rejected) == (QUESTIONS, failed, [])
    assert [row["attempts"] for row in kept] == [2 if row["aided"] else 1 for row in kept]
    assert summary["dropped_attempts"] == {"wrong_image": failed}
    assert summary["endpoint"]["requests"] == QUESTIONS + failed


def test_the_annotation_is_shown_from_the_start(served: FaultServer, recipe_at: Options) -> None:
    summary, kept, _ = synthesized(recipe_at(served, aid="always"))
    assert kinds(served) == {"explain": QUESTIONS}
    assert summary["kept"] == summary["kept_aided"] == len(kept) == QUESTIONS


def test_reasoning_that_admits_it_was_told_is_rejected_and_counted(served: FaultServer, recipe_at: Options) -> None:
    numbers = iter(range(QUESTIONS))
    leaks = ("As the annotation says, it is there.", "Since the answer is given, it is there.", "I was told where it is.")

    def explain(request: dict[str, Any], _: int) -> str:
        number = next(numbers)
        if number == 3:
            return completion("There is nothing of the kind.", "unsure")
        return completion(leaks[number] if number < 3 else "It is the one that differs.", told(request))

    served.says = teacher(explain=explain)
    summary, _, rejected = synthesized(recipe_at(served, aid="always", endpoint={"concurrency": 1}))
    assert summary["dropped"] == summary["dropped_attempts"] == {"disputed": 1, "tells": 3}
    assert summary["kept"] == QUESTIONS - 4
    assert [row["reason"] for row in rejected] == ["tells", "tells", "tells", "disputed"]


def test_only_what_attempts_agree_on_is_kept(served: FaultServer, recipe_at: Options, examples: list[Example]) -> None:
    second = UNAIDED.replace('"image": 1', '"image": 2')
    served.says = teacher(ask=lambda _, number: second if number == 2 else UNAIDED)
    summary, kept, _ = synthesized(recipe_at(served, samples_per_example=3, self_consistency=0.6))
    assert kinds(served) == {"ask": QUESTIONS}
    assert {request["n"] for request in served.requests} == {3}
    assert summary["kept"] == known(examples)
    assert {row["agreement"] for row in kept} == {2 / 3}
    on_second = sum(example.target.boxes[0].image == 2 for example in examples)
    assert summary["dropped"].get("inconsistent", 0) == on_second > 0
    assert summary["mean_agreement"] == pytest.approx(2 / 3)


def test_the_teacher_may_judge_itself(served: FaultServer, recipe_at: Options, examples: list[Example]) -> None:
    replies = iter([GOOD, POOR, "Good."])
    served.says = teacher(judge=lambda *_: next(replies, GOOD))
    summary, kept, rejected = synthesized(recipe_at(served, judge={}, endpoint={"concurrency": 1}))
    right = known(examples)
    assert kinds(served) == {"ask": QUESTIONS, "judge": right}
    assert summary["kept"] == right - 2
    assert (summary["dropped"]["poor"], summary["dropped"]["unmarked"]) == (1, 1)
    assert all(row["marks"] == {"seen": 5, "follows": 5, "own": 5} for row in kept)
    assert [row["marks"]["follows"] for row in rejected if row["reason"] == "poor"] == [2]
    assert summary["mean_marks"]["follows"] == pytest.approx((5 * (right - 2) + 2) / (right - 1))
    assert "judge_endpoint" not in summary
    judged = [request for request in served.requests if kind_of(request) == "judge"]
    # It sees images, reasoning and answer, and neither knows who was aided nor that there is an annotation.
    for request in judged:
        assert "Image 1 shows it quite well." in asked_text(request)
        assert "annotation" not in asked_text(request)
        assert sum(part["type"] == "image_url" for part in request["messages"][0]["content"]) > 1


def test_a_judge_of_its_own_has_a_server_a_price_and_a_budget_of_its_own(
    served: FaultServer, recipe_at: Options, examples: list[Example]
) -> None:
    with serving() as other:
        other.says = teacher()
        judge = {"model": "j", "base_url": other.url, "grid": "pixels", "samples": 2, "temperature": 0.5}
        judge |= {"endpoint": {"concurrency": 2, "prompt_price": 1000.0}}
        summary, kept, _ = synthesized(recipe_at(served, judge=judge, endpoint={"prompt_price": 1.0}))
        assert kinds(served) == {"ask": QUESTIONS}
        assert kinds(other) == {"judge": known(examples)}
        assert {(request["model"], request["n"]) for request in other.requests} == {("j", 2)}
        # As large as the images are, in pixels.
        assert re.search(r"x runs from 0 to (?!1000)\d+", asked_text(other.requests[0]))
    assert {row["judge"] for row in kept} == {"j"}
    usage = summary["judge_endpoint"]
    assert usage["requests"] == known(examples)
    assert usage["cost"] == pytest.approx(usage["prompt_tokens"] / 1e3)
    assert summary["endpoint"]["cost"] == pytest.approx(summary["endpoint"]["prompt_tokens"] / 1e6)


def everything(judge: FaultServer | None = None, **endpoint: Any) -> dict[str, Any]:
    """All options at once."""
    marking: dict[str, Any] = {"samples": 2, "temperature": 0.5, "candidates": 2}
    if judge is not None:
        marking |= {"model": "j", "base_url": judge.url, "endpoint": {"concurrency": 2, "retries": 2, **endpoint}}
    return {"aid": "failed", "samples_per_example": 3, "self_consistency": 0.5, "judge": marking}


def varied(request: dict[str, Any], number: int) -> str:
    """Answers that depend on the request alone, with every kind of failing among them."""
    chance = (request["seed"] + 7 * number) % 4
    match kind_of(request):
        case "ask":
            return UNAIDED if chance else "I do not know."
        case "explain":
            return completion("It is the one." if chance else "The annotation says so.", told(request))
        case _:
            return (GOOD, GOOD, POOR, "?")[chance]


def without_addresses(tree: dict[str, Any]) -> list[Any]:
    _, kept, rejected = synthesized(tree)
    return [kept, rejected]


def paid_twice(*servers: FaultServer) -> list[Any]:
    """Requests answered more than once. What is asked of a teacher and of a judge differs anyhow."""
    paid = Counter(item for server in servers for item in server.paid())
    return [item for item, times in paid.items() if times > 1]


@pytest.fixture(scope="module")
def calm(annotation: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Any, Any]]:
    """Rows and bills (the teacher's, the judge's) where nothing goes wrong; by whether the judge is one of its own."""
    found = {}
    for own_judge in (False, True):
        with serving() as one, serving() as other:
            one.says = other.says = varied
            options = everything(other if own_judge else None)
            rows = without_addresses(tree_at(annotation, tmp_path_factory.mktemp("calm"), one, **options))
            found[own_judge] = rows, (one.paid(), other.paid())
    return found


@pytest.mark.parametrize(
    ("own_judge", "kind", "number"),
    [
        pytest.param(False, "ask", 3, id="unaided"),
        pytest.param(False, "explain", 2, id="aided"),
        pytest.param(False, "judge", 2, id="judged"),
        pytest.param(True, "judge", 3, id="by-its-own-judge"),
    ],
)
def test_a_server_that_dies_anywhere_costs_nothing_twice_and_changes_no_row(
    recipe_at: Options, calm: Any, own_judge: bool, kind: str, number: int
) -> None:
    expected, bill = calm[own_judge]
    with serving() as one, serving() as other:
        one.says = other.says = varied
        options = everything(other if own_judge else None)
        mortal = other if own_judge else one
        mortal.hold = lambda: mortal.script.extend(["404"] * 9) if kinds(mortal).get(kind) == number else None
        with pytest.raises(EndpointError, match="the same command goes on"):
            synthesized(recipe_at(one, **options))
        assert kinds(mortal)[kind] >= number
        assert len(one.answered) + len(other.answered) < len(bill[0]) + len(bill[1])
        mortal.hold = lambda: None
        # Fewer than the tries of a request: all of them may befall the same one.
        one.script, other.script = ["half", "dies"], ["garbage", "500"]
        assert without_addresses(recipe_at(one, **options)) == expected
        assert (one.paid(), other.paid()) == bill
        assert paid_twice(one, other) == []


def test_a_process_killed_while_the_judge_is_asked_goes_on_without_paying_twice(
    recipe_at: Options, calm: Any, tmp_path: Path
) -> None:
    expected, (bill, _) = calm[False]
    with serving() as server:
        server.says = varied
        options = everything() | {"endpoint": {"concurrency": 1}}
        tree = recipe_at(server, **options)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        process = subprocess.Popen(
            [sys.executable, "-m", "polyground", "synthesize", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        killed: list[int] = []

        def kill_in_the_third_judgement() -> None:
            if kinds(server).get("judge") == 3 and not killed:
                killed.append(len(server.requests))
                os.kill(process.pid, signal.SIGKILL)
                process.wait()

        server.hold = kill_in_the_third_judgement
        process.wait(120)
        assert process.returncode == -signal.SIGKILL
        server.hold = lambda: None
        assert without_addresses(tree) == expected
        # The request that was under way when the process died is the only one asked twice.
        asked = Counter((json.dumps(request["messages"]), request["seed"]) for request in server.requests)
        assert sorted(asked.values())[-2:] == [1, 2]
        assert len(server.requests) == len(bill) + 1


def test_a_judges_spent_budget_stops_the_stage_and_a_larger_one_goes_on(served: FaultServer, recipe_at: Options) -> None:
    with serving() as other:
        other.says = teacher()
        options = {"judge": {"model": "j", "base_url": other.url, "endpoint": {"concurrency": 1, "max_tokens": 1}}}
        with pytest.raises(BudgetError, match=r"raise judge\.endpoint\.max_tokens"):
            synthesized(recipe_at(served, **options))
        assert len(other.requests) == 1
        options["judge"]["endpoint"] = {}  # type: ignore[index]
        summary, _, _ = synthesized(recipe_at(served, **options))
        assert summary["asked"] == QUESTIONS
        assert len(served.requests) == QUESTIONS
        assert paid_twice(served, other) == []


def test_a_judges_spent_budget_may_also_finish_the_stage(
    served: FaultServer, recipe_at: Options, examples: list[Example]
) -> None:
    with serving() as other:
        other.says = teacher()
        judge = {"model": "j", "base_url": other.url, "endpoint": {"concurrency": 1, "max_tokens": 1}}
        summary, kept, _ = synthesized(recipe_at(served, judge=judge, endpoint={"on_budget": "finish"}))
    # One judgement was paid for; the questions that failed before it needed none.
    assert len(kept) == 1 == len(other.requests)
    assert summary["asked"] == QUESTIONS - known(examples) + 1
    assert summary["stopped"].startswith("the budget of 1 tokens is spent")


def test_another_judge_may_judge_the_same_answers(served: FaultServer, recipe_at: Options, examples: list[Example]) -> None:
    tree = recipe_at(served)
    synthesized(tree)
    shutil.rmtree(Path(tree["out"]) / "synthesize")
    for least in (3, 4):
        summary, _, _ = synthesized(recipe_at(served, judge={"min_mark": least}))
        assert summary["kept"] == known(examples)
        shutil.rmtree(Path(tree["out"]) / "synthesize")
    assert kinds(served) == {"ask": QUESTIONS, "judge": known(examples)}


def test_keys_reach_neither_files_nor_messages(
    served: FaultServer, recipe_at: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in CANARY.items():
        monkeypatch.setenv(name, key)
    with serving(["ok", "401"]) as other:
        other.says = teacher()
        judge = {"model": "j", "base_url": other.url, "api_key_env": "JUDGE_CANARY", "endpoint": {"concurrency": 1}}
        tree = recipe_at(served, api_key_env="TEACHER_CANARY", judge=judge)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        assert main(["synthesize", str(path)]) == 2
        assert main(["synthesize", str(path)]) == 0
        assert {headers["authorization"] for headers in served.headers} == {f"Bearer {CANARY['TEACHER_CANARY']}"}
        assert {headers["authorization"] for headers in other.headers} == {f"Bearer {CANARY['JUDGE_CANARY']}"}
    shown = "".join(capsys.readouterr())
    assert "check $JUDGE_CANARY" in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any("sk-canary" in text for text in [shown, *(path.read_text("utf-8", "replace") for path in files)])


# ---------------------------------------------------------------- the cost, before


def estimated(tree: dict[str, Any], examples: list[Example]) -> synthesize.Estimate:
    return synthesize.estimate(Recipe.model_validate(tree), examples)


@pytest.mark.parametrize("aid", ["never", "always"])
def test_an_estimate_counts_the_requests_that_follow(
    served: FaultServer, recipe_at: Options, examples: list[Example], aid: str
) -> None:
    tree = recipe_at(served, aid=aid, samples_per_example=2, endpoint={"prompt_price": 2.0, "completion_price": 10.0})
    found = estimated(tree, examples)
    assert served.requests == []
    assert not Path(tree["out"]).exists()
    assert found.requests == (QUESTIONS, 2 * QUESTIONS)
    [one] = found.forecasts
    # 150 tokens an answer, at most 512.
    assert (one.completion_tokens, one.most_completion_tokens) == (300 * QUESTIONS, 1024 * QUESTIONS)
    assert found.cost == pytest.approx(
        ((one.prompt_tokens * 2 + one.completion_tokens * 10) / 1e6, (one.most_prompt_tokens * 2 + 10240 * QUESTIONS) / 1e6)
    )
    synthesized(tree)
    assert len(served.requests) == QUESTIONS


def test_an_estimate_is_an_upper_bound_where_the_work_depends_on_the_answers(recipe_at: Options, examples: list[Example]) -> None:
    with serving() as server, serving() as judge:
        server.says = judge.says = varied
        tree = recipe_at(server, **everything(judge))
        found = estimated(tree, examples)
        assert [f.what for f in found.forecasts] == ["unaided", "aided, at most", "judged, at most"]
        assert [f.requests for f in found.forecasts] == [QUESTIONS, QUESTIONS, 4 * QUESTIONS]
        assert [f.most_requests for f in found.forecasts] == [3 * QUESTIONS, 3 * QUESTIONS, 8 * QUESTIONS]
        assert found.cost is None
        synthesized(tree)
        asked = kinds(server)
        assert asked["ask"] == QUESTIONS
        assert 0 < asked["explain"] <= QUESTIONS
        assert 0 < len(judge.requests) <= 4 * QUESTIONS


def test_what_is_kept_is_not_estimated_again(served: FaultServer, recipe_at: Options, examples: list[Example]) -> None:
    tree = recipe_at(served, endpoint={"concurrency": 1, "max_tokens": 500})
    with pytest.raises(BudgetError):
        synthesized(tree)
    paid = len(served.requests)
    assert 0 < paid < QUESTIONS
    [left] = estimated(tree, examples).forecasts
    assert left.questions == left.requests == QUESTIONS - paid
    # An answer is now as long as those that are there: 53 tokens by the rule of thumb.
    assert left.completion_tokens == (QUESTIONS - paid) * 53
    assert any("max_tokens 500 is less than" in note for note in estimated(tree, examples).notes)


def test_a_dry_run_shows_the_cost_and_asks_nobody(
    served: FaultServer, recipe_at: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = everything() | {"api_key_env": "NOT_SET_ANYWHERE", "endpoint": {"prompt_price": 2.0, "max_cost": 1e-4}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_at(served, **options)))
    for verb in ("synthesize", "run"):
        assert main([verb, str(path), "--dry-run"]) == 0
        shown = capsys.readouterr().out
        block = shown.partition("# cost of synthesis\n")[2].partition("\n\n")[0]
        for part in ("unaided", "aided, at most", "judged, at most", "together", "endpoint.max_cost 0.0001 is less than"):
            assert part in block
    assert served.requests == []
    assert [found.name for found in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_cost_is_told_before_the_stage_asks(
    served: FaultServer, recipe_at: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[str] = []

    def hold() -> None:
        before.append(capsys.readouterr().err)

    served.hold = hold
    synthesized(recipe_at(served, endpoint={"concurrency": 1, "prompt_price": 1.0, "completion_price": 1.0}))
    assert "cost of asking" in before[0]
    assert re.search(r"unaided +12 +12 ", before[0])


def test_images_cost_what_the_recipe_says_where_nothing_better_is_known(recipe_at: Options, examples: list[Example]) -> None:
    images = sum(len(example.images) for example in examples)
    totals = [estimated(recipe_at(None, endpoint={"image_tokens": n}), examples).forecasts[0].prompt_tokens for n in (0, 1000)]
    assert totals[1] - totals[0] == 1000 * images


def test_many_questions_are_measured_on_some(recipe_at: Options, examples: list[Example]) -> None:
    one = estimated(recipe_at(None), examples[:1]).forecasts[0]
    found = estimated(recipe_at(None), examples[:1] * 3 * synthesize.LOOKED_AT)
    assert found.forecasts[0].requests == 3 * synthesize.LOOKED_AT
    assert found.forecasts[0].prompt_tokens == one.prompt_tokens * 3 * synthesize.LOOKED_AT
    assert "measured on 1,000 of 3,000 questions" in found.notes


# ---------------------------------------------------------------- what decides the rows


def test_what_is_not_used_decides_nothing_and_rows_of_before_are_known_again() -> None:
    plain = synthesize._deciding(SynthesizeConfig())
    assert not {"aid", "task_advice", "self_consistency", "judge", "teacher_version"} & plain.keys()


def test_where_a_judge_is_served_decides_nothing(served: FaultServer, recipe_at: Options) -> None:
    with serving() as one, serving() as other:
        one.says = other.says = teacher()
        for server in (one, other):
            judge = {"model": "j", "base_url": server.url, "endpoint": {"concurrency": 1}}
            summary, _, _ = synthesized(recipe_at(served, judge=judge))
            assert summary["asked"] == QUESTIONS
        assert other.requests == []
