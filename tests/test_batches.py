"""Facts about packing and collating, on prompts small enough to draw."""

import pytest
import torch

from polyground.batches import collate_completions, pack_group
from polyground.losses import IGNORED
from polyground.models import Prompt


def prompt(length: int, *, images: int = 0, next_position: int | None = None) -> Prompt:
    return Prompt(
        input_ids=torch.arange(10, 10 + length),
        position_ids=torch.arange(length).expand(3, -1),
        next_position=length if next_position is None else next_position,
        vision={"pixel_values": torch.full((4 * images, 3), float(images))} if images else {},
        image_tokens=images,
    )


def test_a_group_is_packed_behind_one_prompt() -> None:
    packed = pack_group(prompt(3, next_position=7), [[1, 2], [3], [4, 5, 6]])
    assert packed.input_ids_1S.tolist() == [[10, 11, 12, 1, 12, 12, 4, 5]]
    assert packed.positions_31S[0].tolist() == [[0, 1, 2, 7, 2, 2, 7, 8]]
    assert packed.keep_N.tolist() == [2, 3, 4, 5, 6, 7]
    assert packed.targets_N.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.mask_GT.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_a_completion_sees_the_prompt_and_itself_and_nothing_of_its_neighbours() -> None:
    mask = pack_group(prompt(3), [[1, 2], [3, 4]]).mask_11SS[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("completions", [pytest.param([], id="no-completion"), pytest.param([[1], []], id="empty-completion")])
def test_a_group_without_tokens_is_refused(completions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack_group(prompt(3), completions)


def test_ragged_image_counts_make_one_batch() -> None:
    rows = [(prompt(2), [1, 2, 3]), (prompt(3, images=1), [4]), (prompt(2, images=3, next_position=9), [5, 6])]
    batch = collate_completions(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[10, 11, 1, 2, 3], [10, 11, 12, 4, 0], [10, 11, 5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 1, 2, 3],
        [IGNORED, IGNORED, IGNORED, 4, IGNORED],
        [IGNORED, IGNORED, 5, 6, IGNORED],
    ]
    assert batch["position_ids"].shape == (3, 3, 5)
    assert batch["position_ids"][0, 2].tolist() == [0, 1, 9, 10, 0]
    assert [row.image_tokens for row in batch["prompts"]] == [0, 1, 3]
