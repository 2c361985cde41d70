"""Questions put to one or several models about image files, each answer told while it grows.

Models are opened when they are first asked and then kept. Nothing of this knows what the page looks like.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from polyground.answer import Answer, Located, Unreadable, read_answer
from polyground.config import WorldConfig
from polyground.conventions import model_folder, read_config
from polyground.errors import DataError, ModelError
from polyground.geometry import Box
from polyground.grounder import Grounding, found_boxes
from polyground.imagefile import problem_of
from polyground.prompts import student_messages
from polyground.records import Example, Score
from polyground.rewards import Scorer
from polyground.runs import ROLES, base_of, is_run, noted
from polyground.sources import read_source
from polyground.stages.report.pictures import LABELS
from polyground.worlds.build import build_world

ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """A model that is asked: what it is called on the page, and where it lies."""

    name: str
    model: str
    adapter: Path | None = None
    max_pixels_total: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How every model is asked."""

    instruction: str = ""
    """Appended to the question, as in the recipe the models were trained with."""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What one model answered."""

    text: str
    answer: Answer | Unreadable
    told: Mapping[str, Any]
    """As `polyground ground` prints it: boxes in pixels of the files."""
    score: Score
    """Against the annotation, for questions that have one."""
    tokens: int
    seconds: float

    @property
    def boxes(self) -> Sequence[Located]:
        """Empty where the reply holds no readable answer."""
        return self.answer.boxes if isinstance(self.answer, Answer) else ()

    @property
    def verdict(self) -> str:
        """What the answer says, in a few words."""
        if isinstance(self.answer, Unreadable):
            return f"unreadable: {self.answer.value.replace('_', ' ')}"
        if self.answer.choice is not None:
            return f"answers {self.answer.choice}"
        if not self.answer.boxes:
            return "says it is not there"
        named = sorted({located.image for located in self.answer.boxes if located.image is not None})
        return f"image {', '.join(map(str, named))}" if named else "names no image, so drawn on all"


def entrants(model: str, compare: Sequence[str]) -> list[Entrant]:
    """The models of `--model` and `--compare`: each a model folder, an adapter's folder, or a run for its base, SFT and RL model.

    Raises ModelError for a folder that is none of these.
    """
    found: list[Entrant] = []
    for path in (model, *compare):
        for entrant in _of_path(path):
            taken = {other.name for other in found}
            name = entrant.name if entrant.name not in taken else f"{Path(path).name} {entrant.name}"
            number = 2
            while name in taken:
                name, number = f"{entrant.name} {number}", number + 1
            found.append(
                Entrant(name=name, model=entrant.model, adapter=entrant.adapter, max_pixels_total=entrant.max_pixels_total)
            )
    return found


def _of_path(path: str) -> list[Entrant]:
    folder = Path(path)
    if is_run(folder):
        return _of_run(folder)
    if (folder / ADAPTER).is_file():
        return [_adapter(folder)]
    model_folder(path)  # raises ModelError for what is no model
    read_config(model_folder(path))
    return [Entrant(name="base" if path == "tiny" else folder.name or path, model=path)]


def _of_run(run: Path) -> list[Entrant]:
    pixels = noted(run, "model").get("max_pixels_total")
    base = base_of(run)
    places = {role: None if folder is None else run / folder for role, folder in ROLES.items()}
    found = []
    for role, place in places.items():
        path = base if place is None else str(place) if (place / "config.json").is_file() else None
        if path is not None and (path == "tiny" or Path(path).is_dir()):
            found.append(Entrant(name=role, model=path, max_pixels_total=pixels))
    if not found:
        raise ModelError(f"{run}: the run has no model yet; run `polyground sft` and `polyground merge` with its recipe first")
    return found


def _adapter(folder: Path) -> Entrant:
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / ADAPTER}: cannot be read ({error}); copy the adapter's folder again") from error
    # Beside the adapter, where the run was started from another folder.
    beside = [Path(str(base)), *(parent / Path(str(base)).name for parent in folder.absolute().parents)]
    place = next((path for path in beside if (path / "config.json").is_file()), None)
    if place is None:
        raise ModelError(f"{folder}: is an adapter of {base}, which is not there; merge it first, or start where the run was")
    return Entrant(name=f"{folder.parent.name}/{folder.name}", model=str(place), adapter=folder)


class _StoppedError(Exception):
    """Nobody waits for the rest of an answer."""


class Panel:
    """All entrants, asked one after the other."""

    def __init__(self, found: Sequence[Entrant], *, dtype: str = "float32") -> None:
        self.entrants = list(found)
        self._dtype = dtype
        self._loaded: dict[str, Any] = {}
        # One thread, so that the models are asked one after the other, whoever asks.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ask")

    @property
    def names(self) -> list[str]:
        """Of the models, in the order they are shown."""
        return [entrant.name for entrant in self.entrants]

    def ask(self, entrant: Entrant, example: Example, settings: Settings) -> Iterator[str | Reply]:
        """The text as it grows, then the reply. Raises what the model or the images are refused for."""
        arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stop = Event()

        def tell(text: str) -> None:
            if stop.is_set():
                raise _StoppedError
            arrived.put(text)

        answering = self._thread.submit(self._reply, entrant, example, settings, tell)
        answering.add_done_callback(lambda _: arrived.put(None))
        try:
            while (text := arrived.get()) is not None:
                # A page that is slower than the model is shown the latest.
                while text is not None and not arrived.empty():
                    text = arrived.get()
                if text is None:
                    break
                yield text
            yield answering.result()
        finally:
            stop.set()

    def _reply(self, entrant: Entrant, example: Example, settings: Settings, tell: Callable[[str], None]) -> Reply:
        from polyground.sampling.local import LocalSampler

        tell("")
        loaded = self._load(entrant)
        grids = loaded.family.grids(example.images)
        messages = student_messages(example, grids, instruction=settings.instruction)
        began = time.monotonic()
        completion = LocalSampler(loaded).stream(
            messages, temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed, tell=tell
        )
        seconds = time.monotonic() - began
        answer = read_answer(completion.text, grids, native=loaded.family.native)
        score = Scorer((), native=loaded.family.native).score(completion, example, grids)
        told = Grounding(
            question=example.question,
            images=example.images,
            text=completion.text,
            answer=answer,
            boxes=found_boxes(answer, example.images),
        ).to_json()
        return Reply(
            text=completion.text, answer=answer, told=told, score=score, tokens=len(completion.token_ids), seconds=seconds
        )

    def _load(self, entrant: Entrant) -> Any:
        from polyground.models import best_device, load_model

        if entrant.name not in self._loaded:
            self._loaded[entrant.name] = load_model(
                entrant.model,
                dtype=self._dtype,
                adapter=entrant.adapter,
                max_pixels_total=entrant.max_pixels_total,
                device=best_device(),
            )
        return self._loaded[entrant.name]


def question_of(images: Sequence[Path], question: str, known: Example | None) -> Example:
    """What is asked: the known example where images and question are still its own, else a new one.

    Raises DataError, naming what to do, while there is nothing to ask or an image cannot be used.
    """
    if not images:
        raise DataError("there is no image yet: drop one or several files on the left, or choose an example")
    require_images(images)
    if not question.strip():
        raise DataError("there is no question yet: write one below the images")
    if known is not None and question.strip() == known.question.strip() and _same_files(images, known.images):
        return known
    if "<box>" in question or "<image>" in question:
        raise DataError("the question holds <box> or <image>, which only examples may: say it in words, as in “image 2”")
    return Example(key="ask", task="ask", images=tuple(images), question=question.strip(), target=Answer())


def _same_files(images: Sequence[Path], others: Sequence[Path]) -> bool:
    return [path.name for path in images] == [path.name for path in others]


def require_images(images: Sequence[Path]) -> None:
    """Raises one DataError that says of every file that is no good image what is wrong with it, by its name alone."""
    problems = [(number, path, problem_of(path, decode=True)) for number, path in enumerate(images, start=1)]
    lines = [f"Image {number} ({path.name}): {problem.detail}" for number, path, problem in problems if problem is not None]
    if lines:
        raise DataError("\n".join([*lines, "Take it out with its ✕ and choose another file: JPEG, PNG, WebP, GIF, BMP or TIFF."]))


def drawn(example: Example, replies: Mapping[str, Reply], *, truth: bool) -> list[tuple[str, int | None, Box]]:
    """(name, image, box) of what the question asks about, of the annotation where it is known, and of every reply."""
    known: list[tuple[str, Sequence[Located]]] = [("asked", example.question_boxes)]
    known += [("truth", example.target.boxes)] if truth else []
    known += [(name, reply.boxes) for name, reply in replies.items()]
    only = 1 if len(example.images) == 1 else None
    return [(name, located.image or only, located.box) for name, boxes in known for located in boxes]


def world_examples(folder: Path, *, count: int = 10, seed: int = 0) -> list[Example]:
    """Questions of the simulated world, one of each kind, drawn into the folder; the test questions of a run of this seed."""
    none = {"train": 0, "rl": 0, "validation": 0, "ood": 0, "perception": 0}
    annotations = build_world(WorldConfig(**none, test=count, seed=seed), folder)
    return read_source("mig_bench", annotations["test"], name="world")


def spoken(name: str) -> str:
    """What a name is called on the page."""
    return LABELS.get(name, name)
