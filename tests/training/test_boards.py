"""Facts about what loggers see of a GRPO step: images with their boxes drawn, and the answers of a group as a table."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stand_ins import Babbler, ask
from transformers import TrainerState, TrainingArguments

from polyground.answer import Answer, Located
from polyground.config import GrpoConfig
from polyground.errors import ConfigError
from polyground.geometry import Box, Grid
from polyground.models import load_model
from polyground.records import Completion, Example, Rollout, Score
from polyground.rollout import Group
from polyground.training.boards import BETTER, SIDE, TRUTH, WORSE, Answers, Boards, Shown, answers, chosen, markdown, sheet
from polyground.training.grpo import train_grpo
from polyground.training.runs import require_loggers
from polyground.vision import text_strip

INJECTED = "<script>alert(1)</script> | **bold**\n[x](http://y)"
LOW, HIGH = Box(0.5, 0.5, 1.0, 1.0), Box(0.0, 0.0, 0.75, 0.75)


def shown(images: Sequence[Path], *totals: float, task: str = "diff", key: str = "e", text: str = INJECTED) -> Shown:
    """A group whose answers have these rewards; every answer but the best draws the lower right quarter of image 1."""
    target = Answer((Located(1, Box(0.25, 0.25, 0.5, 0.5)),))
    example = Example(key=key, task=task, images=tuple(images), question="where?", target=target)
    rollouts = []
    for sample, total in enumerate(totals):
        answer = Answer((Located(1, HIGH if total == max(totals) else LOW),))
        score = Score(total=total, parts={"iou": total}, iou=total, image_correct=1.0, answer=answer)
        rollouts.append(Rollout(example=key, task=task, completion=Completion(text=text), score=score, sample=sample))
    mean = sum(totals) / len(totals)
    return Shown(Group(example, tuple(rollouts)), [total - mean for total in totals])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (SIDE, SIDE), "black").save(tmp_path / "black.png")
    return tmp_path / "black.png"


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def close(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 12


def test_a_sheet_draws_the_annotation_and_every_answer_where_it_lies(image: Path) -> None:
    picture = sheet(shown([image], 0.9, 0.1))
    left, top = 8, text_strip("where?", width=picture.width).height + 8

    def drawn(colour: str, x: float, y: float) -> bool:
        around = [(left + round(x * SIDE) + dx, top + round(y * SIDE) + dy) for dx in range(-5, 6) for dy in range(-5, 6)]
        return any(close(picture.getpixel(at), rgb(colour)) for at in around)

    assert drawn(TRUTH, 0.5, 0.4)
    assert drawn(BETTER, 0.75, 0.3)
    assert drawn(WORSE, 0.99, 0.9)
    assert not drawn(WORSE, 0.25, 0.9)


def test_a_table_has_a_row_for_every_answer_with_the_parts_of_its_reward(image: Path) -> None:
    table = answers(shown([image], 0.9, 0.1))
    assert table.header == ["answer", "reward", "iou", "advantage", "IoU", "right image", "unreadable", "tokens", "text"]
    assert [row[:4] for row in table.rows] == [[0, 0.9, 0.9, 0.4], [1, 0.1, 0.1, -0.4]]


def test_what_a_model_wrote_is_text_in_markdown() -> None:
    table = markdown(Answers(["a|b"], [[INJECTED]]))
    assert len(table.splitlines()) == 3
    assert "<script>" not in table
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\*\\*bold\\*\\*<br>\\[x\\](http://y)" in table


def test_groups_that_differ_are_shown_first_and_tasks_take_turns(image: Path) -> None:
    flat = shown([image], 0.5, 0.5, task="region", key="flat")
    groups = [flat, *(shown([image], 0.9, 0.1, key=key) for key in ("a", "b")), shown([image], 1.0, 0.0, task="region", key="c")]
    assert [one.group.example.key for one in chosen(groups, size=3)] == ["a", "c", "b"]
    assert chosen(groups, size=0) == []


class Wall:
    """A board that remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def show(self, name: str, sheet: Image.Image, caption: str, table: Answers, step: int) -> None:
        self.seen.append((name, step))


@pytest.mark.parametrize(
    ("save_steps", "iterations", "expected"),
    [
        pytest.param(4, 1, [0, 3, 7], id="the-first-step-and-those-with-a-checkpoint"),
        pytest.param(100, 1, [0], id="no-checkpoint-yet"),
        pytest.param(4, 2, [0, 2, 6], id="rollouts-that-are-used-twice"),
    ],
)
def test_which_steps_are_shown(save_steps: int, iterations: int, expected: list[int]) -> None:
    boards = Boards([Wall()], groups=1, save_steps=save_steps, num_iterations=iterations)
    assert [step for step in range(0, 8, iterations) if boards.wants(step)] == expected


