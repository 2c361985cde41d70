"""The page in gradio: a tab that asks models about images, and one that looks through the rows of a run or a data set."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from polyground.app.asking import Entrant, Panel, Reply, Settings, drawn, question_of, require_images, spoken
from polyground.app.library import Library
from polyground.app.pictures import card, message, paint, pictures, thought
from polyground.app.rows import Filter, Shelf, pages_of, write_export
from polyground.errors import DataError, PolygroundError
from polyground.outcomes import Outcome
from polyground.records import Example

PAGE = 5
"""Rows shown together."""

TRUTH = "truth"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is on the page of the last question: kept per visitor."""

    example: Example | None = None
    paths: Sequence[str] = ()
    """Of the files as they were when it was asked."""
    has_truth: bool = False
    replies: Mapping[str, Reply] = field(default_factory=dict)


def build(
    panel: Panel | None, library: Library | None, *, examples: Sequence[Example], settings: Settings, scratch: Path, first: str
) -> gr.Blocks:
    """The page with the tabs there is something for; `first` is the one that is open at the start."""
    with gr.Blocks(title="polyground", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML('<h1 id="pg-title">polyground</h1>', padding=False)
        with gr.Tabs(selected=first):
            if panel is not None:
                with gr.Tab("Ask", id="ask"):
                    _ask_tab(panel, examples, settings)
            if library is not None:
                with gr.Tab("Browse", id="browse"):
                    _browse_tab(page, library, scratch)
    return page


# ---- asking


def _ask_tab(panel: Panel, examples: Sequence[Example], settings: Settings) -> None:
    colours = paint([TRUTH, "asked", *panel.names])
    by_key = {example.key: example for example in examples}
    choices = [(f"{example.task.replace('_', ' ')}: {example.question[:70]}", example.key) for example in examples]
    asked = gr.State(Asked())
    known = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            files = gr.File(
                label="Images, in the order the question counts them",
                file_count="multiple",
                type="filepath",
                allow_reordering=True,
                elem_id="pg-images",
                height=190,
            )
            question = gr.Textbox(
                label="Question",
                placeholder="Find the object that is in all images.",
                lines=1,
                max_lines=5,
                elem_id="pg-question",
            )
            with gr.Row():
                go = gr.Button("Ask", variant="primary", elem_id="pg-ask")
                stop = gr.Button("Stop", elem_id="pg-stop")
            if choices:
                chosen = gr.Dropdown(
                    label="Or take an example from the simulated world", choices=choices, value=None, elem_id="pg-example"
                )
            with gr.Accordion("Settings", open=False):
                instruction = gr.Textbox(label="Instruction, appended to the question", value=settings.instruction, lines=1)
                max_tokens = gr.Slider(8, 2048, value=settings.max_tokens, step=8, label="Tokens per answer, at most")
                temperature = gr.Slider(0.0, 2.0, value=settings.temperature, step=0.05, label="Temperature (0: the likeliest)")
                seed = gr.Number(value=settings.seed, precision=0, minimum=0, label="Seed")
        with gr.Column(scale=5, min_width=420):
            note = gr.HTML(elem_id="pg-note", padding=False)
            shown = gr.CheckboxGroup(
                label="Boxes shown",
                choices=[(spoken(name), name) for name in (TRUTH, *panel.names)],
                value=[TRUTH, *panel.names],
                elem_id="pg-shown",
            )
            sheet = gr.HTML(elem_id="pg-sheet", padding=False)
            with gr.Row():
                texts: list[gr.HTML] = []
                values: list[gr.Code] = []
                for name in panel.names:
                    with gr.Column(min_width=240):
                        texts.append(gr.HTML(_waiting(name, colours), elem_id=f"pg-text-{len(texts)}", padding=False))
                        values.append(
                            gr.Code(
                                language="json",
                                label=f"{spoken(name)}: answer in pixels",
                                interactive=False,
                                elem_id=f"pg-json-{len(values)}",
                                lines=4,
                                max_lines=14,
                                show_line_numbers=False,
                            )
                        )

    def take(key: str | None) -> tuple[Any, ...]:
        example = by_key.get(key or "")
        if example is None:
            return gr.skip(), gr.skip(), None
        return [str(path) for path in example.images], example.question, example.key

    def look(paths: Sequence[str] | None, key: str | None, now: Asked) -> tuple[Any, ...]:
        """Show the images as they are, before anything is asked."""
        if now.paths and tuple(paths or ()) == tuple(now.paths):
            # Word of the change came after the question: its answers stay.
            return (gr.skip(),) * (3 + 2 * len(panel.names))
        images = [Path(path) for path in paths or ()]
        blank = (*(_waiting(name, colours) for name in panel.names), *("" for _ in panel.names))
        try:
            require_images(images)
        except PolygroundError as error:
            return message(str(error)), "", Asked(), *blank
        example = by_key.get(key or "")
        boxes = []
        if example is not None and [path.name for path in images] == [path.name for path in example.images]:
            boxes = drawn(example, {}, truth=False)
        return "", pictures(images, boxes, colours), Asked(), *blank

    def ask(
        paths: Sequence[str] | None,
        text: str,
        key: str | None,
        names: Sequence[str],
        said: str,
        most: float,
        heat: float,
        number: float,
    ) -> Iterator[tuple[Any, ...]]:
        same: list[Any] = [gr.skip()] * (3 + 2 * len(panel.names))
        images = [Path(path) for path in paths or ()]
        try:
            example = question_of(images, text, by_key.get(key or ""))
        except PolygroundError as error:
            yield (message(str(error)), *same[1:])
            return
        asking = Settings(instruction=said, max_tokens=int(most), temperature=float(heat), seed=int(number or 0))
        replies: dict[str, Reply] = {}
        has_truth = example.key in by_key

        def state() -> tuple[str, Asked]:
            now = Asked(example=example, paths=tuple(paths or ()), has_truth=has_truth, replies=dict(replies))
            return _sheet(now, names, colours), now

        waiting = [_waiting(name, colours, "waits for its turn") for name in panel.names]
        yield ("", *state(), *waiting, *("" for _ in panel.names))
        for place, entrant in enumerate(panel.entrants):
            try:
                for told in panel.ask(entrant, example, asking):
                    update = list(same)
                    update[3 + place] = _thought(entrant, told, colours)
                    if isinstance(told, Reply):
                        replies[entrant.name] = told
                        update[1:3] = state()
                        update[3 + len(panel.names) + place] = in_pixels(told.told)
                    yield tuple(update)
            except PolygroundError as error:
                update = list(same)
                update[0] = message(f"{spoken(entrant.name)}: {error}")
                update[3 + place] = _waiting(entrant.name, colours, "could not be asked")
                yield tuple(update)

    if choices:
        chosen.change(take, chosen, [files, question, known], api_visibility="private")
    outputs = [note, sheet, asked, *texts, *values]
    files.change(look, [files, known, asked], outputs, api_visibility="private", show_progress="hidden")
    inputs = [files, question, known, shown, instruction, max_tokens, temperature, seed]
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 1}
    events = [go.click(ask, inputs, outputs, **options), question.submit(ask, inputs, outputs, **options)]
    stop.click(None, cancels=events, api_visibility="private")
    shown.change(
        lambda now, names: _sheet(now, names, colours), [asked, shown], sheet, api_visibility="private", show_progress="hidden"
    )


