"""Tasks of lmms-eval: their functions give a benchmark's own headline, without lmms-eval being there.

MIG-Bench on the small annotation of `polyground score`, whose responses were counted by hand; MC-Bench on three pairs of images.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from polyground.cli import main
from polyground.errors import ConfigError
from polyground.storage import read_json, read_rows
from sources.source_fixtures import mc_bench, mc_bench_coco

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


# ---------------------------------------------------------------- MC-Bench: boxes over a pair, or none


def boxed(*boxes: tuple[int, list[int]]) -> str:
    return f"<answer>{json.dumps([{'image': image, 'bbox_2d': box} for image, box in boxes])}</answer>"


BALL, OTHER, MAN = (1, [100, 100, 600, 600]), (2, [100, 100, 600, 600]), (2, [0, 0, 1000, 1000])
"""The instances of the three descriptions: one in each image, one in the second, none."""
RIGHT = [boxed(BALL), boxed(MAN), boxed()]
"""Groups cannot be said: of the two balls, which are two groups, the first alone is as good as both."""


@pytest.fixture
def pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., ModuleType]:
    """The task of an MC-Bench file, opened."""

    def export(write: Callable[[Path], tuple[Path, dict[str, Any]]] = mc_bench, *words: str) -> ModuleType:
        pytest.importorskip("pycocotools")
        path, _ = write(tmp_path / "data")
        given = ["--to", "lmms-eval", "--benchmark", "mc_bench", "--grid", "per_mille", "--out", str(tmp_path / "task")]
        assert main(["export", str(path), *given, *words]) == 0
        assert "3 questions of MC-Bench" in capsys.readouterr().out
        return utils_of(tmp_path / "task")

    return export


def asked(utils: ModuleType, folder: Path, replies: list[str]) -> dict[str, Any]:
    """Every metric of the task, as lmms-eval asks for it."""
    docs = list(read_rows(folder / "rows.jsonl"))
    scored = [utils.process_results(doc, [reply]) for doc, reply in zip(docs, replies, strict=False)]
    return {name: getattr(utils, name)([row[name] for row in scored]) for name in scored[0]}


@pytest.mark.parametrize("write", [mc_bench, mc_bench_coco])
def test_a_task_of_mc_bench_gives_weighted_ap50_and_image_level_accuracy(
    pairs: Callable[..., ModuleType], tmp_path: Path, write: Any
) -> None:
    utils = pairs(write)
    # Three instances: the ball of group 1 and the man are found, the ball of group 2 is not.
    told = asked(utils, tmp_path / "task", RIGHT)
    assert told["headline"] == pytest.approx(2 / 3)
    # Boxes stand in exactly the images that hold one in two of three pairs.
    assert told["image_level"] == pytest.approx(2 / 3)
    assert (told["abstained_where_nothing_is"], told["unreadable"]) == (1, 0)
    # One of the two balls, the man, and the empty answer to nothing.
    assert told["mean_iou"] == pytest.approx((1 / 2 + 1 + 1) / 3)


@pytest.mark.parametrize(
    ("replies", "headline", "image_level", "abstained"),
    [
        pytest.param([boxed(BALL, OTHER), *RIGHT[1:]], None, 1, 1, id="both-balls"),
        pytest.param([boxed(), boxed(), boxed()], 0, 1 / 3, 1, id="always-nothing"),
        pytest.param(["nowhere", "nowhere", "nowhere"], 0, 0, 0, id="unreadable"),
        pytest.param([*RIGHT[:2], boxed(BALL)], None, 1 / 3, 0, id="something-where-nothing-is"),
    ],
)
def test_saying_that_nothing_is_there_is_scored(
    pairs: Callable[..., ModuleType],
    tmp_path: Path,
    replies: list[str],
    headline: float | None,
    image_level: float,
    abstained: float,
) -> None:
    told = asked(pairs(), tmp_path / "task", replies)
    assert told["image_level"] == pytest.approx(image_level)
    assert told["abstained_where_nothing_is"] == pytest.approx(abstained)
    assert headline is None or told["headline"] == pytest.approx(headline)


def test_a_task_of_mc_bench_gives_what_score_gives(
    pairs: Callable[..., ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = [boxed(OTHER, BALL), boxed(BALL, MAN), "none"]
    told = asked(pairs(), tmp_path / "task", replies)
    said = [{"index": number, "response": reply} for number, reply in enumerate(replies)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    words = ["--annotation", "data/mc-bench_v0.2_val.json", "--predictions", "said.jsonl", "--json", "scores.json"]
    words = [str(tmp_path / word) if "." in word else word for word in words]
    assert main(["score", "mc_bench", *words, "--grid", "per_mille"]) == 0
    scores = read_json(tmp_path / "scores.json")
    assert told["headline"] == pytest.approx(scores["headline"]["value"])
    assert told["image_level"] == pytest.approx(scores["micro"]["measures"]["image_level"]["value"])


def test_the_order_in_which_processes_hand_in_their_replies_changes_nothing(
    pairs: Callable[..., ModuleType], tmp_path: Path
) -> None:
    utils, replies = pairs(), [boxed(OTHER), boxed(BALL, MAN), boxed(BALL)]
    docs = list(read_rows(tmp_path / "task" / "rows.jsonl"))
    items = [utils.process_results(doc, [reply])["headline"] for doc, reply in zip(docs, replies, strict=True)]
    assert utils.headline(items[::-1]) == utils.headline(items)


def test_a_part_without_an_instance_has_no_precision_and_its_other_metrics(
    pairs: Callable[..., ModuleType], tmp_path: Path
) -> None:
    utils = pairs()
    nothing = list(read_rows(tmp_path / "task" / "rows.jsonl"))[2]
    item = utils.process_results(nothing, [boxed()])["headline"]
    assert math.isnan(utils.headline([item]))
    assert utils.image_level([item]) == utils.abstained_where_nothing_is([item]) == 1


def test_what_average_precision_needs_is_asked_for_when_the_task_is_opened(
    pairs: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs()
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match="pycocotools"):
        utils_of(tmp_path / "task")


def test_every_function_of_mc_bench_is_in_utils(pairs: Callable[..., ModuleType], tmp_path: Path) -> None:
    utils = pairs()
    text = (tmp_path / "task" / "polyground_mc_bench.yaml").read_text(encoding="utf-8")
    named = re.findall(r"!function '?utils\.(\w+)", text)
    assert named[4:] == [
        "headline", "image_level", "abstained_where_nothing_is", "mean_iou", "one_to_one", "image_accuracy", "unreadable",
    ]  # fmt: skip
    assert all(callable(getattr(utils, name)) for name in named)


def test_a_chat_model_is_shown_both_images_of_a_pair_and_told_how_to_say_nothing(
    pairs: Callable[..., ModuleType], tmp_path: Path
) -> None:
    utils = pairs()
    doc = next(iter(read_rows(tmp_path / "task" / "rows.jsonl")))
    [message] = utils.doc_to_messages(doc)
    assert [part["url"].size for part in message["content"] if part["type"] == "image"] == [(200, 100), (100, 200)]
    assert "Golf balls with the same color" in utils.doc_to_text(doc)
    assert "an empty list when" in utils.doc_to_text(doc)
