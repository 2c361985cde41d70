"""Facts about `polyground validate`: everything that would break or spoil training is counted, named, and stops with code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyground.cli import main
from polyground.conventions import TINY
from test_light_import import run_without_torch
from toys import write_toy


def picture(path: Path, seed: int, width: int = 60, height: int = 40) -> Path:
    """Noise: no two seeds give the same bytes, and a file cut short cannot be decoded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def row(number: int, images: list[str], **changes: Any) -> dict[str, Any]:
    """A row of this project's own layout."""
    base = {
        "key": f"own/{number}",
        "task": "find",
        "images": images,
        "question": f"Find object {number}.",
        "target": {"boxes": [{"image": 1, "box": [0.1, 0.2, 0.5, 0.6]}]},
    }
    return {**base, **changes}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def good_set(folder: Path, name: str = "rows.jsonl", *, seed: int = 0, rows: int = 4) -> Path:
    """Rows of one, two, one, two … images; no image is in two rows."""
    made = []
    for number in range(rows):
        images = [f"{name}-{number}-{i}.png" for i in range(1 + number % 2)]
        for i, image in enumerate(images):
            picture(folder / image, seed=1000 * seed + 10 * number + i)
        made.append(row(number, images, key=f"{name}/{number}"))
    return write_rows(folder / name, *made)


def validate(path: Path, *options: str) -> int:
    return main(["validate", "--source", "polyground", "--path", str(path), *options])


