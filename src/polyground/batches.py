"""Rows to tensors: one GRPO group packed behind its shared prompt, and padded batches for supervised training.

What a prompt's tensors are is the model adapter's business (`models`); which completions to train on is the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from polyground.losses import IGNORED

if TYPE_CHECKING:
    from polyground.models import Prompt

# Shapes: B rows, G completions of one prompt, P prompt tokens, T tokens (of the longest row or completion), S tokens of a
# packed group, N = all completion tokens of a group laid end to end, 3 the rotary axes (time, height, width).


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedGroup:
    """One prompt and its G completions as a single sequence, in which no completion sees another.

    `[prompt without its last token | last token + completion 1 | ... | last token + completion G]`, each completion
    without its own last token, which predicts nothing. The prompt is computed once instead of G times.
    """

    input_ids_1S: Tensor
    mask_11SS: Tensor
    """Bool: may row attend to column. Only attention functions that read bool masks as such (sdpa) may be given it."""
    positions_31S: Tensor
    """Completions all start where the prompt ends: at its largest position + 1, not at its length."""
    keep_N: Tensor
    """Places in S whose next token is a completion token: the index for `logits_to_keep`."""
    targets_N: Tensor
    """The completion tokens that are predicted there."""
    lengths: tuple[int, ...]
    """[G] tokens of each completion; they add up to N."""

    def to(self, device: torch.device) -> PackedGroup:
        return PackedGroup(
            input_ids_1S=self.input_ids_1S.to(device),
            mask_11SS=self.mask_11SS.to(device),
            positions_31S=self.positions_31S.to(device),
            keep_N=self.keep_N.to(device),
            targets_N=self.targets_N.to(device),
            lengths=self.lengths,
        )

    def unpack(self, values_N: Tensor) -> Tensor:
        """[G, T] per-token values, padded with 0 on the right."""
        return pad_sequence(list(values_N.split(list(self.lengths))), batch_first=True)

    @property
    def mask_GT(self) -> Tensor:
        """1 on completion tokens, 0 on padding, as `unpack` lays them out."""
        return self.unpack(torch.ones_like(self.targets_N))


def pack_group(prompt: Prompt, completions: Sequence[Sequence[int]]) -> PackedGroup:
    """Pack the completions (token ids, none of them empty) behind their prompt."""
    if not completions or not all(completions):
        raise ValueError("a group needs at least one completion and every completion at least one token")
    prompt_ids_P, positions_3P = prompt.input_ids, prompt.position_ids
    last, shared = prompt_ids_P[-1:], len(prompt_ids_P) - 1
    lengths = [len(completion) for completion in completions]
    targets = [torch.tensor(completion, dtype=torch.long) for completion in completions]

    input_ids = [prompt_ids_P[:-1]]
    positions = [positions_3P[:, :-1]]
    for target in targets:
        input_ids += [last, target[:-1]]
        after = torch.arange(len(target) - 1) + int(prompt.next_position)
        positions += [positions_3P[:, -1:], after.expand(3, -1)]

    owner_S = torch.cat(
        [torch.zeros(shared, dtype=torch.long), torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))]
    )
    order_S = torch.arange(len(owner_S))
    seen_SS = (owner_S[None, :] == 0) | (owner_S[None, :] == owner_S[:, None])
    mask_SS = seen_SS & (order_S[None, :] <= order_S[:, None])
    return PackedGroup(
        input_ids_1S=torch.cat(input_ids).unsqueeze(0),
        mask_11SS=mask_SS[None, None],
        positions_31S=torch.cat(positions, dim=1).unsqueeze(1),
        keep_N=torch.arange(shared, len(owner_S)),
        targets_N=torch.cat(targets),
        lengths=tuple(lengths),
    )


def collate_completions(rows: Sequence[tuple[Prompt, Sequence[int]]], *, pad_token_id: int) -> dict[str, Tensor]:
    """The model's inputs and labels for several (prompt, completion) rows, padded on the right.

    Image counts may differ from row to row, 0 included. `labels` [B, T] hold the completion's tokens and `IGNORED`
    elsewhere, unshifted as transformers has them.
    """
    ids = [torch.cat([prompt.input_ids, torch.tensor(completion, dtype=torch.long)]) for prompt, completion in rows]
    labels = [
        torch.cat([torch.full_like(prompt.input_ids, IGNORED), torch.tensor(completion, dtype=torch.long)])
        for prompt, completion in rows
    ]
    positions = [
        torch.cat([prompt.position_ids, (torch.arange(len(completion)) + int(prompt.next_position)).expand(3, -1)], dim=1).T
        for prompt, completion in rows
    ]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "position_ids": pad_sequence(positions, batch_first=True).permute(2, 0, 1).contiguous(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    pixels = [prompt.pixel_values for prompt, _ in rows if prompt.pixel_values is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
        batch["image_grid_thw"] = torch.cat([prompt.image_grid_thw for prompt, _ in rows if prompt.image_grid_thw is not None])
    return batch
