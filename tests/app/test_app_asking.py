"""Facts about asking: which models a path stands for, answers that are told while they grow, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from polyground.app.asking import Panel, Reply, Settings, drawn, entrants, question_of, world_examples
from polyground.app.browse import named_files
from polyground.app.server import free_port
from polyground.errors import ConfigError, DataError, ModelError
from polyground.models import load_model
from polyground.prompts import student_messages
from polyground.sampling.local import LocalSampler
from toys import write_toy

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_told_grows_into_what_sample_gives(toy: Path, images: list[Path], temperature: float) -> None:
    loaded = load_model(toy)
    example = question_of(images, "where?", None)
    messages = student_messages(example, loaded.family.grids(images))
    sampler, told = LocalSampler(loaded), list[str]()
    options = {"temperature": temperature, "max_tokens": 12, "seed": 3}
    completion = sampler.stream(messages, tell=told.append, **options)
    [[expected]] = sampler.sample([messages], n=1, **options)
    assert (completion.text, completion.token_ids) == (expected.text, expected.token_ids)
    assert len(told) == min(11, len(expected.token_ids))
    decoded = [loaded.family.decode(expected.token_ids[:length]) for length in range(1, len(told) + 1)]
    assert told == decoded


def test_a_panel_tells_the_text_and_then_the_reply(toy: Path, images: list[Path]) -> None:
    panel = Panel(entrants(str(toy), []))
    *texts, reply = panel.ask(panel.entrants[0], question_of(images, "where?", None), Settings(max_tokens=6))
    assert isinstance(reply, Reply)
    assert all(isinstance(text, str) for text in texts)
    assert texts
    assert reply.told["raw"] == reply.text


def test_a_refusal_in_the_model_reaches_who_asked(toy: Path, images: list[Path]) -> None:
    panel = Panel(entrants(str(toy), []))
    with pytest.raises(DataError, match="would break the prompt"):
        list(panel.ask(panel.entrants[0], question_of(images, "where is <|im_end|>?", None), Settings(max_tokens=6)))


def test_who_stops_listening_ends_the_answer(toy: Path, images: list[Path]) -> None:
    panel = Panel(entrants(str(toy), []))
    asking = panel.ask(panel.entrants[0], question_of(images, "where?", None), Settings(max_tokens=2000))
    next(asking)
    asking.close()
    # The one thread is free again long before 2000 tokens are written.
    *_, reply = panel.ask(panel.entrants[0], question_of(images, "where?", None), Settings(max_tokens=2))
    assert isinstance(reply, Reply)


def test_a_run_stands_for_its_models_and_names_stay_apart(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "state.json").write_text(json.dumps({"config": {"model": {"path": str(toy)}}}), encoding="utf-8")
    (run / "sft-merged").symlink_to(toy)
    assert [(one.name, one.model) for one in entrants(str(run), [])] == [("base", str(toy)), ("sft", str(run / "sft-merged"))]
    assert [one.name for one in entrants("tiny", [str(toy), str(run), str(toy)])] == ["base", "toy", "run base", "sft", "toy toy"]


def test_an_adapter_is_laid_over_the_base_it_names(toy: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "grpo" / "checkpoint-60"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(toy)}), encoding="utf-8")
    [one] = entrants(str(adapter), [])
    assert (one.name, one.model, one.adapter) == ("grpo/checkpoint-60", str(toy), adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "runs/gone"}), encoding="utf-8")
    with pytest.raises(ModelError, match="runs/gone, which is not there; merge it first"):
        entrants(str(adapter), [])


def test_a_run_without_a_model_says_what_makes_one(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    with pytest.raises(ModelError, match="polyground merge"):
        entrants(str(tmp_path), [])


def test_bad_images_are_named_with_what_is_wrong_and_what_to_do(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("<html>no</html>", encoding="utf-8")
    cut = tmp_path / "cut.png"
    cut.write_bytes(images[0].read_bytes()[:60])
    with pytest.raises(DataError) as refused:
        question_of([images[0], tmp_path / "notes.png", cut], "where?", None)
    said = str(refused.value).splitlines()
    assert said[0].startswith("Image 2 (notes.png): not a readable image but a web page")
    assert said[1].startswith("Image 3 (cut.png): ")
    assert "choose another file" in said[2]


@pytest.mark.parametrize(
    ("count", "question", "said"),
    [
        pytest.param(0, "where?", "no image yet", id="no-image"),
        pytest.param(2, "  ", "no question yet", id="no-question"),
        pytest.param(2, "what is at <box>?", "only examples may", id="placeholder"),
    ],
)
def test_what_cannot_be_asked_says_what_is_missing(images: list[Path], count: int, question: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        question_of(images[:count], question, None)


def test_the_world_gives_one_question_of_each_kind_with_its_truth(tmp_path: Path) -> None:
    examples = world_examples(tmp_path)
    assert len(examples) == len({example.task for example in examples}) == 10
    for example in examples:
        assert question_of(example.images, example.question, example) is example
        names = [name for name, _, _ in drawn(example, {}, truth=True)]
        assert names == ["asked"] * len(example.question_boxes) + ["truth"]
    other = question_of(examples[0].images, "another question", examples[0])
    assert other.target.boxes == ()


def test_answers_are_named_files(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.touch()
    assert named_files([f"step 60={path}"]) == {"step 60": path}
    for word in ("step60", f"={path}", "a=nowhere.jsonl", f"truth={path}"):
        with pytest.raises(ConfigError, match="--answers"):
            named_files([word])


def test_a_port_that_is_taken_is_refused() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="taken"):
            free_port(other.getsockname()[1])
