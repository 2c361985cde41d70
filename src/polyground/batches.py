"""Rows to tensors: one GRPO group packed behind its shared prompt, and padded batches for supervised training.

What a prompt's tensors are is the model adapter's business (`models`); which completions to train on is the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from polyground.losses import IGNORED
from polyground.models.shared_prefix import GroupLayout

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
    positions_31S: Tensor
    """Completions all start where the prompt ends: at its largest position + 1, not at its length."""
    keep_N: Tensor
    """Places in S whose next token is a completion token: the index for `logits_to_keep`."""
    targets_N: Tensor
    """The completion tokens that are predicted there."""
    layout: tuple[GroupLayout, ...]
    """What lies where; one entry, or several where groups were joined."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each completion; they add up to N."""
        return tuple(length for group in self.layout for length in group.lengths)

    @property
    def mask_11SS(self) -> Tensor:
        """Bool: may row attend to column. Only attention functions that read bool masks as such (sdpa) may be given it."""
        parts = [part for group in self.layout for part in (group.prefix, *group.lengths)]
        starts = [at for group in self.layout for at in (True, *(False for _ in group.lengths))]
        sizes = torch.tensor(parts)
        part_S = torch.arange(len(parts)).repeat_interleave(sizes)
        group_S = torch.tensor(starts).long().cumsum(0).repeat_interleave(sizes)
        shared_S = torch.tensor(starts).repeat_interleave(sizes)
        order_S = torch.arange(len(part_S))
        seen_SS = (shared_S[None, :] & (group_S[None, :] == group_S[:, None])) | (part_S[None, :] == part_S[:, None])
        return (seen_SS & (order_S[None, :] <= order_S[:, None]))[None, None].to(self.input_ids_1S.device)

    def to(self, device: torch.device) -> PackedGroup:
        """The same group on this device; the layout is plain numbers and stays."""
        return PackedGroup(
            input_ids_1S=self.input_ids_1S.to(device),
            positions_31S=self.positions_31S.to(device),
            keep_N=self.keep_N.to(device),
            targets_N=self.targets_N.to(device),
            layout=self.layout,
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

    return PackedGroup(
        input_ids_1S=torch.cat(input_ids).unsqueeze(0),
        positions_31S=torch.cat(positions, dim=1).unsqueeze(1),
        keep_N=torch.arange(shared, shared + sum(lengths)),
        targets_N=torch.cat(targets),
        layout=(GroupLayout(shared, tuple(lengths)),),
    )


def join_groups(groups: Sequence[PackedGroup]) -> PackedGroup:
    """Several groups laid end to end in one row; none sees another."""
    if len(groups) == 1:
        return groups[0]
    sizes = [group.input_ids_1S.shape[1] for group in groups]
    starts = [sum(sizes[:i]) for i in range(len(groups))]
    return PackedGroup(
        input_ids_1S=torch.cat([group.input_ids_1S for group in groups], dim=1),
        positions_31S=torch.cat([group.positions_31S for group in groups], dim=2),
        keep_N=torch.cat([group.keep_N + start for group, start in zip(groups, starts, strict=True)]),
        targets_N=torch.cat([group.targets_N for group in groups]),
        layout=tuple(layout for group in groups for layout in group.layout),
    )


def collate_completions(rows: Sequence[tuple[Prompt, Sequence[int]]], *, pad_token_id: int) -> dict[str, Any]:
    """Tokens, mask, [3, B, T] positions and labels of several (prompt, completion) rows, padded on the right.

    `prompts` are the rows' own, whose images the model adapter encodes: counts may differ from row to row, 0 included.
    `labels` [B, T] hold the completion's tokens and `IGNORED` elsewhere, unshifted as transformers has them.
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
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "position_ids": pad_sequence(positions, batch_first=True).permute(2, 0, 1).contiguous(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "prompts": [prompt for prompt, _ in rows],
    }
