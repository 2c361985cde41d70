"""Facts about `polyground init`: a recipe that loads, splits that share no image with what is measured, nothing overwritten."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from polyground.cli import main
from polyground.config import load_recipe
from polyground.sources import read_source
from sources.source_fixtures import picture
from toys import write_toy

SPLITS = ("train", "rl", "validation", "test")


def hash_of(name: str) -> int:
    """A colour of its own for every name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:3])


def conversation(images: list[str], box: list[int] | None) -> dict[str, Any]:
    answer = "B" if box is None else json.dumps([{"image": 1, "bbox_2d": box}])
    question = f"{'<image>' * len(images)}Find the cup in {images[0]}." + (" (A) here (B) there" if box is None else "")
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"<answer>{answer}</answer>"}]
    return {"conversations": said, "images": images}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty questions in pixels, each about an image of its own and one it shares with a neighbour; 200 x 100 pixels."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for n in range(40):
        names = [f"images/{n}.jpg", f"images/pair-{n // 2}.jpg"]
        for name in names:
            picture(Path("photos") / name, colour=f"#{hash_of(name):06x}")
        rows.append(conversation(names, [20, 10, 120, 60]))
    path = Path("photos/cups.json")
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def init(*arguments: str, data: Path) -> int:
    return main(["init", "mine.yaml", "--model", "tiny", "--data", str(data), *arguments])


def rows_of(split: str) -> list[Any]:
    [file] = getattr(load_recipe("mine.yaml").data, split)
    return read_source(file.source, file.path, check_images="decode", **file.options)


def test_one_file_becomes_a_recipe_and_splits_that_can_be_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--grid", "pixels", data=data) == 0
    shown = capsys.readouterr().out
    assert "read as sharegpt" in shown
    counts = {split: len(rows_of(split)) for split in SPLITS}
    assert counts == {"train": 17, "rl": 17, "validation": 2, "test": 4}
    keys = [example.key for split in SPLITS for example in rows_of(split)]
    assert sorted(keys) == sorted({f"data/{n}" for n in range(40)})
    box = rows_of("train")[0].target.boxes[0].box
    assert (box.x0, box.y0, box.x1, box.y1) == (0.1, 0.1, 0.6, 0.6)
    assert main(["validate", "mine.yaml"]) == 0


def test_no_image_of_what_is_measured_is_in_another_split(data: Path) -> None:
    assert init("--grid", "pixels", data=data) == 0
    images = {split: {image for example in rows_of(split) for image in example.images} for split in SPLITS}
    for split in SPLITS:
        assert not images[split] & images["test"] or split == "test"
        assert not images[split] & images["validation"] or split == "validation"


def test_copies_of_an_image_are_one_image(data: Path) -> None:
    rows = [conversation([f"images/{n}.jpg"], [20, 10, 120, 60]) for n in range(40)]
    data.write_text(json.dumps(rows), encoding="utf-8")
    for n in range(20, 40):
        Path(f"photos/images/{n}.jpg").write_bytes(Path(f"photos/images/{n - 20}.jpg").read_bytes())
    assert init("--grid", "pixels", data=data) == 0
    held_out = {int(example.key.partition("/")[2]) % 20 for split in ("validation", "test") for example in rows_of(split)}
    learnt = {int(example.key.partition("/")[2]) % 20 for split in ("train", "rl") for example in rows_of(split)}
    assert held_out
    assert not held_out & learnt


def test_questions_that_all_share_an_image_are_all_trained_on_and_that_is_said(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation([f"images/{n}.jpg", "images/0.jpg"], [20, 10, 120, 60]) for n in range(1, 40)]
    data.write_text(json.dumps(rows), encoding="utf-8")
    assert init("--grid", "pixels", data=data) == 0
    assert not load_recipe("mine.yaml").data.test
    assert "nothing is held out" in capsys.readouterr().out


