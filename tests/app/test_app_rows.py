"""Facts about finding rows again: what is read when, what filters keep, and what a run and a data set are turned into."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from small_run import example, make_run, rollout, write

from polyground.app.library import library_of
from polyground.app.rows import Examples, Filter, Lines, QuestionShelf, write_export
from polyground.errors import ConfigError, DataError
from polyground.outcomes import Outcome
from polyground.sources import read_source


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> QuestionShelf:
    """10,000 questions and the answers of two models: `sft` right on every second, `rl` on every fourth."""
    folder = tmp_path_factory.mktemp("many")
    numbers = range(10_000)
    data = write(
        folder / "data.jsonl",
        [example(n, task="diff" if n % 5 else "region", images=2 + n % 3).to_json() for n in numbers],
    )
    sft = write(folder / "sft.jsonl", [rollout(f"q{n}", iou=float(n % 2 == 0)).to_json() for n in numbers])
    rl = write(folder / "rl.jsonl", [rollout(f"q{n}", iou=float(n % 4 == 0), image=float(n % 4 == 0)).to_json() for n in numbers])
    return QuestionShelf("many", Examples(data), {"sft": sft, "rl": rl}, threshold=0.5)


def test_ten_thousand_rows_are_parsed_once_and_then_only_those_looked_at(many: QuestionShelf) -> None:
    read_through = many.parsed
    assert read_through == 30_000  # a line of each of three files, once
    chosen = many.select(Filter(tasks=frozenset({"region"}), outcomes={"sft": Outcome.RIGHT}))
    assert (len(many), len(chosen)) == (10_000, 1_000)
    assert many.parsed == read_through  # choosing reads nothing
    page = [many.read(number) for number in chosen[500:505]]
    assert [found.key for found in page] == ["q5000", "q5010", "q5020", "q5030", "q5040"]
    assert many.parsed == read_through + 15  # five questions and two answers to each


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        pytest.param(Filter(), 10_000, id="everything"),
        pytest.param(Filter(tasks=frozenset({"region"})), 2_000, id="task"),
        pytest.param(Filter(tasks=frozenset({"nowhere"})), 0, id="unknown-task"),
        pytest.param(Filter(images=frozenset({4})), 3_333, id="image-count"),
        pytest.param(Filter(outcomes={"sft": Outcome.RIGHT, "rl": Outcome.WRONG_IMAGE}), 2_500, id="lost-between-two-models"),
        pytest.param(Filter(outcomes={"rl": Outcome.RIGHT | Outcome.WRONG_IMAGE}), 10_000, id="either-outcome"),
        pytest.param(Filter(pass_rate=(0.4, 0.6)), 2_500, id="half-of-the-answers-right"),
        pytest.param(Filter(reward=(0.9, math.inf)), 2_500, id="both-rewarded"),
        pytest.param(Filter(text="q99"), 111, id="part-of-a-key"),
    ],
)
def test_a_filter_keeps(many: QuestionShelf, wanted: Filter, count: int) -> None:
    assert len(many.select(wanted)) == count


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"a": 1}, {"a": 2}])
    path.write_bytes(path.read_bytes() + b'\n{"a": 3')
    lines = Lines(path)
    assert [row["a"] for row in lines.scan()] == [1, 2]
    assert lines.row(1) == {"a": 2}


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl: row 2 is not JSON"):
        list(Lines(path).scan())


# ---- what there is to look through


def test_a_run_offers_its_splits_its_groups_and_its_synthesis(tmp_path: Path) -> None:
    library = library_of(make_run(tmp_path / "run"), options={}, answers={}, scratch=tmp_path / "scratch")
    assert library.names == [
        "evaluation · test",
        "GRPO · groups",
        "rejection sampling · groups",
        "synthesis · dropped",
        "data · rl",
        "data · test",
    ]
    test = library.shelf("evaluation · test")
    assert test.names == ("base", "sft", "rl")
    found = test.read(0)
    assert [(said.name, said.rollout.score.iou) for said in found.said] == [("base", 0.0), ("sft", 0.4), ("rl", 0.8)]
    assert found.example is not None
    assert all(path.is_file() for path in found.example.images)
    assert list(test.select(Filter(outcomes={"sft": Outcome.WRONG_BOX, "rl": Outcome.RIGHT}))) == [0, 1]


def test_a_group_is_one_row_with_its_advantages_and_its_question(tmp_path: Path) -> None:
    library = library_of(make_run(tmp_path / "run"), options={}, answers={}, scratch=tmp_path / "scratch")
    groups = library.shelf("GRPO · groups")
    assert (len(groups), groups.counts) == (2, [2])
    found = groups.read(1)
    assert (found.facts, [said.advantage for said in found.said]) == ({"step": 1}, [-1.5, -0.5, 0.5, 1.5])
    assert found.example is not None
    assert found.example.question == "Which object of image 2 is new?"
    rejected = library.shelf("rejection sampling · groups")
    assert list(rejected.select(Filter(pass_rate=(0.5, 0.5)))) == [0]
    assert library.shelf("synthesis · dropped").read(0).said[0].note == "wrong_box"


def test_another_run_and_further_answers_stand_beside(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    more = {"step 60": other / "evaluate" / "rl" / "test.jsonl"}
    library = library_of(run, options={}, answers=more, compare=[other], scratch=tmp_path / "scratch")
    names = library.shelf("evaluation · test").names
    assert names == ("base", "sft", "rl", "other base", "other sft", "other rl", "step 60")


def test_an_export_is_a_data_set_that_is_read_again(tmp_path: Path) -> None:
    library = library_of(make_run(tmp_path / "run"), options={}, answers={}, scratch=tmp_path / "scratch")
    shelf = library.shelf("evaluation · test")
    out = tmp_path / "marked.jsonl"
    assert write_export([shelf.read(1)], out) == 1
    [again] = read_source("polyground", out, images_root="/")
    found = shelf.read(1).example
    assert found is not None
    assert (again.key, again.target, again.question) == ("test/diff/1", found.target, found.question)
    row = json.loads(out.read_text(encoding="utf-8"))
    assert [answer["name"] for answer in row["answers"]] == ["base", "sft", "rl"]


def test_a_data_set_in_any_format_is_browsed_and_its_bad_rows_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "world" / "rl" / "MIG_data.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([*rows, {**rows[0], "answer": [0.6, 0.2, 0.2, 0.6], "question": "inverted"}]), encoding="utf-8")
    library = library_of(path, source="mig_bench", options={}, answers={}, scratch=tmp_path / "scratch")
    shelf = library.shelf("MIG_data.json")
    assert (len(shelf), shelf.bad, shelf.tasks) == (2, 1, ["diff"])


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        pytest.param("nowhere", {}, DataError, "no such run or data set", id="no-such-path"),
        pytest.param("data.json", {}, ConfigError, "--source", id="format-unknown"),
        pytest.param("folder", {}, DataError, "is not the folder of a run", id="another-folder"),
        pytest.param(
            "data.json", {"source": "mig_bench", "compare": [Path("x")]}, ConfigError, "is for runs", id="compare-of-data"
        ),
    ],
)
def test_what_cannot_be_browsed_says_why(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.json").write_text("[]", encoding="utf-8")
    with pytest.raises(error, match=said):
        library_of(tmp_path / name, **{"options": {}, "answers": {}, "scratch": tmp_path, **options})


def test_a_data_set_without_a_good_row_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"key": "a"}])
    library = library_of(path, options={}, answers={}, scratch=tmp_path / "scratch")
    with pytest.raises(DataError, match=r"no row can be read as polyground \(1 bad\)"):
        library.shelf("rows.jsonl")
