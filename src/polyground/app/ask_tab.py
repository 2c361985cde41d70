"""The tab of the page that asks models about images, in gradio: files, question and settings on the left, answers beside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from polyground.app.asking import Entrant, Panel, Reply, Settings, drawn, question_of, require_images, spoken
from polyground.app.library import THRESHOLD
from polyground.app.pictures import message, paint, pictures, thought
from polyground.errors import PolygroundError
from polyground.outcomes import Outcome, outcome_of
from polyground.records import Example

TRUTH = "truth"

HINT = "Drop one or several images on the left and write a question about them, or take an example; then press Ask."

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: no name for other programs, no veil over what changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is on the page of the last question: kept per visitor."""

    example: Example | None = None
    paths: Sequence[str] = ()
    """Of the files as they were when it was asked."""
    has_truth: bool = False
    replies: Mapping[str, Reply] = field(default_factory=dict)


class AskTab:
    """Draws the tab where it is made, and answers its events."""

    def __init__(self, panel: Panel, examples: Sequence[Example], settings: Settings) -> None:
        self._panel = panel
        self._colours = paint([TRUTH, "asked", *panel.names])
        self._examples = {example.key: example for example in examples}
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = self._draw_question(settings)
            with gr.Column(scale=5, min_width=420):
                self._draw_answers()
        self._answer_events(inputs)

    # What there is to see ------------------------------------------------------------------------------------------------

    def _draw_question(self, settings: Settings) -> list[Any]:
        """The left side; gives the fields of the settings."""
        self._files = gr.File(
            label="Images, in order",
            file_count="multiple",
            type="filepath",
            allow_reordering=True,
            elem_id="pg-images",
            height=190,
        )
        self._question = gr.Textbox(
            label="Question", placeholder="Find the object that is in all images.", lines=1, max_lines=5, elem_id="pg-question"
        )
        with gr.Row():
            self._go = gr.Button("Ask", variant="primary", elem_id="pg-ask")
            self._stop = gr.Button("Stop", elem_id="pg-stop")
        choices = [(f"{one.task.replace('_', ' ')}: {one.question[:70]}", key) for key, one in self._examples.items()]
        self._chosen = gr.Dropdown(
            label="Or take an example", choices=choices, value=None, elem_id="pg-example", visible=bool(choices)
        )
        with gr.Accordion("Settings", open=False):
            instruction = gr.Textbox(label="Instruction, appended to the question", value=settings.instruction, lines=1)
            most = gr.Slider(8, 2048, value=settings.max_tokens, step=8, label="Tokens per answer, at most")
            heat = gr.Slider(0.0, 2.0, value=settings.temperature, step=0.05, label="Temperature (0: the likeliest)")
            seed = gr.Number(value=settings.seed, precision=0, minimum=0, label="Seed")
        return [instruction, most, heat, seed]

    def _draw_answers(self) -> None:
        names = self._panel.names
        self._note = gr.HTML(message(HINT, kind="note"), elem_id="pg-note", padding=False)
        self._shown = gr.CheckboxGroup(
            label="Boxes shown",
            choices=[(spoken(name), name) for name in (TRUTH, *names)],
            value=[TRUTH, *names],
            elem_id="pg-shown",
        )
        self._sheet = gr.HTML(elem_id="pg-sheet", padding=False)
        self._texts: list[gr.HTML] = []
        self._values: list[gr.Code] = []
        with gr.Row():
            for place, name in enumerate(names):
                with gr.Column(min_width=240):
                    self._texts.append(gr.HTML(self._waiting(name), elem_id=f"pg-text-{place}", padding=False))
                    self._values.append(
                        gr.Code(
                            language="json",
                            label=f"{spoken(name)}: answer in pixels",
                            interactive=False,
                            elem_id=f"pg-json-{place}",
                            elem_classes="pg-json",
                            lines=4,
                            max_lines=14,
                            show_line_numbers=False,
                            wrap_lines=True,
                        )
                    )

    # What happens --------------------------------------------------------------------------------------------------------

    def _answer_events(self, settings: Sequence[Any]) -> None:
        asked, known = gr.State(Asked()), gr.State(None)
        outputs = [self._note, self._sheet, asked, *self._texts, *self._values]
        inputs = [self._files, self._question, known, self._shown, *settings]
        self._chosen.change(self._take, self._chosen, [self._files, self._question, known], api_visibility="private")
        self._files.change(self._look, [self._files, known, asked], outputs, **QUIET)
        events = [
            self._go.click(self._ask, inputs, outputs, concurrency_limit=1, **QUIET),
            self._question.submit(self._ask, inputs, outputs, concurrency_limit=1, **QUIET),
        ]
        self._stop.click(None, cancels=events, api_visibility="private")
        self._shown.change(self._drawn, [asked, self._shown], self._sheet, **QUIET)

    def _take(self, key: str | None) -> tuple[Any, ...]:
        example = self._examples.get(key or "")
        if example is None:
            return gr.skip(), gr.skip(), None
        return [str(path) for path in example.images], example.question, example.key

    def _look(self, paths: Sequence[str] | None, key: str | None, now: Asked) -> tuple[Any, ...]:
        """Show the images as they are, before anything is asked."""
        if now.paths and tuple(paths or ()) == tuple(now.paths):
            # Word of the change came after the question: its answers stay.
            return self._same()
        images = [Path(path) for path in paths or ()]
        blank = (*map(self._waiting, self._panel.names), *("" for _ in self._panel.names))
        try:
            require_images(images)
        except PolygroundError as error:
            return message(str(error)), "", Asked(), *blank
        if not images:
            return message(HINT, kind="note"), "", Asked(), *blank
        example = self._examples.get(key or "")
        boxes = []
        if example is not None and [path.name for path in images] == [path.name for path in example.images]:
            boxes = drawn(example, {}, truth=False)
        return "", pictures(images, boxes, self._colours), Asked(), *blank

    def _ask(
        self,
        paths: Sequence[str] | None,
        text: str,
        key: str | None,
        names: Sequence[str],
        said: str,
        most: float,
        heat: float,
        number: float,
    ) -> Iterator[tuple[Any, ...]]:
        try:
            example = question_of([Path(path) for path in paths or ()], text, self._examples.get(key or ""))
        except PolygroundError as error:
            yield (message(str(error)), *self._same()[1:])
            return
        asking = Settings(instruction=said, max_tokens=int(most), temperature=float(heat), seed=int(number or 0))
        now = Asked(example=example, paths=tuple(paths or ()), has_truth=example.key in self._examples)
        waiting = [self._waiting(name, "waits for its turn") for name in self._panel.names]
        yield ("", self._drawn(now, names), now, *waiting, *("" for _ in self._panel.names))
        for place, entrant in enumerate(self._panel.entrants):
            update = list(self._same())
            try:
                for told in self._panel.ask(entrant, example, asking):
                    update[3 + place] = self._thought(entrant, told, has_truth=now.has_truth)
                    if isinstance(told, Reply):
                        replies = {**now.replies, entrant.name: told}
                        now = Asked(example=example, paths=now.paths, has_truth=now.has_truth, replies=replies)
                        update[1:3] = self._drawn(now, names), now
                        update[3 + len(self._panel.names) + place] = in_pixels(told.told)
                    yield tuple(update)
            except PolygroundError as error:
                update[0] = message(f"{spoken(entrant.name)}: {error}")
                update[3 + place] = self._waiting(entrant.name, "could not be asked")
                yield tuple(update)

    def _same(self) -> tuple[Any, ...]:
        """Everything stays as it is: note, pictures, what was asked, texts and values."""
        return (gr.skip(),) * (3 + 2 * len(self._panel.names))

    def _drawn(self, asked: Asked, names: Sequence[str]) -> Any:
        """The images with the boxes that are wanted."""
        if asked.example is None:
            return gr.skip()
        boxes = drawn(asked.example, asked.replies, truth=asked.has_truth)
        return pictures(asked.example.images, [box for box in boxes if box[0] in (*names, "asked")], self._colours)

    def _waiting(self, name: str, status: str = "not asked yet") -> str:
        return thought(name, self._colours[name], reasoning="", reply="", status=status)

    def _thought(self, entrant: Entrant, told: str | Reply, *, has_truth: bool) -> str:
        from polyground.training.watch import thought_of

        text = told if isinstance(told, str) else told.text
        reply = text.rpartition("</think>")[2].strip() if "</think>" in text or "<think>" not in text else ""
        status, tone = "thinks …" if text else "opens the images …", ""
        if isinstance(told, Reply):
            status, tone = status_of(told, has_truth=has_truth)
        colour = self._colours[entrant.name]
        return thought(entrant.name, colour, reasoning=thought_of(text), reply=reply, status=status, tone=tone)


def status_of(reply: Reply, *, has_truth: bool) -> tuple[str, str]:
    """What stands beside a model's name, and its tone: good or bad is told only where the truth is known."""
    said, tone = reply.verdict, "bad" if reply.verdict.startswith("unreadable") else ""
    if has_truth and not tone:
        outcome = outcome_of(reply.score, threshold=THRESHOLD)
        tone = "good" if outcome == Outcome.RIGHT else "bad"
        overlap = f" (IoU {reply.score.iou:.2f})" if reply.boxes else ""
        said = f"{outcome.spoken}{overlap}: {said}"
    return f"{said} · {reply.tokens} tokens in {reply.seconds:.1f} s", tone


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
