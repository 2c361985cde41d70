"""What is fuzzed: four functions of bytes that raise when something hostile got further than it may.

A case is text: its first line says how the rest is read, so that a case is legible and stays what it is when sources are added.
No fuzzer is needed here: `tests/test_fuzz_cases.py` replays every kept case.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from polyground.answer import (
    MAX_BOXES,
    NATIVE_READERS,
    Answer,
    Unreadable,
    answers_directly,
    follows_contract,
    read_answer,
    write_answer,
    write_completion,
)
from polyground.benchmarks import BENCHMARKS, compats_of, judge
from polyground.config import DataConfig, DataSource, Recipe, WorldConfig, dump_recipe, load_recipe
from polyground.errors import ConfigError, DataError, visible
from polyground.geometry import PER_MILLE, Box, Grid
from polyground.prompts import student_messages
from polyground.records import Completion, Example, Located, Rollout, Score
from polyground.rewards import Scorer
from polyground.sources import BadRow, scan_source
from polyground.sources.reading import require_none_bad
from polyground.stages import report
from polyground.stages.report.pictures import shown_question


@cache
def scratch(name: str) -> Path:
    """A folder of this process; `clear_scratch` removes it."""
    return Path(tempfile.mkdtemp(prefix=f"polyground-fuzz-{name}-"))


def clear_scratch() -> None:
    for name in ("sources", "config", "report"):
        if scratch(name).is_dir():
            shutil.rmtree(scratch(name))
    scratch.cache_clear()
    _report_run.cache_clear()
    _source_folder.cache_clear()


class Broken(AssertionError):  # noqa: N818 - what the fuzzer is after
    """A promise that did not hold."""


def require(held: bool, promise: str) -> None:
    if not held:
        raise Broken(promise)


def text_of(data: bytes) -> str:
    """As a model or a JSON file may bring it: lone surrogates included."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")


# ---------------------------------------------------------------- answers


def answer(data: bytes) -> None:
    """First line: `native images pixels`, e.g. `qwen_json 3 0`. Any text is an answer or a named reason, scored within bounds."""
    head, _, body = data.partition(b"\n")
    words = [*text_of(head).split(), "", "", ""]
    native = words[0] if words[0] in NATIVE_READERS else None
    images = int(words[1]) if re.fullmatch(r"[1-9]", words[1]) else 2
    grids = [Grid(640, 480) if words[2] == "1" else PER_MILLE] * images
    text = text_of(body)

    found = read_answer(text, grids, native=native)
    require(isinstance(found, Answer | Unreadable), "an answer or a reason")
    if isinstance(found, Answer):
        require(len(found.boxes) <= MAX_BOXES, "at most MAX_BOXES boxes")
        require(all(b.image is None or 1 <= b.image <= images for b in found.boxes), "a box is on an image of the prompt")
        require(all(0 <= b.confidence <= 1 for b in found.boxes), "a confidence is in [0, 1]")
        if all(located.image is not None for located in found.boxes):
            written = write_completion("so", found, grids)
            require(follows_contract(written), "what is written follows the contract")
            again = read_answer(written, grids)
            require(isinstance(again, Answer), f"what is written is read: {written} gave {again}")
            if isinstance(again, Answer):
                require(write_answer(again, grids) == write_answer(found, grids), f"and says the same: {written}")
    if follows_contract(text) or answers_directly(text):
        require(found is not Unreadable.MISSING, "what follows the contract has an answer")

    target = Answer((Located(1, Box(0.25, 0.25, 0.5, 0.75)),))
    example = Example(key="k", task="t", images=tuple(Path(f"{i}.png") for i in range(images)), question="Where?", target=target)
    letters = Example(
        key="k", task="t", images=example.images, question="Which?", target=Answer(choice="B"), choices=("x", "y", "z")
    )
    for asked in (example, letters):
        _within_bounds(_scorer(native).score(text, asked, grids), asked, text)
        for benchmark in BENCHMARKS.values():
            if benchmark.in_letters == bool(asked.choices):
                for compat in (None, *compats_of(benchmark)):
                    _within_bounds(judge(benchmark, text, asked, grids, native=native, compat=compat), asked, text)


@cache
def _scorer(native: str | None) -> Scorer:
    return Scorer(Recipe().rewards, native=native)


