"""Facts about what is seen of a training: a panel on a terminal, plain lines elsewhere, one line at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState

from polyground.training.view import View, sparkline

HALF = {
    "loss": 0.5,
    "reward": 0.25,
    "rewards/iou/mean": 0.2,
    "rewards/format/mean": 0.9,
    "iou": 0.2,
    "frac_reward_zero_std": 0.125,
    "entropy": 0.4,
    "completions/mean_length": 58.0,
}


class Clock:
    """Ten seconds later each time it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def seen(
    folder: Path, *, terminal: bool, steps: int, start: int = 0, width: int = 120, height: int = 40, warnings: str | None = None
) -> tuple[View, str]:
    """A training of 20 steps, ten seconds each, whose reward rises by 0.01 a step: its view, and what was written meanwhile."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=width, height=height, color_system=None, legacy_windows=False)
    if warnings is not None:
        (folder / "warnings.jsonl").write_text(warnings, encoding="utf-8")
    view = View("grpo", log=folder / "log.jsonl", warnings=folder / "warnings.jsonl", console=console, clock=clock)
    state = TrainerState(global_step=start, max_steps=20, is_world_process_zero=True)
    view.on_train_begin(None, state, None)
    for step in range(start + 1, start + steps + 1):
        clock.now += 10
        state.global_step = step
        view.on_step_end(None, state, None)
        view.on_log(None, state, None, logs={**HALF, "reward": 0.25 + 0.01 * step})
    if start + steps == 20:
        view.on_train_end(None, state, None)
    return view, out.getvalue()


@pytest.fixture
def views() -> Iterator[list[View]]:
    """Those that hold a terminal give it back."""
    held: list[View] = []
    yield held
    for view in held:
        view.close()


def panel_of(view: View, width: int = 120, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, record=True)
    console.print(view.panel())
    return console.export_text()


def test_without_a_terminal_there_is_a_line_for_every_tenth_and_one_at_the_end(tmp_path: Path) -> None:
    _, text = seen(tmp_path, terminal=False, steps=20)
    lines = text.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("grpo: step 1 of 20  loss 0.5  reward 0.26 (iou 0.2, format 0.9)  IoU 0.2  without variance 0.125")
    assert lines[1].startswith("grpo: step 2 of 20")
    assert lines[10].startswith("grpo: step 20 of 20")
    assert "0:20 gone, about 3:00 left, 10 s a step" in lines[1]
    assert "\x1b" not in text


def test_the_last_line_goes_from_the_first_tenth_to_the_last(tmp_path: Path) -> None:
    _, text = seen(tmp_path, terminal=False, steps=20)
    last = text.splitlines()[-1]
    assert last.startswith("grpo: 20 steps in 3:20  loss 0.5 → 0.5  reward 0.265 → 0.445")  # means of two lines each
    assert "peak" in last
    assert "warning" not in last  # nobody watched


@pytest.mark.parametrize(
    ("warnings", "said"),
    [
        pytest.param("", "no warning", id="none"),
        pytest.param('{"step": 3, "kind": "kl", "text": "far"}\n', "1 warning: kl", id="one"),
        pytest.param(
            '{"step": 3, "kind": "kl", "text": "x"}\n{"step": 4, "kind": "cut_off", "text": "y"}\n', "2 warnings: kl, cut_off"
        ),
    ],
)
def test_the_last_line_counts_the_warnings(tmp_path: Path, warnings: str, said: str) -> None:
    _, text = seen(tmp_path, terminal=False, steps=20, warnings=warnings)
    assert said in text.splitlines()[-1]


def test_a_resumed_training_speaks_of_all_of_it(tmp_path: Path) -> None:
    rows = [{**HALF, "step": step, "reward": 0.25 + 0.01 * step} for step in range(1, 11)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, text = seen(tmp_path, terminal=False, steps=10, start=10)
    last = text.splitlines()[-1]
    assert last.startswith("grpo: 10 steps in 1:40 (after 10 done before)")
    assert "reward 0.265 → 0.445" in last


def test_the_panel_shows_where_the_training_is(tmp_path: Path, views: list[View]) -> None:
    view, _ = seen(tmp_path, terminal=True, steps=5, warnings='{"step": 3, "kind": "kl", "text": "The KL is large"}\n')
    views.append(view)
    shown = panel_of(view)
    for said in (
        "grpo · step 5 of 20",
        "0:50 gone, about 2:30 left, 10 s a step",
        "reward",
        "0.3",
        "format",
        "without variance",
        "entropy",
        "tokens",
        "peak",
        "! step 3: The KL is large",
        "▁▂▄▆█",
    ):
        assert said in shown, shown


def test_a_narrow_panel_puts_figures_below_one_another(tmp_path: Path, views: list[View]) -> None:
    view, _ = seen(tmp_path, terminal=True, steps=2, width=60)
    views.append(view)
    lines = panel_of(view, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("loss" in line or "entropy" in line for line in lines) == 2


def test_a_low_terminal_has_two_figures_in_a_row_and_its_warnings_above_them(tmp_path: Path, views: list[View]) -> None:
    parts = {f"rewards/part {number}/mean": 0.5 for number in range(12)}
    view, _ = seen(tmp_path, terminal=True, steps=2, width=80, height=24, warnings='{"step": 1, "kind": "kl", "text": "far"}\n')
    views.append(view)
    view.on_log(None, TrainerState(global_step=3, max_steps=20, is_world_process_zero=True), None, logs={**HALF, **parts})
    lines = panel_of(view, 80, 24).splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert [place for place, line in enumerate(lines) if "! step 1: far" in line] == [3]  # below border, bar and memory
    assert all("…" not in line for line in lines)


def test_a_terminal_gets_the_last_line_too(tmp_path: Path) -> None:
    view, text = seen(tmp_path, terminal=True, steps=20)
    assert "grpo: 20 steps in 3:20" in text
    assert view._live is None


@pytest.mark.parametrize("logs", [None, {}, {"train_runtime": 3.0}], ids=["nothing", "empty", "the-end-of-the-log"])
def test_a_line_without_a_loss_is_no_figure(tmp_path: Path, logs: Mapping[str, Any] | None) -> None:
    view, _ = seen(tmp_path, terminal=False, steps=1)
    before = view.line()
    view.on_log(None, TrainerState(global_step=9, max_steps=20), None, logs=logs)
    assert view.line() == before


def test_names_of_others_move_no_cursor(tmp_path: Path) -> None:
    view, _ = seen(tmp_path, terminal=False, steps=1)
    state = TrainerState(global_step=2, max_steps=20, is_world_process_zero=True)
    view.on_log(None, state, None, logs={**HALF, "rewards/\x1b[2J/mean": 0.5})
    assert "\x1b" not in view.line()
    assert "\x1b[2J" not in panel_of(view)


def test_a_sparkline_leaves_out_what_is_no_number() -> None:
    assert sparkline([float("nan"), 0.0, float("inf"), 1.0], width=4) == "▁█"
    assert sparkline([], width=4) == ""
