import math
from dataclasses import astuple
from importlib.resources import files
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from polyground.errors import ConfigError
from polyground.stages.pretrain import load_config, run
from polyground.training.pretrain import FastVision, Gaze, normalised, read, schedule
from polyground.training.pretrain_data import TOKENS_PER_IMAGE, Encoder, Span, label_tokens, patches
from polyground.worlds.pretraining import Mix, Sample, sample_step
from polyground.worlds.scenes import Item, Scene, render, sample_scene

TINY = Path(str(files("polyground"))) / "models" / "tiny"


@pytest.fixture(scope="module")
def model() -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def test_the_batched_forward_is_the_models_own(model: Qwen3VLForConditionalGeneration) -> None:
    rng = Random(0)
    images = [render(sample_scene(rng)) for _ in range(3)]
    encoder = Encoder(TINY / "tokenizer.json")
    rows = encoder.pad([Sample((2, 0), "Find the red star in image 2.", "ok")])
    merged, deep = FastVision(model)(normalised(np.stack([patches(image) for image in images])))
    logits = model.lm_head(read(model, merged, deep, rows))

    shown = Qwen2VLImageProcessorPil.from_pretrained(TINY)([images[2], images[0]], return_tensors="pt")
    ids = torch.from_numpy(rows.input_ids_BT)
    kinds = (ids == model.config.image_token_id).int()
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **shown).logits
    assert torch.allclose(logits, own, atol=1e-3)


def test_an_image_takes_its_tokens_and_digits_stand_alone() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    assert encoder.ids(encoder.prompt(2, "Find it.")).count(encoder.image_id) == 2 * TOKENS_PER_IMAGE
    assert len(encoder.ids("937")) == 3


def samples_and_scenes() -> tuple[list[Sample], list[Scene]]:
    scenes, samples = sample_step(Random(1), scenes=12, samples=80, mix=Mix(naming=0.3, choosing=0.1))
    return samples, scenes


def shown_item(sample: Sample, span: Span, scenes: list[Scene]) -> Item:
    """The object of the image that the span says it is about (per-mille figures in answers, exact ones for phrases)."""
    items = scenes[sample.images[span.image - 1]].items
    return min(items, key=lambda item: max(abs(a - b) for a, b in zip(astuple(item.box), span.edges, strict=True)))


def test_spans_are_about_the_object_they_write_down() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    samples, scenes = samples_and_scenes()
    openings = phrases = 0
    for sample in samples:
        ids, _ = encoder.row(sample)
        for span in encoder.spans(sample):
            item = shown_item(sample, span, scenes)
            assert astuple(item.box) == pytest.approx(span.edges, abs=0.002)
            knows, words = encoder.decode([ids[span.knows]]).strip(), encoder.decode(ids[span.first : span.last + 1])
            assert words.endswith(item.shape)
            assert item.colour in words or span.first == span.last
            openings += knows.endswith("[")
            phrases += knows == item.shape
            assert knows.endswith("[") or knows == item.shape
    assert openings > 30
    assert phrases > 30


def test_a_token_about_an_object_is_told_the_image_token_with_its_centre() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    samples, scenes = samples_and_scenes()
    several = 0
    for sample in samples:
        rows = encoder.pad([sample])
        ids = rows.input_ids_BT[0].tolist()
        spans = [(span, shown_item(sample, span, scenes)) for span in encoder.spans(sample)]
        wanted = [(t, item) for span, item in spans for t in range(span.first, span.last + 1)]
        assert rows.about_P2[:, 1].tolist() == [t for t, _ in wanted]
        for at, (_, item) in zip(rows.at_P.tolist(), wanted, strict=True):
            assert ids[at] == encoder.image_id
            number = ids[:at].count(encoder.image_id)
            image, (row, column) = number // TOKENS_PER_IMAGE, divmod(number % TOKENS_PER_IMAGE, 4)
            assert item in scenes[sample.images[image]].items
            x, y = item.box.center
            assert (row, column) == (int(y * 4), int(x * 4))
            several += image > 0
    assert several > 30


def test_what_a_head_attends_to_is_kept_and_forgotten(model: Qwen3VLForConditionalGeneration) -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    scene = sample_scene(Random(3), count=1)
    [item] = scene.items
    gaze = Gaze(model)
    try:
        phrase = f"{item.colour} {item.shape}"
        rows = encoder.pad([Sample((0,), f"Find the {phrase}.", "ok", ((phrase, 1, item.box),))])
        pixels = normalised(np.stack([patches(render(scene))]))
        read(model, *FastVision(model)(pixels), rows)
        [first, second] = [weights.detach() for weights in gaze.seen]
        loss = gaze.loss(rows)
        [(b, t)], [at] = rows.about_P2.tolist(), rows.at_P.tolist()
        assert loss.item() == pytest.approx(-(math.log(first[b, t, at]) + math.log(second[b, t, at])) / 2, abs=1e-5)
        assert not gaze.seen
    finally:
        gaze.close()


def test_plain_text_is_about_nothing() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    assert encoder.spans(Sample((), "", '[{"bbox_2d": [1, 2, 30, 40], "label": "red star"}]')) == []


def test_the_tokens_of_a_scene_know_where_in_the_image_their_object_lies() -> None:
    scene = sample_scene(Random(2), count=1)
    seen = label_tokens([scene])
    assert seen.present_SM.sum() == 1
    assert seen.edges_SM4[seen.present_SM][0] == pytest.approx(astuple(scene.items[0].box))
    x, y = scene.items[0].box.center
    assert seen.present_SM.reshape(4, 4)[int(y * 4), int(x * 4)]


def test_the_learning_rate_rises_then_falls() -> None:
    shares = [schedule(step, 100, warmup=10) for step in range(100)]
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[0] == 0.1
    assert shares[-1] == 0.02


def test_a_misspelt_key_is_refused_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stepz: 3\n")
    with pytest.raises(ConfigError, match="stepz"):
        load_config(recipe)


def test_a_stopped_pretraining_goes_on_where_it_was(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    small = ("vision_steps", "logging_steps", "threads", "parts", "vision_scenes", "scenes", "samples", "held_out", "measured")
    text = f"out: {tmp_path / 'out'}\n" + "".join(f"{key}: {1 + (at > 3)}\n" for at, key in enumerate(small))
    recipe.write_text(text + "steps: 1\n")
    assert run(load_config(recipe))["step"] == 2
    recipe.write_text(text + "steps: 2\n")
    points: list[dict[str, float]] = []
    assert run(load_config(recipe), points.append)["step"] == 3
    assert [point["step"] for point in points] == [3]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_recipe_may_change_keys_from_a_step_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mix_listing: 0.1\nchanges:\n  20: {mix_listing: 0.3}\n  30: {mix_finding: 0.2, mix_listing: 0.4}\n")
    config = load_config(recipe)
    assert [config.at(step).mix_listing for step in (0, 19, 20, 29, 30)] == [0.1, 0.1, 0.3, 0.3, 0.4]
    assert config.at(30).mix_finding == 0.2


def test_a_change_of_a_misspelt_key_is_refused_by_name(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("changes:\n  20: {mix_lisping: 0.3}\n")
    with pytest.raises(ConfigError, match="mix_lisping"):
        load_config(recipe)
