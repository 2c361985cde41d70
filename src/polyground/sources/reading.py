"""What every reader shares: rows streamed from files, image names made safe paths, bad rows with their reasons.

Nothing here holds a whole file in memory, and nothing here knows a format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from polyground.errors import DataError, visible
from polyground.extras import install_command
from polyground.geometry import Box
from polyground.imagefile import ImageError, problem_of
from polyground.records import Example

OnBad = Literal["raise", "quarantine"]

NAMED = 10
"""How many bad rows or missing files an error message names."""

HUB = "hub:"
"""A path `hub:owner/name` names a data set of the Hugging Face hub (`sources.hub`)."""

_SCREENED, _DECODERS = 256, 8
"""Rows whose images are checked together, and how many images at a time."""

_row: ContextVar[int] = ContextVar("row", default=0)
"""The row that `scan_rows` is at, for whoever finds its example bad only afterwards."""

_CHUNK = 1 << 20
_MAX_ROW = 1 << 26
"""Characters of one row of a JSON list; what is longer is a file with a broken row, not a row."""
_SPACE = re.compile(r"[ \t\n\r]*")
_HUGE = 1e12
"""No coordinate is as large; Python cannot divide whole numbers that no float holds."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be an example."""

    row: int
    """1-based position in the file."""
    key: str
    reason: str
    """A short word that can be counted: inverted, out_of_range, duplicate, …"""
    detail: str


Item = Example | BadRow
"""What a reader yields, in file order."""


class RowError(ValueError):
    """A row, or one turn of it, is bad; carries the countable reason beside the message."""

    def __init__(self, reason: str, detail: str, key: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.key = key
        """Key of the turn that is bad, where it is not the whole row."""


# ---------------------------------------------------------------- rows to examples


def scan_rows(
    path: Path,
    read_row: Callable[[Any, str], Example | Iterable[Example | RowError]],
    *,
    name: str,
    task_field: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    rows: Iterable[tuple[int, Any]] | None = None,
) -> Iterator[Item]:
    """Every row of a file as an example (or several), or as a BadRow when `read_row` raises RowError, or gives one among others.

    `read_row` is given the row and its key: `name/task/position in its task`, or `name/position` without a task field. A
    question that an earlier row asked of the same images is a BadRow of reason `duplicate` unless duplicates are kept.
    `rows` replaces the rows of the file, for formats that join several tables.
    """
    positions: Counter[str] = Counter()
    seen: set[int] = set()
    for number, row in stream_rows(path) if rows is None else rows:
        task = str(row.get(task_field)) if task_field and isinstance(row, dict) else "?" if task_field else None
        key = f"{name}/{positions['']}" if task is None else f"{name}/{task}/{positions[task]}"
        positions["" if task is None else task] += 1
        _row.set(number)
        try:
            found = read_row(row, key)
            examples = [found] if isinstance(found, Example) else list(found)
        except RowError as error:
            yield BadRow(number, key, error.reason, str(error))
            continue
        for example in examples:
            if isinstance(example, RowError):
                yield BadRow(number, example.key or key, example.reason, str(example))
                continue
            identity = _identity(example)
            if identity in seen and duplicates == "report":
                yield BadRow(number, example.key, "duplicate", "an earlier row asks the same question about the same images")
                continue
            seen.add(identity)
            yield example


def _identity(example: Example) -> int:
    """A small number in place of what makes two examples the same question."""
    parts = (example.task, [str(image) for image in example.images], example.question, example.question_boxes, example.choices)
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def collect(items: Iterable[Item]) -> tuple[list[Example], list[BadRow]]:
    """The examples and the bad rows of a reader, each in file order."""
    examples: list[Example] = []
    bad: list[BadRow] = []
    for item in items:
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            examples.append(item)
    return examples, bad


def reasons_of(bad: Iterable[BadRow]) -> dict[str, int]:
    """How many rows are bad, by reason."""
    return dict(Counter(row.reason for row in bad))


def require_none_bad(bad: Sequence[BadRow], path: Path, *, remedy: str = "repair them or read with on_bad: quarantine") -> None:
    """Raises one DataError that counts the reasons and names the first ten bad rows."""
    if not bad:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons_of(bad).items())
    rows = "".join(f"\n  row {row.row} ({visible(row.key)}): {visible(row.detail)}" for row in bad[:NAMED])
    raise DataError(f"{path}: {len(bad)} bad rows ({counts}); {remedy}{rows}")


