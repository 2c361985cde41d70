"""Facts about LoRA layers in one piece: peft's numbers, and peft's own forward wherever they are more than plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import RAGGED, gradients, packed_logprobs, relative, row_logprobs, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polyground.config import SftConfig
from polyground.models import Loaded, Prompt, load_model, lora
from polyground.models.lora import OnePieceLinear, compute_in_one_piece, merged_for_rollout, plain_adapter
from polyground.records import Message
from polyground.sampling.local import LocalSampler
from polyground.training.runs import add_adapter
from toys import write_image, write_toy

IN, OUT, RANK = 24, 40, 3
"""Merging pays from 16 tokens on: 24 * 40 / (24 + 40) = 15."""


class One(nn.Module):
    """A model of one linear layer, or two behind one another."""

    def __init__(self, *, bias: bool = True, layers: int = 1) -> None:
        super().__init__()
        self.steps = nn.Sequential(*(nn.Linear(IN, OUT if i + 1 == layers else IN, bias=bias) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)


def adapted(*, bias: bool = True, layers: int = 1, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """peft's own model with an adapter that changes what the layers compute."""
    torch.manual_seed(0)
    options = {"r": RANK, "lora_alpha": 5, "target_modules": r"steps\.\d", "init_lora_weights": False} | config
    return get_peft_model(One(bias=bias, layers=layers).to(dtype), LoraConfig(**options), autocast_adapter_dtype=False)


def in_one_piece(model: Any) -> Any:
    """A copy of a peft model whose layers compute in one piece."""
    twin = copy.deepcopy(model)
    assert compute_in_one_piece(twin) > 0
    return twin


