"""What the recipes for real models promise, checked without their models and data."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from polyground.cli import main
from polyground.config import DataSource, Recipe, load_recipe
from polyground.sources import ABOUT_ROWS, options_of
from polyground.stages import evaluation_splits, own_splits
from polyground.storage import read_json, read_rows
from sources.source_fixtures import (
    blink,
    lisa,
    llmseg,
    mc_bench,
    mig_bench,
    mmiu,
    odinw,
    picture,
    reasonvos,
    ref_l4,
    revos,
    write_json,
)
from toys import write_toy

RECIPES = Path(__file__).parents[1] / "recipes"
REAL = pytest.mark.parametrize("path", sorted(RECIPES.glob("qwen*.yaml")), ids=lambda path: path.stem)

BENCHMARKS = {"mig_bench", "mc_bench", "lisa", "llmseg", "revos", "reasonvos", "ref_l4", "odinw", "blink", "mmiu"}


def sources(recipe: Recipe) -> list[tuple[str, DataSource]]:
    return [(split, source) for split, found in own_splits(recipe).items() for source in found]


@REAL
def test_every_option_of_every_file_is_one_that_its_reader_knows(path: Path) -> None:
    for split, source in sources(load_recipe(path)):
        unknown = set(source.options) - set(options_of(source.source)) - set(ABOUT_ROWS)
        assert not unknown, (split, source.path)


@REAL
def test_no_question_is_for_the_teacher_and_for_rl(path: Path) -> None:
    data = load_recipe(path).data
    assert [source.path for source in data.train] == [source.path for source in data.rl]
    for taught, reinforced in zip(data.train, data.rl, strict=True):
        assert taught.options["every"] == reinforced.options["every"]
        assert 0 <= taught.options["skip"] < reinforced.options["skip"] < taught.options["every"]


@REAL
def test_files_of_one_split_have_names_of_their_own(path: Path) -> None:
    data = load_recipe(path).data
    for split in (data.train, data.rl, data.ood, data.perception):
        names = [source.options["name"] for source in split]
        assert len(set(names)) == len(names)


@REAL
def test_every_benchmark_of_the_paper_is_scored_and_nothing_comes_from_the_simulated_world(path: Path) -> None:
    recipe = load_recipe(path)
    assert {source.source for split, source in sources(recipe) if split not in ("train", "rl")} == BENCHMARKS
    assert set(evaluation_splits(recipe)) <= set(own_splits(recipe))


@REAL
def test_images_are_decoded_before_a_model_is_loaded(path: Path) -> None:
    assert {source.options["check_images"] for _, source in sources(load_recipe(path))} == {"decode"}


@REAL
def test_the_pass_rates_kept_are_above_none_and_at_most_three_quarters(path: Path) -> None:
    reject = load_recipe(path).reject
    assert [n for n in range(9) if reject.keeps(n / 8)] == [1, 2, 3, 4, 5, 6]
    assert reject.num_generations == 8


@REAL
def test_a_dry_run_needs_neither_model_nor_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in ("missing  model models/", "data.train: data/MGrounding-630k/", "dry run: nothing was done"):
        assert part in shown
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- run, on a toy model and a few rows in every published layout

FILES = {
    "Common_Object/common_train_70k": "common",
    "Difference/diff_train_70k": "diff",
    "Free-Form/free_form_grounding_130k": "free_form",
    "Group_Grounding/gg_train_120k": "gg_train",
    "Object_Tracking/ot_train_130k": "object_tracking",
    "Referring_Grounding/refer_train_70k": "refer",
    "Region_Locating/region_train_70k": "region",
}


CARD = """---
configs:
- config_name: Art_Style
  data_files:
  - split: val
    path: Art_Style/val-*
---
"""
"""How the hub's copy of BLINK says what its folders are."""


