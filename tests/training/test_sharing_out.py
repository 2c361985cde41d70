"""Facts about how a step's work is dealt out to processes; what the processes make of it is in test_processes.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st
from stand_ins import ask
from torch.utils.data import BatchSampler

from polyground.config import GrpoConfig
from polyground.models import Loaded
from polyground.records import Example
from polyground.training.processes import IDLE, EvenRows, PromptLengths, balanced
from polyground.training.schedule import Schedule
from polyground.training.sft import sft_steps

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


def shares(order: list[int], *, processes: int, batch: int) -> list[list[int]]:
    """What each process gets when accelerate deals out a step."""
    return [
        [item for rows in BatchSamplerShard(BatchSampler(order, batch, False), processes, process) for item in rows]
        for process in range(processes)
    ]


@given(SHAPES, st.data())
def test_dealing_out_keeps_every_item_once_and_gives_each_process_as_many(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    processes, batch, rounds = shape
    count = processes * batch * rounds
    costs = data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count))
    order = balanced(costs, processes=processes, batch=batch)
    assert sorted(order) == list(range(count))
    assert {len(share) for share in shares(order, processes=processes, batch=batch)} == {batch * rounds}


@pytest.mark.parametrize(
    ("costs", "processes", "batch", "loads"),
    [
        pytest.param([9, 8, 1, 2], 2, 1, [10, 10], id="heavy-with-light"),
        pytest.param([9, 8, 1, 2], 2, 2, [10, 10], id="in-batches"),
        pytest.param([5, 5, 5, 5], 2, 1, [10, 10], id="all-alike"),
        pytest.param([100, 1, 1, 1], 2, 1, [101, 2], id="as-many-for-all-even-so"),
        pytest.param([3, 1, 2], 1, 1, [6], id="one-process"),
    ],
)
def test_processes_get_about_as_much(costs: list[float], processes: int, batch: int, loads: list[float]) -> None:
    dealt = shares(balanced(costs, processes=processes, batch=batch), processes=processes, batch=batch)
    assert [sum(costs[item] for item in share) for share in dealt] == loads
    assert all(share == sorted(share, key=lambda item: -costs[item]) for share in dealt)


def test_what_does_not_go_up_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 items cannot be dealt out to 2 processes"):
        balanced([1, 2, 3], processes=2, batch=1)


@pytest.mark.parametrize(
    ("rows", "processes", "batch", "accumulation"), [(10, 2, 1, 1), (9, 2, 2, 2), (3, 4, 2, 1), (8, 2, 2, 2)]
)
def test_a_step_has_the_rows_of_one_process_with_as_much_accumulation(
    rows: int, processes: int, batch: int, accumulation: int
) -> None:
    sampler = EvenRows(rows, processes=processes, batch=batch, accumulation=accumulation, seed=5, cost=lambda row: float(row % 4))
    alone = SeedableRandomSampler(range(rows), data_seed=5)
    step = processes * batch * accumulation
    for epoch in range(2):
        for one in (sampler, alone):
            one.set_epoch(epoch)
        dealt, order = list(sampler), list(alone)
        assert len(dealt) == len(sampler)
        assert len(dealt) % (processes * batch) == 0
        assert sorted(row for row in dealt if row != IDLE) == sorted(order)
        for start in range(0, rows, step):
            assert sorted(row for row in dealt[start : start + step] if row != IDLE) == sorted(order[start : start + step])
    # As many steps as the trainer takes.
    assert -(-len(sampler) // step) == sft_steps(rows, _sft(batch, accumulation), processes=processes)


def _sft(batch: int, accumulation: int):
    from polyground.config import SftConfig

    return SftConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)


def test_a_schedule_that_is_dealt_out_has_the_same_examples_in_each_step(examples: list[Example]) -> None:
    options = {"steps": 6, "per_step": 2, "num_iterations": 2, "seed": 0}
    plain = Schedule(examples, **options)
    turned = Schedule(examples, **options, deal=lambda numbers: [1, 0])
    for step in range(6):
        first, second = 2 * step, 2 * step + 1
        assert [turned.number(first), turned.number(second)] == [plain.number(second), plain.number(first)]
        assert [turned.place(first), turned.place(second)] == [1, 0]
        assert [plain.place(first), plain.place(second)] == [0, 1]


def test_the_length_of_a_prompt_is_known_before_it_is_read(toy: Loaded, examples: list[Example]) -> None:
    lengths = PromptLengths(toy.family)
    for example in examples:
        messages, _ = ask(example)
        assert lengths(messages) == len(toy.family.encode(messages))


def test_a_prompt_that_cannot_be_read_has_no_length_yet(toy: Loaded, examples: list[Example]) -> None:
    broken = Example(**{**vars_of(examples[0]), "images": (Path("missing.png"),)})
    assert PromptLengths(toy.family)(ask(broken)[0]) == 0


def vars_of(example: Example) -> dict:
    return {name: getattr(example, name) for name in example.__slots__}


def test_two_processes_count_as_one_with_twice_the_accumulation() -> None:
    two = GrpoConfig(gradient_accumulation_steps=2).deciding(processes=2)
    assert two == GrpoConfig(gradient_accumulation_steps=4).deciding()
    assert two != GrpoConfig(gradient_accumulation_steps=2).deciding()


def test_an_idle_process_learns_nothing(toy: Loaded, examples: list[Example]) -> None:
    from polyground.batches import collate_completions
    from polyground.losses import IGNORED
    from polyground.training.sft import Lesson, Lessons

    lessons = Lessons([Lesson(tuple(ask(examples[0])[0]), "<answer>[]</answer>")], toy)
    batch = collate_completions([lessons[IDLE]], pad_token_id=toy.family.pad_token_id)
    assert torch.all(batch["labels"] == IGNORED)
    assert batch["input_ids"].shape[1] == lessons.cost()(0) - len(toy.family.completion_ids("<answer>[]</answer>"))