def layer_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, PeftLinear))


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outcome(model: nn.Module, x: Tensor, *, frozen_input: bool = False) -> dict[str, Tensor]:
    """Output and all gradients there are, by name."""
    x = x.clone().requires_grad_(not frozen_input)
    model.zero_grad(set_to_none=True)
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape)
    (y.double() * weights).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach().double(), **found} | ({} if x.grad is None else {"x": x.grad.double()})


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of all tensors, each relative to its length."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def pieces(y: Tensor) -> int:
    """How many layers computed this in one piece, as its graph tells."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(node.name() == "_OnePieceBackward" for node in seen)


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (600,), (1, 1), (2, 7), (2, 3, 5), (2, 300)], ids=str)
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool, frozen_input: bool) -> None:
    model = adapted(bias=bias, layers=2)
    twin = in_one_piece(model)
    assert (pieces(twin(inputs(*shape))), pieces(model(inputs(*shape)))) == (2, 0)
    ours, theirs = (outcome(each, inputs(*shape), frozen_input=frozen_input) for each in (twin, model))
    assert ("x" in ours) != frozen_input
    assert distance(ours, theirs) < 2e-6


def test_an_empty_batch_has_an_empty_result_and_zero_gradients() -> None:
    found = outcome(in_one_piece(adapted()), inputs(0))
    assert found["y"].shape == (0, OUT)
    assert all(not tensor.any() for tensor in found.values())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"lora_alpha": 3}, id="scale-1"),
        pytest.param({"lora_alpha": 7, "use_rslora": True}, id="scale-7-over-root-3"),
        pytest.param({"r": 8, "lora_alpha": 1}, id="scale-1-over-8"),
    ],
)
def test_any_scale_is_applied_as_peft_does(config: dict[str, Any]) -> None:
    model = adapted(**config)
    twin = in_one_piece(model)
    assert pieces(twin(inputs(20))) == 1
    assert distance(outcome(twin, inputs(20)), outcome(model, inputs(20))) < 2e-6


@pytest.mark.parametrize("tokens", [pytest.param(2, id="narrow"), pytest.param(40, id="merged")])
def test_gradients_are_those_of_finite_differences(tokens: int) -> None:
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((tokens, 6), (5, 6), (5,), (2, 6), (5, 2))]
    for i in (0, 3, 4):
        tensors[i].requires_grad_()
    assert lora._merges(tensors[0], tensors[1]) == (tokens == 40)
    assert torch.autograd.gradcheck(lambda *given: lora._OnePiece.apply(*given, 1.7), tensors)


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B"])
def test_only_what_wants_a_gradient_gets_one(wanted: str) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted in name)
    for tokens in (4, 40):
        ours, theirs = (outcome(each, inputs(tokens), frozen_input=wanted != "x") for each in (in_one_piece(model), model))
        assert len(ours) == 2
        assert distance(ours, theirs) < 2e-6


def test_inputs_and_gradients_may_be_of_any_layout() -> None:
    model = adapted()
    for each in (transposed := inputs(4, 9).transpose(0, 1), inputs(1).expand(30, IN), inputs(60)[::2]):
        assert not each.is_contiguous()
        assert distance(outcome(in_one_piece(model), each), outcome(model, each)) < 2e-6
    x, twin = transposed.clone().requires_grad_(), in_one_piece(model)
    twin(x).sum().backward()  # a gradient of one number, repeated
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert torch.allclose(x.grad, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 30])
def test_the_output_may_be_changed_in_place(tokens: int) -> None:
    model = adapted()
    twin = in_one_piece(model)
    x = inputs(2, tokens).requires_grad_()
    twin(x).mul_(2).sum().backward()
    assert torch.allclose(x.grad, torch.autograd.grad(2 * model(x).sum(), x)[0], atol=1e-5)


@pytest.mark.parametrize("tokens", [6, 200])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_is_no_further_from_float32_than_peft(tokens: int, weights: torch.dtype) -> None:
    model = adapted(layers=3, dtype=weights)
    exact = outcome(copy.deepcopy(model).double(), inputs(tokens).to(weights).double())
    gaps: list[float] = []
    counts: list[int] = []
    for each in (in_one_piece(model), model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gaps.append(distance(outcome(each, inputs(tokens).to(weights)), exact))
            counts.append(pieces(each(inputs(tokens).to(weights))))
    assert counts == [3, 0]
    assert 1e-4 < gaps[0] < 1.2 * gaps[1]


def test_an_adapter_too_small_to_show_in_a_bfloat16_weight_is_still_heard() -> None:
    model = in_one_piece(adapted(bias=False, r=1, lora_alpha=1))
    layer, signs = layer_of(model), torch.ones(IN)
    signs[1::2] = -1
    layer.base_layer.weight.data.fill_(1)  # whose products with the signs sum to 0
    layer.lora_A["default"].weight.data.copy_(signs * 2**-10)  # 1 + 2^-10 is 1 in bfloat16
    layer.lora_B["default"].weight.data.fill_(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(signs.expand(200, IN))
    assert torch.equal(y.float(), torch.full((200, OUT), IN * 2**-10))


def test_under_autocast_outputs_are_in_its_type_and_gradients_in_the_weights_own() -> None:
    twin = in_one_piece(adapted())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = twin(inputs(20))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in twin.parameters() if p.grad is not None} == {torch.float32}


# ---------------------------------------------------------------- what is left to peft


def _two_active(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=r"steps\.\d", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _doubled(module: nn.Module, _given: Any, y: Tensor) -> Tensor:
    return 2 * y


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class _Doubling(nn.Linear):
    """A linear layer of another kind, as quantised ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _as_kind(kind: type[nn.Module]) -> Callable[[PeftModel], None]:
    return lambda model: setattr(layer_of(model).base_layer, "__class__", kind)


LEFT_TO_PEFT: dict[str, tuple[dict[str, Any], Callable[[PeftModel], Any]]] = {
    "dropout": ({"lora_dropout": 0.5}, lambda model: model.train()),
    "dora": ({"use_dora": True}, lambda model: None),
    "bias-of-the-adapter": ({"lora_bias": True}, lambda model: None),
    "two-adapters": ({}, _two_active),
    "merged": ({}, lambda model: model.merge_adapter()),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "hook-on-the-base": ({}, lambda model: layer_of(model).base_layer.register_forward_hook(_doubled)),
    "hook-on-a-factor": ({}, lambda model: layer_of(model).lora_B["default"].register_forward_hook(_doubled)),
    "base-of-another-class": ({}, _as_kind(_Doubling)),
    "parametrised-base": (
        {},
        lambda model: parametrize.register_parametrization(layer_of(model).base_layer, "weight", _Halved()),
    ),
    "trained-base": ({}, lambda model: layer_of(model).base_layer.weight.requires_grad_()),
    "trained-bias": ({}, lambda model: layer_of(model).base_layer.bias.requires_grad_()),
}


