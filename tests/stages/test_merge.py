"""Merging an adapter: equal before and after, complete or not there at all."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from polyground.errors import ModelError, StorageError
from polyground.models import load_model
from polyground.records import Message
from polyground.sampling.local import LocalSampler
from polyground.stages.merge import merge_adapter
from toys import FAMILIES, write_image, write_toy


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "base", getattr(request, "param", "qwen3_vl"))


def _adapter(base: Path, folder: Path, *, seed: int = 0, alpha: int = 12) -> Path:
    loaded = load_model(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=loaded.family.lora_targets, init_lora_weights=False)
    get_peft_model(loaded.model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_the_merged_folder_answers_as_the_base_with_its_adapter(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    summary = merge_adapter(base, adapter, tmp_path / "merged", tolerance=1e-3)
    assert summary["max_logprob_difference"] <= 1e-3
    prompts = [[Message("user", (write_image(tmp_path / "x.png"), "where?"))]]
    options = {"n": 1, "temperature": 0.0, "max_tokens": 12, "seed": 0}
    texts = [
        LocalSampler(loaded).sample(prompts, **options)[0][0].text
        for loaded in (load_model(base, adapter=adapter), load_model(tmp_path / "merged"), load_model(base))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_merged_folder_is_whole_and_says_where_it_came_from(base: Path, tmp_path: Path) -> None:
    merge_adapter(base, _adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"} <= names
    assert "generation_config.json" in names
    assert json.loads((tmp_path / "merged" / "merged_from.json").read_text())["adapter_config"]["lora_alpha"] == 12
    assert not (tmp_path / "merged.partial").exists()


def test_a_complete_folder_is_left_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter")
    first = merge_adapter(base, adapter, tmp_path / "merged")
    written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    assert merge_adapter(base, adapter, tmp_path / "merged") == first
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written


def test_what_a_killed_merge_left_is_written_anew(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "junk").write_text("x")
    merge_adapter(base, _adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged" / "junk").exists()


def test_a_folder_merged_from_another_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    merge_adapter(base, _adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    with pytest.raises(StorageError, match="another adapter"):
        merge_adapter(base, _adapter(base, tmp_path / "other", seed=1), tmp_path / "merged")


def test_a_folder_that_is_no_merged_model_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(StorageError, match="not a merged model"):
        merge_adapter(base, _adapter(base, tmp_path / "adapter"), tmp_path / "merged")


def test_a_merge_outside_the_tolerance_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(base, tmp_path / "adapter", alpha=400)
    with pytest.raises(ModelError, match=r"more than merge\.tolerance"):
        merge_adapter(base, adapter, tmp_path / "merged", tolerance=-1.0)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial").exists()


def test_a_missing_adapter_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge_adapter(base, tmp_path / "nothing", tmp_path / "merged")
