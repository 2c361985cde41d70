"""Where torchvision is installed, transformers resizes with it; the adapters, which do without, give the same pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from polyground.models import load_family
from polyground.records import Message
from polyground.vision import load_image
from toys import FAMILIES, write_image, write_toy

# The first with a Lanczos filter for tensors.
pytest.importorskip("torchvision", minversion="0.27")

LEVELS = 2
"""Of 256. Both round to whole levels between their passes over rows and columns, and SmolVLM resizes up to three times."""


def _torchvision_processor(folder: Path, model_type: str):
    if model_type == "internvl":
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor as Processor
    elif model_type == "smolvlm":
        from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor as Processor
    else:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Processor
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("size", [(300, 90), (33, 47), (640, 480)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_pixels_agree_within_rounding(tmp_path: Path, model_type: str, size: tuple[int, int]) -> None:
    folder = write_toy(tmp_path / "toy", model_type)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    family = load_family(folder)
    ours = family.encode([Message("user", (tmp_path / "noise.png", "?"))]).vision["pixel_values"]
    other = _torchvision_processor(folder, model_type)
    options = family.convention.layout.processor_options(None)
    theirs = other(images=[[load_image(tmp_path / "noise.png")]], return_tensors="pt", **options)["pixel_values"]
    theirs = theirs[0] if model_type == "smolvlm" else theirs
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs().max() * max(other.image_std) * 255
    assert levels <= LEVELS + 0.1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_folder_opened_by_auto_processor_makes_the_same_prompt(tmp_path: Path, model_type: str) -> None:
    if model_type == "smolvlm":
        pytest.importorskip("num2words")
    folder = write_toy(tmp_path / "toy", model_type)
    images = [write_image(tmp_path / "wide.png", width=150, height=40), write_image(tmp_path / "square.png")]
    processor = AutoProcessor.from_pretrained(folder)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "where?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    expected = processor(text=[text], images=[load_image(path) for path in images], return_tensors="pt")
    prompt = load_family(folder).encode([Message("user", (*images, "where?"))])
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
