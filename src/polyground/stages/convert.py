"""Convert a data set from any format that can be read into any that can be written, one row in memory at a time.

The new file appears under its name when it is whole, and not before; rows that cannot be converted stop it, or are set aside
and counted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from polyground.answer import NATIVE_WRITERS
from polyground.conventions import GRIDS, Convention, load_convention
from polyground.errors import DataError, StorageError, UsageError
from polyground.exports import CONTRACT, FORMATS, Format, Style, dataset_info, has_boxes, names_under, verl_schema, write_row
from polyground.geometry import UNIT, Grid
from polyground.imagefile import ImageError, check_image, image_size
from polyground.records import Example
from polyground.sources import SOURCES, Item, scan_source
from polyground.sources.reading import NAMED, BadRow, RowError, current_row
from polyground.splits import ImageHashes, shown_in
from polyground.stages import named_source, source_options
from polyground.storage import atomic_write_json, read_json

INFO = "dataset_info.json"
"""Where LLaMA-Factory looks a data set up; beside the data."""

_SHOWN = 15
"""Tasks that the summary lists."""

_CACHED = 100_000
"""Image sizes and existences kept in memory: an image asked about by several rows is opened once."""


def arguments(parser: argparse.ArgumentParser, *, source: str | None = None, further: Mapping[str, str] | None = None) -> None:
    """What `polyground convert` takes; with a `source`, as `polyground export` has it, that format is the only one read.

    `further` are layouts that another stage writes, by name, for the help alone.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats (--to):\n" + "\n".join(f"  {name:<11} {fmt.about}" for name, fmt in FORMATS.items())
    if further:
        parser.epilog += "\n\nof a run or a benchmark (`polyground export RUN --to NAME --help`):\n"
        parser.epilog += "\n".join(f"  {name:<13} {about}" for name, about in further.items())
    if source is None:
        parser.add_argument("source", metavar="SOURCE", help=f"format of the data: {', '.join(sorted(SOURCES))}")
    else:
        parser.set_defaults(source=source)
    parser.add_argument("path", metavar="PATH", help="annotation file, folder of shards, or hub:owner/name")
    parser.add_argument("--to", required=True, choices=[*FORMATS, *(further or ())], help="format to write, see below")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl, .json or .parquet, as the format allows")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--grid", metavar="NAME", help="what boxes are written on: per_mille, unit, pixels or per_mille_yxyx")
    grid.add_argument("--model", metavar="FOLDER", help="write boxes as the family of this model folder does")
    parser.add_argument("--max-pixels-total", type=int, metavar="N", help="with --model: pixels the images of one row share")
    parser.add_argument(
        "--form",
        choices=(CONTRACT, *NATIVE_WRITERS),
        default=CONTRACT,
        help="how answers are written: this project's contract (default), or as an untrained family does (sharegpt, vlm_r1, trl)",
    )
    parser.add_argument("--instruction", default="", metavar="TEXT", help="appended to every question, as in a recipe")
    parser.add_argument(
        "--think", default="", metavar="TEXT", help="think block of rows without reasoning (default: those rows have none)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the source, as in images_root=photos"
    )
    parser.add_argument(
        "--relative-to",
        type=Path,
        metavar="FOLDER",
        help="image names are relative to it where they lie under it (default: FILE's)",
    )
    parser.add_argument(
        "--on-bad", choices=("raise", "quarantine"), default="raise", help="stop and write nothing (default), or set them aside"
    )
    parser.add_argument(
        "--quarantine", type=Path, metavar="FILE", help="where to set bad rows aside (default: FILE.quarantine.jsonl)"
    )
    parser.add_argument("--check-images", action="store_true", help="a row whose image file does not exist is a bad row")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="SOURCE:PATH[,KEY=VALUE]",
        help="drop rows that show an image of these, such as a benchmark; images are compared by their bytes; repeatable",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="stop after so many rows")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def run(options: argparse.Namespace) -> str:
    """Read, write, and say what became of every row."""
    plan = _plan(options)
    report = _Report()
    with ExitStack() as files:
        rows = files.enter_context(_NewFile(plan.out))
        aside = None if plan.quarantine is None else files.enter_context(_NewFile(plan.quarantine))
        for item in plan.items():
            found = plan.convert(item)
            if isinstance(found, _Dropped):
                report.dropped[found.owner] += 1
            elif isinstance(found, _Left):
                report.left_out(found)
                if aside is not None:
                    aside.write(found.to_json())
                elif len(report.first) == NAMED:
                    break
            else:
                rows.write(found.row)
                report.wrote(found.example, found.row)
        report.require_good(plan)
    if plan.format.registered:
        _register(plan.out)
    return report.text(plan)


