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
from polyground.training.pretrain_data import TOKENS_PER_IMAGE, Encoder, patches
from polyground.worlds.pretraining import Sample
from polyground.worlds.scenes import render, sample_scene

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
