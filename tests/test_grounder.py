"""Facts about asking a model from Python: which model a path means, how it is asked, and what an answer says and shows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

import polyground
from polyground.answer import Answer, Located, Unreadable
from polyground.cli import main
from polyground.errors import DataError, ModelError, PolygroundError, StorageError
from polyground.geometry import Box, iou
from polyground.grounder import COLOURS, Grounding, Told, found_boxes, resolve
from polyground.worlds.scenes import describe, render, sample_scene

LEFT, MIDDLE = Box(0.0, 0.0, 0.5, 1.0), Box(0.25, 0.25, 0.75, 0.75)


def stage(folder: Path, **config: Any) -> Path:
    """A complete stage, as far as its manifest goes."""
    folder.mkdir(parents=True)
    row = {"stage": folder.name, "fingerprint": "", "config": config, "version": "0", "summary": {}, "finished": "", "seconds": 0}
    (folder / "manifest.json").write_text(json.dumps(row), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with both merged models, trained with an instruction and a pixel budget."""
    model = {"path": "models/base", "max_pixels_total": 1000}
    for name in ("sft", "grpo"):
        stage(tmp_path / "run" / name, prompts={"instruction": "Think first."})
    for name in ("sft-merged", "grpo-merged"):
        (stage(tmp_path / "run" / name, model=model) / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "run"


AS_TRAINED = Told("Think first.", 1000)


@pytest.mark.parametrize(
    ("role", "folder", "told"),
    [
        pytest.param(None, "grpo-merged", AS_TRAINED, id="the-last-by-default"),
        pytest.param("rl", "grpo-merged", AS_TRAINED, id="rl"),
        pytest.param("sft", "sft-merged", AS_TRAINED, id="sft"),
    ],
)
def test_a_run_is_asked_as_it_was_trained(run: Path, role: str | None, folder: str, told: Told) -> None:
    assert resolve(run, role) == (run / folder, told)


def test_the_base_of_a_run_is_asked_without_the_instruction_it_never_saw(run: Path) -> None:
    assert resolve(run, "base") == ("models/base", Told("", 1000))


def test_a_merged_folder_is_asked_as_the_run_it_is_of(run: Path) -> None:
    assert resolve(run / "sft-merged") == (run / "sft-merged", AS_TRAINED)


def test_a_run_without_rl_is_its_sft_model(run: Path) -> None:
    (run / "grpo-merged" / "manifest.json").unlink()
    assert resolve(run)[0] == run / "sft-merged"


def test_any_other_model_folder_is_taken_as_it_is() -> None:
    assert resolve("tiny") == ("tiny", Told())
    assert resolve("models/Qwen2.5-VL-7B-Instruct") == ("models/Qwen2.5-VL-7B-Instruct", Told())


@pytest.mark.parametrize(
    ("path", "role", "error", "said"),
    [
        pytest.param("run", "rl", StorageError, "has no rl model yet", id="not-trained-yet"),
        pytest.param("run", None, StorageError, "run `polyground merge`", id="nothing-merged-yet"),
        pytest.param("run", "teacher", ModelError, "role 'teacher' is unknown", id="no-such-role"),
        pytest.param("tiny", "sft", ModelError, "is no folder of a run", id="a-role-of-no-run"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, path: str, role: str | None, error: type[PolygroundError], said: str) -> None:
    stage(tmp_path / "run" / "sft")
    with pytest.raises(error, match=said):
        resolve(tmp_path / "run" if path == "run" else path, role)


def test_what_is_no_folder_is_told_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"mine\.yaml: is a file; give the folder of a run"):
        polyground.load(tmp_path / "mine.yaml")
    with pytest.raises(ModelError, match="there is no such folder"):
        polyground.load(tmp_path / "nowhere")


# ---------------------------------------------------------------- what an answer says


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    """A wide and a tall white picture."""
    paths = (tmp_path / "wide.png", tmp_path / "tall.png")
    for path, size in zip(paths, ((200, 100), (100, 200)), strict=True):
        Image.new("RGB", size, "white").save(path)
    return paths


def grounding(images: tuple[Path, ...], answer: Answer | Unreadable, text: str = "") -> Grounding:
    return Grounding(question="Where?", images=images, text=text, answer=answer, boxes=found_boxes(answer, images))


def test_boxes_are_in_pixels_of_the_image_they_lie_in(images: tuple[Path, ...]) -> None:
    one, two = found_boxes(Answer((Located(1, MIDDLE), Located(2, MIDDLE))), images)
    assert one.pixels == (50, 25, 150, 75)
    assert two.pixels == (25, 50, 75, 150)


def test_a_box_of_no_named_image_has_pixels_only_where_all_images_have_one_size(images: tuple[Path, ...]) -> None:
    assert found_boxes(Answer((Located(None, MIDDLE),)), images)[0].pixels is None
    assert found_boxes(Answer((Located(None, MIDDLE),)), images[:1])[0].pixels == (50, 25, 150, 75)


@pytest.mark.parametrize(
    ("answer", "text", "said", "row"),
    [
        pytest.param(Answer((Located(2, LEFT),)), "", "image 2: 0, 0, 50, 200", {"image": 2, "box": [0, 0, 50, 200]}, id="a-box"),
        pytest.param(Answer(), "", "not there", {"image": None, "boxes": []}, id="nothing"),
        pytest.param(Answer(choice="B"), "", "choice B", {"choice": "B"}, id="a-letter"),
        pytest.param(
            Unreadable.MISSING,
            "hm",
            "no readable answer (missing): 'hm'",
            {"unreadable": "missing", "raw": "hm"},
            id="unreadable",
        ),
        pytest.param(
            Answer(),
            "<think>I see none.</think><answer>[]</answer>",
            "I see none.\nnot there",
            {"reasoning": "I see none."},
            id="reasoning",
        ),
    ],
)
def test_an_answer_says_itself_in_words_and_in_json(
    images: tuple[Path, ...], answer: Answer | Unreadable, text: str, said: str, row: dict[str, Any]
) -> None:
    reply = grounding(images, answer, text)
    assert str(reply) == said
    assert reply.to_json().items() >= row.items()
    json.dumps(reply.to_json())


def test_a_box_is_drawn_on_its_image_alone(images: tuple[Path, ...]) -> None:
    pair = (images[0], images[0])
    sheet = grounding(pair, Answer((Located(2, LEFT),))).show(side=200)
    colour = tuple(bytes.fromhex(COLOURS[0][1:]))
    columns = {x for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == colour}
    assert columns
    assert min(columns) > sheet.width // 2


def test_two_boxes_have_two_colours(images: tuple[Path, ...]) -> None:
    sheet = grounding(images[:1], Answer((Located(1, LEFT), Located(1, MIDDLE)))).show()
    colours = {colour for _, colour in sheet.getcolors(maxcolors=1 << 24) or ()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:2]} <= colours


def test_a_drawing_that_cannot_be_written_is_an_error(images: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name a \.png file"):
        grounding(images, Answer()).save(tmp_path / "answer.doc")


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def grounder() -> Any:
    return polyground.load("tiny", device="cpu")


def test_the_packaged_model_finds_an_object_in_a_file_and_in_memory(
    grounder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = sample_scene(Random(1), count=4)
    picture, wanted = render(scene), scene.items[0]
    question = f"Find the {describe(wanted, scene)}."
    picture.save(tmp_path / "scene.png")

    in_memory, in_file = grounder.ground(picture, question), grounder.ground(tmp_path / "scene.png", question)
    assert in_memory.text == in_file.text
    assert iou(in_memory.boxes[0].box, wanted.box) > 0.5
    assert in_memory._repr_png_().startswith(b"\x89PNG")

    out = tmp_path / "answer.png"
    assert main(["ground", "--model", "tiny", str(tmp_path / "scene.png"), "-q", question, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == in_file.to_json()
    assert Image.open(out).size == in_file.show().size


def test_a_question_without_an_image_is_an_error(grounder: Any) -> None:
    with pytest.raises(DataError, match="at least one image"):
        grounder.ground([], "Where?")


def test_an_empty_question_is_an_error(grounder: Any, images: tuple[Path, ...]) -> None:
    with pytest.raises(DataError, match="say what to find"):
        grounder.ground(list(images), " ")


def test_a_question_that_does_not_go_with_the_images_is_an_error(grounder: Any, images: tuple[Path, ...]) -> None:
    with pytest.raises(DataError, match="<image>"):
        grounder.ground(list(images), "Is <image> the one?")
