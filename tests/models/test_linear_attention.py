"""A hybrid language model over a packed group: exactly what it says of each prompt and completion alone."""

import copy
from pathlib import Path

import pytest
import torch
from packed import RAGGED, SINGLE, TEMPERATURE, gradients, packed_logprobs, relative, row_logprobs, with_adapter

from polyground.batches import pack_group
from polyground.losses import token_scores
from polyground.models import Loaded, Prompt, load_model
from polyground.models.linear_attention import Branches, packed_mask
from polyground.records import Message
from toys import write_image, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("models") / "toy", "qwen3_5")


@pytest.fixture
def adapted(folder: Path) -> Loaded:
    return with_adapter(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("images")
    square, wide = write_image(folder / "square.png"), write_image(folder / "wide.png", "blue", width=84)
    return square, wide, write_image(folder / "tall.png", "white", height=84)


@pytest.mark.parametrize("completions", [RAGGED, SINGLE], ids=["ragged", "one-token-each"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_packed_group_is_its_rows(adapted: Loaded, images: tuple[Path, ...], count: int, completions: list[list[int]]) -> None:
    prompt = adapted.family.encode([Message("user", (*images[:count], "where is it?"))])
    ours, theirs = (score(adapted, prompt, completions) for score in (packed_logprobs, row_logprobs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    expected = gradients(adapted, theirs)
    assert any("linear_attn.in_proj_qkv" in name for name in expected)
    assert relative(gradients(adapted, ours), expected) < 1e-4


def test_a_prompt_of_several_chunks_is_carried_over(adapted: Loaded, images: tuple[Path, ...]) -> None:
    prompt = adapted.family.encode([Message("user", (images[0], "where is it? " * 12))])
    assert len(prompt) > 2 * 64
    long = [list(range(60, 60 + length)) for length in (3, 70)]
    ours, theirs = (score(adapted, prompt, long) for score in (packed_logprobs, row_logprobs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert relative(gradients(adapted, ours), gradients(adapted, theirs)) < 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_prompt_shorter_than_the_convolution_is_carried_over(adapted: Loaded, length: int) -> None:
    prompt = Prompt(torch.arange(70, 70 + length), torch.arange(length).expand(3, -1), length)
    ours, theirs = (score(adapted, prompt, RAGGED) for score in (packed_logprobs, row_logprobs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_layers_computed_again_in_the_backward_pass_are_told_as_well(adapted: Loaded, images: tuple[Path, ...]) -> None:
    prompt = adapted.family.encode([Message("user", (*images[:2], "where?"))])
    expected = gradients(adapted, packed_logprobs(adapted, prompt, RAGGED))
    adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.model.train()
    assert relative(gradients(adapted, packed_logprobs(adapted, prompt, RAGGED)), expected) < 1e-5


def test_a_mask_alone_would_let_completions_run_into_one_another(adapted: Loaded) -> None:
    prompt = adapted.family.encode([Message("user", ("where?",))])
    packed = pack_group(prompt, RAGGED)
    with torch.no_grad():
        output = adapted.family.forward(
            adapted.model,
            input_ids=packed.input_ids_1S,
            position_ids=packed.positions_31S,
            features=[],
            attention_mask=packed.mask_11SS,
            logits_to_keep=packed.keep_N,
        )
        wrong = token_scores(output.logits[0], packed.targets_N, temperature=TEMPERATURE).logprobs_N
        gap = (wrong - row_logprobs(adapted, prompt, RAGGED)).abs()
    assert gap[: len(RAGGED[0])].max() < 1e-5
    assert gap[len(RAGGED[0]) :].max() > 0.1


def test_a_deep_copy_branches_with_its_own_weights(folder: Path) -> None:
    loaded = load_model(folder)
    layer = loaded.model.model.language_model.layers[0].linear_attn
    twin = copy.deepcopy(loaded.model).model.language_model.layers[0].linear_attn
    torch.nn.init.zeros_(twin.out_proj.weight)
    hidden, branches = torch.ones(1, 6, 32), Branches((2, 2))
    assert not twin(hidden, attention_mask=branches).any()
    assert layer(hidden, attention_mask=branches).any()


def test_a_model_of_attention_alone_is_given_the_mask_alone(folder: Path, tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    plain, hybrid = (load_model(path).model.model.language_model for path in (write_toy(tmp_path / "plain"), folder))
    assert packed_mask(plain, mask, lengths=[2, 1]) is mask
    assert packed_mask(hybrid, mask, lengths=[2, 1]) == {"full_attention": mask, "linear_attention": Branches((2, 1))}
