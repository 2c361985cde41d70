"""Tasks of lmms-eval: their functions give a benchmark's own headline, without lmms-eval being there.

On the small annotation of `polyground score`, whose responses were counted by hand.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from polyground.cli import main
from polyground.storage import read_rows

SMALL = Path(__file__).parent / "stages" / "mig_bench_small"
MEANT = (5 / 11 + 4 / 6 + 3 / 4) / 3
"""Mean over the tasks of the first box at IoU 0.5; one of the 11 rows of region has an annotation that cannot be met."""

Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    """A copy of the annotation, with pictures."""
    path = tmp_path / "data" / "annotation.json"
    path.parent.mkdir()
    shutil.copy(SMALL / "annotation.json", path)
    for row in json.loads(path.read_text(encoding="utf-8")):
        for image in row["images"]:
            target = path.parent / image
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), "red").save(target)
    return path


@pytest.fixture
def export(annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    def run(*words: object) -> Any:
        given = ["--to", "lmms-eval", "--benchmark", "mig_bench", "--out", tmp_path / "task"]
        code = main(["export", str(annotation), *map(str, [*given, *words])])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def utils_of(folder: Path) -> ModuleType:
    """The task's module, opened as lmms-eval opens it."""
    spec = importlib.util.spec_from_file_location("utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_of(folder: Path) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((folder / "polyground_mig_bench.yaml").read_text(encoding="utf-8"), Loader)


def responses() -> dict[str, str]:
    return {
        f"mig_bench/{row['task']}/{row['index']}": row["response"]
        for file in (SMALL / "responses").glob("*.jsonl")
        for row in read_rows(file)
    }


def test_the_functions_of_a_task_give_the_headline_that_score_gives(export: Export, tmp_path: Path) -> None:
    code, out, _ = export("--grid", "per_mille", "--native", "qwen_tokens")
    assert code == 0
    assert "20 questions of MIG-Bench and 1 that count as wrong" in out
    utils, docs, said = utils_of(tmp_path / "task"), list(read_rows(tmp_path / "task" / "rows.jsonl")), responses()
    items = [utils.process_results(doc, [said[doc["key"]]])["headline"] for doc in docs]
    assert utils.headline(items) == pytest.approx(MEANT)
    # Of a part, the row that cannot be met is not counted: 5 of the 10 asked.
    region = [item for doc, item in zip(docs, items, strict=True) if doc["task"] == "region"]
    assert utils.headline(region) == pytest.approx(5 / 10)


def test_every_function_the_yaml_names_is_in_utils(export: Export, tmp_path: Path) -> None:
    export("--grid", "per_mille")
    task, utils = task_of(tmp_path / "task"), utils_of(tmp_path / "task")
    text = (tmp_path / "task" / "polyground_mig_bench.yaml").read_text(encoding="utf-8")
    named = re.findall(r"!function '?utils\.(\w+)", text)
    assert len(named) == 4 + len(task["metric_list"]) == 9
    assert all(callable(getattr(utils, name)) for name in named)
    assert task["task"] == "polyground_mig_bench"
    assert Path(task["dataset_kwargs"]["data_files"][task["test_split"]]).is_file()
    doc = next(iter(read_rows(tmp_path / "task" / "rows.jsonl")))
    assert set(utils.process_results(doc, ["no"])) == {metric["metric"] for metric in task["metric_list"]}
    assert task["doc_to_target"] in doc


def test_chat_models_get_images_in_their_place_and_others_the_question_alone(export: Export, tmp_path: Path) -> None:
    export("--grid", "per_mille", "--instruction", "native")
    utils = utils_of(tmp_path / "task")
    doc = next(iter(read_rows(tmp_path / "task" / "rows.jsonl")))
    [message] = utils.doc_to_messages(doc)
    assert [part["type"] for part in message["content"]] == ["text", "image", "text", "image", "text"]
    assert [part["text"] for part in message["content"] if part["type"] == "text"][:2] == ["Image 1: ", "\nImage 2: "]
    assert message["content"][1]["url"].size == (40, 20)
    asked = "Please locate the 1th region picture in the source image.\nGive the bounding box and nothing else."
    assert utils.doc_to_text(doc) == asked
    assert [picture.size for picture in utils.doc_to_visual(doc)] == [(40, 20), (40, 20)]


@pytest.mark.parametrize(
    ("words", "answer", "right"),
    [
        pytest.param(["--grid", "per_mille"], "[100, 100, 300, 300]", 1.0, id="per-mille"),
        pytest.param(["--grid", "pixels"], "[4, 2, 12, 6]", 1.0, id="pixels-of-the-file"),
        pytest.param(["--grid", "pixels"], "[100, 100, 300, 300]", 0.0, id="never-guessed"),
        pytest.param(["--model", "tiny"], "[100, 100, 300, 300]", 1.0, id="of-the-family"),
    ],
)
def test_the_grid_is_declared(export: Export, tmp_path: Path, words: list[str], answer: str, right: float) -> None:
    assert export(*words, "--native", "qwen_json")[0] == 0
    utils = utils_of(tmp_path / "task")
    doc = next(iter(read_rows(tmp_path / "task" / "rows.jsonl")))
    item = utils.process_results(doc, [f'[{{"bbox_2d": {answer}}}]'])["headline"]
    assert item["rollout"]["score"]["iou"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        pytest.param(["--grid", "per_mille", "--max-pixels", "100"], "go with --model", id="pixels-without-a-model"),
        pytest.param(["--model", "nowhere"], "no such model folder", id="no-such-model"),
        pytest.param(["--grid", "per_mille", "--images-root", "elsewhere"], "missing_image", id="no-images"),
    ],
)
def test_a_task_that_could_not_be_asked_is_refused(export: Export, tmp_path: Path, words: list[str], told: str) -> None:
    code, _, errors = export(*words)
    assert code == 2
    assert told in errors
    assert not (tmp_path / "task").exists()


def test_a_task_is_not_written_over_another_unasked(export: Export) -> None:
    assert export("--grid", "per_mille")[0] == 0
    assert "add --force" in export("--grid", "per_mille")[2]
    assert export("--grid", "per_mille", "--force")[0] == 0
