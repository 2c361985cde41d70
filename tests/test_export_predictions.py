"""A run's predictions in other people's layouts, opened by their own packages; the run is written by hand, without a model.

Four grounding questions of four tasks and two of each kind of multiple choice. The base answers a box that names no image, and
nothing else that can be read; the SFT model is right twice, once in the wrong image, once unreadable, and right on one letter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from polyground.answer import Answer, Located
from polyground.cli import main
from polyground.config import Recipe, dump_recipe
from polyground.conventions import model_folder
from polyground.geometry import FULL_IMAGE, Box
from polyground.records import Completion, Example, Rollout, Score
from polyground.stages import evaluate, evaluation_splits, model_identity, read_split, split_identity, world
from polyground.storage import RunFolder, atomic_write_json, read_json, read_rows

CORNER = Box(0.0, 0.0, 0.125, 0.125)
Export = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run as `evaluate` leaves it."""
    out = tmp_path_factory.mktemp("hand") / "run"
    sizes = {"train": 0, "rl": 0, "validation": 0, "test": 4, "ood": 0, "perception": 2}
    made = Recipe.model_validate({"name": "hand", "out": out, "model": {"path": "tiny"}, "world": sizes})
    world.run(made)
    merged = out / "sft-merged"
    shutil.copytree(model_folder("tiny"), merged, ignore=shutil.ignore_patterns("*.safetensors"))
    (merged / "model.safetensors").write_bytes(b"weights")
    (merged / "merged_from.json").write_text(json.dumps({"base": str(out)}), encoding="utf-8")
    with RunFolder(merged, "merge", {}) as folder:
        folder.finish({"max_logprob_difference": 2e-5})
    with RunFolder(
        out / "sft", "sft", {"seed": 7, "sft": {"learning_rate": 0.001, "max_steps": -1, "use_peft": False}}
    ) as folder:
        folder.finish({"rows": 1200, "steps": 30})
    splits = evaluation_splits(made)
    identity = {
        "evaluate": {"limit_per_split": None},
        "prompts": made.prompts.to_json(),
        "model": model_identity(made),
        "data": {split: split_identity(made, split) for split in splits},
    }
    for role, answer in {"base": _base, "sft": _sft}.items():
        with RunFolder(out / "evaluate" / role, "evaluate", identity) as folder:
            for split in splits:
                for position, example in enumerate(read_split(made, split)):
                    folder.append(f"{split}.jsonl", _rollout(example, answer(example, position)).to_json())
            folder.finish({})
    atomic_write_json(out / "evaluate" / "outcomes.json", evaluate.tell_outcomes(made, ["base", "sft"], splits))
    atomic_write_json(out / "evaluate" / "results.json", evaluate.tabulate(made, ["base", "sft"], splits))
    return made


def _base(example: Example, position: int) -> Answer | None:
    return Answer((Located(None, FULL_IMAGE),)) if example.target.boxes and position == 0 else None


def _sft(example: Example, position: int) -> Answer | None:
    if example.target.choice is not None:
        return example.target if position == 0 else Answer(choice=next(c for c in "AB" if c != example.target.choice))
    [gold] = example.target.boxes
    elsewhere = next(n for n in range(1, len(example.images) + 1) if n != gold.image)
    return [example.target, Answer((Located(elsewhere, CORNER),)), None, Answer((Located(gold.image, gold.box, 0.5),))][position]


def _rollout(example: Example, answer: Answer | None) -> Rollout:
    right = answer is not None and answer.choice == example.target.choice and _places(answer) == _places(example.target)
    score = Score(
        total=float(right),
        parts={},
        iou=float(right),
        image_correct=float(right) if example.target.boxes else None,
        unreadable="missing" if answer is None else None,
        answer=answer,
    )
    return Rollout(example=example.key, task=example.task, completion=Completion(text="said | so <b>"), score=score)


def _places(answer: Answer) -> list[Any]:
    return [(located.image, located.box) for located in answer.boxes]