def screen_images(items: Iterable[Item], *, decode: bool) -> Iterator[Item]:
    """The same items, with a BadRow for every example that has an image file which cannot be used.

    Files are looked up, or with `decode` opened and decoded to their end, each once, several at a time. Reasons are those of
    `imagefile.ImageError`.
    """
    checked: dict[Path, ImageError | None] = {}

    numbered = ((_row.get() if isinstance(item, Example) else item.row, item) for item in items)
    with ThreadPoolExecutor(max_workers=_DECODERS if decode else 1) as pool:
        while few := list(islice(numbered, _SCREENED)):
            images = dict.fromkeys(image for _, item in few if isinstance(item, Example) for image in item.images)
            new = [image for image in images if image not in checked]
            checked.update(zip(new, pool.map(partial(problem_of, decode=decode), new), strict=True))
            for number, item in few:
                errors = [] if isinstance(item, BadRow) else [e for image in item.images if (e := checked[image]) is not None]
                if isinstance(item, Example) and errors:
                    yield BadRow(number, item.key, errors[0].reason, "; ".join(map(str, errors[:NAMED])))
                else:
                    yield item


def current_row() -> int:
    """1-based position of the row that `scan_rows` gave last; 0 before the first."""
    return _row.get()


# ---------------------------------------------------------------- files to rows


def stream_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(1-based number, row) of a JSON list, JSON lines, a parquet file, a folder of such shards, or a hub data set.

    JSON is told apart by its first character. Raises DataError naming file and row for what cannot be read or ends too soon;
    the rows before it have been yielded by then.
    """
    if str(path).startswith(HUB):
        from polyground.sources.hub import hub_rows

        yield from enumerate(hub_rows(str(path)), start=1)
    elif path.is_dir():
        yield from enumerate((row for shard in _shards(path) for _, row in stream_rows(shard)), start=1)
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    else:
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from _json_rows(file, path)
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from error


def load_json(path: Path) -> Any:
    """A whole JSON file, for formats whose tables refer to one another; raises DataError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); download or build it again") from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: cannot be read: there is no such file; check the path, which starts from {Path.cwd()}")
    why = error.strerror if isinstance(error, OSError) else error
    return DataError(f"{path}: cannot be read ({why}); is it the annotation file?")


def _shards(folder: Path) -> list[Path]:
    for suffix in ("parquet", "jsonl", "json"):
        if shards := sorted(folder.glob(f"*.{suffix}")):
            return shards
    raise DataError(f"{folder}: holds no .parquet, .jsonl or .json file; name the annotation file")


def _json_rows(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    first = file.read(_CHUNK).lstrip()
    if first.startswith("["):
        yield from _list_rows(first[1:], file, path)
        return
    if first.startswith("{") and _is_one_object(first, file):
        raise DataError(f"{path}: holds one JSON object, not a list of rows; is it the right file for this format?")
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error}); download or build it again") from error


def _is_one_object(first: str, file: IO[str]) -> bool:
    """Whether the text is one object over several lines: then its first line is no whole object."""
    line, newline, _ = first.partition("\n")
    if not newline:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.strip() == "{"
    return False