@pytest.mark.parametrize("case", LEFT_TO_PEFT)
def test_more_than_a_plain_adapter_is_left_to_peft(case: str) -> None:
    config, change = LEFT_TO_PEFT[case]
    model = adapted(**config).eval()
    change(model)
    twin = in_one_piece(model)
    assert plain_adapter(layer_of(twin)) is None
    assert not pieces(twin(inputs(20)))
    found = []
    for each in (twin, model):
        torch.manual_seed(3)
        found.append(outcome(each, inputs(20)))
    assert distance(*found) == 0


def test_dropout_matters_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    twin = in_one_piece(model)
    assert plain_adapter(layer_of(twin.train())) is None
    assert pieces(twin.eval()(inputs(20))) == 1
    assert distance(outcome(twin, inputs(20)), outcome(model.eval(), inputs(20))) < 2e-6


def test_an_adapter_in_float32_on_weights_in_bfloat16_is_left_to_peft() -> None:
    model = adapted(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    x = inputs(20).bfloat16()
    twin = in_one_piece(model)
    assert not pieces(twin(x))
    assert distance(outcome(twin, x), outcome(model, x)) == 0


def test_a_mixed_batch_of_adapters_is_left_to_peft() -> None:
    model = adapted().eval()
    twin = in_one_piece(model)
    names = ["default", "__base__"]
    ours, theirs = (layer_of(each)(inputs(2), adapter_names=names) for each in (twin, model))
    assert torch.equal(ours, theirs)


def test_with_the_adapter_switched_off_the_model_is_its_base() -> None:
    model = adapted()
    twin = in_one_piece(model)
    with twin.disable_adapter():
        assert torch.equal(twin(inputs(20)), layer_of(model).base_layer(inputs(20)))
    assert pieces(twin(inputs(20))) == 1


# ---------------------------------------------------------------- one model among others


def test_only_the_model_asked_for_changes() -> None:
    model = adapted()
    other = get_peft_model(One(), LoraConfig(r=RANK, target_modules=r"steps\.\d"))
    assert compute_in_one_piece(model) == 1
    assert compute_in_one_piece(model) == 0
    assert type(layer_of(model)) is OnePieceLinear
    assert type(layer_of(other)) is PeftLinear


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    twin = in_one_piece(adapted())
    before = twin(inputs(20)).detach()
    other = copy.deepcopy(twin)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not other(inputs(20)).any()
    assert torch.equal(twin(inputs(20)), before)


def test_names_and_files_stay_pefts(tmp_path: Path) -> None:
    model = adapted()
    twin = in_one_piece(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    twin.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(One(), str(tmp_path))
    assert torch.equal(layer_of(again).lora_B["default"].weight, layer_of(model).lora_B["default"].weight)
    merged = twin.merge_and_unload()
    assert torch.allclose(merged(inputs(20)), model(inputs(20)), atol=1e-5)


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward leaves for the backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # Held until all is counted: memory given back could be counted twice as one.
        y = model(x)
    assert y.requires_grad
    return sum(held.values())


@pytest.mark.parametrize(
    ("tokens", "less"), [pytest.param(10, 0, id="narrow"), pytest.param(100, 3 * 4 * RANK * 100, id="merged")]
)
def test_no_more_is_kept_for_the_backward_than_peft_keeps(tokens: int, less: int) -> None:
    model = adapted(layers=3)
    x = inputs(tokens)
    assert kept_for_backward(in_one_piece(model), x) == kept_for_backward(model, x) - less


# ---------------------------------------------------------------- rollouts


def test_in_a_rollout_the_weights_are_merged_once_and_never_touched() -> None:
    model = adapted(layers=2)
    twin = in_one_piece(model)
    weight = layer_of(twin).base_layer.weight
    before = weight.detach().clone()
    with merged_for_rollout(twin), torch.no_grad():
        assert torch.allclose(twin(inputs(2)), model(inputs(2)), atol=1e-5)
        held = layer_of(twin).merged_weight
        assert held is not None
        held.zero_()
        assert torch.equal(layer_of(twin)(inputs(2)), layer_of(twin).base_layer.bias.expand(2, IN))
        assert torch.equal(weight, before)
    assert layer_of(twin).merged_weight is None
    assert torch.allclose(twin(inputs(2)), model(inputs(2)), atol=1e-5)


def test_gradients_and_the_base_are_the_same_inside_a_rollout() -> None:
    model = adapted()
    twin = in_one_piece(model)
    with merged_for_rollout(twin):
        assert distance(outcome(twin, inputs(20)), outcome(model, inputs(20))) < 2e-6
        with torch.no_grad(), twin.disable_adapter():
            assert torch.equal(twin(inputs(20)), layer_of(model).base_layer(inputs(20)))


def test_an_error_in_a_rollout_leaves_nothing_merged() -> None:
    twin = in_one_piece(adapted())
    with pytest.raises(KeyError), merged_for_rollout(twin):
        raise KeyError
    assert layer_of(twin).merged_weight is None


@pytest.mark.parametrize("case", ["autocast", "bfloat16", "disabled", "large"])
def test_what_merging_would_change_or_cost_is_not_merged(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = in_one_piece(adapted(dtype=torch.bfloat16 if case == "bfloat16" else torch.float32))
    if case == "large":
        monkeypatch.setattr(lora, "MERGED_BYTES", 4 * IN * OUT - 1)
    inside = {"autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "disabled": twin.disable_adapter}
    with inside.get(case, nullcontext)(), merged_for_rollout(twin):
        assert layer_of(twin).merged_weight is None


# ---------------------------------------------------------------- a whole model


TOLERANCES = {"qwen3_vl": 1e-5, "qwen2_5_vl": 1e-5, "qwen3_5": 1e-4}
"""Of each weight's gradient; the recurrences of linear attention multiply rounding (peft's own is 1e-5 from float64 there)."""


@pytest.fixture(scope="module", params=TOLERANCES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "model", request.param)


@pytest.fixture
def both(folder: Path) -> tuple[Loaded, Loaded]:
    """The same model with the same adapter: in one piece, and as peft has it."""
    ours, theirs = with_adapter(folder), with_adapter(folder)
    assert compute_in_one_piece(ours.model) > 0
    return ours, theirs


def prompt_of(loaded: Loaded, folder: Path) -> Prompt:
    images = tuple(write_image(folder / f"{colour}.png", colour) for colour in ("red", "blue"))
    return loaded.family.encode([Message("user", (*images, "where?"))])


def test_a_packed_group_has_pefts_logprobs_and_gradients(both: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    found = []
    for loaded in both:
        logprobs = packed_logprobs(loaded, prompt_of(loaded, tmp_path), RAGGED)
        found.append((logprobs.detach(), gradients(loaded, logprobs)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=2e-6)
    assert relative(found[0][1], found[1][1]) < TOLERANCES[both[0].config["model_type"]]


def test_activation_checkpointing_gives_the_same_gradients(both: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    found = []
    for loaded, recompute in zip(both, (True, False), strict=True):
        if recompute:
            loaded.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            loaded.model.train()
        logprobs = row_logprobs(loaded, prompt_of(loaded, tmp_path), RAGGED[:1])
        found.append(gradients(loaded, logprobs))
    assert relative(*found) < TOLERANCES[both[0].config["model_type"]]


def test_what_is_trained_or_opened_here_computes_in_one_piece(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    made = add_adapter(loaded.model, loaded.family, SftConfig(lora_r=3), seed=0)
    made.save_pretrained(tmp_path)
    for model in (made, load_model(folder, adapter=tmp_path).model):
        kinds = {type(module) for module in model.modules() if isinstance(module, PeftLinear)}
        assert kinds == {OnePieceLinear}


def test_sampled_tokens_are_pefts(both: tuple[Loaded, Loaded], tmp_path: Path) -> None:
    found = []
    for loaded in both:
        images = tuple(write_image(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
        sampler, asked = LocalSampler(loaded), [Message("user", (*images, "where?"))]
        found += sampler.sample([asked], n=3, temperature=1.0, max_tokens=6, seed=4)
    ours, theirs = found
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert all(layer.merged_weight is None for layer in both[0].model.modules() if isinstance(layer, OnePieceLinear))