@pytest.fixture
def export(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs the verb on the run's folder; gives the exit code, what was printed, and what went to standard error."""

    def run(to: str, *words: object, out: Path | None = None, source: Path | None = None) -> Any:
        target = tmp_path / "out" if out is None else out
        code = main(["export", str(source or recipe.out), "--to", to, "--out", str(target), *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def gold(recipe: Recipe) -> list[Example]:
    return read_split(recipe, "test")


# ---------------------------------------------------------------- COCO


def test_pycocotools_loads_truth_and_results_and_counts_what_is_right(export: Export, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    assert export("coco", "--model", "sft")[0] == 0
    truth = coco.COCO(tmp_path / "out" / "annotations" / "test.json")
    found = truth.loadRes(str(tmp_path / "out" / "results" / "test" / "sft.json"))
    measured = cocoeval.COCOeval(truth, found, "bbox")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    # Two tasks of four are found, and each task is a category of one instance.
    assert measured.stats[1] == pytest.approx(0.5)


def test_every_image_of_a_question_is_an_image_of_its_own(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("coco")
    truth = read_json(tmp_path / "out" / "annotations" / "test.json")
    assert [image["question_id"] for image in truth["images"]] == [e.key for e in gold(recipe) for _ in e.images]
    assert [image["id"] for image in truth["images"]] == list(range(1, len(truth["images"]) + 1))
    for image, source in zip(truth["images"], (path for e in gold(recipe) for path in e.images), strict=True):
        copied = tmp_path / "out" / "images" / image["file_name"]
        assert copied.read_bytes() == source.read_bytes()
        with Image.open(copied) as picture:
            assert picture.size == (image["width"], image["height"])
    assert len({image["file_name"] for image in truth["images"]}) == len(truth["images"])


def test_a_box_is_in_pixels_of_the_image_it_names(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("coco")
    truth = read_json(tmp_path / "out" / "annotations" / "test.json")
    rows = read_json(tmp_path / "out" / "results" / "test" / "sft.json")
    images = {image["id"]: image for image in truth["images"]}
    assert [row["score"] for row in rows] == [1.0, 1.0, 0.5]
    first, second, _ = rows
    [box] = gold(recipe)[0].target.boxes
    width, height = images[first["image_id"]]["width"], images[first["image_id"]]["height"]
    x0, y0, x1, y1 = box.box.to_pixels(width=width, height=height)
    assert first["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
    assert images[first["image_id"]]["image_in_question"] == box.image
    assert second["bbox"] == [0, 0, images[second["image_id"]]["width"] / 8, images[second["image_id"]]["height"] / 8]
    assert images[second["image_id"]]["image_in_question"] != gold(recipe)[1].target.boxes[0].image


def test_what_a_layout_cannot_hold_is_told(export: Export) -> None:
    code, out, _ = export("coco")
    assert code == 0
    assert "4 of test" in out
    assert "4 questions answered by a letter" in out
    assert "boxes that name none of several images: 1 of base" in out
    assert "results/test/base.json: no box was answered" in out


# ---------------------------------------------------------------- supervision


def test_supervision_arrays_stand_under_the_pictures_of_the_coco_file(export: Export, tmp_path: Path) -> None:
    export("supervision", "--split", "test")
    truth = read_json(tmp_path / "out" / "test" / "truth.json")
    arrays = read_json(tmp_path / "out" / "test" / "sft.json")
    assert list(arrays) == [image["file_name"] for image in truth["images"]]
    assert sum(len(found["xyxy"]) for found in arrays.values()) == 3
    answered = [(found["confidence"], found["class_id"]) for found in arrays.values() if found["xyxy"]]
    assert [confidence for confidence, _ in answered] == [[1.0], [1.0], [0.5]]


def test_supervision_itself_reads_the_folder(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("supervision")
    export("supervision", "--split", "test")
    monkeypatch.chdir(tmp_path / "out")
    snippet = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```")[1].removeprefix("python\n")
    told: dict[str, Any] = {}
    exec(snippet.replace("SPLIT", "test").replace("MODEL", "sft"), told)
    assert len(told["truth"]) == len(told["arrays"])
    assert sum(len(told["detections"](path)) for path, _, _ in told["truth"]) == 3


# ---------------------------------------------------------------- FiftyOne


def test_a_question_is_a_group_and_its_images_are_slices(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("fiftyone")
    assert read_json(tmp_path / "out" / "metadata.json")["media_type"] == "group"
    samples = read_json(tmp_path / "out" / "samples.json")["samples"]
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample["group"]["_id"]["$oid"], []).append(sample["group"]["name"])
        assert (tmp_path / "out" / sample["filepath"]).is_file()
    assert list(groups.values())[:4] == [[f"image_{n}" for n in range(1, len(e.images) + 1)] for e in gold(recipe)]
    assert all(len(identity) == 24 for identity in groups)


def test_fiftyone_fields_are_truth_and_models(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("fiftyone", out=tmp_path / "one")
    export("fiftyone", out=tmp_path / "two")
    samples = read_json(tmp_path / "one" / "samples.json")["samples"]
    assert samples == read_json(tmp_path / "two" / "samples.json")["samples"]
    [target] = gold(recipe)[0].target.boxes
    sample = samples[(target.image or 0) - 1]
    box = target.box
    [detection] = sample["truth"]["detections"]
    assert detection["bounding_box"] == [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]
    assert sample["sft"]["detections"][0]["bounding_box"] == detection["bounding_box"]
    assert (sample["sft_right"], sample["base_right"], sample["tags"]) == (1.0, 0.0, ["test"])
    letters = [sample for sample in samples if "truth_choice" in sample]
    assert {sample["tags"][0] for sample in letters} == {"perception_blink", "perception_mmiu"}
    assert "sft" not in letters[0]
    identities = [d["_id"]["$oid"] for s in samples for who in ("truth", "sft") if who in s for d in s[who]["detections"]]
    assert len(set(identities)) == len(identities)


# ---------------------------------------------------------------- Label Studio


def test_every_result_of_label_studio_is_of_a_tool_in_its_configuration(export: Export, tmp_path: Path) -> None:
    export("label-studio")
    folders = sorted(path.parent for path in (tmp_path / "out").rglob("config.xml"))
    assert folders
    for folder in folders:
        view = ElementTree.fromstring((folder / "config.xml").read_text(encoding="utf-8"))
        tools = {tag.get("name"): tag.get("toName") for tag in view.iter() if tag.get("toName")}
        objects = {tag.get("name"): tag.get("value") for tag in view.iter() if tag.tag in ("Image", "Text")}
        letters = {tag.get("value") for tag in view.iter("Choice")}
        for task in read_json(folder / "tasks.json"):
            assert {str(value).removeprefix("$") for value in objects.values()} <= set(task["data"])
            for said in (*task["annotations"], *task["predictions"]):
                for result in said["result"]:
                    assert tools[result["from_name"]] == result["to_name"] in objects
                    assert set(result["value"].get("choices", [])) <= letters


def test_label_studio_counts_in_percent_and_names_models(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("label-studio", "--split", "test", "--image-prefix", "https://pictures/")
    tasks = [task for file in sorted((tmp_path / "out" / "test").rglob("tasks.json")) for task in read_json(file)]
    by_key = {task["data"]["key"]: task for task in tasks}
    example = gold(recipe)[0]
    [target] = example.target.boxes
    task = by_key[example.key]
    [result] = task["annotations"][0]["result"]
    assert result["value"]["x"] == pytest.approx(100 * target.box.x0)
    assert result["value"]["width"] == pytest.approx(100 * (target.box.x1 - target.box.x0))
    assert result["to_name"] == f"image_{target.image}"
    assert [(said["model_version"], said["score"], len(said["result"])) for said in task["predictions"]] == [
        ("base", 0.0, 0),
        ("sft", 1.0, 1),
    ]
    assert task["data"]["image_1"] == "https://pictures/images/test/00000-1.png"


# ---------------------------------------------------------------- the hub


def test_datasets_loads_questions_images_and_replies(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    assert export("hf-dataset")[0] == 0
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"test": 4, "perception_blink": 2, "perception_mmiu": 2}
    example, row = gold(recipe)[0], loaded["test"][0]
    assert (row["key"], len(row["images"])) == (example.key, len(example.images))
    with Image.open(example.images[0]) as picture:
        assert row["images"][0].size == picture.size
    [target] = example.target.boxes
    box = [target.box.x0, target.box.y0, target.box.x1, target.box.y1]
    assert (row["truth_images"], row["truth_boxes"]) == ([target.image], [box])
    assert (row["sft_images"], row["sft_boxes"], row["sft_right"]) == ([target.image], [box], 1.0)
    assert (row["base_images"], row["base_right"], row["base_reply"]) == ([None], 0.0, "said | so <b>")
    assert [found["sft_right"] for found in loaded["perception_blink"]] == [1.0, 0.0]


def test_the_results_of_a_data_set_are_rows(export: Export, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    export("hf-dataset")
    rows = list(read_rows(tmp_path / "out" / "results" / "results.jsonl"))
    [row] = [
        row
        for row in rows
        if (row["split"], row["model"], row["task"], row["measure"]) == ("test", "sft", "macro", "accuracy at IoU 0.5")
    ]
    assert (row["value"], row["questions"]) == (0.5, 4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    told = yaml.safe_load(card.split("---")[1])
    assert [configuration["config_name"] for configuration in told["configs"]] == ["predictions", "results"]
    assert [entry["split"] for entry in told["configs"][0]["data_files"]] == ["test", "perception_blink", "perception_mmiu"]
    assert told["size_categories"] == ["n<1K"]
    assert "license" not in told


def test_the_model_index_holds_the_headlines_of_the_evaluation(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    words = ["--license", "apache-2.0", "--base-model", "owner/base", "--name", "A | model"]
    assert export("model-card", *words)[0] == 0
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    results = read_json(recipe.out / "evaluate" / "results.json")
    told = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert told["test", "accuracy at IoU 0.5, mean over tasks"] == 0.5
    assert told["perception_blink", "accuracy, mean over tasks"] == 0.5
    macro = results["splits"]["test"]["models"]["sft"]["macro"]
    assert told["test", "share of replies without a usable answer"] == macro["unreadable_rate"] == 0.25
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == ("apache-2.0", "owner/base", "image-text-to-text")
    assert "# A \\| model" in card.text
    assert "| sft: rows | 1,200 |" in card.text
    assert "max_steps" not in card.text


def test_a_model_folder_has_what_loads_and_nothing_of_this_machine(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("model-card")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "results.json", "export.json", "tokenizer.json"} <= names
    assert not {"manifest.json", "state.json", ".lock", "merged_from.json"} & names
    for path in (tmp_path / "out").iterdir():
        assert str(recipe.out).encode() not in path.read_bytes(), path.name


def test_a_card_beside_the_weights_leaves_the_run_whole(export: Export, recipe: Recipe) -> None:
    merged = recipe.out / "sft-merged"
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in merged.iterdir() if path.name != "README.md"}
    assert export("model-card", out=merged)[0] == 0
    assert "exists" in export("model-card", out=merged)[2]
    assert export("model-card", "--force", out=merged)[0] == 0
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in merged.iterdir() if path.name != "README.md"}
    assert after == before
    assert evaluate.present_roles(recipe) == ["base", "sft"]


# ---------------------------------------------------------------- folders and refusals


def test_only_an_earlier_export_is_ever_replaced(export: Export, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years", encoding="utf-8")
    code, _, errors = export("coco", "--force", out=mine)
    assert (code, (mine / "thesis.txt").read_text(encoding="utf-8")) == (2, "years")
    assert "not written by `polyground export`" in errors
    assert export("coco", out=tmp_path / "out")[0] == 0
    assert export("coco", out=tmp_path / "out")[0] == 2
    assert export("supervision", "--force", out=tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "annotations").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_linked_images_are_the_same_file(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    export("coco", "--link", "--split", "test")
    assert (tmp_path / "out" / "images" / "test" / "00000-1.png").samefile(gold(recipe)[0].images[0])


@pytest.mark.parametrize(
    ("to", "words", "told"),
    [
        pytest.param("coco", ["--split", "ood_pairs"], "evaluated were test, perception_blink, perception_mmiu", id="split"),
        pytest.param("coco", ["--model", "rl"], "evaluated were base, sft", id="model"),
        pytest.param(
            "coco", ["--split", "perception_blink"], "no question of perception_blink is answered by boxes", id="letters"
        ),
        pytest.param("coco", ["--license", "mit"], "--license goes with --to hf-dataset or model-card", id="stray-option"),
        pytest.param("hf-dataset", ["--image-prefix", "x"], "--image-prefix goes with --to label-studio", id="stray-prefix"),
        pytest.param("model-card", ["--model", "base"], "has its own card", id="the-base"),
        pytest.param("model-card", ["--split", "test"], "leave it out", id="card-of-a-split"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_what_can(
    export: Export, to: str, words: Sequence[str], told: str, tmp_path: Path
) -> None:
    code, _, errors = export(to, *words)
    assert code == 2
    assert told in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_evaluated_run_is_refused(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    assert "no such recipe or run" in export("coco", source=tmp_path / "nothing")[2]
    assert "holds no answers" in export("coco", source=recipe.out / "world")[2]
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe.model_copy(update={"out": tmp_path / "new"})), encoding="utf-8")
    assert "is not evaluated" in export("coco", source=path)[2]


def test_a_run_on_data_of_ones_own_needs_its_recipe(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(recipe.out / "evaluate", run / "evaluate")
    for role in ("base", "sft"):
        path = run / "evaluate" / role / "manifest.json"
        manifest = read_json(path)
        manifest["config"]["data"]["test"] = [{"source": "mig_bench"}]
        atomic_write_json(path, manifest)
    assert "test are data of your own" in export("coco", source=run)[2]


def test_a_recipe_exports_as_the_folder_of_its_run_does(export: Export, recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    export("coco", source=path, out=tmp_path / "one")
    export("coco", out=tmp_path / "two")
    one, two = (read_json(tmp_path / name / "annotations" / "test.json") for name in ("one", "two"))
    assert one["annotations"] == two["annotations"]


def test_help_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    from polyground.predictions import LAYOUTS

    with pytest.raises(SystemExit):
        main(["export", "--help"])
    told = capsys.readouterr().out
    assert [name for name in (*LAYOUTS, "lmms-eval", "sharegpt") if name not in told] == []