def _sheet(asked: Asked, names: Sequence[str], colours: Mapping[str, str]) -> Any:
    """The images with the boxes that are wanted."""
    if asked.example is None:
        return gr.skip()
    boxes = drawn(asked.example, asked.replies, truth=asked.has_truth)
    return pictures(asked.example.images, [box for box in boxes if box[0] in (*names, "asked")], colours)


def _waiting(name: str, colours: Mapping[str, str], status: str = "not asked yet") -> str:
    return thought(name, colours[name], reasoning="", reply="", status=status)


def _thought(entrant: Entrant, told: str | Reply, colours: Mapping[str, str]) -> str:
    from polyground.training.watch import thought_of

    text = told if isinstance(told, str) else told.text
    reasoning = thought_of(text)
    reply = text.rpartition("</think>")[2].strip() if "</think>" in text or "<think>" not in text else ""
    if isinstance(told, Reply):
        speed = f"{told.verdict} · {told.tokens} tokens in {told.seconds:.1f} s"
        tone = "bad" if told.verdict.startswith("unreadable") else "good"
        return thought(entrant.name, colours[entrant.name], reasoning=reasoning, reply=reply, status=speed, tone=tone)
    status = "thinks …" if text else "opens the images …"
    return thought(entrant.name, colours[entrant.name], reasoning=reasoning, reply=reply, status=status)


