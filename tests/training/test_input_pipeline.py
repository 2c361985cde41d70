"""Facts about how images reach a step: once, from wherever they were decoded, with the same numbers and the same errors."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import ask, judge
from transformers import TrainerState

from polyground.config import GrpoConfig, SftConfig
from polyground.errors import DataError
from polyground.imagefile import ImageError
from polyground.models import Family, ImageFeatures, Loaded, Prompt, load_model
from polyground.records import Example
from polyground.sampling.local import LocalSampler
from polyground.storage import read_rows
from polyground.training.grpo import train_grpo
from polyground.training.remembering import FeatureCache, Remembering
from polyground.training.sft import Lesson, train_sft
from toys import write_image

QUIET = {"logging_steps": 1, "report_to": [], "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-2}


def learn(
    loaded: Loaded, examples: list[Example], out: Path, *, sampler: Callable[[Loaded], LocalSampler] = LocalSampler, **changes
) -> dict:
    small = {"num_generations": 3, "max_completion_length": 6, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2}
    config = GrpoConfig(**{**small, **QUIET, **changes})
    return train_grpo(loaded, examples, config, sampler=sampler, ask=ask, judge=judge, out=out, seed=3)


def lines(out: Path) -> list[dict]:
    """What was logged, without how long it took."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("train_", "total_"))}
        for row in read_rows(out / "log.jsonl")
    ]


def texts(out: Path) -> list[tuple[int, str, str]]:
    return [(row["step"], row["example"], row["completion"]["text"]) for row in read_rows(out / "rollouts.jsonl")]