@pytest.mark.parametrize(("boards", "groups"), [([], 2), ([Wall()], 0)], ids=["nobody-looks", "none-wanted"])
def test_nothing_is_drawn_for_nobody(boards: list[Wall], groups: int) -> None:
    assert not Boards(boards, groups=groups, save_steps=1, num_iterations=1).wants(0)


def test_an_image_that_is_gone_stops_no_training(image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wall = Wall()
    boards = Boards([wall], groups=2, save_steps=1, num_iterations=1)
    boards.take([shown([tmp_path / "gone.png"], 1.0, 0.0), shown([image], 1.0, 0.0, task="region")])
    boards.on_step_end(TrainingArguments(report_to=["tensorboard"]), TrainerState(global_step=5), None)
    assert wall.seen == [("groups/2", 5)]
    assert "gone.png" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param(["tensorbord"], "tensorbord is not supported, only", id="misspelt"),
        pytest.param(["neptune"], "pip install neptune", id="not-installed"),
    ],
)
def test_a_logger_that_is_not_there_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_loggers(names)


@pytest.mark.parametrize("names", [[], ["tensorboard"], ["none"], ["all"]], ids=str)
def test_a_logger_that_is_there_is_taken(names: list[str]) -> None:
    require_loggers(names)


# ---- through the loggers themselves


def judge(completion: Completion, example: Example, grids: Sequence[Grid]) -> Score:
    """Boxes on image 1, the better the longer the completion."""
    value = len(completion.token_ids) / 8
    answer = Answer((Located(1, Box(0.0, 0.0, 0.25 + value / 2, 0.5)),))
    return Score(total=value, parts={"length": value}, iou=value, image_correct=1.0, answer=answer)


def learn(folder: Path, examples: list[Example], out: Path, *names: str, **changes: Any) -> None:
    """Four steps with checkpoints after the second and the fourth."""
    small = {"num_generations": 3, "max_completion_length": 8, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2}
    quiet = {"logging_steps": 1, "lora_r": 2, "lora_alpha": 4, "beta": 0.0, "report_to": list(names)}
    config = GrpoConfig(**{**small, **quiet, **changes})
    train_grpo(load_model(folder), examples, config, sampler=lambda _: Babbler(), ask=ask, judge=judge, out=out, seed=3)


def test_tensorboard_holds_curves_pictures_and_tables(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(toy_folder, examples, tmp_path, "tensorboard")
    [folder] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3, 4]
    assert sorted(events.Tags()["images"]) == ["groups/1/images", "groups/2/images"]
    pictures = events.Images("groups/1/images")
    assert [event.step for event in pictures] == [1, 2, 4]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert any(close(colour, rgb(TRUTH)) for colour in colours)
    assert any(close(colour, rgb(BETTER)) for colour in colours)
    tables = events.Tensors("groups/1/answers/text_summary")
    assert [event.step for event in tables] == [1, 2, 4]
    text = tables[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[2].startswith("| answer | reward | length | advantage | IoU | right image |")
    assert len(text.splitlines()) == 2 + 2 + 3  # caption, blank, header, rule, three answers


def test_without_groups_tensorboard_holds_curves_only(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(toy_folder, examples, tmp_path, "tensorboard", report_groups=0, max_steps=1)
    [folder] = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == []
    assert "train/reward" in events.Tags()["scalars"]


def test_pictures_change_no_number(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    learn(toy_folder, examples, tmp_path / "seen", "tensorboard", max_steps=2)
    learn(toy_folder, examples, tmp_path / "unseen", max_steps=2)
    for name in ("rollouts.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "seen" / name).read_bytes() == (tmp_path / "unseen" / name).read_bytes()


def test_wandb_keeps_pictures_and_tables_offline(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'polyground[loggers]'")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    learn(toy_folder, examples, tmp_path / "run", "wandb")
    wandb.finish()
    media = list((tmp_path / "wandb").glob("offline-run-*/files/media"))
    assert len(media) == 1
    pictures = sorted(media[0].glob("images/groups/*/images_*.png"))
    tables = sorted(media[0].glob("table/groups/*/answers_*.table.json"))
    assert (len(pictures), len(tables)) == (6, 6)  # two groups of three steps
    told = json.loads(tables[0].read_text(encoding="utf-8"))
    assert told["columns"][:4] == ["answer", "reward", "length", "advantage"]
    assert [row[0] for row in told["data"]] == [0, 1, 2]


def test_trackio_keeps_pictures_and_tables(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'polyground[loggers]'")
    learn(toy_folder, examples, tmp_path / "run", "trackio")
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 6
