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
from polyground.training.pretrain import FastVision, normalised, read, schedule
from polyground.training.pretrain_data import TOKENS_PER_IMAGE, Encoder, label_cells, patches
from polyground.worlds.pretraining import Mix, Sample, sample_step
from polyground.worlds.scenes import SHAPES, render, sample_scene

TINY = Path(str(files("polyground"))) / "models" / "tiny"


@pytest.fixture(scope="module")
def model() -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


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


def test_a_token_that_opens_a_box_or_ends_a_phrase_has_the_box_of_its_object() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    scenes, samples = sample_step(Random(1), scenes=12, samples=60, mix=Mix(naming=0.3, choosing=0.1))
    openings = phrases = 0
    for sample in samples:
        ids, _ = encoder.row(sample)
        # Per-mille figures in the answer, exact ones for phrases.
        boxes = {tuple(round(edge, 2) for edge in astuple(item.box)) for k in sample.images for item in scenes[k].items}
        for token, box in encoder.located(sample):
            assert any(max(abs(a - b) for a, b in zip(box, there, strict=True)) < 0.01 for there in boxes)
            text = encoder.decode([ids[token]]).strip()
            openings += text.endswith("[")
            phrases += text in SHAPES
            assert text.endswith("[") or text in SHAPES
    assert openings > 30
    assert phrases > 30


def test_plain_text_points_at_nothing() -> None:
    encoder = Encoder(TINY / "tokenizer.json")
    assert encoder.located(Sample((), "", '[{"bbox_2d": [1, 2, 30, 40], "label": "red star"}]')) == []


def test_the_cells_of_a_scene_know_where_in_the_image_their_object_lies() -> None:
    scene = sample_scene(Random(2), count=1)
    cells = label_cells([scene])
    assert cells.present_SK.sum() == 1
    assert cells.edges_SK4[cells.present_SK][0] == pytest.approx(astuple(scene.items[0].box))


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