def test_the_same_seed_divides_alike_and_another_does_not(data: Path) -> None:
    held_out = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["init", f"{name}.yaml", "--model", "tiny", "--data", str(data), "--grid", "pixels", "--seed", seed]) == 0
        held_out.append((Path(f"{name}-data") / "test.jsonl").read_text(encoding="utf-8"))
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("there", ["mine.yaml", "mine-data/train.jsonl"])
def test_nothing_is_overwritten(data: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(there).parent.mkdir(exist_ok=True)
    Path(there).write_text("precious", encoding="utf-8")
    assert init("--grid", "pixels", data=data) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert Path(there).read_text(encoding="utf-8") == "precious"


def test_how_boxes_are_written_is_asked_and_never_told_from_the_numbers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(data=data) == 2
    said = capsys.readouterr().err
    assert "say --grid" in said
    # The numbers fit both: only one of them is right, and they cannot say which.
    assert "40 of 40" in next(line for line in said.splitlines() if line.strip().startswith("pixels"))
    assert "40 of 40" in next(line for line in said.splitlines() if line.strip().startswith("per_mille "))
    assert "0 of 40" in next(line for line in said.splitlines() if line.strip().startswith("unit"))
    assert not Path("mine.yaml").exists()


def test_rows_without_boxes_need_no_grid(data: Path) -> None:
    data.write_text(json.dumps([conversation([f"images/{n}.jpg"], None) for n in range(40)]), encoding="utf-8")
    assert init(data=data) == 0
    assert rows_of("train")[0].target.choice == "B"


def test_images_are_looked_for_around_the_file(data: Path) -> None:
    moved = Path("photos/annotation/deep.json")
    moved.parent.mkdir()
    data.rename(moved)
    assert init("--grid", "pixels", data=moved) == 0
    assert len(rows_of("train")) == 17


def test_bad_rows_are_left_out_counted_and_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows[3] = conversation(["images/3.jpg"], [120, 10, 20, 60])
    rows[4] = conversation(["images/nowhere.jpg"], [20, 10, 120, 60])
    data.write_text(json.dumps(rows), encoding="utf-8")
    assert init("--grid", "pixels", data=data) == 0
    shown = capsys.readouterr().out
    assert "38 good rows, 2 bad (1 inverted, 1 missing_image), left out" in shown
    assert "row 4 " in shown
    assert sum(len(rows_of(split)) for split in SPLITS) == 38


def test_files_of_ones_own_are_used_where_they_lie(data: Path) -> None:
    words = ["--model", "tiny", "--grid", "pixels"]
    for split in ("train", "rl", "test"):
        words += [f"--{split}", str(data)]
    assert main(["init", "mine.yaml", *words]) == 0
    recipe = load_recipe("mine.yaml")
    assert [file.path for file in (*recipe.data.train, *recipe.data.rl, *recipe.data.test)] == [data] * 3
    assert not Path("mine-data").exists()


def test_one_file_for_the_cold_start_and_for_rl_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--grid", "pixels", "--train", str(data), "--rl", str(data)]
    assert main(["init", "mine.yaml", *words]) == 0
    shown = capsys.readouterr().out
    assert "train and rl are one file" in shown
    assert "nothing is held out to measure with. Give --test" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--model", "tiny"], "--data missing", id="no-data"),
        pytest.param(["--data", "photos/cups.json"], "--model missing", id="no-model"),
        pytest.param(["--model", "nowhere", "--data", "photos/cups.json"], "no such model folder", id="no-such-model"),
        pytest.param(["--model", "tiny", "--data", "nowhere.json"], "nowhere.json", id="no-such-file"),
        pytest.param(["--model", "tiny", "--data", "odd.json"], "its format is not known by its fields (picture)", id="unknown"),
        pytest.param(["--model", "tiny", "--data", "lost.json", "--grid", "pixels"], "say --images-root", id="no-images"),
        pytest.param(["--model", "tiny", "--data", "a", "--train", "b"], "not both", id="data-and-splits"),
        pytest.param(["--model", "tiny", "--train", "photos/cups.json"], "give --train and --rl", id="no-questions-for-rl"),
        pytest.param(["--model", "tiny", "--data", "photos/cups.json", "--grid", "unit"], "another --grid", id="the-wrong-grid"),
        pytest.param(
            ["--model", "tiny", "--data", "photos/cups.json", "--grid", "pixels", "--teacher", "localhost"],
            "is no address",
            id="no-address",
        ),
        pytest.param(
            ["--model", "tiny", "--data", "photos/cups.json", "--grid", "pixels", "--teacher", "http://127.0.0.1/v1"],
            "add --teacher-model",
            id="no-name-of-the-teacher",
        ),
    ],
)
def test_a_mistake_is_said_and_nothing_is_written(
    data: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd.json").write_text('[{"picture": "a.jpg"}]', encoding="utf-8")
    Path("lost.json").write_text(json.dumps([conversation(["far/away.jpg"], [1, 2, 3, 4])]), encoding="utf-8")
    assert main(["init", "mine.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


class Terminal(io.StringIO):
    """Somebody who types these lines."""

    def isatty(self) -> bool:
        return True


def test_four_questions_are_enough(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["nowhere", "tiny", "nowhere.json", str(data), "metres", "pixels", "http://127.0.0.1:8000/v1 qwen-72b"]
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in typed)))
    assert main(["init", "mine.yaml"]) == 0
    said = capsys.readouterr()
    assert all(f"{n}/4" in said.out for n in (1, 2, 3, 4))
    assert "no such model folder" in said.err
    assert "'metres' is none of" in said.err
    recipe = load_recipe("mine.yaml")
    assert (recipe.synthesize.teacher_base_url, recipe.synthesize.teacher_model) == ("http://127.0.0.1:8000/v1", "qwen-72b")


def test_a_terminal_that_is_closed_leaves_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert main(["init", "mine.yaml"]) == 2
    assert not Path("mine.yaml").exists()


def test_hostile_names_stay_values(data: Path) -> None:
    folder = Path("a, b} # c: [d")
    data.parent.rename(folder)
    assert main(["init", "mine.yaml", "--model", "tiny", "--data", str(folder / data.name), "--grid", "pixels"]) == 0
    assert load_recipe("mine.yaml").data.train[0].options["images_root"].startswith(str(folder))


# ---------------------------------------------------------------- real families, by their small files


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy folder whose config.json says the sizes of Qwen2.5-VL-7B."""
    folder = write_toy(tmp_path_factory.mktemp("model") / "qwen", "qwen2_5_vl")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "vocab_size": 152064}
    config["text_config"] |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_budget_is_chosen_that_fits_the_gpu(data: Path, qwen: Path) -> None:
    budgets = []
    for gib in (24, 80):
        name = f"gpu-{gib}.yaml"
        words = ["--model", str(qwen), "--data", str(data), "--grid", "pixels", "--memory", str(gib)]
        assert main(["init", name, *words]) == 0
        recipe = load_recipe(name)
        budgets.append(recipe.model.max_pixels_total)
        assert recipe.model.dtype == "bfloat16"
        assert recipe.grpo.gradient_checkpointing
    assert budgets[0] is not None
    assert budgets[1] is not None
    assert budgets[0] <= budgets[1]
