"""Which model folders open, and what is said of the others."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from polyground.errors import ModelError
from polyground.models import best_device, load_family, load_model, save_processor_files
from toys import write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "toy")


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(toy: Path) -> None:
    loaded = load_model(toy)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32


def test_a_trainable_model_keeps_its_vision_tower_frozen(toy: Path) -> None:
    trainable = {name for name, p in load_model(toy, trainable=True).model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any("visual" in name for name in trainable)


@pytest.mark.parametrize("device", ["nonsense", pytest.param("cuda:99", id="more-than-there-are")])
def test_a_device_that_is_not_there_is_said(toy: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used .*polyground doctor"):
        load_model(toy, device=device)


def test_a_launched_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert best_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == "cuda:1"


def test_the_dtype_is_the_one_asked_for(toy: Path) -> None:
    assert load_model(toy, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_is_laid_over_the_base(toy: Path, tmp_path: Path, trainable: bool) -> None:
    base = load_model(toy)
    get_peft_model(base.model, LoraConfig(r=2, target_modules=base.family.lora_targets)).save_pretrained(tmp_path)
    loaded = load_model(toy, adapter=tmp_path, trainable=trainable)
    learning = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert bool(learning) == trainable
    assert all("lora_" in name for name in learning)


def test_lora_reaches_every_linear_layer_of_the_language_model_and_none_of_the_vision_tower(toy: Path) -> None:
    base = load_model(toy)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=base.family.lora_targets))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 2 * 7
    assert all("language_model" in name for name in adapted)


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _unknown(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _cut_short(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _deeper(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_without("config.json"), "no config.json", id="no-config"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "not valid JSON", id="broken-config"),
        pytest.param(_unknown, "'llama' is not supported", id="unknown-type"),
        pytest.param(_without("model.safetensors"), "no \\*.safetensors", id="no-weights"),
        pytest.param(_pickled, "only pickled weights", id="pickled"),
        pytest.param(_cut_short, "cannot be loaded", id="cut-short"),
        pytest.param(_deeper, "weights that config.json asks for are missing", id="missing-layer"),
        pytest.param(_without("preprocessor_config.json"), "image processor cannot be loaded", id="no-processor"),
        pytest.param(_without("chat_template.jinja"), "no chat template", id="no-template"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, damage, message: str) -> None:
    folder = write_toy(tmp_path / "toy")
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        load_model(folder)
    assert str(folder) in str(raised.value)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match="/nowhere: no such model folder"):
        load_model("/nowhere")


def test_an_adapter_folder_without_safetensors_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model(toy, adapter=tmp_path)


def test_saved_processor_files_are_enough_to_encode(toy: Path, tmp_path: Path) -> None:
    save_processor_files(toy, tmp_path)
    (tmp_path / "config.json").write_text((toy / "config.json").read_text())
    assert load_family(tmp_path).completion_ids("a") == load_family(toy).completion_ids("a")
