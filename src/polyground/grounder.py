"""Ask a model about images and see the boxes: what notebooks, `polyground ground` and the demo are made of.

A merged model of a run is asked as it was trained, with its instruction and its pixel budget. Nothing is scored here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from polyground.answer import Answer, Located, Unreadable, read_answer, reasoning_of
from polyground.conventions import TINY, model_folder
from polyground.errors import DataError, ModelError, StorageError
from polyground.geometry import Box
from polyground.prompts import student_messages
from polyground.records import Example
from polyground.runs import ROLES, base_of, is_run, noted
from polyground.storage import MANIFEST, require_whole
from polyground.vision import check_images, contact_sheet, draw_boxes, image_size, load_image

if TYPE_CHECKING:
    from polyground.models import Loaded

COLOURS = ("#e4572e", "#17789b", "#6a994e", "#8e4fa8", "#b8860b", "#d6336c")
"""Of the first box, the second, and so on round again."""

_SIDE = 448

Picture = Path | str | Image.Image
"""An image file, or a picture in memory."""


@dataclass(frozen=True, slots=True)
class Found:
    """One box of an answer."""

    image: int | None
    """1-based position among the images asked about; None where the answer did not say."""
    box: Box
    """In fractions of its image."""
    pixels: tuple[float, float, float, float] | None
    """(x0, y0, x1, y1) of the image *file*; None where the image is not named among images of different sizes."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Grounding:
    """What a model said to one question. In a notebook it shows itself as the images with the boxes drawn."""

    question: str
    images: tuple[Path, ...]
    text: str
    """The whole completion."""
    answer: Answer | Unreadable
    boxes: tuple[Found, ...] = ()
    """Empty for "not there", a multiple choice, or an answer that could not be read."""
    _kept: TemporaryDirectory[str] | None = field(default=None, compare=False)
    """Holds pictures that came from memory, as long as somebody may want to see them."""

    @property
    def reasoning(self) -> str | None:
        """What stands between the think tags; None where the completion does not keep to that form."""
        return reasoning_of(self.text)

    @property
    def choice(self) -> str | None:
        """The letter of a multiple choice."""
        return self.answer.choice if isinstance(self.answer, Answer) else None

    @property
    def unreadable(self) -> str | None:
        """Why the completion holds no answer, in a word of `answer.Unreadable`; None where it holds one."""
        return self.answer.value if isinstance(self.answer, Unreadable) else None

    def show(self, *, columns: int = 4, side: int = _SIDE) -> Image.Image:
        """The images in rows, each box on its image; a box that names no image is drawn on all of them."""
        drawn = []
        for number, path in enumerate(self.images, start=1):
            mine = [
                (found.box, str(place + 1) if len(self.boxes) > 1 else "", COLOURS[place % len(COLOURS)])
                for place, found in enumerate(self.boxes)
                if found.image in (number, None)
            ]
            drawn.append(draw_boxes(load_image(path), mine, min_side=side))
        captions = [f"Image {number}: {path.name}" for number, path in enumerate(self.images, start=1)]
        return contact_sheet(drawn, captions, columns=min(columns, len(drawn)), side=side)

    def save(self, out: Path | str) -> None:
        """Write what `show` gives to an image file. Raises DataError where that cannot be."""
        out = Path(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.show().save(out)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{out}: the drawing cannot be written ({error}); name a .png file in a folder you may write to"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the first box as `image` and `box` (pixels of the file), all of them as `boxes`."""
        reply: dict[str, Any] = {"image": None, "box": None, "reasoning": self.reasoning, "raw": self.text}
        if self.unreadable is not None:
            return {**reply, "unreadable": self.unreadable}
        if self.choice is not None:
            return {**reply, "choice": self.choice}
        boxes = [
            {"image": found.image, "box": None if found.pixels is None else [round(side, 1) for side in found.pixels]}
            for found in self.boxes
        ]
        return {**reply, **(boxes[0] if boxes else {}), "boxes": boxes}

    def __str__(self) -> str:
        """The answer in words, the reasoning first."""
        lines = [self.reasoning] if self.reasoning else []
        if self.unreadable is not None:
            lines.append(f"no readable answer ({self.unreadable}): {self.text!r}")
        elif self.choice is not None:
            lines.append(f"choice {self.choice}")
        elif not self.boxes:
            lines.append("not there")
        for found in self.boxes:
            where = "an image not named" if found.image is None else f"image {found.image}"
            at = "" if found.pixels is None else f": {', '.join(f'{side:.0f}' for side in found.pixels)}"
            lines.append(f"{where}{at}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{self.question!r}: {'; '.join(str(self).splitlines())}>"

    def _repr_png_(self) -> bytes:
        # What Jupyter looks for on a value it displays.
        buffer = io.BytesIO()
        self.show().save(buffer, format="PNG")
        return buffer.getvalue()


class Grounder:
    """A model that has been opened, and how it is asked. `polyground.load` makes one."""

    def __init__(self, loaded: Loaded, *, instruction: str = "") -> None:
        from polyground.sampling.local import LocalSampler

        self.loaded = loaded
        self.instruction = instruction
        """Follows every question."""
        self._sampler = LocalSampler(loaded)

    def __repr__(self) -> str:
        kind = self.loaded.config["model_type"]
        path = "tiny" if self.loaded.path == TINY else str(self.loaded.path)
        return f"Grounder({path!r}, {kind}, instruction={self.instruction!r}, on {self.loaded.device})"

    def ground(
        self,
        images: Picture | Sequence[Picture],
        question: str,
        *,
        choices: Sequence[str] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Grounding:
        """Ask once about one image or several, in the order the question counts them.

        `choices` makes it a multiple choice, answered by a letter. At temperature 0 the same question has the same answer. Raises
        DataError for an image that cannot be used, or a question that does not go with the images.
        """
        given = [images] if isinstance(images, Path | str | Image.Image) else list(images)
        if not given:
            raise DataError("there is no image to ask about; give at least one image file")
        if not question.strip():
            raise DataError("the question is empty; say what to find")
        kept, paths = _as_files(given)
        check_images(paths)
        grids = self.loaded.family.grids(paths)
        example = Example(key="ask", task="ask", images=tuple(paths), question=question, target=Answer(), choices=tuple(choices))
        messages = student_messages(example, grids, instruction=self.instruction)
        [[completion]] = self._sampler.sample([messages], n=1, temperature=temperature, max_tokens=max_tokens, seed=seed)
        answer = read_answer(completion.text, grids, native=self.loaded.family.native)
        return Grounding(
            question=question,
            images=tuple(paths),
            text=completion.text,
            answer=answer,
            boxes=found_boxes(answer, paths),
            _kept=kept,
        )


def open_grounder(
    path: Path | str,
    *,
    role: str | None = None,
    instruction: str | None = None,
    max_pixels_total: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Grounder:
    """As `polyground.load`, which explains the arguments."""
    if not model_folder(path).is_dir():
        what = "is a file" if Path(path).exists() else "there is no such folder"
        raise ModelError(f"{path}: {what}; give the folder of a run (`out` of its recipe) or of a model, or `tiny`")
    folder, told = resolve(path, role)
    with warnings.catch_warnings():
        # In a notebook without ipywidgets, progress bars warn that they are plain.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers.utils import logging as bars

        from polyground.models import best_device, load_model
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        loaded = load_model(
            folder,
            dtype=dtype,
            max_pixels_total=told.max_pixels_total if max_pixels_total is None else max_pixels_total,
            device=device or best_device(),
        )
    finally:
        if shown:
            bars.enable_progress_bar()
    return Grounder(loaded, instruction=told.instruction if instruction is None else instruction)


@dataclass(frozen=True, slots=True)
class Told:
    """How a model was asked while it was trained."""

    instruction: str = ""
    max_pixels_total: int | None = None


def resolve(path: Path | str, role: str | None = None) -> tuple[Path | str, Told]:
    """The model folder meant by a path, and how it is asked. No torch; raises ModelError, StorageError, or DataError.

    A path is `tiny`, a model folder, or a run's folder, in which `role` chooses between base, SFT and RL.
    """
    if role is not None and role not in ROLES:
        raise ModelError(f"role {role!r} is unknown; a run has {', '.join(ROLES)}")
    folder = model_folder(path)
    if str(path) == "tiny" or not is_run(folder):
        if role is not None:
            raise ModelError(f"{path}: is no folder of a run, so that it has no role {role!r}; leave `role` out")
        merged = folder.name in ROLES.values() and (folder / MANIFEST).is_file()
        return path, _told(folder.parent) if merged else Told()
    if role == "base":
        if (base := base_of(folder)) is None:
            raise StorageError(f"{folder}: no stage says yet which base it starts from; name the base's own folder")
        return base, Told(max_pixels_total=_budget(folder))
    there = [name for name in reversed(ROLES.values()) if name is not None and (folder / name / MANIFEST).is_file()]
    wanted = ROLES[role] if role is not None else there[0] if there else None
    if wanted is None or wanted not in there:
        which = f"no {role} model" if role else "no merged model"
        raise StorageError(f"{folder}: has {which} yet; run `polyground merge` with its recipe, or choose role='base'")
    require_whole(folder / wanted)
    return folder / wanted, _told(folder)


def _told(run: Path) -> Told:
    return Told(str(noted(run, "prompts").get("instruction", "")), _budget(run))


def _budget(run: Path) -> int | None:
    budget = noted(run, "model").get("max_pixels_total")
    return None if budget is None else int(budget)


def _as_files(pictures: Sequence[Picture]) -> tuple[TemporaryDirectory[str] | None, list[Path]]:
    """Paths of the pictures; those in memory are written without loss into a folder that lasts as long as the first value."""
    if not any(isinstance(picture, Image.Image) for picture in pictures):
        return None, [Path(picture) for picture in pictures if not isinstance(picture, Image.Image)]
    kept, paths = TemporaryDirectory(prefix="polyground-"), []
    for number, picture in enumerate(pictures, start=1):
        if isinstance(picture, Image.Image):
            path = Path(kept.name) / f"picture {number}.png"
            picture.convert("RGB").save(path)
            paths.append(path)
        else:
            paths.append(Path(picture))
    return kept, paths


def found_boxes(answer: Answer | Unreadable, images: Sequence[Path]) -> tuple[Found, ...]:
    """The boxes of an answer, also in pixels of the image files."""
    if isinstance(answer, Unreadable):
        return ()
    return tuple(Found(located.image, located.box, _pixels(located, images)) for located in answer.boxes)


def _pixels(located: Located, images: Sequence[Path]) -> tuple[float, float, float, float] | None:
    """None for a box whose image is not named among images of different sizes: its pixels would be a guess."""
    if located.image is None and len({image_size(path) for path in images}) > 1:
        return None
    width, height = image_size(images[(located.image or 1) - 1])
    return located.box.to_pixels(width=width, height=height)