@pytest.fixture
def teacher() -> Iterator[str]:
    """An OpenAI-compatible server that finds everything in the left half of image 1, in the numbers it is asked for."""

    class Teacher(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = request["messages"][0]["content"][-1]["text"]
            width, height = map(int, re.search(r"x runs from 0 to (\d+) and y from 0 to (\d+)", asked).groups())  # type: ignore[union-attr]
            answer = json.dumps([{"image": 1, "bbox_2d": [0, 0, width // 2, height]}])
            text = f"<think>The first image has it on its left side.</think><answer>{answer}</answer>"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice] * request["n"]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def lay_out(data: Path) -> None:
    """A few rows of everything that the recipes name, where they name it."""
    for path, kind in FILES.items():
        folder = path.partition("/")[0]
        rows = []
        for n in range(2):
            picture(data / "MGrounding-630k" / folder / f"{n}.jpg", (224, 112))
            said = f"<image>\n<image>\nFind the {kind} number {n}."
            answer = "It's in the first image. <|box_start|>(0,0),(500,1000)<|box_end|>"
            images = [f"./MGrounding-630k/{folder}/{n}.jpg", f"./MGrounding-630k/{folder}/0.jpg"]
            turns = [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]
            rows.append({"type": kind, "images": images, "conversations": turns})
        write_json(data / "MGrounding-630k" / f"{path}.json", rows)
    file, _ = mig_bench(data / "MIG-Bench")
    rows = json.loads(file.read_text())
    write_json(file, [{**row, "images": [f"./MIG-Bench/{name}" for name in row["images"]]} for row in rows])
    mc_bench(data / "MC-Bench")
    for write in (lisa, llmseg, revos, reasonvos):
        write(data / "univg")
    answers, pictures = data / "UniVG-R1-data" / "zero_shot_evaluation", data / "UniVG-R1-zeroshot"
    answers.mkdir(parents=True)
    for file in (data / "univg").glob("*.json"):
        file.rename(answers / file.name.replace("lisa_val", "lisa_test"))
    (data / "univg").rename(pictures)
    (pictures / "videos").rename(pictures / "ReVOS")
    ref_l4(data / "Ref-L4")[0].rename(data / "Ref-L4" / "ref-l4-test.parquet")
    odinw(data / "odinw")
    blink(data / "BLINK")
    (data / "BLINK" / "README.md").write_text(CARD, encoding="utf-8")
    mmiu(data / "MMIU")


SMALL = {
    "model.dtype": "float32",
    "synthesize.samples_per_example": 1,
    "reject.min_pass_rate": "null",
    "reject.max_pass_rate": "null",
    "reject.num_generations": 2,
    "reject.max_completion_length": 4,
    "grpo.num_generations": 2,
    "grpo.max_completion_length": 4,
    "grpo.max_steps": 1,
    "grpo.gradient_accumulation_steps": 1,
    "sft.max_steps": 1,
    "evaluate.max_completion_length": 4,
    "evaluate.bootstrap": 0,
    "report.gallery_size": 2,
}
"""What is changed of a recipe to fit into a test; training stays in float32, as a CPU has it."""


@pytest.mark.slow
def test_the_recipe_runs_from_the_published_files_to_the_report(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "data")
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-72B-Instruct"):
        write_toy(tmp_path / "models" / name, "qwen2_5_vl")
    small = SMALL | {"synthesize.teacher_base_url": teacher, "data.ood.4.options.strip_prefix": "/data/zero-shot"}
    for section in ("sft", "grpo"):
        small |= {f"{section}.bf16": "false", f"{section}.lora_r": 2, f"{section}.report_to": "[]"}
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["run", str(RECIPES / "qwen2.5-vl-7b.yaml"), *words]) == 0
    out = tmp_path / "runs" / "qwen2.5-vl-7b"
    taught = list(read_rows(out / "synthesize" / "kept.jsonl"))
    reinforced = list(read_rows(out / "reject" / "kept.jsonl"))
    assert sorted(row["task"] for row in taught) == sorted(row["task"] for row in reinforced)
    assert len({row["task"] for row in taught}) == 7
    assert all(row["question"].endswith("number 0.") for row in taught)
    assert all(row["question"].endswith("number 1.") for row in reinforced)
    results = read_json(out / "evaluate" / "results.json")
    assert results["models"] == ["base", "sft", "rl"]
    assert set(results["splits"]) >= {"test", "ood_mc_bench", "ood_reasonvos", "ood_odinw_aquarium", "perception_mmiu"}
    assert (out / "report.html").stat().st_size > 10_000
