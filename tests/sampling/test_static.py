"""Decoding with fixed shapes: equal to decoding with growing caches and to transformers, and fit to be recorded.

A tape stands in for CUDA graphs: it records the operations of a step and does them again on the same memory.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hasty import Hasty, generated, ragged_prompts
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import LogitsProcessor, LogitsProcessorList

from polyground.models import Loaded, load_model
from polyground.records import Completion, Message
from polyground.sampling import static
from polyground.sampling.decoding import Parts, Prefilled
from polyground.sampling.drawing import Settings, Written, draw, uniform
from polyground.sampling.local import LocalSampler
from polyground.sampling.static import Shape, StaticDecoder, _Memory, _product, obstacle, rung
from toys import FAMILIES, write_toy

torch.set_num_threads(1)

WITH_KEYS = [family for family in FAMILIES if family != "qwen3_5"]
"""The families all of whose layers hold keys."""


@pytest.fixture(scope="module", params=WITH_KEYS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(write_toy(tmp_path_factory.mktemp("models") / "toy", request.param))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A family where one will do for all."""
    return load_model(write_toy(tmp_path_factory.mktemp("models") / "one"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[Message]]:
    return ragged_prompts(tmp_path_factory.mktemp("images"))


def assert_same(ours: list[list[Completion]], theirs: list[list[Completion]], *, within: float = 1e-4) -> None:
    assert [[c.token_ids for c in g] for g in ours] == [[c.token_ids for c in g] for g in theirs]
    for our, their in zip(chain(*ours), chain(*theirs), strict=True):
        assert our.truncated == their.truncated
        assert our.logprobs == pytest.approx(their.logprobs, abs=within)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_fixed_shapes_draw_what_growing_caches_draw(loaded: Loaded, prompts: list[list[Message]], top_p: float) -> None:
    hasty = replace(loaded, family=Hasty(loaded.family, every=8))
    options = {"n": 9, "temperature": 1.0, "top_p": top_p, "max_tokens": 30, "seed": 6}
    fixed = LocalSampler(hasty, decoding="static").sample(prompts, **options)
    assert_same(fixed, LocalSampler(hasty, decoding="growing").sample(prompts, **options))
    # Rows of every prompt leave at different steps, some after the second look.
    assert all(len({len(c.token_ids) for c in group}) > 3 for group in fixed)
    assert max(len(c.token_ids) for c in chain(*fixed)) > 2 * static.LOOK_EVERY


def test_greedy_is_transformers_generate_for_ragged_image_counts(loaded: Loaded, prompts: list[list[Message]]) -> None:
    expected = [generated(loaded, messages, max_tokens=20)[0] for messages in prompts]
    sampled = LocalSampler(loaded, decoding="static").sample(prompts, n=2, temperature=0, max_tokens=20, seed=0)
    assert [list(c.token_ids) for group in sampled for c in group] == [ids for ids in expected for _ in range(2)]


class Drawing(LogitsProcessor):
    """Leaves `generate` only the token that the given numbers draw, so that chance is ours and all else is its own."""

    def __init__(self, uniform_RT: Tensor, settings: Settings) -> None:
        self._uniform_TR = iter(uniform_RT.unbind(1))
        self._settings = settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, _ = draw(scores.float(), next(self._uniform_TR), self._settings)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@pytest.mark.parametrize("decoding", ["growing", "static"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampled_is_transformers_generate_given_the_same_numbers(
    loaded: Loaded, prompts: list[list[Message]], top_p: float, decoding: Any
) -> None:
    hasty = replace(loaded, family=Hasty(loaded.family, every=8))
    settings = Settings(5, 0.9, top_p, 16, 11)
    keys = [f"question {i}" for i in range(len(prompts))]
    options = {"n": 5, "temperature": 0.9, "top_p": top_p, "max_tokens": 16, "seed": 11, "keys": keys}
    sampled = LocalSampler(hasty, decoding=decoding).sample(prompts, **options)
    for key, messages, group in zip(keys, prompts, sampled, strict=True):
        chance = LogitsProcessorList([Drawing(uniform([key], settings), settings)])
        rows = generated(hasty, messages, max_tokens=16, do_sample=True, top_k=0, num_return_sequences=5, logits_processor=chance)
        for row, completion in zip(rows, group, strict=True):
            # `generate` pads what has ended.
            assert tuple(row[: len(completion.token_ids)]) == completion.token_ids
            assert len(completion.token_ids) == 16 or completion.token_ids[-1] in hasty.family.stop_token_ids


# ---------------------------------------------------------------- recording


class Tape(TorchDispatchMode):
    """The operations of one step, done again on call. Refuses whatever a CUDA graph could not hold."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, ...]] = []
        with self:
            step()
        # Recording runs the step here, so that the first call has been made.
        self._made = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} makes the host wait for a number"
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        shapes_vary = torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        vary = masks or shapes_vary
        assert not vary, f"{func} has results whose size depends on values"
        assert "lift_fresh" not in func.name(), "numbers of the host are copied to the device"
        if func is torch.ops.aten.where.self:
            assert all(x.ndim for x in args), "numbers of the host are copied to the device"
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def __call__(self) -> None:
        if self._made:
            self._made = False
            return
        again: dict[int, Tensor] = {}

        def now(x: Any) -> Any:
            return tree_map_only(Tensor, lambda t: again.get(id(t), t), x)

        for func, args, kwargs, result in self._calls:
            made = func(*now(args), **now(kwargs))
            again.update((id(old), new) for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True))


class TapeRecorder:
    def __init__(self, *, willing: bool = True) -> None:
        self.willing, self.warmed, self.tapes, self.played = willing, 0, 0, 0

    def warm_up(self, step: Callable[[], None]) -> bool:
        self.warmed += 1
        step()
        return self.willing

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.tapes += 1
        tape = Tape(step)

        def play() -> None:
            self.played += 1
            tape()

        return play


class Recorded(LocalSampler):
    """Decodes in recorded steps, on a CPU."""

    recorder: TapeRecorder

    def _static(self, parts: Parts, settings: Settings) -> StaticDecoder:
        self.recorder = TapeRecorder()
        return StaticDecoder(parts, settings, recorder=self.recorder)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a toy's few tokens make its memory move in every way."""
    monkeypatch.setattr(static, "_OWN", 4)
    monkeypatch.setattr(static, "_FEWEST", 1)
    monkeypatch.setattr(static, "_WORTH", 1)
    monkeypatch.setattr(static, "LOOK_EVERY", 3)


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 0.9)])
@pytest.mark.usefixtures("small")
def test_steps_played_back_draw_what_growing_caches_draw(
    loaded: Loaded, prompts: list[list[Message]], temperature: float, top_p: float
) -> None:
    hasty = replace(loaded, family=Hasty(loaded.family, every=8))
    options = {"n": 5, "temperature": temperature, "top_p": top_p, "max_tokens": 20, "seed": 6}
    sampler = Recorded(hasty)
    assert_same(sampler.sample(prompts, **options), LocalSampler(hasty).sample(prompts, **options))
    assert sampler.recorder.tapes >= 2
    assert sampler.recorder.played > sampler.recorder.tapes