def _within_bounds(score: Score, example: Example, text: str) -> None:
    numbers = [score.total, score.iou, *score.parts.values(), *([] if score.image_correct is None else [score.image_correct])]
    require(all(math.isfinite(number) for number in numbers), f"scores are finite: {score}")
    require(all(-1e-9 <= number <= 1 + 1e-9 for number in numbers[1:]), f"parts are in [0, 1]: {score}")
    rollout = Rollout(example=example.key, task=example.task, completion=Completion(text=text), score=score)
    again = Rollout.from_json(json.loads(json.dumps(rollout.to_json())))
    require(again == rollout, "a rollout is read back as it was")


# ---------------------------------------------------------------- sources


def sources(data: bytes) -> None:
    """First line: `source lines|list option=value …`. Rows are examples under the root, counted, or a DataError says where."""
    head, _, body = data.partition(b"\n")
    name, layout, *words = [*text_of(head).split(), "", ""]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    folder = _source_folder()
    path = folder / ("rows.jsonl" if layout == "lines" else "rows.json")
    path.write_bytes(body)
    try:
        items = list(scan_source(name, path, **options))
    except DataError as error:
        _one_message(str(error))
        return
    for item in items:
        if isinstance(item, BadRow):
            require(bool(item.reason) and item.row >= 1, f"a bad row has a reason and a number: {item}")
            continue
        require(isinstance(item, Example), f"neither an example nor a bad row: {item!r}")
        for image in item.images:
            inside = os.path.normpath(image)
            require(inside.startswith(f"{folder}{os.sep}"), f"{image} leads out of {folder}")
        again = Example.from_json(json.loads(json.dumps(item.to_json())))
        require(again.to_json() == json.loads(json.dumps(item.to_json())), "an example is read back as it was")
        student_messages(item, [PER_MILLE] * len(item.images), instruction="")
    try:
        require_none_bad([item for item in items if isinstance(item, BadRow)], path)
    except DataError as error:
        _one_message(str(error))


PICTURES = ("1", "a", "b", "c", "images/1", "images/a", "images/b", "images/c", "images/x", "images/y")
PICTURES += tuple(f"cats/{frame:05}" for frame in range(0, 20, 5)) + tuple(f"ReasonVOS/dog/{frame}" for frame in range(4))
"""Image files that rows may name; some readers look at sizes."""


@cache
def _source_folder() -> Path:
    folder = scratch("sources")
    for name in PICTURES:
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100), "red").save(path)
    return folder


def _one_message(message: str) -> None:
    """What a terminal shows of a message moves no cursor and begins no line that the program did not."""
    shown = visible(message, keep="\n")
    require(not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown), f"control characters: {shown!r}")
    require(all(line.startswith("  ") for line in shown.split("\n")[1:]), f"a line of its own: {message!r}")


# ---------------------------------------------------------------- recipes


def config(data: bytes) -> None:
    """YAML, then overrides, each behind a NUL. A ConfigError, or a recipe that reads back equal from its own YAML."""
    body, *words = data.split(b"\0")
    path = scratch("config") / "recipe.yaml"
    path.write_bytes(body)
    try:
        recipe = load_recipe(path, [text_of(word) for word in words], section="grpo")
    except ConfigError as error:
        require(str(path) in str(error) or bool(words), f"the message names the file or an override: {error}")
        return
    again = scratch("config") / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    require(load_recipe(again) == recipe, "a recipe is read back as it was")


# ---------------------------------------------------------------- the report

SLOTS = 10
"""Texts of a case of `report`, in order: question, task, key, choice, three completions, warning, name of a reward, title."""


