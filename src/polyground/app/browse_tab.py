"""The tab of the page that looks through rows, in gradio: filters, a page of rows at a time, marks and their export."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from polyground.app.ask_tab import QUIET
from polyground.app.asking import spoken
from polyground.app.library import Library
from polyground.app.pictures import card, message
from polyground.app.rows import Filter, Shelf, pages_of, write_export
from polyground.errors import DataError, PolygroundError
from polyground.outcomes import Outcome

PAGE = 5
"""Rows shown together."""

Marks = Mapping[str, frozenset[int]]
"""Numbers of the marked rows, by the name of their shelf."""


class BrowseTab:
    """Draws the tab where it is made, and answers its events."""

    def __init__(self, page: gr.Blocks, library: Library, scratch: Path) -> None:
        self._library = library
        self._scratch = scratch
        self._draw_filters()
        self._draw_buttons()
        self._draw_rows()
        self._answer_events(page)

    # What there is to see ------------------------------------------------------------------------------------------------

    def _draw_filters(self) -> None:
        names = self._library.names
        with gr.Row():
            self._view = gr.Dropdown(label="What to look through", choices=names, value=names[0], elem_id="pg-view", scale=2)
            self._tasks = _choice("Task", "pg-tasks", scale=2)
            self._counts = _choice("Images", "pg-counts", scale=1)
            self._outcomes = _choice("Outcome (of several models: all must fit)", "pg-outcomes", scale=3)
        with gr.Row():
            self._text = gr.Textbox(label="Key holds", placeholder="any, then Enter", lines=1, elem_id="pg-key", scale=2)
            self._low = gr.Number(label="Pass rate from", value=0, minimum=0, maximum=1, step=0.05, scale=1)
            self._high = gr.Number(
                label="Pass rate to", value=1, minimum=0, maximum=1, step=0.05, scale=1, elem_id="pg-rate-high"
            )
            self._least = gr.Textbox(label="Reward from", placeholder="any", lines=1, scale=1, elem_id="pg-reward-low")
            self._most = gr.Textbox(label="Reward to", placeholder="any", lines=1, scale=1, elem_id="pg-reward-high")
            self._only = gr.Checkbox(label="Marked rows only", value=False, elem_id="pg-only", scale=1)

    def _draw_buttons(self) -> None:
        with gr.Row(elem_classes="pg-paging"):
            self._back = gr.Button("◀ Previous page", elem_id="pg-back", size="md")
            self._number = gr.Number(
                label="Page", value=1, minimum=1, precision=0, elem_id="pg-page", show_label=False, container=False
            )
            self._on = gr.Button("Next page ▶", elem_id="pg-next", size="md")
            self._every = gr.Button("Mark all that match", elem_id="pg-mark-all", size="md")
            self._none = gr.Button("Unmark all", elem_id="pg-unmark", size="md")
            self._export = gr.Button("Export marked rows", variant="primary", elem_id="pg-export", size="md")
        self._status = gr.HTML(elem_id="pg-status", padding=False)
        self._out = gr.File(label="Marked rows as JSON Lines", visible=False, elem_id="pg-file", interactive=False)

    def _draw_rows(self) -> None:
        self._slots: list[gr.Column] = []
        self._boxes: list[gr.Checkbox] = []
        self._cards: list[gr.HTML] = []
        for place in range(PAGE):
            with gr.Column(visible=False, elem_classes="pg-slot") as slot:
                self._boxes.append(gr.Checkbox(label="Mark", elem_id=f"pg-mark-{place}", container=False))
                self._cards.append(gr.HTML(elem_id=f"pg-card-{place}"))
            self._slots.append(slot)

    # What happens --------------------------------------------------------------------------------------------------------

    def _answer_events(self, page: gr.Blocks) -> None:
        marks, ids, first = gr.State({}), gr.State([]), gr.State(1)
        kinds = [self._tasks, self._counts, self._outcomes]
        ranges = [self._text, self._low, self._high, self._least, self._most]
        filters = [self._view, *kinds, *ranges, self._only]
        shown = [self._status, self._number, ids, *self._slots, *self._boxes, *self._cards]
        anew, here = [marks, first, *filters], [marks, self._number, *filters]
        for opened in (page.load, self._view.input):
            opened(self._open, self._view, kinds, **QUIET).then(self._show, anew, shown, **QUIET)
        for one in (*kinds, self._low, self._high, self._only):
            one.input(self._show, anew, shown, **QUIET)
        for written in (self._text, self._least, self._most):
            written.submit(self._show, anew, shown, **QUIET)
        self._number.submit(self._show, here, shown, **QUIET)
        self._back.click(lambda marked, at, *rest: self._show(marked, int(at or 1) - 1, *rest), here, shown, **QUIET)
        self._on.click(lambda marked, at, *rest: self._show(marked, int(at or 1) + 1, *rest), here, shown, **QUIET)
        for place, tick in enumerate(self._boxes):
            tick.input(marking(place), [marks, ids, self._view, tick], marks, **QUIET)
        self._every.click(self._mark_all, [marks, *filters], marks, **QUIET).then(self._show, here, shown, **QUIET)
        self._none.click(lambda: {}, None, marks, **QUIET).then(self._show, here, shown, **QUIET)
        self._export.click(self._write, [marks, self._view], [self._status, self._out], **QUIET)

    def _open(self, name: str) -> tuple[Any, ...]:
        """The filters that a shelf has something for."""
        try:
            shelf = self._library.shelf(name)
        except PolygroundError:
            return (gr.update(choices=[], value=[]),) * 3
        ways = [(f"{spoken(who)}: {way.spoken}", f"{who}\t{way.name}") for who in shelf.names for way in Outcome]
        return (
            gr.update(choices=shelf.tasks, value=[]),
            gr.update(choices=[str(count) for count in shelf.counts], value=[]),
            gr.update(choices=ways, value=[]),
        )

    def _rows(self, marked: Marks, *values: Any) -> tuple[Shelf, list[int]]:
        """The rows that fit the filters, in their order."""
        name, tasks, images, ways, part, low, high, least, most, marked_only = values
        shelf = self._library.shelf(name)
        wanted = Filter(
            tasks=frozenset(tasks or ()),
            images=frozenset(map(int, images or ())),
            outcomes=masks_of(ways or ()),
            pass_rate=(0.0 if low is None else float(low), 1.0 if high is None else float(high)),
            reward=(bound_of(least, -math.inf), bound_of(most, math.inf)),
            text=part or "",
        )
        rows = shelf.select(wanted)
        mine = marked.get(name, frozenset()) if marked_only else None
        return shelf, [row for row in rows if mine is None or row in mine]

    def _show(self, marked: Marks, at: Any, *values: Any) -> tuple[Any, ...]:
        """The page of this number: its status, its number, its rows."""
        try:
            shelf, rows = self._rows(marked, *values)
            pages = pages_of(rows, PAGE)
            at = min(max(1, int(at or 1)), pages)
            few = rows[(at - 1) * PAGE : at * PAGE]
            found = [shelf.read(row) for row in few]
        except PolygroundError as error:
            return message(str(error)), 1, [], *([gr.update(visible=False)] * PAGE), *([gr.skip()] * PAGE), *([gr.skip()] * PAGE)
        mine = marked.get(values[0], frozenset())
        empty = PAGE - len(few)
        return (
            message(counted(shelf, len(rows), at, pages, len(mine)), kind="note"),
            at,
            few,
            *(gr.update(visible=place < len(few)) for place in range(PAGE)),
            *(gr.update(value=row in mine, label=f"Mark {one.key}") for row, one in zip(few, found, strict=True)),
            *([gr.skip()] * empty),
            *(card(one, threshold=shelf.threshold) for one in found),
            *([""] * empty),
        )

    def _mark_all(self, marked: Marks, *values: Any) -> Marks:
        try:
            _, rows = self._rows(marked, *values)
        except PolygroundError:
            return marked
        return {**marked, values[0]: frozenset(marked.get(values[0], frozenset())) | frozenset(rows)}

    def _write(self, marked: Marks, name: str) -> tuple[Any, ...]:
        mine = sorted(marked.get(name, ()))
        if not mine:
            return message("No row is marked here: tick “Mark” above the rows you want, then export."), gr.update(visible=False)
        shelf = self._library.shelf(name)
        path = Path(tempfile.mkdtemp(dir=self._scratch)) / f"{re.sub(r'[^a-zA-Z0-9_]+', '-', name).strip('-')}.jsonl"
        count = write_export((shelf.read(row) for row in mine), path)
        ready = "1 row is ready below." if count == 1 else f"{count} rows are ready below."
        return message(ready, kind="note"), gr.update(value=str(path), visible=True)


def _choice(label: str, name: str, *, scale: int) -> gr.Dropdown:
    """A filter that takes several values; which there are, the shelf says."""
    return gr.Dropdown(label=label, choices=[], value=[], multiselect=True, elem_id=name, scale=scale)


def marking(place: int) -> Any:
    """What a tick beside the row in this place of the page does to the marks."""

    def mark(marked: Marks, rows: Sequence[int], name: str, ticked: bool) -> Marks:
        mine = set(marked.get(name, ()))
        if place < len(rows):
            (mine.add if ticked else mine.discard)(rows[place])
        return {**marked, name: frozenset(mine)}

    return mark


def bound_of(text: str, otherwise: float) -> float:
    """The number in a field that may be empty. Raises DataError for what is none."""
    try:
        return float(text) if text and text.strip() else otherwise
    except ValueError as error:
        raise DataError(f"Reward: {text!r} is not a number; write one such as 0.5, or leave the field empty") from error


def masks_of(ways: Sequence[str]) -> dict[str, Outcome]:
    """`["sft\\tRIGHT", "rl\\tWRONG_BOX"]` by who answered."""
    masks: dict[str, Outcome] = {}
    for way in ways:
        who, _, name = way.partition("\t")
        masks[who] = masks.get(who, Outcome(0)) | Outcome[name]
    return masks


def counted(shelf: Shelf, count: int, at: int, pages: int, marked: int) -> str:
    bad = f" · {shelf.bad} bad rows left out" if shelf.bad else ""
    return f"{count} of {len(shelf)} rows match · page {at} of {pages} · {marked} marked{bad}"