@pytest.mark.usefixtures("small")
def test_recordings_serve_batch_after_batch(one: Loaded, prompts: list[list[Message]]) -> None:
    hasty = replace(one, family=Hasty(one.family, every=32))
    options = {"n": 2, "temperature": 1.0, "max_tokens": 8, "seed": 2}
    few, many = Recorded(hasty, batch_size=4), Recorded(hasty, batch_size=4)
    few.sample(prompts, **options)
    questions = prompts * 3
    keys = [f"question {i}" for i in range(len(questions))]
    sampled = many.sample(questions, keys=keys, **options)
    assert_same(sampled, LocalSampler(hasty, batch_size=4).sample(questions, keys=keys, **options))
    assert many.recorder.played >= 2 * few.recorder.played
    assert many.recorder.tapes <= 2 * few.recorder.tapes


def test_a_step_that_cannot_be_recorded_runs_as_it_is(one: Loaded, prompts: list[list[Message]]) -> None:
    recorder = TapeRecorder(willing=False)
    options = {"n": 2, "temperature": 1.0, "max_tokens": 12, "seed": 2}

    class Unwilling(LocalSampler):
        def _static(self, parts: Parts, settings: Settings) -> StaticDecoder:
            return StaticDecoder(parts, settings, recorder=recorder)

    assert_same(Unwilling(one).sample(prompts, **options), LocalSampler(one).sample(prompts, **options))
    assert (recorder.warmed, recorder.tapes) == (1, 0)


