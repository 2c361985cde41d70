"""Facts about attention over shared prompts: equal to dense attention under a mask, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from polyground.models.shared_prefix import SHARED_PREFIX, GroupLayout, _attend, attend_written_out, packed_attention

D = 16

LAYOUTS = [
    pytest.param([(5, (3,))], 4, 4, id="one completion"),
    pytest.param([(7, (4, 4, 4))], 4, 4, id="equal lengths"),
    pytest.param([(37, (3, 7, 1, 5))], 4, 2, id="ragged, two queries a key"),
    pytest.param([(1, (1, 1))], 4, 1, id="the shortest there is"),
    pytest.param([(9, (2, 6)), (1, (3,)), (20, (1, 1, 8))], 4, 2, id="several groups in a row"),
]


def layout_of(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[GroupLayout, ...]:
    return tuple(GroupLayout(prefix, lengths) for prefix, lengths in groups)


def mask_of(layout: tuple[GroupLayout, ...]) -> Tensor:
    """[1, 1, S, S] bool, written down token by token."""
    owners = [
        (number, completion)
        for number, group in enumerate(layout)
        for completion, length in enumerate((group.prefix, *group.lengths))
        for _ in range(length)
    ]
    seen = [
        [k <= q and mine[0] == theirs[0] and theirs[1] in (0, mine[1]) for k, theirs in enumerate(owners)]
        for q, mine in enumerate(owners)
    ]
    return torch.tensor(seen)[None, None]


def inputs(layout: tuple[GroupLayout, ...], heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    total = sum(group.total for group in layout)
    return [torch.randn(1, h, total, D, dtype=dtype, requires_grad=True) for h in (heads, key_heads, key_heads)]


def dense(query: Tensor, key: Tensor, value: Tensor, layout: tuple[GroupLayout, ...]) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask_of(layout), scale=0.3)


@pytest.mark.parametrize(("groups", "heads", "key_heads"), LAYOUTS)
def test_output_and_gradients_equal_dense_attention(groups: list, heads: int, key_heads: int) -> None:
    layout = layout_of(groups)
    mine, theirs = (inputs(layout, heads, key_heads, torch.float64) for _ in range(2))
    out, expected = packed_attention(*mine, layout, scale=0.3), dense(*theirs, layout)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("groups", "heads", "key_heads"), LAYOUTS[2:])
def test_in_bfloat16_it_is_no_further_from_the_truth_than_dense_attention(groups: list, heads: int, key_heads: int) -> None:
    layout = layout_of(groups)
    exact = inputs(layout, heads, key_heads, torch.float64)
    truth = dense(*exact, layout)
    weights = torch.randn_like(truth)
    (truth * weights).sum().backward()

    def error(attend) -> list[float]:
        rough = [x.detach().bfloat16().requires_grad_() for x in exact]
        out = attend(*rough)
        (out * weights.bfloat16()).sum().backward()
        found = [out.detach(), *(x.grad for x in rough)]
        return [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(found, [truth.detach(), *(x.grad for x in exact)], strict=True)
        ]

    ours = error(lambda *qkv: packed_attention(*qkv, layout, scale=0.3))
    theirs = error(lambda *qkv: dense(*qkv, layout))
    assert max(ours) < 1.2 * max(theirs)


def test_gradients_survive_recomputation() -> None:
    layout = layout_of([(6, (2, 3))])
    plain, again = (inputs(layout, 4, 2, torch.float64) for _ in range(2))
    packed_attention(*plain, layout, scale=0.3).square().sum().backward()
    checkpoint(lambda *qkv: packed_attention(*qkv, layout, scale=0.3), *again, use_reentrant=False).square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_layout_that_does_not_fit_its_row_is_refused() -> None:
    query = torch.zeros(1, 4, 9, D)
    with pytest.raises(ValueError, match="one row of 8 tokens; got 1 rows of 9"):
        packed_attention(query, query, query, layout_of([(5, (3,))]), scale=1.0)


@pytest.fixture(scope="module")
def decoder() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation=SHARED_PREFIX,
    )
    return Qwen3ForCausalLM(config).eval()


def test_a_model_of_this_attention_reads_a_layout_as_it_reads_rows_one_by_one(decoder: Qwen3ForCausalLM) -> None:
    prompt, completions = torch.arange(10), [torch.tensor([11, 12, 13]), torch.tensor([14])]
    ids = torch.cat([prompt, *completions])[None]
    positions = torch.cat([torch.arange(10), *(10 + torch.arange(len(c)) for c in completions)])[None]
    layout = (GroupLayout(10, tuple(map(len, completions))),)
    anything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    packed = decoder(input_ids=ids, position_ids=positions, attention_mask=anything, layout=layout, use_cache=False).logits[
        0, 10:
    ]
    rows = [decoder(input_ids=torch.cat([prompt, c])[None]).logits[0, 10:] for c in completions]
    torch.testing.assert_close(packed, torch.cat(rows), rtol=1e-5, atol=1e-6)


def test_without_a_layout_it_is_sdpa(decoder: Qwen3ForCausalLM) -> None:
    plain = copy.deepcopy(decoder)
    plain.set_attn_implementation("sdpa")
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for given in (None, mask):
        torch.testing.assert_close(
            decoder(input_ids=ids, attention_mask=given).logits, plain(input_ids=ids, attention_mask=given).logits
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_the_kernel_that_takes_a_bias(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, length, D, dtype=dtype) for length in (3, 9, 9))
    bias = torch.zeros(2, 1, 1, 9)
    bias[1, ..., :4] = -torch.inf
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = attend_written_out(query, key, value, 0.3, bias)
    kernel = _attend(query, key, value, 0.3, causal=False, bias=bias)
    assert ours.lse.dtype == torch.float32
    assert ours.out.dtype == dtype
    torch.testing.assert_close(ours.lse, kernel.lse.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(ours.out, kernel.out, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