# ---------------------------------------------------------------- what was asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    source: str
    path: str
    options: Mapping[str, Any]
    to: str
    out: Path
    quarantine: Path | None
    """None where the first bad rows stop everything."""
    grid: str | None
    """Name of one of the format's grids; None where the model's convention says, or nothing does."""
    convention: Convention | None
    style: Style
    root: Path
    """What image names are relative to."""
    check_images: bool
    limit: int | None
    without: Mapping[str, frozenset[str]]
    """Hashes of images whose rows are dropped, by who shows them."""
    hashes: ImageHashes

    @property
    def format(self) -> Format:
        return FORMATS[self.to]

    def items(self) -> Iterator[Item]:
        return islice(scan_source(self.source, self.path, **self.options), self.limit)

    def convert(self, item: Item) -> _Written | _Left | _Dropped:
        if isinstance(item, BadRow):
            return _Left(item.row, item.key, item.reason, item.detail)
        try:
            if (owner := self._owner(item)) is not None:
                return _Dropped(owner)
            if self.check_images:
                for image in item.images:
                    _require_image(image)
            return _Written(item, write_row(self.to, item, self._grids(item), self.style))
        except (RowError, ImageError) as error:
            return _Left(current_row(), item.key, error.reason, str(error), item)

    def _owner(self, example: Example) -> str | None:
        """Who of `without` shows an image of this example, too."""
        if not self.without:
            return None
        for image in example.images:
            _require_image(image)
            for name, barred in self.without.items():
                if self.hashes.of(image) in barred:
                    return name
        return None

    def _grids(self, example: Example) -> list[Grid]:
        """One per image; images are opened only where the numbers of a box depend on their size."""
        count = len(example.images)
        if not (self.format.grids and has_boxes(example)):
            return [UNIT] * count
        if self.convention is not None:
            if self.convention.per_mille:
                return self.convention.grids([(1, 1)] * count)
            sizes = [_size(image) for image in example.images]
            try:
                return self.convention.grids(sizes)
            except DataError as error:
                raise RowError("unfit_image", str(error)) from error
        if self.grid is None:
            raise UsageError(
                f"example {example.key} has boxes, and nothing says how {self.to} should write them; name the grid "
                f"(--grid {' | '.join(self.format.grids)}) or the model that will be trained (--model FOLDER)"
            )
        rule = self.format.grids[self.grid]
        return [rule(*_size(image)) if self.grid == "pixels" else rule(1, 1) for image in example.images]


def _plan(options: argparse.Namespace) -> _Plan:
    """The options, checked against one another and the disk before anything is read."""
    form, out = FORMATS[options.to], options.out
    if out.suffix not in form.suffixes:
        raise UsageError(f"--out {out}: {options.to} is written to {' or '.join(form.suffixes)}; change the ending")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: give a number of rows, 1 or more")
    if options.quarantine is not None and options.on_bad != "quarantine":
        raise UsageError("--quarantine names a file for bad rows; add --on-bad quarantine")
    if options.quarantine is not None and options.quarantine.suffix != ".jsonl":
        raise UsageError(f"--quarantine {options.quarantine}: bad rows are written to .jsonl; change the ending")
    if options.form != CONTRACT and not form.native:
        raise UsageError(f"--form {options.form}: {options.to} has a form of its own for answers; leave it out")
    quarantine = None
    if options.on_bad == "quarantine":
        quarantine = options.quarantine or out.with_name(f"{out.name}.quarantine.jsonl")
    _require_apart([path for path in (out, quarantine) if path is not None], options.path)
    for path in (out, quarantine):
        if path is not None and path.exists() and not options.force:
            raise StorageError(f"{path} exists; choose another name, or add --force to replace it")
    grid, convention = _grid_of(options, form)
    hashes = ImageHashes()
    plan = _Plan(
        source=options.source,
        path=options.path,
        options=source_options(options.source, options.option),
        to=options.to,
        out=out,
        quarantine=quarantine,
        grid=grid,
        convention=convention,
        root=options.relative_to or out.parent,
        style=Style(
            name=names_under(options.relative_to or out.parent),
            form=options.form,
            instruction=options.instruction,
            think=options.think,
        ),
        check_images=options.check_images,
        limit=options.limit,
        without={word: _shown_in(word, hashes) for word in options.without},
        hashes=hashes,
    )
    if form.registered:
        _require_registrable(out, force=options.force)
    return plan