class Tally:
    """A family that counts, in this process, the prompts it encodes and those whose images the tower sees."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.encoded: list[Path] = []
        self.seen = 0

    def __getattr__(self, name: str):
        return getattr(self._family, name)

    def encode(self, messages) -> Prompt:
        self.encoded += [image for message in messages for image in message.images]
        return self._family.encode(messages)

    def encode_images_of(self, model, prompts) -> list[ImageFeatures]:
        self.seen += sum(bool(prompt.vision) for prompt in prompts)
        return self._family.encode_images_of(model, prompts)


def tallied(folder: Path) -> tuple[Loaded, Tally]:
    loaded = load_model(folder)
    tally = Tally(loaded.family)
    return Loaded(loaded.model, tally, loaded.path, loaded.config), tally


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_worker_processes_change_nothing_but_who_decodes(
    toy_folder: Path, examples: list[Example], tmp_path: Path, num_iterations: int
) -> None:
    decoded = {}
    for workers in (0, 2):
        loaded, tally = tallied(toy_folder)
        learn(loaded, examples, tmp_path / str(workers), dataloader_num_workers=workers, num_iterations=num_iterations)
        decoded[workers] = len(tally.encoded)
    images_of_a_pass = sum(len(example.images) for example in examples)
    assert decoded == {0: images_of_a_pass * 2 // num_iterations, 2: 0}
    assert lines(tmp_path / "0") == lines(tmp_path / "2")
    assert texts(tmp_path / "0") == texts(tmp_path / "2")


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def kill_in_step_4(self: object, args: object, state: TrainerState, control: object, **_: object) -> None:
    if state.global_step == 3:
        raise KilledError


def test_a_run_with_workers_and_a_cache_goes_on_exactly(
    toy_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dataloader_num_workers": 1, "image_cache_mib": 1}
    learn(load_model(toy_folder), examples, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr("polyground.training.runs.LogRows.on_pre_optimizer_step", kill_in_step_4)
        with pytest.raises(KilledError):
            learn(load_model(toy_folder), examples, tmp_path / "killed", **options)
    learn(load_model(toy_folder), examples, tmp_path / "killed", **options)
    assert texts(tmp_path / "whole") == texts(tmp_path / "killed")
    whole, killed = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert all(torch.allclose(whole[name], killed[name], atol=1e-6) for name in whole)


def test_kept_features_change_nothing_but_the_work(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    found = {}
    for mib in (0, 1):
        loaded, tally = tallied(toy_folder)
        learn(loaded, examples, tmp_path / str(mib), image_cache_mib=mib)
        found[mib] = (len(tally.encoded), tally.seen)
    # Two passes over four prompts with 1 + 2 + 3 + 6 images.
    assert found == {0: (24, 8), 1: (12, 4)}
    assert texts(tmp_path / "0") == texts(tmp_path / "1")
    for off, on in zip(lines(tmp_path / "0"), lines(tmp_path / "1"), strict=True):
        assert on == pytest.approx(off, rel=1e-5, abs=1e-6)


def test_workers_are_told_what_the_cache_holds(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    loaded, tally = tallied(toy_folder)
    # One worker holds at most two batches of one prompt: of six passes over four prompts most find the cache filled.
    options = {"dataloader_num_workers": 1, "image_cache_mib": 1, "per_device_train_batch_size": 1, "save_steps": 24}
    learn(loaded, examples, tmp_path, max_steps=24, **options)
    assert (tally.encoded, tally.seen) == ([], 4)


def test_a_changed_image_is_another_image(toy: Loaded, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    copy = Path(shutil.copyfile(image, tmp_path / "b.png"))
    family = Remembering(toy.family, cache_mib=1)

    def identity(path: Path, question: str) -> str | None:
        example = Example(key="k", task="region", images=(path,), question=question, target=None)
        return family.identity(ask(example)[0])

    first = identity(image, "where?")
    assert first == identity(copy, "where?")
    assert first != identity(image, "what?")
    write_image(image, "blue", width=84)
    assert first != identity(image, "where?")
    assert identity(tmp_path / "none.png", "where?") is None


def test_the_cache_lets_go_of_the_longest_unused_and_keeps_within_its_bytes() -> None:
    prompt = Prompt(torch.zeros(1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long), 1)
    third = ImageFeatures(torch.zeros(80_000))  # of a MiB, nearly
    cache = FeatureCache(1)
    for name in ("a", "b", "c"):
        cache.put(name, prompt, third)
    assert cache.get("a") is not None
    cache.put("d", prompt, third)
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    assert cache.bytes == 3 * (80_000 * 4 + 4 * 8) <= 2**20
    cache.put("huge", prompt, ImageFeatures(torch.zeros(300_000)))
    assert "huge" not in cache
    assert cache.bytes == 3 * (80_000 * 4 + 4 * 8)


def test_pixels_are_let_go_once_the_tower_has_seen_them(toy: Loaded, examples: list[Example]) -> None:
    family = Remembering(toy.family)
    prompt = family.encode(ask(examples[1])[0])
    assert not prompt.vision
    assert len(family.encode_images(toy.model, prompt)) == prompt.image_tokens > 0
    assert not family._unseen


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_with_its_row_wherever_it_was_opened(
    toy_folder: Path, examples: list[Example], tmp_path: Path, workers: int
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(examples[0].images[0].read_bytes()[:60])
    broken = Example(key="broken", task="region", images=(bad,), question="where?", target=examples[0].target)
    with pytest.raises(DataError, match=r"^broken: .*bad\.png: .*What is done so far is kept"):
        learn(load_model(toy_folder), [*examples[1:], broken], tmp_path / "run", dataloader_num_workers=workers)
    lesson = Lesson(tuple(ask(broken)[0]), "x", "broken")
    with pytest.raises(DataError, match=r"^broken: .*bad\.png: .*; then run the same command again"):
        train_sft(
            load_model(toy_folder),
            [lesson],
            SftConfig(**{**QUIET, "max_steps": 1, "dataloader_num_workers": workers}),
            out=tmp_path / "sft",
            seed=0,
        )


def test_workers_change_nothing_in_supervised_fine_tuning(toy_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    lessons = [Lesson(tuple(ask(example)[0]), f"<think>{example.key}</think>") for example in examples]
    for workers in (0, 2):
        config = SftConfig(
            **{**QUIET, "max_steps": 4, "per_device_train_batch_size": 2, "dataloader_num_workers": workers, "save_steps": 4}
        )
        train_sft(load_model(toy_folder), lessons, config, out=tmp_path / str(workers), seed=1)
    assert lines(tmp_path / "0") == lines(tmp_path / "2")


def test_an_image_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a.png"), "huge_image", "too large")))
    assert (str(error), error.path, error.reason) == ("a.png: too large", Path("a.png"), "huge_image")