def _list_rows(buffer: str, file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, one in memory at a time; `buffer` is what follows the opening bracket."""
    decoder, number, at, size = json.JSONDecoder(), 0, 0, _CHUNK
    while True:
        at = _after_space(buffer, at)
        if number == 0 and buffer.startswith("]", at):
            return
        try:
            row, end = decoder.raw_decode(buffer, at)
            end = _after_space(buffer, end)
        except RecursionError as error:
            raise DataError(f"{path}: row {number + 1} is nested too deeply; download or build it again") from error
        except ValueError as error:
            problem = error
        else:
            if end < len(buffer) and buffer[end] in ",]":
                number += 1
                yield number, row
                if buffer[end] == "]":
                    return
                at, size = end + 1, _CHUNK
                continue
            problem = ValueError("neither a comma nor the end of the list behind it")
            # A number may go on behind what looks like its end: 5 | e-3.
            if end < len(buffer) and not isinstance(row, int | float):
                raise _broken_row(path, number + 1, problem)
        # Perhaps only the rest of the row is missing. Doubling keeps the cost of trying again linear in its length.
        more = "" if len(buffer) - at > _MAX_ROW else file.read(size)
        if not more:
            raise _broken_row(path, number + 1, problem)
        buffer, at, size = buffer[at:] + more, 0, min(2 * size, _MAX_ROW)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _broken_row(path: Path, number: int, problem: ValueError) -> DataError:
    error = DataError(f"{path}: row {number} is not valid JSON ({problem}); download or build it again")
    error.__cause__ = problem
    return error


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; {install_command('train')}") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); download it again") from error


# ---------------------------------------------------------------- fields and images


def field_of(row: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of the wanted kind, or a RowError that names it."""
    if not isinstance(row, dict):
        raise RowError("malformed", f"a row must be an object; got {type(row).__name__}")
    value = row.get(name)
    if not isinstance(value, kind):
        raise RowError("malformed", f"field {name!r} is missing or of the wrong kind: {shortened(value)}")
    return value


def shortened(value: object, limit: int = 80) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def unit_box(numbers: Any, *, width: float, height: float, what: str) -> Box:
    """The box of four numbers (x0, y0, x1, y1) on a grid of this size.

    Annotation is never clipped or turned round: RowError of reason malformed, out_of_range or inverted.
    """
    if not isinstance(numbers, list | tuple) or len(numbers) != 4 or not all(_is_number(n) for n in numbers):
        raise RowError("malformed", f"the {what} must be four numbers; got {shortened(numbers)}")
    if not all(abs(n) < _HUGE for n in numbers):
        raise RowError("out_of_range", f"the {what} leaves the image: {shortened(numbers)}")
    x0, y0, x1, y1 = numbers[0] / width, numbers[1] / height, numbers[2] / width, numbers[3] / height
    if not (min(x0, y0, x1, y1) >= 0 and max(x0, y0, x1, y1) <= 1):
        raise RowError("out_of_range", f"the {what} leaves the image: {list(numbers)} on {width:g} x {height:g}")
    if not (x0 < x1 and y0 < y1):
        raise RowError("inverted", f"the {what} has swapped corners or no area: {list(numbers)}")
    return Box(x0, y0, x1, y1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class ImageRoot:
    """Turns what an annotation calls its images into paths under one folder, and nowhere else.

    An annotation is data, not to be trusted with the whole disk: `../` out of the folder is refused, and so is an absolute
    path, unless it lies in the folder (`images_root: /` allows all) or starts with `strip_prefix`, the root of the
    machine that wrote it.
    """

    folder: Path
    strip_prefix: str | None = None
    store: Path | None = None
    """Where images that are embedded in the rows are written, each under the hash of its bytes."""

    def paths(self, names: Any) -> tuple[Path, ...]:
        """A name, an embedded image, or a list of them. RowError of reason malformed, no_images or unsafe_path."""
        names = names if isinstance(names, list | tuple) else [] if names is None else [names]
        if not names:
            raise RowError("no_images", "the row has no image")
        return tuple(self.path(name) for name in names)

    def path(self, name: Any) -> Path:
        """A file below the folder, an embedded image stored first. RowError: malformed, unsafe_path or embedded_image."""
        if isinstance(name, bytes):
            return self._stored(name, None)
        if isinstance(name, dict):
            content, name = name.get("bytes"), name.get("path")
            if isinstance(content, bytes):
                return self._stored(content, name)
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise RowError("malformed", f"an image must be a file name; got {shortened(name)}")
        if name.startswith(("http://", "https://")):
            raise RowError("unsafe_path", f"{shortened(name)} is an address; download the images and name the files")
        name = name.removeprefix("file://")
        if self.strip_prefix and name.startswith(self.strip_prefix):
            name = name[len(self.strip_prefix) :].lstrip("/")
        name = os.path.normpath(name)
        if name.startswith("/"):
            if not Path(name).is_relative_to(os.path.normpath(Path.cwd() / self.folder)):
                raise RowError(
                    "unsafe_path",
                    f"{name} is an absolute path outside {self.folder}; set strip_prefix to the part it shares with all",
                )
        elif name == ".." or name.startswith("../"):
            raise RowError("unsafe_path", f"{name} leads out of {self.folder}; set images_root to the folder it starts from")
        return self.folder / name

    def _stored(self, content: bytes, name: object) -> Path:
        if self.store is None:
            raise RowError("embedded_image", "the row holds an image's bytes; set images_out to the folder to write them to")
        suffix = PurePosixPath(name).suffix.lower() if isinstance(name, str) else ""
        suffix = suffix if suffix in _SUFFIXES else _suffix(content)
        file = self.store / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
        if not file.is_file():
            try:
                self.store.mkdir(parents=True, exist_ok=True)
                draft = file.with_name(f".{file.name}.{os.getpid()}")
                draft.write_bytes(content)
                draft.replace(file)
            except OSError as error:
                raise DataError(
                    f"{file}: the image cannot be written ({error.strerror}); free space or set images_out"
                ) from error
        return file


def image_root(
    path: Path, images_root: str | Path | None, strip_prefix: str | None = None, images_out: str | Path | None = None
) -> ImageRoot:
    """The root of an annotation file: its own folder when none is given; embedded images go to `<file>_images` beside it."""
    # A hub data set has no folder of its own: what it embeds needs to be told where to go.
    folder = Path() if str(path).startswith(HUB) else path if path.is_dir() else path.parent
    beside = None if str(path).startswith(HUB) else path.with_name(f"{path.stem}_images")
    return ImageRoot(
        folder if images_root is None else Path(images_root), strip_prefix, beside if images_out is None else Path(images_out)
    )


_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def _suffix(content: bytes) -> str:
    return next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), ".png")