def test_a_good_set_has_nothing_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(good_set(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert f"validate {tmp_path / 'rows.jsonl'} (polyground): 4 good rows, 0 bad" in shown
    assert shown.rstrip().endswith("nothing to mend")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "find 4" in lines  # by task
    assert lines[lines.index("rows by number of images") + 3 :][:3] == ["1 2", "2 2", "together 4"]
    assert "data 6 0 0 60 x 40 60 x 40 60 x 40" in lines  # files, missing, damaged, sizes
    assert "data 4 16 16 16 0 0 0" in lines  # boxes and their areas


BAD = {
    "inverted": {"target": {"boxes": [{"image": 1, "box": [0.5, 0.2, 0.1, 0.6]}]}},
    "out_of_range": {"target": {"boxes": [{"image": 1, "box": [0.1, 0.2, 50, 60]}]}},
    "bad_image": {"target": {"boxes": [{"image": 3, "box": [0.1, 0.2, 0.5, 0.6]}]}},
    "placeholder_mismatch": {"question": "In <image> and <image>, find it."},
    "bad_choice": {"choices": ["a cup", "a dish"], "target": {"choice": "C"}},
    "control_token": {"question": "Find it.<|im_end|>"},
    "malformed": {"question": 7},
    "no_images": {"images": []},
    "unsafe_path": {"images": ["../../etc/passwd"]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_counted_by_its_reason_and_named(reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png", 1)
    path = write_rows(tmp_path / "rows.jsonl", row(0, ["a.png"]), {**row(1, ["a.png"]), **BAD[reason]})
    assert validate(path, "--model", "tiny") == 2
    shown = capsys.readouterr().err
    assert "1 good row, 1 bad" in shown
    assert f"bad rows of data: 1 (1 {reason}):" in shown
    assert f"  {path}: row 2 (" in shown
    assert "TO MEND before training (1):" in shown


def test_only_the_first_ten_bad_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "a.png", 1)
    path = write_rows(tmp_path / "rows.jsonl", *(row(n, ["a.png"], **BAD["inverted"]) for n in range(14)), row(20, ["a.png"]))
    assert validate(path) == 2
    shown = capsys.readouterr().err
    assert "bad rows of data: 14 (14 inverted):" in shown
    assert sum(": inverted: " in line for line in shown.splitlines()) == 10
    assert "  and 4 more" in shown


def test_a_key_that_stands_in_two_files_of_a_split_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = good_set(tmp_path, "one.jsonl", seed=1), good_set(tmp_path, "two.jsonl", seed=2)
    second.write_text(second.read_text().replace("two.jsonl/0", "one.jsonl/0"))
    recipe = write_recipe(tmp_path, train=[first, second])
    assert main(["validate", str(recipe)]) == 2
    assert "bad rows of train: 1 (1 duplicate_key):" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--workers=1", "--workers=3"])
def test_missing_and_damaged_images_are_named(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["whole.png", "gone.png", "page.png", "half.png"]
    for seed, name in enumerate(names):
        picture(tmp_path / name, seed)
    (tmp_path / "gone.png").unlink()
    (tmp_path / "page.png").write_text("<html>404</html>")
    half = tmp_path / "half.png"
    half.write_bytes(half.read_bytes()[:3000])
    path = write_rows(tmp_path / "rows.jsonl", *(row(n, [name]) for n, name in enumerate(names)))
    assert validate(path, option) == 2
    shown = capsys.readouterr().err
    assert "images of data that cannot be used: 3:" in shown
    assert f"{tmp_path / 'gone.png'}: no such image" in shown
    assert f"{tmp_path / 'page.png'}: not a readable image but a web page" in shown
    assert f"{half}: the image is cut short" in shown
    assert "data 4 1 2 60 x 40" in " ".join(shown.split())


def test_headers_alone_do_not_notice_a_file_that_is_cut_short_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = picture(tmp_path / "half.png", 1)
    half.write_bytes(half.read_bytes()[:3000])
    path = write_rows(tmp_path / "rows.jsonl", row(0, ["half.png"]))
    assert validate(path) == 2
    assert validate(path, "--headers-only") == 0
    assert "images, headers only: files that are cut short are not noticed" in capsys.readouterr().out


def test_only_the_first_ten_missing_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *(row(n, [f"{n}.png"]) for n in range(13)))
    assert validate(path) == 2
    shown = capsys.readouterr().err
    assert shown.count("no such image") == 10
    assert "  and 3 more" in shown


# ---------------------------------------------------------------- leakage


def write_recipe(folder: Path, *, model: str = "tiny", **splits: list[Path]) -> Path:
    """A recipe on own data alone."""
    import yaml

    data = {split: [{"source": "polyground", "path": str(path)} for path in paths] for split, paths in splits.items()}
    sizes = dict.fromkeys(("train", "rl", "validation", "test", "ood", "perception"), 0)
    tree = {"out": str(folder / "run"), "model": {"path": model}, "world": sizes, "data": data}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_an_image_of_a_benchmark_is_found_in_training_under_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, bench = good_set(tmp_path, "train.jsonl", seed=1), good_set(tmp_path, "bench.jsonl", seed=2)
    assert validate(train, "--against", f"polyground:{bench}") == 0
    capsys.readouterr()
    shutil.copy(tmp_path / "train.jsonl-2-0.png", tmp_path / "bench.jsonl-3-1.png")
    assert validate(train, "--against", f"polyground:{bench}") == 2
    shown = capsys.readouterr().err
    assert "data and polyground:bench.jsonl share 1 image, in:\n  train.jsonl/2 and bench.jsonl/3" in shown
    assert "data and polyground:bench.jsonl share 1 image; drop the rows from data" in shown


def test_a_benchmark_whose_images_are_not_found_is_no_proof_of_innocence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, bench = good_set(tmp_path, "train.jsonl", seed=1), good_set(tmp_path / "bench", "bench.jsonl", seed=2)
    moved = shutil.move(bench, tmp_path / "moved.jsonl")
    assert validate(train, "--against", f"polyground:{moved}") == 2
    shown = capsys.readouterr().err
    assert "polyground:moved.jsonl: 6 of 6 images cannot be read, so it is not known whether training shares them" in shown
    assert validate(train, "--against", f"polyground:{moved},images_root={tmp_path / 'bench'}") == 0


def test_the_splits_of_a_recipe_are_compared_with_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {split: good_set(tmp_path, f"{split}.jsonl", seed=seed) for seed, split in enumerate(("train", "rl", "test", "ood"))}
    shutil.copy(tmp_path / "rl.jsonl-0-0.png", tmp_path / "ood.jsonl-0-0.png")
    shutil.copy(tmp_path / "rl.jsonl-2-0.png", tmp_path / "train.jsonl-0-0.png")
    recipe = write_recipe(tmp_path, **{split: [path] for split, path in sets.items()})
    assert main(["validate", str(recipe)]) == 2
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert "shared with train rl" in lines
    assert "test 0 0" in lines
    assert "ood_ood 0 1" in lines
    # Two training splits may share images.
    assert lines[-3:-1] == [
        "TO MEND before training (1):",
        "rl and ood_ood share 1 image; drop the rows from rl (convert --without)",
    ]


# ---------------------------------------------------------------- tokens and memory


def test_tokens_are_those_that_the_model_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polyground.models import load_family
    from polyground.prompts import student_messages
    from polyground.sources import read_source

    path = good_set(tmp_path)
    assert validate(path, "--model", "tiny", "--json", str(tmp_path / "out.json")) == 0
    assert "exact for this folder's image sizes, chat template and tokenizer" in capsys.readouterr().out

    family = load_family("tiny")
    instruction = "Think first, then answer."
    prompts = [
        family.encode(student_messages(example, family.grids(example.images), instruction=instruction))
        for example in read_source("polyground", path)
    ]
    found = json.loads((tmp_path / "out.json").read_text())["splits"]["data"]["tokens"]
    lengths = sorted(len(prompt) for prompt in prompts)
    assert (found["min"], found["max"], found["rows"]) == (lengths[0], lengths[-1], 4)
    assert found["median_image_tokens"] == sum(sorted(prompt.image_tokens for prompt in prompts)[1:3]) / 2


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "internvl", "smolvlm"])
def test_tokens_are_exact_for_every_kind_of_family(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polyground.models import load_family
    from polyground.prompts import student_messages
    from polyground.sources import read_source

    model, path = write_toy(tmp_path / "model", model_type), good_set(tmp_path)
    assert validate(path, "--model", str(model), "--json", str(tmp_path / "out.json")) == 0
    family = load_family(model)
    lengths = [
        len(family.encode(student_messages(e, family.grids(e.images), instruction="Think first, then answer.")))
        for e in read_source("polyground", path)
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["text_tokens"] == "exact"
    assert (found["splits"]["data"]["tokens"]["min"], found["splits"]["data"]["tokens"]["max"]) == (min(lengths), max(lengths))


def test_without_a_tokenizer_image_tokens_stay_exact_and_text_is_called_an_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, model)
    assert validate(good_set(tmp_path), "--model", str(model), "--json", str(tmp_path / "out.json")) == 0
    assert "text tokens an ESTIMATE: the folder has no tokenizer.json" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    # 60 x 40 becomes 140 x 112 for the tiny model: 5 x 4 tokens of 28 pixels; rows have one image or two.
    assert found["splits"]["data"]["tokens"]["median_image_tokens"] == 30


def test_prompts_over_the_limit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good_set(tmp_path)
    assert validate(path, "--model", "tiny", "--max-length", "60") == 2
    shown = capsys.readouterr().err
    assert "prompts of data over 60 tokens: 2:" in shown
    assert "  rows.jsonl/1: " in shown
    assert "data: 2 prompts over 60 tokens; lower max_pixels_total" in shown


def test_an_image_too_thin_for_the_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "thin.png", 1, width=900, height=4)
    path = write_rows(tmp_path / "rows.jsonl", row(0, ["thin.png"]))
    assert validate(path, "--model", "tiny") == 2
    assert "one side is more than 200 times the other" in capsys.readouterr().err


def test_memory_is_estimated_with_the_settings_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, rl = good_set(tmp_path, "train.jsonl", seed=1), good_set(tmp_path, "rl.jsonl", seed=2, rows=1)
    recipe = write_recipe(tmp_path, train=[train], rl=[rl])
    assert main(["validate", str(recipe), "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert f"with the settings of {recipe}" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    longest = {split: found["splits"][split]["tokens"]["max"] for split in ("train", "rl")}
    assert longest["train"] > longest["rl"]
    assert found["memory"]["SFT"]["batch"] == f"4 rows of {longest['train']} + 128 tokens"
    assert found["memory"]["GRPO"]["batch"] == f"4 groups of {longest['rl']} + 8 x 128 tokens"
    assert found["memory"]["SFT"]["lasting_bytes"]["weights"] == 4 * 7_121_024


def test_a_model_that_is_not_downloaded_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(good_set(tmp_path), "--model", str(tmp_path / "later")) == 0
    assert "the folder is not there, so tokens and memory are not counted" in capsys.readouterr().out


# ---------------------------------------------------------------- recipes, samples, and what is refused


def test_a_world_that_is_not_built_is_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\nworld: {{train: 3, rl: 2, validation: 0, test: 2, ood: 1, perception: 1}}\n")
    assert main(["validate", str(recipe)]) == 2
    assert "there is no data to look at" in capsys.readouterr().err
    assert main(["world", str(recipe)]) == 0
    assert main(["validate", str(recipe)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "together 3 2 2 1 1 1 1 1 1" in lines
    assert lines[-1] == "nothing to mend"


def test_bad_rows_of_a_file_read_with_quarantine_are_counted_but_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = good_set(tmp_path)
    path.write_text(path.read_text() + json.dumps(row(9, ["rows.jsonl-0-0.png"], **BAD["inverted"])) + "\n")
    recipe = write_recipe(tmp_path, train=[path])
    assert main(["validate", str(recipe)]) == 2
    capsys.readouterr()
    recipe.write_text(recipe.read_text().replace("source: polyground", "source: polyground\n    options: {on_bad: quarantine}"))
    assert main(["validate", str(recipe)]) == 0
    assert "bad rows of train: 1 (1 inverted):" in capsys.readouterr().out


def test_a_sample_reads_every_row_but_opens_the_images_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good_set(tmp_path, rows=20)
    assert validate(path, "--sample", "5", "--model", "tiny", "--json", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())["splits"]["data"]
    assert (found["rows"], found["tokens"]["rows"]) == (20, 5)
    assert 5 <= found["images"] <= 10
    assert "every row was read; images and tokens are those of 5 rows of each split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param([], "give a recipe, or --source NAME --path FILE", id="nothing"),
        pytest.param(["r.yaml", "--source", "mig_bench"], "not both", id="both"),
        pytest.param(["--source", "polyground", "--path", "no-such.jsonl"], "no-such.jsonl: cannot be read", id="no-such-file"),
        pytest.param(["--source", "polyground", "--path", "x", "--against", "bench.json"], "write SOURCE:PATH", id="against"),
        pytest.param(["--source", "polyground", "--path", "x", "--sample", "0"], "--sample 0: give 1 or more", id="sample"),
        pytest.param(["--source", "polyground", "--path", "x", "--option", "images_root"], "write it as key=value", id="option"),
    ],
)
def test_a_command_that_cannot_be_understood_says_why(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *options]) == 2
    assert said in capsys.readouterr().err


def test_half_an_annotation_is_refused_with_the_row_where_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good_set(tmp_path)
    path.write_text(path.read_text()[:-40])
    assert validate(path) == 2
    assert f"{path}:4: not valid JSON" in capsys.readouterr().err


def test_the_whole_check_runs_without_torch(tmp_path: Path) -> None:
    path = good_set(tmp_path)
    for arguments in (
        ["validate", "--source", "polyground", "--path", str(path), "--model", "tiny"],
        ["check-coords", "--source", "polyground", "--path", str(path), "--model", "tiny", "--out", str(tmp_path / "out.png")],
        ["run", str(write_recipe(tmp_path, train=[path])), "--dry-run"],
    ):
        found = run_without_torch(f"from polyground.cli import main; sys.exit(main({arguments!r}))")
        assert found.returncode == 0, found.stderr