def test_a_peft_wrapped_model_is_recorded_with_its_adapter(one: Loaded, prompts: list[list[Message]]) -> None:
    fresh = load_model(one.path)
    torch.manual_seed(0)
    model = get_peft_model(fresh.model, LoraConfig(r=4, target_modules=fresh.family.lora_targets, init_lora_weights=False))
    wrapped = replace(fresh, model=model)
    options = {"n": 2, "temperature": 1.0, "max_tokens": 12, "seed": 2}
    sampler = Recorded(wrapped)
    adapted = sampler.sample(prompts, **options)
    assert_same(adapted, LocalSampler(wrapped).sample(prompts, **options))
    # The next call records anew: nothing remembers the adapter.
    with model.disable_adapter():
        assert_same(sampler.sample(prompts, **options), LocalSampler(one).sample(prompts, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_recorded_steps_draw_what_growing_caches_draw(
    loaded: Loaded, prompts: list[list[Message]], dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = load_model(loaded.path, device=torch.device("cuda"), dtype=dtype)
    options = {"n": 9, "temperature": 1.0, "max_tokens": 64, "seed": 6}
    with caplog.at_level(logging.INFO, logger="polyground"):
        recorded = LocalSampler(there).sample(prompts, **options)
    assert "not recorded" not in caplog.text
    if dtype == "float32":
        assert_same(recorded, LocalSampler(there, decoding="growing").sample(prompts, **options), within=1e-3)


# ---------------------------------------------------------------- types and devices


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_bfloat16_is_as_near_to_float32_as_growing_caches_are(one: Loaded, prompts: list[list[Message]], autocast: bool) -> None:
    options = {"n": 4, "temperature": 1.0, "max_tokens": 8, "seed": 2}
    half = one if autocast else load_model(one.path, dtype="bfloat16")
    precision = torch.bfloat16 if autocast else None

    def distance(decoding: Any) -> float:
        sampled = LocalSampler(half, autocast=precision, decoding=decoding).sample(prompts, **options)
        pairs = zip(chain(*exact), chain(*sampled), strict=True)
        # Both have read the same until the first token that differs.
        found = [
            abs(a - b)
            for ours, theirs in pairs
            for i, (a, b) in enumerate(zip(ours.logprobs, theirs.logprobs, strict=False))
            if ours.token_ids[: i + 1] == theirs.token_ids[: i + 1]
        ]
        assert len(found) > 40
        return sum(found) / len(found)

    exact = LocalSampler(one, decoding="growing").sample(prompts, **options)
    assert distance("static") <= 1.2 * distance("growing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1.0), (1.0, 0.9)])
def test_a_step_runs_where_tensors_hold_no_values(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, temperature: float, top_p: float
) -> None:
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and known(device))
    toy = load_model(write_toy(tmp_path / "toy"), dtype=dtype)
    toy.model.to("meta")
    settings, meta = Settings(3, temperature, top_p, 20, 0), torch.device("meta")
    prefilled = _prefilled(2, 7, dtype=getattr(torch, dtype), device=meta)
    written = Written(6, settings, stops=[1, 2], banned=[3], pad=0, device=meta)
    memory = _Memory(prefilled, settings)
    memory.begin(prefilled, rows=6, spare=written.spare)
    with torch.no_grad():
        static._step(Parts.of(toy), memory, written)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_are_in_float32(device: str) -> None:
    a, b = (torch.ones(2, 3, *size, dtype=torch.bfloat16, device=device) for size in ((4, 5), (5, 6)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _product(a, b)
    assert (found.shape, found.dtype) == ((2, 3, 4, 6), torch.float32)


# ---------------------------------------------------------------- shapes and memory


@pytest.mark.parametrize(
    ("capacity", "needed", "expected"),
    [(16, 16, 16), (16, 9, 16), (16, 8, 8), (12, 3, 3), (12, 2, 2), (12, 4, 6), (5, 2, 2), (5, 3, 3), (1, 1, 1)],
)
def test_rungs(capacity: int, needed: int, expected: int) -> None:
    assert rung(capacity, needed) == expected


def _prefilled(prompts: int, length: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Prefilled:
    """Two layers whose keys and values are the number of their prompt; 2 heads of width 8."""
    states = torch.arange(prompts, dtype=dtype, device=device)[:, None, None, None].expand(prompts, 2, length, 8)
    return Prefilled(
        length=length,
        logits_BV=torch.zeros(prompts, 285, dtype=dtype, device=device),
        position_B=torch.arange(prompts, device=device) * 10,
        layers=[SimpleNamespace(keys=states, values=states) for _ in range(2)],
        valid_BP=None,
    )


def test_a_prompt_without_rows_leaves_the_others_their_keys() -> None:
    memory = _Memory(_prefilled(4, 6), Settings(2, 1.0, 1.0, 8, 0))
    memory.begin(_prefilled(4, 6), rows=8, spare=8)
    memory.own(1)[0][:] = torch.arange(8.0)[:, None, None, None]
    memory.move([[0, 1], [4], [7]])
    assert memory.row.tolist() == [0, 1, 4, 8, 7, 8, 8, 8]
    assert memory.prompt(0)[0][:3, 0, 7, 0].tolist() == [0, 2, 3]
    assert memory.own(1)[0][[0, 1, 2, 4], 0, 0, 0].tolist() == [0, 1, 4, 7]
    assert memory.position[[0, 2, 4]].tolist() == [0, 20, 30]


def test_memory_moves_between_shapes_and_stays_where_it_is() -> None:
    memory = _Memory(_prefilled(4, 6), Settings(4, 1.0, 1.0, 8, 0))
    memory.begin(_prefilled(4, 6), rows=16, spare=16)
    places = {memory.own(0)[0].data_ptr(), memory.prompt(1)[0].data_ptr(), memory.row.data_ptr(), memory.bias.data_ptr()}
    memory.own(0)[1][:] = torch.arange(16.0)[:, None, None, None]
    memory.move([[5], [14, 15]], prompts=2, each=2)
    assert memory.shape == Shape(2, 2, 8, 8)
    assert memory.row.tolist() == [5, 16, 14, 15]
    assert memory.own(0)[1][:, 1, 7, 7].tolist() == [5, 5, 14, 15]
    assert memory.prompt(1)[1][:, 1, 7, 7].tolist() == [1, 3]
    assert places == {
        memory.own(0)[0].data_ptr(), memory.prompt(1)[0].data_ptr(), memory.row.data_ptr(), memory.bias.data_ptr()
    }  # fmt: skip


def test_fewer_and_shorter_prompts_lie_at_the_end_of_their_shape() -> None:
    memory = _Memory(_prefilled(4, 16), Settings(2, 1.0, 1.0, 8, 0))
    memory.begin(_prefilled(3, 6), rows=6, spare=8)
    assert memory.shape == Shape(4, 2, 8, 8)
    assert memory.row.tolist() == [0, 1, 2, 3, 4, 5, 8, 8]
    assert memory.bias[0].tolist() == [-torch.inf] * 2 + [0.0] * 6
    # No softmax is over nothing.
    assert memory.bias[3].tolist() == [0.0] * 8


# ---------------------------------------------------------------- where it cannot be


def test_recurrent_states_stand_in_the_way(tmp_path: Any, prompts: list[list[Message]]) -> None:
    toy = load_model(write_toy(tmp_path / "toy", "qwen3_5"))
    with pytest.raises(ValueError, match="some of its layers carry a recurrent state; leave `decoding` at 'auto'"):
        LocalSampler(toy, decoding="static").sample(prompts, n=1, temperature=0, max_tokens=2, seed=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"_attn_implementation": "eager"}, "loaded with eager attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of sliding_attention"),
    ],
    ids=["none", "attention", "sliding"],
)
def test_obstacles_are_named(one: Loaded, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str | None) -> None:
    decoder = one.family.language_model(one.model)
    for name, value in change.items():
        monkeypatch.setattr(decoder.config, name, value, raising=False)
    found = obstacle(decoder)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_rotary_positions_that_follow_the_length_stand_in_the_way(one: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder: Any = one.family.language_model(one.model)
    monkeypatch.setattr(decoder.rotary_emb, "rope_type", "dynamic")
    assert "rotary" in str(obstacle(decoder))