def _shown_in(word: str, hashes: ImageHashes) -> frozenset[str]:
    """Of the rows that can be read; a benchmark's own bad rows show nothing that it could be asked about."""
    file = named_source("--without", word)
    items = scan_source(file.source, str(file.path), **file.options)
    return shown_in((item for item in items if not isinstance(item, BadRow)), hashes=hashes)


def _grid_of(options: argparse.Namespace, form: Format) -> tuple[str | None, Convention | None]:
    if options.model is None and options.max_pixels_total is not None:
        raise UsageError("--max-pixels-total goes with --model: it shrinks the images that the model's pixels are counted on")
    if options.model is not None:
        if form.grids is not GRIDS:
            raise UsageError(f"--model: {options.to} does not write boxes as a model does; leave it out, see `convert --help`")
        return None, load_convention(options.model, max_pixels_total=options.max_pixels_total)
    name = options.grid or form.grid
    if name is None:
        return None, None
    if name not in form.grids:
        known = f"one of {', '.join(form.grids)}" if form.grids else "no grid at all: boxes are kept as they are"
        raise UsageError(f"--grid {name}: {options.to} takes {known}")
    return name, None


def _require_apart(written: Sequence[Path], read: str) -> None:
    """What is read is never written to."""
    source = Path(read).absolute()
    for path in written:
        if path.absolute() == source:
            raise UsageError(f"{path} is what is read; choose another name")
        if source.is_dir() and path.absolute().parent == source:
            raise UsageError(f"{path} lies in the folder that is read; choose another folder")
    if len({path.absolute() for path in written}) < len(written):
        raise UsageError(f"{written[0]}: the rows and the bad rows need a file each")


# ---------------------------------------------------------------- rows, kept and left out


@dataclass(frozen=True, slots=True)
class _Written:
    example: Example
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Dropped:
    """A row that shows an image of `--without`."""

    owner: str


@dataclass(frozen=True, slots=True)
class _Left:
    """A row that was not converted: refused by the reader, or an example that the format cannot hold."""

    row: int
    """1-based position in the file."""
    key: str
    reason: str
    detail: str
    example: Example | None = None

    def __str__(self) -> str:
        return f"row {self.row} ({self.key}): {self.detail}"

    def to_json(self) -> dict[str, Any]:
        example = {} if self.example is None else {"example": self.example.to_json()}
        return {"row": self.row, "key": self.key, "reason": self.reason, "detail": self.detail, **example}


