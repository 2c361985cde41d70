"""What is seen of a training while it runs: a panel where standard error is a terminal, plain lines where it is not, and one
line at the end. It only reads what the trainer logs; nothing of the training depends on it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyground.errors import visible
from polyground.storage import read_rows

FIGURES = {
    "loss": "loss",
    "reward": "reward",
    "iou": "IoU",
    "image_accuracy": "right image",
    "unreadable": "unreadable",
    "frac_reward_zero_std": "without variance",
    "entropy": "entropy",
    "kl": "KL",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""What is shown of a log line, and under which name; the parts of the reward stand below the reward."""

AT_THE_END = ("loss", "reward", "iou", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length")
"""What the last line says, from the first tenth of the log to the last."""

IN_A_LINE = ("loss", "reward", "iou", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length")
"""What a plain line says."""

WIDE, LESS_WIDE = 96, 72
"""Columns from which figures stand two in a row, and from which they do where the terminal is too low for one in a row."""

SPARKS = "▁▂▃▄▅▆▇█"


class View(TrainerCallback):
    """Shows a training of the stage called `name`, whose lines lie in `log` and whose warnings, if any, in `warnings`."""

    def __init__(
        self,
        name: str,
        *,
        log: Path,
        warnings: Path,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._log, self._warnings, self._clock = name, log, warnings, clock
        self._console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._step = self._total = self._begun_at = 0
        self._begun = clock()
        self._tenth = -1
        self._warned: list[Mapping[str, Any]] = []

    # What Trainer calls ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = self._begun_at = state.global_step
        self._total, self._begun = state.max_steps, self._clock()
        if not state.is_world_process_zero:
            return
        # Of an earlier attempt: curves and the last line speak of the whole training.
        self._rows = [row for row in read_rows(self._log) if "loss" in row] if self._log.exists() else []
        if self._console.is_terminal:
            # What others write meanwhile, warnings above all, goes above the panel.
            self._live = Live(console=self._console, get_renderable=self.panel, refresh_per_second=2)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self._step = state.global_step
        self._rows.append({**logs, "step": state.global_step})
        self._warned = list(read_rows(self._warnings)) if self._warnings.exists() else []
        tenth = 10 * self._step // max(1, self._total)
        if self._live is None and tenth > self._tenth:
            self._print(self.line())
            self._tenth = tenth

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()
        if state.is_world_process_zero:
            self._print(self.last_line())

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # What is shown ---------------------------------------------------------------------------------------------------

    def panel(self) -> Panel:
        """All there is to see at this moment."""
        done = ProgressBar(total=max(1, self._total), completed=self._step)
        # A bar ends no line by itself.
        blocks: list[Any] = [Padding(done), Text(f"memory {spoken_memory()}", style="dim")]
        # Above the figures: what does not fit into a low terminal is cut off below.
        blocks += [
            Text(f"! step {row['step']}: {visible(str(row['text']))}", style="yellow", overflow="ellipsis", no_wrap=True)
            for row in self._warned[-3:]
        ]
        if self._rows:
            blocks.append(self._figures(rows_taken=len(blocks) + 2))
        title = f" {visible(self._name)} · step {self._step} of {self._total} "
        return Panel(Group(*blocks), title=Text(title), title_align="left", subtitle=Text(f" {self._times()} "), padding=(0, 1))

    def line(self) -> str:
        """The same in one line."""
        row = self._rows[-1]
        said = [f"{FIGURES[key]} {_short(row[key])}{self._in_parts(key)}" for key in IN_A_LINE if _is_number(row.get(key))]
        return (
            f"{visible(self._name)}: step {self._step} of {self._total}  {'  '.join(said)}  ({self._times()}, {spoken_memory()})"
        )

    def last_line(self) -> str:
        """What the training came to: steps, time, figures from the first tenth of the log to the last, memory, warnings."""
        said = []
        for key in AT_THE_END:
            values = self._values(key)
            if values:
                few = max(1, len(values) // 10)
                first, last = _short(fmean(values[:few])), _short(fmean(values[-few:]))
                said.append(f"{FIGURES[key]} {first} → {last}")
        warned = list(read_rows(self._warnings)) if self._warnings.exists() else []
        if self._warnings.exists():
            kinds = ", ".join(dict.fromkeys(str(row["kind"]) for row in warned))
            said.append(f"{len(warned)} warning{'s' * (len(warned) != 1)}: {kinds}" if warned else "no warning")
        before = f" (after {self._begun_at} done before)" if self._begun_at else ""
        steps = f"{self._step - self._begun_at} steps in {spoken_clock(self._clock() - self._begun)}{before}"
        return f"{visible(self._name)}: {'  '.join([steps, *said, spoken_memory()])}"

    def _figures(self, *, rows_taken: int) -> Table:
        row = self._rows[-1]
        shown: list[tuple[str, str]] = []
        for key, name in FIGURES.items():
            if _is_number(row.get(key)):
                shown.append((name, key))
            if key == "reward":
                shown += [(f"  {visible(part)}", name_of) for part, name_of in _parts(row).items()]
        wide, is_low = self._console.width, len(shown) + rows_taken >= self._console.height
        columns = 2 if wide >= WIDE or (is_low and wide >= LESS_WIDE) else 1
        # Of the inner width, what the longest name, a number and the gaps between them leave.
        longest = max((len(name) for name, _ in shown), default=0)
        room = max(0, min(16, (wide - 4) // columns - longest - 9 - 3 * 2))
        table = Table.grid(padding=(0, 2), expand=False)
        down = -(-len(shown) // columns)
        for place in range(down):
            cells: list[Text] = []
            for name, key in shown[place::down]:
                values = self._values(key)
                cells += [
                    Text(name, style="dim", no_wrap=True),
                    Text(_short(values[-1]), justify="right", style="bold"),
                    Text(self._spark(values, width=room), style="cyan", no_wrap=True),
                ]
            table.add_row(*cells)
        return table

    def _spark(self, values: Sequence[float], *, width: int) -> str:
        return sparkline(values, width=width) if "utf" in self._console.encoding else ""

    def _in_parts(self, key: str) -> str:
        parts = _parts(self._rows[-1]) if key == "reward" else {}
        if len(parts) < 2:
            return ""
        return f" ({', '.join(f'{visible(name)} {_short(self._rows[-1][part])}' for name, part in parts.items())})"

    def _values(self, key: str) -> list[float]:
        return [float(row[key]) for row in self._rows if _is_number(row.get(key))]

    def _times(self) -> str:
        gone, steps = self._clock() - self._begun, self._step - self._begun_at
        if not steps:
            return f"{spoken_clock(gone)} gone"
        each = gone / steps
        left = spoken_clock(each * (self._total - self._step))
        return f"{spoken_clock(gone)} gone, about {left} left, {_short(each)} s a step"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The course of the values in so many characters, each the mean of its share of them.

    >>> sparkline([0, 1, 2, 3], width=4), sparkline([0, 0, 4, 4], width=2), sparkline([5, 5], width=8)
    ('▁▃▅█', '▁█', '▁▁')
    """
    known = [value for value in values if value == value and abs(value) != float("inf")]
    count = min(width, len(known))
    edges = [round(place * len(known) / count) for place in range(count + 1)] if count else []
    means = [fmean(known[start:end]) for start, end in pairwise(edges)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    return "".join(SPARKS[int((mean - low) / (high - low) * 7.999)] if high > low else SPARKS[0] for mean in means)


def spoken_clock(seconds: float) -> str:
    """
    >>> spoken_clock(8.6), spoken_clock(251), spoken_clock(3900)
    ('0:08', '4:11', '1:05:00')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def spoken_memory() -> str:
    """The most memory this process has held so far, of the machine and of its accelerator."""
    held = [f"{_peak_bytes() / 2**30:.1f} GiB"] if _peak_bytes() else []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held.append(f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return f"peak {', '.join(held)}" if held else "unknown"


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on every system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _parts(row: Mapping[str, Any]) -> dict[str, str]:
    """Log keys of the parts of the reward, by the part's name."""
    return {
        key.removeprefix("rewards/").removesuffix("/mean"): key
        for key in row
        if key.startswith("rewards/") and key.endswith("/mean")
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _short(value: float) -> str:
    """
    >>> _short(0.29176), _short(57.5156), _short(3e-4), _short(0.0)
    ('0.292', '57.5', '0.0003', '0')
    """
    return f"{value:.3g}"
