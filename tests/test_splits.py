"""Mixing, duplicates, leaks and fair subsampling."""

from collections import Counter
from pathlib import Path

import pytest

from polyground.answer import Answer
from polyground.errors import DataError
from polyground.records import Example
from polyground.splits import find_leaks, mix, require_no_leaks, subsample, without_duplicates, without_leaks


def example(key: str, *images: Path, task: str = "diff", question: str = "?") -> Example:
    return Example(key=key, task=task, images=images, question=question, target=Answer())


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path, Path]:
    paths = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "copy_of_a.png"
    for path, data in zip(paths, (b"a", b"b", b"a"), strict=True):
        path.write_bytes(data)
    return paths


def test_a_copy_under_another_name_is_a_leak(images: tuple[Path, Path, Path]) -> None:
    a, b, copy = images
    train, test = [example("train/0", a), example("train/1", b)], [example("test/0", copy, copy)]
    [leak] = find_leaks(train, test)
    assert (leak.first, leak.second) == ("train/0", "test/0")
    with pytest.raises(DataError, match=r"'train' and 'test' share 1 images(.|\n)*train/0 and test/0"):
        require_no_leaks({"train": train, "test": test})
    assert without_leaks(train, test) == [train[1]]
    require_no_leaks({"train": without_leaks(train, test), "test": test})


def test_duplicates_are_told_by_bytes_and_question(images: tuple[Path, Path, Path]) -> None:
    a, b, copy = images
    first, same, other = example("0", a), example("1", copy), example("2", a, question="what?")
    assert without_duplicates([first, same, other, example("3", b)]) == [first, other, example("3", b)]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        find_leaks([example("0", tmp_path / "gone.png")], [])


MANY = [
    example(f"{task}/{n}", task=task) for task, count in (("diff", 50), ("region", 5), ("reasoning", 20)) for n in range(count)
]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, {}),
        (15, {"diff": 5, "region": 5, "reasoning": 5}),
        (30, {"diff": 13, "region": 5, "reasoning": 12}),
        (75, {"diff": 50, "region": 5, "reasoning": 20}),
        (100, {"diff": 50, "region": 5, "reasoning": 20}),
    ],
)
def test_subsamples_are_as_even_over_tasks_as_they_can_be(count: int, expected: dict[str, int]) -> None:
    taken = Counter(e.task for e in subsample(MANY, count))
    assert all(abs(taken[task] - wanted) <= 1 for task, wanted in expected.items())
    assert sum(taken.values()) == min(count, len(MANY))


def test_subsamples_are_in_order_repeatable_and_nested() -> None:
    small, large, other = subsample(MANY, 10, seed=1), subsample(MANY, 20, seed=1), subsample(MANY, 10, seed=2)
    assert small == subsample(list(MANY), 10, seed=1) != other
    assert small == [e for e in large if e in small]
    assert large == [e for e in MANY if e in large]


def test_mixing_keeps_everything_and_repeats_itself() -> None:
    sources = {"one": MANY[:50], "two": MANY[50:]}
    mixed = mix(sources)
    assert sorted(e.key for e in mixed) == sorted(e.key for e in MANY)
    assert mixed == mix(sources) != mix(sources, seed=1)
    assert len(mix(sources, weights={"one": 0.5})) == 50


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({"one": MANY, "two": MANY[:1]}, {}, "two examples have the key"),
        ({"one": MANY}, {"one": 1.5}, "must lie in"),
        ({"one": MANY}, {"tow": 0.5}, "unknown sources: tow"),
    ],
)
def test_bad_mixtures_are_refused(sources: dict[str, list[Example]], weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mix(sources, weights=weights)
