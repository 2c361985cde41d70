"""What every reader shares: rows streamed from files, image names made safe paths, bad rows with their reasons.

Nothing here holds a whole file in memory, and nothing here knows a format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from polyground.errors import DataError
from polyground.geometry import Box
from polyground.records import Example

OnBad = Literal["raise", "quarantine"]

NAMED = 10
"""How many bad rows or missing files an error message names."""

HUB = "hub:"
"""A path `hub:owner/name` names a data set of the Hugging Face hub (`sources.hub`)."""

_CHUNK = 1 << 20
_MAX_ROW = 1 << 26
"""Characters of one row of a JSON list; what is longer is a file with a broken row, not a row."""


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
    """A row is bad; carries the countable reason beside the message."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# ---------------------------------------------------------------- rows to examples


def scan_rows(
    path: Path,
    read_row: Callable[[Any, str], Example | Iterable[Example]],
    *,
    name: str,
    task_field: str | None = None,
    duplicates: Literal["report", "keep"] = "report",
    rows: Iterable[tuple[int, Any]] | None = None,
) -> Iterator[Item]:
    """Every row of a file as an example (or several), or as a BadRow when `read_row` raises RowError.

    `read_row` is given the row and its key: `name/task/position in its task`, or `name/position` without a task field. A
    question that an earlier row asked of the same images is a BadRow of reason `duplicate` unless duplicates are kept.
    `rows` replaces the rows of the file, for formats that join several tables.
    """
    positions: Counter[str] = Counter()
    seen: set[bytes] = set()
    for number, row in stream_rows(path) if rows is None else rows:
        task = str(row.get(task_field)) if task_field and isinstance(row, dict) else "?" if task_field else None
        key = f"{name}/{positions['']}" if task is None else f"{name}/{task}/{positions[task]}"
        positions["" if task is None else task] += 1
        try:
            found = read_row(row, key)
            examples = [found] if isinstance(found, Example) else list(found)
        except RowError as error:
            yield BadRow(number, key, error.reason, str(error))
            continue
        for example in examples:
            identity = _identity(example)
            if identity in seen and duplicates == "report":
                yield BadRow(number, example.key, "duplicate", "an earlier row asks the same question about the same images")
                continue
            seen.add(identity)
            yield example


def _identity(example: Example) -> bytes:
    parts = (example.task, example.images, example.question, example.question_boxes, example.choices)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


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


def require_none_bad(bad: Sequence[BadRow], path: Path) -> None:
    """Raises one DataError that counts the reasons and names the first ten bad rows."""
    if not bad:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons_of(bad).items())
    rows = "".join(f"\n  row {row.row} ({row.key}): {row.detail}" for row in bad[:NAMED])
    raise DataError(f"{path}: {len(bad)} bad rows ({counts}); repair them or read with on_bad: quarantine{rows}")


def require_images(examples: Iterable[Example], path: Path) -> None:
    """Raises DataError naming the first ten image files that do not exist."""
    missing = [image for image in dict.fromkeys(i for example in examples for i in example.images) if not image.is_file()]
    if missing:
        names = "".join(f"\n  {image}" for image in missing[:NAMED])
        raise DataError(f"{path}: {len(missing)} image files are missing; set images_root to the folder they lie under{names}")


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
            raise DataError(f"{path}: cannot be read ({error}); is it the annotation file?") from error


def load_json(path: Path) -> Any:
    """A whole JSON file, for formats whose tables refer to one another; raises DataError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it the annotation file?") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); download or build it again") from error


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
    decoder, number, size = json.JSONDecoder(), 0, _CHUNK
    buffer = buffer.lstrip()
    while not (number == 0 and buffer.startswith("]")):
        try:
            row, end = decoder.raw_decode(buffer)
            rest = buffer[end:].lstrip()
            whole = bool(rest)
        except RecursionError as error:
            raise DataError(f"{path}: row {number + 1} is nested too deeply; download or build it again") from error
        except ValueError as error:
            whole, problem = False, error
        else:
            problem = ValueError("the file ends in the middle of the list")
        if not whole or rest[0] not in ",]":
            more = "" if whole or len(buffer) > _MAX_ROW else file.read(size)
            if not more:
                raise DataError(
                    f"{path}: row {number + 1} is not valid JSON ({problem}); download or build it again"
                ) from problem
            # Doubling keeps the cost of trying again linear in the length of a long row.
            buffer, size = buffer + more, min(2 * size, _MAX_ROW)
            continue
        number += 1
        yield number, row
        if rest[0] == "]":
            return
        buffer = rest[1:].lstrip()
        if len(buffer) < _CHUNK // 2:
            buffer, size = (buffer + file.read(_CHUNK)).lstrip(), _CHUNK


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'polyground[train]'") from error
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
        path = Path(os.path.normpath(self.folder / PurePosixPath(name)))
        if not path.is_relative_to(os.path.normpath(self.folder)):
            if Path(name).is_absolute():
                raise RowError(
                    "unsafe_path",
                    f"{name} is an absolute path outside {self.folder}; set strip_prefix to the part it shares with all",
                )
            raise RowError("unsafe_path", f"{name} leads out of {self.folder}; set images_root to the folder it starts from")
        return path

    def _stored(self, content: bytes, name: object) -> Path:
        if self.store is None:
            raise RowError("embedded_image", "the row holds an image's bytes; set images_out to the folder to write them to")
        suffix = PurePosixPath(name).suffix.lower() if isinstance(name, str) else ""
        file = self.store / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix or _suffix(content)}"
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


_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def _suffix(content: bytes) -> str:
    return next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), ".png")
