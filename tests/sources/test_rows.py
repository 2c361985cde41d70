"""Which rows of a file are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyground.errors import DataError
from polyground.sources import read_source


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten questions, numbered from 0."""
    rows = [{"task": "region", "images": ["a.png"], "question": f"{n}?", "answer": [0.0, 0.0, 0.5, 1.0]} for n in range(10)]
    path = tmp_path / "ten.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, range(10), id="all"),
        pytest.param({"limit": 3}, [0, 1, 2], id="the-first"),
        pytest.param({"skip": 8}, [8, 9], id="what-follows"),
        pytest.param({"skip": 2, "limit": 2}, [2, 3], id="a-piece"),
        pytest.param({"every": 4}, [0, 4, 8], id="spread-over-the-file"),
        pytest.param({"every": 4, "skip": 1}, [1, 5, 9], id="another-spread-that-shares-no-question"),
        pytest.param({"every": 4, "skip": 1, "limit": 2}, [1, 5], id="a-few-of-them"),
        pytest.param({"skip": 99}, [], id="beyond-the-end"),
    ],
)
def test_rows_are_taken_by_position(ten: Path, options: dict[str, int], expected: list[int]) -> None:
    examples = read_source("mig_bench", ten, check_images="no", version="original", **options)
    assert [int(example.question.rstrip("?")) for example in examples] == list(expected)


@pytest.mark.parametrize("options", [{"limit": 0}, {"skip": -1}, {"every": 0}, {"every": 1.5}, {"limit": True}, {"skip": "3"}])
def test_a_position_that_is_none_is_refused(ten: Path, options: dict[str, object]) -> None:
    [name] = options
    with pytest.raises(DataError, match=rf"{name} must be a whole number of at least [01]"):
        read_source("mig_bench", ten, check_images="no", **options)  # type: ignore[arg-type]
