"""Facts that hold for every public benchmark: its own annotation, given as the answers, is its best score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from source_fixtures import FIXTURES

from polyground.answer import write_completion
from polyground.benchmarks import BENCHMARKS, ceiling, read_annotation
from polyground.cli import main
from polyground.geometry import PER_MILLE
from polyground.storage import read_json

KINDS = {kind: source for kind, (source, _) in FIXTURES.items() if source in BENCHMARKS}


def score(folder: Path, source: str, path: Path, options: dict[str, Any], answers: dict[str, str]) -> Any:
    predictions = folder / "answers.jsonl"
    rows = [{"example": key, "completion": {"text": text}} for key, text in answers.items()]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--annotation", path, "--predictions", predictions, "--grid", "per_mille", "--json", folder / "out.json"]
    for name in ("version", "images_root", "strip_prefix"):
        if name in options:
            words += [f"--{name.replace('_', '-')}", options[name]]
    assert main(["score", source, "--bootstrap", "10", *map(str, words)]) == 0
    return read_json(folder / "out.json")


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("version", "images_root", "strip_prefix")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_annotation_itself_is_the_best_answer(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind]
    if BENCHMARKS[source].headline == "average_precision":
        pytest.importorskip("pycocotools")
    path, options = FIXTURES[kind][1](tmp_path)
    annotation = read_annotation(source, path, **given(options))
    answers = {e.key: write_completion("I looked.", e.target, [PER_MILLE] * len(e.images)) for e in annotation.examples}
    found = score(tmp_path, source, path, options, answers)
    assert found["headline"]["value"] == pytest.approx(ceiling(annotation))
    assert found["micro"]["mean_iou"]["value"] == pytest.approx(1)
    # The groups of MC-Bench are the one thing that an answer cannot say.
    assert ceiling(annotation) == pytest.approx(1) or source == "mc_bench"
    assert all(value is None or value["value"] == 1 for name, value in images_and_abstention(found).items()), found


def images_and_abstention(found: Any) -> dict[str, Any]:
    micro = found["micro"]
    names = ("abstained_where_nothing_is", "image_level")
    return {"image": micro["image_accuracy"], **{name: micro.get("measures", {}).get(name) for name in names}}


@pytest.mark.parametrize("kind", KINDS)
def test_silence_scores_nothing(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind]
    if BENCHMARKS[source].headline == "average_precision":
        pytest.importorskip("pycocotools")
    path, options = FIXTURES[kind][1](tmp_path)
    annotation = read_annotation(source, path, **given(options))
    found = score(tmp_path, source, path, options, {example.key: "" for example in annotation.examples})
    assert (found["headline"]["value"], found["micro"]["mean_iou"]["value"]) == (0, 0)
    assert found["micro"]["unreadable"] == {"missing": 1}


def test_the_words_around_a_description_are_told(tmp_path: Path) -> None:
    path, _ = FIXTURES["mc_bench"][1](tmp_path)
    assert "{text}" in str(read_annotation("mc_bench", path).tags()["template"])
    assert read_annotation("mc_bench", path, template="Box {text}.").tags()["template"] == "Box {text}."


def test_every_benchmark_has_a_fixture() -> None:
    assert set(KINDS.values()) == set(BENCHMARKS)
