"""Rows in JSON Lines, run folders that survive a kill, and files that are either old or new but never half.

What a row means is not known here. A stage appends rows as it makes them and writes its manifest last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from polyground import __version__
from polyground.errors import DataError, StorageError

MANIFEST = "manifest.json"
"""Written last: a folder that has it is complete."""
STATE = "state.json"
"""Written first: what the folder is for, and how long it took so far."""
LOCK = ".lock"


def read_rows(path: Path | str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file, in order; blank lines are skipped. Raises DataError naming file and line."""
    path = Path(path)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _read_row(path, number, line)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run the stage that writes it, or correct the path") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def read_json(path: Path | str) -> Any:
    """The value of a JSON file. Raises DataError naming the file."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run the stage that writes it, or correct the path") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend or delete the file") from error


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace a file so that a reader, or a kill at any moment, sees the old text or the new one whole."""
    with _replacing(Path(path)) as file:
        file.write(text.encode())


def atomic_write_json(path: Path | str, value: Any) -> None:
    """As `atomic_write_text`, for a JSON value, indented."""
    atomic_write_text(path, json.dumps(value, indent=2, default=_jsonable) + "\n")


def atomic_write_rows(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """As `atomic_write_text`, for rows that need not fit into memory."""
    with _replacing(Path(path)) as file:
        for row in rows:
            file.write(json.dumps(row, default=_jsonable).encode() + b"\n")


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A draft beside the file, which takes its place when the block ends well."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            # Gone already when all went well; suppressed so that the first mishap is the one reported.
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        _sync_folder(path.parent)


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration's canonical JSON: the order of the keys does not matter."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


class RowWriter:
    """Appends rows to a JSON Lines file; a row is on disk when `append` returns.

    What a killed writer left of its last line is cut on opening, and a row that does not fit on the disk leaves nothing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab", buffering=0)
            _cut_torn_line(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """One row, on disk when this returns. Raises StorageError, the file as it was, where the disk is full."""
        line = memoryview(json.dumps(row, default=_jsonable).encode() + b"\n")
        with _explained(self.path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                while line:  # an unbuffered write may take only a part
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(before)
                raise

    def close(self) -> None:
        """Nothing is left to be written: rows are on disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a complete run folder says of itself."""

    stage: str
    fingerprint: str
    """Of `config`."""
    config: Mapping[str, Any]
    """Everything that decided the rows."""
    version: str
    """Of polyground."""
    summary: Mapping[str, Any]
    """The stage's own numbers."""
    finished: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall time over all resumptions."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the folder's rows, tables and weights when they were complete."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def made_alike(path: Path | str, *, stage: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this stage, complete and made under this configuration."""
    if not (Path(path) / MANIFEST).is_file():
        return False
    manifest = read_manifest(path)
    return (manifest.stage, manifest.fingerprint) == (stage, fingerprint(config))


def take_over(source: Path | str, target: Path | str) -> None:
    """A complete folder once more, by hard links (copies where the disk has none); nothing half is ever seen at `target`.

    The files of a complete folder are never written to again, so that two folders may share them.
    """
    source, target = Path(source), Path(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        try:
            shutil.copytree(source, draft, copy_function=_link, ignore=shutil.ignore_patterns(LOCK))
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        _sync_folder(target.parent)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of a complete stage folder. Raises StorageError when the stage has not finished there."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        state = _read_state(path)
        stage = state["stage"] if state else path.name
        why = "is not complete" if state else "does not exist" if not path.exists() else "is not the folder of a stage"
        raise StorageError(f"{path}: {why}; run `polyground {stage}` with this recipe first")
    row = _read_own_json(path / MANIFEST)
    try:
        return Manifest(**{name: row[name] for name in Manifest.__slots__ if name != "files" or name in row})
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{path / MANIFEST}: not a manifest of this program ({error}); delete the folder and run its stage again"
        ) from error


def require_whole(path: Path | str) -> None:
    """Raises StorageError for a file of a complete folder that has another length than when the folder became complete.

    A line lost at the end of a file leaves a file that looks whole. A file that is gone is missed by whoever reads it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, size in manifest.files.items():
        file = path / name
        if file.is_file() and (found := file.stat().st_size) != size:
            raise StorageError(
                f"{file}: has {found} bytes, and had {size} when `{manifest.stage}` was complete; bring back what is lost, "
                f"or delete {path} and run the stage again"
            )


def _lengths(folder: Path) -> dict[str, int]:
    """Bytes of what is never written to again; checkpoints and what belongs to other programs are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        ours = path.suffix in _LASTING and path.name not in (STATE, MANIFEST) and not path.name.startswith(".")
        if ours and not name.parts[0].startswith("checkpoint-") and path.is_file():
            found[name.as_posix()] = path.stat().st_size
    return found


_LASTING = (".jsonl", ".json", ".safetensors")


class RunFolder:
    """The folder of one stage: rows that outlive a kill, and a manifest written last.

    Opening a folder continues it. A folder made under another configuration, or in use by another process, is refused.
    Under torchrun every process opens it and the first alone writes, unless it is this process's own (`own`).
    """

    def __init__(self, path: Path | str, stage: str, config: Mapping[str, Any], *, own: bool = False) -> None:
        self.path = Path(path)
        self._writes = own or _is_first()
        self.stage = stage
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=_jsonable))
        self._writers: dict[str, RowWriter] = {}
        self._since = self._noted = time.monotonic()
        state = _read_state(self.path)
        if state is None:
            state = {"stage": stage, "fingerprint": fingerprint(self.config), "config": self.config, "seconds": 0.0}
        self._refuse_another(state)
        self._seconds_before = float(state["seconds"])
        if self.complete:
            require_whole(self.path)
        else:
            self.lock()
            self._note_state()

    @property
    def complete(self) -> bool:
        """True once `finish` has written the manifest."""
        return (self.path / MANIFEST).is_file()

    @property
    def summary(self) -> Mapping[str, Any]:
        """What `finish` was given. Raises StorageError while the stage is not complete."""
        return read_manifest(self.path).summary

    @property
    def seconds(self) -> float:
        """Wall time spent so far, earlier attempts included."""
        return self._seconds_before + time.monotonic() - self._since

    def file(self, name: str) -> Path:
        """The path of a file of this folder."""
        return self.path / name

    def rows(self, file: str) -> Iterator[dict[str, Any]]:
        """The rows of one of the folder's files; none when it was never written to."""
        if self.file(file).exists():
            if not self.complete:
                self._writer(file)
            yield from read_rows(self.file(file))

    def done_keys(self, file: str, *, field: str = "key") -> set[str]:
        """The `field` of every row that is already there: what a resumed stage need not do again."""
        keys = set()
        for number, row in enumerate(self.rows(file), start=1):
            if field not in row:
                raise StorageError(
                    f"{self.file(file)}: row {number} has no {field!r}; delete {self.path} and run the stage again"
                )
            keys.add(row[field])
        return keys

    def append(self, file: str, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        if self.complete:
            raise StorageError(f"{self.path}: already complete; delete it to run `polyground {self.stage}` again")
        self._writer(file).append(row)
        if time.monotonic() - self._noted > 5:
            self._note_state()

    def finish(self, summary: Mapping[str, Any]) -> Manifest:
        """Write the manifest, which makes the folder complete, and let go of it; under torchrun the first process writes it."""
        manifest = Manifest(
            stage=self.stage,
            fingerprint=fingerprint(self.config),
            config=self.config,
            version=__version__,
            summary=json.loads(json.dumps(summary, default=_jsonable)),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(self.seconds, 3),
            files=_lengths(self.path),
        )
        if self._writes:
            self._note_state()
            atomic_write_json(self.path / MANIFEST, manifest.to_json())
        self.close()
        return manifest

    def lock(self) -> None:
        """Keep other processes out until `close`, `finish` or the end of this process. Raises StorageError if one is in."""
        if self._writes:
            _take_lock(self.path / LOCK, self.stage)
            # Drafts of processes that were killed; whoever may write here holds the lock.
            for draft in self.path.rglob(".*.tmp"):
                if not draft.name.endswith(f".{os.getpid()}.tmp"):
                    with suppress(OSError):
                        draft.unlink()

    def close(self) -> None:
        """Close the files and let other processes in; the folder can be opened again."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        _release_lock(self.path / LOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.complete:
            self._note_state()
        self.close()

    def _writer(self, file: str) -> RowWriter:
        if file not in self._writers:
            self._writers[file] = RowWriter(self.file(file))
        return self._writers[file]

    def _note_state(self) -> None:
        self._noted = time.monotonic()
        state = {
            "stage": self.stage,
            "fingerprint": fingerprint(self.config),
            "config": self.config,
            "seconds": round(self.seconds, 3),
        }
        if self._writes:
            atomic_write_json(self.path / STATE, state)

    def _refuse_another(self, state: Mapping[str, Any]) -> None:
        if state["stage"] != self.stage:
            raise StorageError(f"{self.path}: belongs to the stage {state['stage']!r}, not {self.stage!r}; choose another --out")
        if state["fingerprint"] != fingerprint(self.config):
            changed = sorted(_differences(state["config"], self.config))
            shown = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
            raise StorageError(
                f"{self.path}: was made under another configuration (changed: {shown or 'unknown'}); "
                f"choose another --out, restore the value, or delete the folder to start again"
            )


def _jsonable(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("tolist", "to_json"):  # numpy scalars and arrays; our own records and sections
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DataError(f"{path}:{number}: not valid JSON ({what}); mend the line or write the file again") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: a row is a JSON object, this is a {type(row).__name__}; write one object a line")
    return row


def _read_own_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except DataError as error:
        raise StorageError(str(error)) from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: not written by this program; delete {path.parent} and run its stage again")
    return value


def _read_state(folder: Path) -> dict[str, Any] | None:
    """What an existing folder is for: its state, or its manifest where a copy left the state behind."""
    for name in (STATE, MANIFEST):
        if (folder / name).is_file():
            state = _read_own_json(folder / name)
            if not {"stage", "fingerprint", "config", "seconds"} <= state.keys():
                raise StorageError(f"{folder / name}: not written by this program; delete {folder} and run its stage again")
            return state
    return None


def _differences(before: object, after: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of the values that differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in before.keys() | after.keys():
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif before != after:
        yield prefix


def _cut_torn_line(path: Path) -> None:
    """Cut the file after its last newline."""
    with path.open("rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            step = min(65536, position)
            file.seek(position - step)
            if (newline := file.read(step).rfind(b"\n")) >= 0:
                position = position - step + newline + 1
                break
            position -= step
        if position < end:
            file.truncate(position)
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_first() -> bool:
    """Whether this is the first process of a launcher, or one on its own."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def sole(folder: Path | str, stage: str) -> Iterator[None]:
    """Keep other processes from making a folder that is written aside and then renamed. Raises StorageError if one does."""
    lock = Path(folder).with_name(f".{Path(folder).name}{LOCK}")
    if _is_first():
        _take_lock(lock, stage)
    try:
        yield
    finally:
        _release_lock(lock)


# A POSIX lock belongs to the process: the same process may open a folder twice, a forked data worker inherits nothing,
# and the kernel lets go when the process dies. It also lets go when *any* descriptor of the file closes, hence one per file.
_LOCKS: dict[Path, int] = {}


def _take_lock(lock: Path, stage: str) -> None:
    lock = lock.absolute()
    folder = lock.parent
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = _LOCKS.get(lock)
        if held is not None and lock.exists() and os.fstat(held).st_ino == lock.stat().st_ino:
            return
        _release_lock(lock)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise StorageError(
                f"{folder}: another process is running `{stage}` there; wait for it, stop it, or choose another --out"
            ) from error
    _LOCKS[lock] = descriptor


def _release_lock(lock: Path) -> None:
    descriptor = _LOCKS.pop(lock.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again: it continues where it stopped",
    errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
    errno.EACCES: "choose another --out, or give yourself the right to write there",
    errno.EPERM: "choose another --out, or give yourself the right to write there",
    errno.EROFS: "the disk is read-only: choose another --out",
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or choose another --out",
    errno.EEXIST: "a file stands where a folder is needed: move it, or choose another --out",
}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and run the same command again")
        raise StorageError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