@dataclass(slots=True)
class _Report:
    """Counts, and the first bad rows; no row is kept."""

    written: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    absolute: int = 0
    """Rows with an image outside the folder that image names are relative to."""
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that show an image of `--without`, by whose."""
    first: list[_Left] = field(default_factory=list)

    def wrote(self, example: Example, row: Mapping[str, Any]) -> None:
        self.written += 1
        self.absolute += any(isinstance(name, str) and name.startswith(os.sep) for name in row.get("images", row.get("image")))
        self.tasks[example.task] += 1
        self.images[len(example.images)] += 1

    def left_out(self, row: _Left) -> None:
        self.reasons[row.reason] += 1
        if len(self.first) < NAMED:
            self.first.append(row)

    def require_good(self, plan: _Plan) -> None:
        """Raises DataError for bad rows that nobody asked to set aside, and when nothing is left."""
        bad = self.reasons.total()
        named = "".join(f"\n  {row}" for row in self.first)
        if bad and plan.quarantine is None:
            more = ", and reading stopped there" if bad == NAMED else ""
            raise DataError(
                f"{plan.path}: {bad} bad of {bad + self.written} rows ({_listed(self.reasons)}){more}; nothing was written. "
                f"Repair them, or set them aside with --on-bad quarantine{named}"
            )
        if not self.written:
            why = f"all {bad} rows are bad ({_listed(self.reasons)})" if bad else "it holds no row"
            if self.dropped:
                why = f"every good row shows an image of {_listed(self.dropped)}"
            raise DataError(f"{plan.path}: {why}; nothing was written{named}")

    def text(self, plan: _Plan) -> str:
        """For a terminal: rows read, written and left out, each with its reason."""
        bad = self.reasons.total()
        lines = [
            f"read      {self.written + bad + self.dropped.total()} rows of {plan.path} ({plan.source})",
            f"written   {self.written} rows to {plan.out} ({plan.to})",
            f"left out  {bad}" + (f" ({_listed(self.reasons)}), see {plan.quarantine}" if bad else ""),
            f"tasks     {_listed(self.tasks, most=_SHOWN)}",
            f"images    {', '.join(f'{count} rows with {images}' for images, count in sorted(self.images.items()))}",
        ]
        for name, count in self.dropped.items():
            lines.append(f"dropped   {count} rows that show an image of {name}")
        if self.absolute:
            lines.append(
                f"paths     {self.absolute} rows name images outside {plan.root} by absolute path: "
                "read them with images_root=/, or give --relative-to"
            )
        if plan.format.registered:
            lines.append(f"entry     {plan.out.stem!r} in {plan.out.with_name(INFO)}")
        return "\n".join(lines)


def _listed(counts: Counter[str], *, most: int | None = None) -> str:
    shown = ", ".join(f"{count} {word}" for word, count in counts.most_common(most))
    more = len(counts) - (most or len(counts))
    return f"{shown} and {more} more" if more > 0 else shown


# ---------------------------------------------------------------- files


class _NewFile:
    """Rows of a file that appears under its name when the `with` ends well, and leaves nothing behind when it does not.

    JSON lines, one JSON list or parquet, by the ending of its name. Without a row no file appears, and an old one is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._rows: _Json | _Parquet | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        with self._explained():
            if self._rows is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                parquet = self.path.suffix == ".parquet"
                self._rows = _Parquet(self._draft) if parquet else _Json(self._draft, a_list=self.path.suffix == ".json")
            self._rows.write(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with self._explained():
                    if self._rows is None:
                        self.path.unlink(missing_ok=True)
                    else:
                        self._rows.finish()
                        self._draft.replace(self.path)
        finally:
            # A full disk is met again on closing; the first mishap is the one reported.
            with suppress(OSError):
                if self._rows is not None:
                    self._rows.file.close()
            with suppress(OSError):
                self._draft.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing was left there. "
                "Free space, or choose another --out"
            ) from error


class _Json:
    """JSON lines, or one JSON list with a row on each line."""

    def __init__(self, path: Path, *, a_list: bool) -> None:
        self.file = path.open("w", encoding="utf-8", newline="")
        self._before, self._between, self._after = ("[\n", ",\n", "\n]\n") if a_list else ("", "\n", "\n")

    def write(self, row: Mapping[str, Any]) -> None:
        self.file.write(self._before + json.dumps(row))
        self._before = self._between

    def finish(self) -> None:
        self.file.write(self._after)
        self.file.flush()
        os.fsync(self.file.fileno())


class _Parquet:
    """Row groups of at most so many rows and about so many bytes."""

    ROWS, BYTES = 1000, 64 << 20

    def __init__(self, path: Path) -> None:
        self._schema = verl_schema()
        from pyarrow.parquet import ParquetWriter

        self.file = path.open("wb")
        self._writer = ParquetWriter(self.file, self._schema)
        self._held: list[Mapping[str, Any]] = []
        self._bytes = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self._held.append(row)
        self._bytes += sum(len(image["bytes"]) for image in row["images"])
        if len(self._held) >= self.ROWS or self._bytes >= self.BYTES:
            self._flush()

    def _flush(self) -> None:
        from pyarrow import Table

        self._writer.write_table(Table.from_pylist(self._held, schema=self._schema))
        self._held, self._bytes = [], 0

    def finish(self) -> None:
        self._flush()
        self._writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())


def _require_registrable(out: Path, *, force: bool) -> None:
    """Raises unless the file's entry can be added to the dataset_info.json beside it."""
    known = _registered(out.with_name(INFO))
    if out.stem in known and known[out.stem] != dataset_info(out.name) and not force:
        raise StorageError(
            f"{out.with_name(INFO)} has another entry {out.stem!r}; choose another file name, or add --force to replace it"
        )


def _register(out: Path) -> None:
    info = out.with_name(INFO)
    atomic_write_json(info, {**_registered(info), out.stem: dataset_info(out.name)})


def _registered(info: Path) -> dict[str, Any]:
    known = read_json(info) if info.exists() else {}
    if not isinstance(known, dict):
        raise DataError(f"{info}: holds no object of data sets by name; move it away")
    return known


@lru_cache(maxsize=_CACHED)
def _size(image: Path) -> tuple[int, int]:
    return image_size(image)


@lru_cache(maxsize=_CACHED)
def _require_image(image: Path) -> None:
    check_image(image, decode=False)