def in_pixels(told: Mapping[str, Any]) -> str:
    """The answer as JSON, without the texts that stand above it; a box is one line.

    >>> print(in_pixels({"image": 1, "box": [0.5, 1.0, 2.0, 3.0], "reasoning": None, "raw": "", "boxes": []}))
    {
      "image": 1,
      "box": [0.5, 1.0, 2.0, 3.0],
      "boxes": []
    }
    """
    text = json.dumps({name: value for name, value in told.items() if name not in ("reasoning", "raw")}, indent=2)
    return re.sub(r"\[\s*([-\d.,\s]+?)\s*\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)


# ---- browsing


def _browse_tab(page: gr.Blocks, library: Library, scratch: Path) -> None:
    marks = gr.State({})
    ids = gr.State([])
    with gr.Row():
        view = gr.Dropdown(
            label="What to look through", choices=library.names, value=library.names[0], elem_id="pg-view", scale=2
        )
        tasks = gr.Dropdown(label="Task", choices=[], value=[], multiselect=True, elem_id="pg-tasks", scale=2)
        counts = gr.Dropdown(label="Images", choices=[], value=[], multiselect=True, elem_id="pg-counts", scale=1)
        outcomes = gr.Dropdown(
            label="Outcome (of several models: all must fit)",
            choices=[],
            value=[],
            multiselect=True,
            elem_id="pg-outcomes",
            scale=3,
        )
    with gr.Row():
        text = gr.Textbox(label="Key holds", lines=1, elem_id="pg-key", scale=2)
        low = gr.Number(label="Pass rate from", value=0, minimum=0, maximum=1, step=0.05, scale=1)
        high = gr.Number(label="to", value=1, minimum=0, maximum=1, step=0.05, scale=1, elem_id="pg-rate-high")
        least = gr.Textbox(label="Reward from", placeholder="any", lines=1, scale=1, elem_id="pg-reward-low")
        most = gr.Textbox(label="to", placeholder="any", lines=1, scale=1, elem_id="pg-reward-high")
        only = gr.Checkbox(label="Marked rows only", value=False, elem_id="pg-only", scale=1)
    with gr.Row(elem_classes="pg-paging"):
        back = gr.Button("◀ Previous page", elem_id="pg-back")
        number = gr.Number(label="Page", value=1, minimum=1, precision=0, elem_id="pg-page")
        on = gr.Button("Next page ▶", elem_id="pg-next")
        every = gr.Button("Mark all that match", elem_id="pg-mark-all")
        none = gr.Button("Unmark all", elem_id="pg-unmark")
        export = gr.Button("Export marked rows", variant="primary", elem_id="pg-export")
    status = gr.HTML(elem_id="pg-status", padding=False)
    out = gr.File(label="Marked rows as JSON Lines", visible=False, elem_id="pg-file", interactive=False)
    boxes, cards, slots = [], [], []
    for place in range(PAGE):
        with gr.Column(visible=False, elem_classes="pg-slot") as slot:
            boxes.append(gr.Checkbox(label="Mark", elem_id=f"pg-mark-{place}", container=False))
            cards.append(gr.HTML(elem_id=f"pg-card-{place}"))
        slots.append(slot)

    filters = [view, tasks, counts, outcomes, text, low, high, least, most, only]

    def rows_of(marked: Mapping[str, Any], *values: Any) -> tuple[Shelf, list[int]]:
        name, some, images, ways, part, lo, hi, worst, best, marked_only = values
        shelf = library.shelf(name)
        wanted = Filter(
            tasks=frozenset(some or ()),
            images=frozenset(map(int, images or ())),
            outcomes=_masks(ways or ()),
            pass_rate=(0.0 if lo is None else float(lo), 1.0 if hi is None else float(hi)),
            reward=(_bound(worst, -math.inf), _bound(best, math.inf)),
            text=part or "",
        )
        rows = shelf.select(wanted)
        mine = marked.get(name, frozenset()) if marked_only else None
        return shelf, [row for row in rows if mine is None or row in mine]

    def show(marked: Mapping[str, Any], at: Any, *values: Any) -> tuple[Any, ...]:
        """The page of this number: its status, its number, its rows."""
        hidden = [gr.update(visible=False)] * PAGE
        try:
            shelf, rows = rows_of(marked, *values)
            pages = pages_of(rows, PAGE)
            at = min(max(1, int(at or 1)), pages)
            few = rows[(at - 1) * PAGE : at * PAGE]
            found = [shelf.read(row) for row in few]
        except PolygroundError as error:
            return message(str(error)), 1, [], *hidden, *([gr.skip()] * PAGE), *([gr.skip()] * PAGE)
        mine = marked.get(values[0], frozenset())
        empty = PAGE - len(few)
        return (
            message(_counted(shelf, len(rows), at, pages, len(mine)), kind="note"),
            at,
            few,
            *(gr.update(visible=place < len(few)) for place in range(PAGE)),
            *(gr.update(value=row in mine, label=f"Mark {one.key}") for row, one in zip(few, found, strict=True)),
            *([gr.skip()] * empty),
            *(card(one, threshold=shelf.threshold) for one in found),
            *([""] * empty),
        )

    def open_shelf(name: str) -> tuple[Any, ...]:
        """The filters that a shelf has something for."""
        try:
            shelf = library.shelf(name)
        except PolygroundError:
            return gr.update(choices=[], value=[]), gr.update(choices=[], value=[]), gr.update(choices=[], value=[])
        ways = [(f"{spoken(who)}: {way.spoken}", f"{who}\t{way.name}") for who in shelf.names for way in Outcome]
        return (
            gr.update(choices=shelf.tasks, value=[]),
            gr.update(choices=[str(count) for count in shelf.counts], value=[]),
            gr.update(choices=ways, value=[]),
        )

    def mark(place: int) -> Any:
        def marking(marked: Mapping[str, Any], rows: Sequence[int], name: str, ticked: bool) -> dict[str, Any]:
            mine = set(marked.get(name, ()))
            if place < len(rows):
                (mine.add if ticked else mine.discard)(rows[place])
            return {**marked, name: frozenset(mine)}

        return marking

    def mark_all(marked: Mapping[str, Any], *values: Any) -> dict[str, Any]:
        try:
            _, rows = rows_of(marked, *values)
        except PolygroundError:
            return dict(marked)
        return {**marked, values[0]: frozenset(marked.get(values[0], frozenset())) | frozenset(rows)}

    def write(marked: Mapping[str, Any], name: str) -> tuple[Any, ...]:
        mine = sorted(marked.get(name, ()))
        if not mine:
            return message("No row is marked here: tick “Mark” above the rows you want, then export."), gr.update(visible=False)
        shelf = library.shelf(name)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        path = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.jsonl"
        count = write_export((shelf.read(row) for row in mine), path)
        return message(f"{count} rows are ready below.", kind="note"), gr.update(value=str(path), visible=True)

    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    shown = [status, number, ids, *slots, *boxes, *cards]
    first = gr.State(1)
    page.load(open_shelf, view, [tasks, counts, outcomes], **options).then(show, [marks, first, *filters], shown, **options)
    view.input(open_shelf, view, [tasks, counts, outcomes], **options).then(show, [marks, first, *filters], shown, **options)
    for one in (tasks, counts, outcomes, low, high, only):
        one.input(show, [marks, first, *filters], shown, **options)
    for written in (text, least, most):
        written.submit(show, [marks, first, *filters], shown, **options)
    number.submit(show, [marks, number, *filters], shown, **options)
    back.click(lambda marked, at, *rest: show(marked, int(at or 1) - 1, *rest), [marks, number, *filters], shown, **options)
    on.click(lambda marked, at, *rest: show(marked, int(at or 1) + 1, *rest), [marks, number, *filters], shown, **options)
    for place, tick in enumerate(boxes):
        tick.input(mark(place), [marks, ids, view, tick], marks, **options)
    every.click(mark_all, [marks, *filters], marks, **options).then(show, [marks, number, *filters], shown, **options)
    none.click(lambda: {}, None, marks, **options).then(show, [marks, number, *filters], shown, **options)
    export.click(write, [marks, view], [status, out], **options)


def _bound(text: str, otherwise: float) -> float:
    """The number in a field that may be empty. Raises DataError for what is none."""
    try:
        return float(text) if text and text.strip() else otherwise
    except ValueError as error:
        raise DataError(f"Reward: {text!r} is not a number; write one such as 0.5, or leave the field empty") from error


def _masks(ways: Sequence[str]) -> dict[str, Outcome]:
    """`["sft\\tRIGHT", "rl\\tWRONG_BOX"]` by who answered."""
    masks: dict[str, Outcome] = {}
    for way in ways:
        who, _, name = way.partition("\t")
        masks[who] = masks.get(who, Outcome(0)) | Outcome[name]
    return masks


def _counted(shelf: Shelf, count: int, at: int, pages: int, marked: int) -> str:
    bad = f" · {shelf.bad} bad rows left out" if shelf.bad else ""
    return f"{count} of {len(shelf)} rows match · page {at} of {pages} · {marked} marked{bad}"