def page(data: bytes) -> None:
    """Texts between NULs stand wherever a model or an annotation may write: they arrive as text, and as nothing else."""
    texts = ([text_of(part) for part in data.split(b"\0")] + ["x"] * SLOTS)[:SLOTS]
    question, task, key, choice, base, sft, rl, warning, reward, title = texts
    recipe, example = _report_run()
    example = Example(
        key=key,
        task=task,
        images=example.images,
        question=question.replace("<box>", "").replace("<image>", ""),
        target=Answer(choice="A"),
        choices=(choice, "y"),
    )
    out = recipe.out
    _write_rows(out / "test.jsonl", [example.to_json()])
    for role, text in (("base", base), ("sft", sft), ("rl", rl)):
        score = Score(total=1.0, parts={reward: 1.0}, unreadable=None, answer=Answer(choice="A"))
        rollout = Rollout(example=key, task=task, completion=Completion(text=text), score=score)
        _write_rows(out / "evaluate" / role / "test.jsonl", [rollout.to_json()])
    measure = {"value": 0.5, "low": 0.1, "high": 0.9}
    row = {"accuracy": {"0.5": measure}, "mean_iou": None, "image_accuracy": None, "unreadable_rate": 0.0, "examples": 1}
    tables = {role: {"macro": row, "tasks": {task: row}} for role in ("base", "sft", "rl")}
    counts = {"examples": 1, "better": 0, "worse": 0, "p_value": 1.0, "significant": False}
    split = {"models": tables, "differences": {"rl-sft": {"tasks": {task: measure}, "macro": measure, **counts}}}
    results = {"tags": {"headline_iou": 0.5, "bootstrap": 2}, "models": list(tables), "splits": {"test": split}}
    (out / "evaluate" / "results.json").write_text(json.dumps(results))
    log = [{"step": step, "loss": 1.0, f"rewards/{reward}/mean": 0.5, f"unreadable/{task}": 0.5} for step in (1, 2)]
    _write_rows(out / "grpo" / "log.jsonl", log)
    _write_rows(out / "grpo" / "warnings.jsonl", [{"step": 1, "kind": "x", "text": warning}])
    try:
        html = report.run(recipe.model_copy(update={"name": title})).read_bytes().decode("utf-8")
    except DataError as error:
        require("test.jsonl" in str(error), f"a row that cannot be an example is named: {error}")
        return
    seen = Page(html)
    seen.require_harmless()
    for text in (shown_question(example), warning, f"{key}"):
        require(_as_kept(text) in seen.text, f"{text!r} arrives as text")


def _as_kept(text: str) -> str:
    """A file in UTF-8 has no lone surrogates, and a parser reads no NUL."""
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def _report_run() -> tuple[Recipe, Example]:
    out = scratch("report")
    for role in ("base", "sft", "rl"):
        (out / "evaluate" / role).mkdir(parents=True)
    (out / "grpo").mkdir()
    Image.new("RGB", (8, 8), "red").save(out / "a.png")
    data = DataConfig(test=[DataSource(source="polyground", path=out / "test.jsonl")])
    sizes = {"train": 0, "rl": 0, "validation": 0, "test": 0, "ood": 0, "perception": 0}
    example = Example(key="k", task="t", images=(out / "a.png",), question="", target=Answer(choice="A"), choices=("x", "y"))
    return Recipe(out=out, data=data, world=WorldConfig(**sizes)), example


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def _vocabulary() -> tuple[frozenset[str], frozenset[str], str]:
    """Tags and attributes that the template and the charts write, and the hash of the one script."""
    folder = resources.files("polyground") / "report_template"
    ours = (folder / "report.html.j2").read_text(encoding="utf-8") + (resources.files("polyground") / "charts.py").read_text(
        encoding="utf-8"
    )
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tags = frozenset(re.findall(r"<([a-zA-Z][a-zA-Z0-9]*)", ours))
    attributes = frozenset(re.findall(r"[\s'\"]([a-zA-Z][a-zA-Z0-9-]*)=\"", ours)) | {"hidden", "open"}
    return frozenset(map(str.lower, tags)), frozenset(map(str.lower, attributes)), digest


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(html)
        self.close()
        self.text = "\x01".join(["".join(self.pieces), *self._values()])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "script":
            self.scripts.append("")
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] += data
        self.pieces.append(data)

    def handle_comment(self, data: str) -> None:
        raise Broken(f"a comment: {data!r}")

    def handle_pi(self, data: str) -> None:
        raise Broken(f"a processing instruction: {data!r}")

    def _values(self) -> Iterator[str]:
        for _, attributes in self.tags:
            yield from attributes.values()

    def require_harmless(self) -> None:
        tags, known, digest = _vocabulary()
        for tag, attributes in self.tags:
            require(tag in tags, f"a tag of its own: <{tag}>")
            for name, value in attributes.items():
                require(name in known and not name.startswith("on"), f"an attribute of its own: <{tag} {name}={value!r}>")
                if name in ("href", "src"):
                    require(value.startswith(("#", "data:image/png;base64,")), f"an address of its own: {value!r}")
                if name == "style":
                    require(re.fullmatch(r"[a-z0-9:;%.\- ]*", value) is not None, f"a style of its own: {value!r}")
        require([tag for tag, _ in self.tags].count("style") == 1, "one style sheet")
        for script in self.scripts:
            found = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            require(found == digest, f"a script of its own: {script[:80]!r}")


TARGETS: dict[str, Callable[[bytes], None]] = {"answer": answer, "sources": sources, "config": config, "report": page}
"""By name, as `fuzz.py --target` takes them and as the folders of `cases` are called."""
