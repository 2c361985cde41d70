"""How many floating-point operations a GRPO update needs, and what share of the machine's matrix-product rate it reached.

Per token and linear layer of n inputs and m outputs a product costs 2 n m. The update of a LoRA adapter of rank r on a frozen
model takes, for every token that goes through the language model,

    forward     2 N + 2 A       N weights of the decoder's linear layers, A = r x sum of (n + m) of the adapted ones
    backward    2 N + 4 A       gradients of activations only, N being frozen; of the adapter, of activations and of weights

so 4 N + 6 A where full fine-tuning has 6 N; the first layer's query, key and value need no gradient of their input, which is the
frozen embedding. (`models.lora` adds the adapter to the weight where that is less work; the count stays what a plain adapter
needs.) Attention adds, for each pair of a query and a key it may see, 4 x query width
forward (scores, values) and 8 x query width backward (each product has two gradients; a flash kernel computes the scores
once more, which is not counted as needed). The output layer adds 4 x hidden x vocabulary for each completion token.
Normalisations, activations, rotary positions, softmax, the vision tower (frozen, and encoded once per step in the phase before)
and the optimiser are left out: they are part of what keeps the fraction below one.

A group of G completions of C tokens behind a prompt of P needs P - 1 + G C tokens and P^2 / 2 + G (C P + C^2 / 2) pairs; row by
row it is G (P + C) tokens and G (P + C)^2 / 2 pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import product_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The sizes of a language model that the count depends on."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    """Width of all query heads together."""
    key: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Decoder:
        """From config.json."""
        text = config["text_config"]
        heads = text["num_attention_heads"]
        width = text.get("head_dim") or text["hidden_size"] // heads
        return cls(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            query=heads * width,
            key=text["num_key_value_heads"] * width,
            vocabulary=text["vocab_size"],
        )

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's linear layers: query, key, value, output, gate, up, down."""
        projections = [(self.hidden, self.query), (self.hidden, self.key), (self.hidden, self.key), (self.query, self.hidden)]
        return [*projections, *2 * [(self.hidden, self.intermediate)], (self.intermediate, self.hidden)]

    @property
    def weights(self) -> int:
        return self.layers * sum(n * m for n, m in self.linear)

    def adapter(self, rank: int) -> int:
        return self.layers * rank * sum(n + m for n, m in self.linear)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(forward=self.forward + other.forward, backward=self.backward + other.backward)


def shared(decoder: Decoder, prompt: int, completions: Sequence[int], *, rank: int) -> Work:
    """The update of one group whose prompt is computed once; `completions` are lengths."""
    # The prompt's last token belongs to the completions: it is where their first token is predicted.
    pairs = (prompt - 1) * prompt / 2 + sum(c * (prompt - 1) + c * (c + 1) / 2 for c in completions)
    return _work(decoder, tokens=prompt - 1 + sum(completions), pairs=pairs, predicted=sum(completions), rank=rank)


def row_by_row(decoder: Decoder, prompt: int, completions: Sequence[int], *, rank: int) -> Work:
    """The same with the prompt repeated before every completion, without padding and without recomputation."""
    rows = [prompt + c for c in completions]
    pairs = sum(row * (row + 1) / 2 for row in rows)
    return _work(decoder, tokens=sum(rows), pairs=pairs, predicted=sum(completions), rank=rank)


def _work(decoder: Decoder, *, tokens: int, pairs: float, predicted: int, rank: int) -> Work:
    weights, adapter = decoder.weights, decoder.adapter(rank)
    attention = 4.0 * decoder.query * decoder.layers * pairs
    head = 2.0 * decoder.hidden * decoder.vocabulary * predicted
    first = 2 * sum(n * (m + rank) for n, m in decoder.linear[:3])
    return Work(
        forward=tokens * (2 * weights + 2 * adapter) + attention + head,
        backward=tokens * (2 * weights + 4 * adapter - first) + 2 * attention + head,
    )


def rates(decoder: Decoder, *, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Floating-point operations per second: of large square matrices, and of the MLP at these very sizes."""
    side = 8192 if device.type == "cuda" else 2048
    return {
        "square": product_rate(side, side, side, dtype=dtype, device=device),
        "own_shape": product_rate(tokens, decoder.hidden, decoder.intermediate, dtype=dtype, device=device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder; its config.json is read")
    parser.add_argument("--prompt", type=int, default=1100)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--completion", type=int, nargs="+", default=[48])
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    decoder = Decoder.of(json.loads((options.folder / "config.json").read_text(encoding="utf-8")))
    print(f"decoder weights {decoder.weights / 1e6:.1f} M, adapter {decoder.adapter(options.lora_r) / 1e6:.2f} M")
    for groups in options.groups:
        for completion in options.completion:
            lengths = [completion] * groups
            once = shared(decoder, options.prompt, lengths, rank=options.lora_r).total
            each = row_by_row(decoder, options.prompt, lengths, rank=options.lora_r).total
            print(
                f"P {options.prompt}, G {groups}, C {completion}: shared {once / 1e9:.1f} GFLOP, "
                f"row by row {each / 1e9:.1f} GFLOP, ratio {each / once:.1f}"
            )
    tokens = options.prompt + options.groups[0] * options.completion[0]
    measured = rates(decoder, tokens=tokens, dtype=getattr(torch, options.dtype), device=torch.device(options.device))
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in measured.items()))


if __name__ == "__main__":
    main()
