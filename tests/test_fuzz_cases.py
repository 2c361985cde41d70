"""What the fuzzers have found, replayed; and the fuzzers' own promises, which can be broken."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import targets

CASES = sorted(path for path in fuzz.CASES.glob("*/*") if not path.name.startswith("."))


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    targets.clear_scratch()


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_met_well(case: Path) -> None:
    targets.TARGETS[case.parent.name](case.read_bytes())


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_good_inputs_keep_every_promise(name: str) -> None:
    seeds = fuzz.SEEDS[name]()
    assert len(seeds) >= 8
    for seed in seeds:
        targets.TARGETS[name](seed)


def test_every_source_is_fuzzed_from_rows_that_it_reads() -> None:
    from polyground.sources import SOURCES

    assert {seed.split()[0].decode() for seed in fuzz.SEEDS["sources"]()} == set(SOURCES)


@pytest.mark.parametrize(
    ("html", "promise"),
    [
        pytest.param("<script>alert(1)</script>", "a script of its own", id="script"),
        pytest.param('<rect onclick="x()"/>', "an attribute of its own", id="handler"),
        pytest.param('<a href="javascript:x()">', "an address of its own", id="address"),
        pytest.param("<marquee>", "a tag of its own", id="tag"),
        pytest.param('<i style="background: url(x)">', "a style of its own", id="style"),
        pytest.param("<style></style>", "one style sheet", id="two-sheets"),
    ],
)
def test_markup_of_another_is_noticed(html: str, promise: str) -> None:
    with pytest.raises(targets.Broken, match=promise):
        targets.Page(f"<style></style>{html}").require_harmless()


def test_a_comment_is_noticed() -> None:
    with pytest.raises(targets.Broken, match="a comment"):
        targets.Page("<!-- x -->")


@pytest.mark.parametrize("message", ["clears\x1b[2J", "turns\u202eround"])
def test_a_message_moves_no_cursor(message: str) -> None:
    targets._one_message(message)
    with pytest.raises(targets.Broken, match="a line of its own"):
        targets._one_message(f"{message}\npolyground: all is well")


def test_changed_rows_are_still_json() -> None:
    row = {"a": [1, 2.5, "x"], "b": {"c": None}}
    changed = [fuzz._changed(row, random.Random(seed)) for seed in range(200)]
    assert all(json.dumps(value) for value in changed)
    assert len({json.dumps(value) for value in changed}) > 100


def test_slices_add_up_and_a_finding_is_listed_once() -> None:
    told: dict = {"targets": {}}
    for _ in range(2):
        fuzz.add(told, "answer", seconds=60, cpu_seconds=50, executions=1000, finding={"what": "KeyError: 'id'", "file": "x"})
    assert told["targets"]["answer"] == {
        "seconds": 120,
        "cpu_seconds": 100,
        "executions": 2000,
        "slices": 2,
        "findings": [{"what": "KeyError: 'id'", "file": "x"}],
    }
