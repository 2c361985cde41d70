"""Answers of servers on disk, so that none is paid for twice, and what they cost.

A row of a cache file is one answer, appended whole as it arrives. Keys are digests of what was asked: neither addresses nor
secrets are in them. Each process writes a file of its own and reads those of all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from polyground.errors import StorageError
from polyground.records import Completion
from polyground.sampling.servers import Reply
from polyground.storage import RowWriter

logger = logging.getLogger("polyground")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Money per million tokens, in the currency of the user's bill; None where it is not known."""

    prompt: float | None = None
    completion: float | None = None


@dataclass(kw_only=True, slots=True)
class Spending:
    """What was asked of servers so far, earlier attempts whose answers are kept included."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Requests whose answer told no usage."""

    @property
    def tokens(self) -> int:
        """Prompts and completions together, as far as the server has counted them."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, prompt: int | None, completion: int | None) -> None:
        """One request more; None for what the server has not counted."""
        self.requests += 1
        self.uncounted += prompt is None
        self.prompt_tokens += prompt or 0
        self.completion_tokens += completion or 0

    def cost(self, prices: Prices) -> float | None:
        """None without a price.

        >>> Spending(prompt_tokens=2_000_000, completion_tokens=500_000).cost(Prices(prompt=0.5, completion=2.0))
        2.0
        """
        if prices.prompt is None and prices.completion is None:
            return None
        return (self.prompt_tokens * (prices.prompt or 0.0) + self.completion_tokens * (prices.completion or 0.0)) / 1e6

    def told(self, prices: Prices) -> dict[str, Any]:
        """What a summary says of it."""
        cost = self.cost(prices)
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            **({} if cost is None else {"cost": round(cost, 6)}),
            **({"requests_without_usage": self.uncounted} if self.uncounted else {}),
        }


class Responses:
    """The answers kept in a folder. Without a folder nothing is kept, only counted."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.spending = Spending()
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        """File, offset of the row, and which of its completions."""
        self._writer: RowWriter | None = None
        self._lock: int | None = None
        if folder is not None:
            self._open(folder)

    @classmethod
    def looked_at(cls, folder: Path) -> Self:
        """Those of a folder that may not be there, which is neither made nor written to."""
        found = cls(None)
        for path in sorted(folder.glob("answers-*.jsonl")):
            found._read(path)
        return found

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Completion | None:
        """The completion kept under this key."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        path, offset, number = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                row = _row(file.readline())
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}); run the same command again") from error
        if row is None or row["keys"][number] != key:
            raise StorageError(f"{path}: was changed while it was in use; run the same command again")
        return _kept(row["completions"][number])

    def put(self, keys: Sequence[str], reply: Reply, model: str) -> None:
        """Keep an answer under one key per completion; it is on disk when this returns."""
        self.spending.add(reply.prompt_tokens, reply.completion_tokens)
        if self._writer is None:
            return
        completions = [_to_keep(completion) for completion in reply.completions[: len(keys)]]
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        path = self._writer.path
        offset = path.stat().st_size
        self._writer.append({"keys": list(keys[: len(completions)]), "completions": completions, "model": model, "usage": usage})
        for number, key in enumerate(keys[: len(completions)]):
            self._places[bytes.fromhex(key)] = (path, offset, number)

    def close(self) -> None:
        """Close the file and let go of its lock; once more does no harm."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = 0
            while (lock := _locked(folder / f".answers-{number}.lock")) is None:
                number += 1
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror}); name another folder for the answers") from error
        self._lock = lock
        self._writer = RowWriter(folder / f"answers-{number}.jsonl")
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        damaged = 0
        with path.open("rb") as file:
            offset = 0
            for line in file:
                row = _row(line)
                if row is None:
                    damaged += 1
                else:
                    usage = row["usage"]
                    self.spending.add(usage.get("prompt_tokens"), usage.get("completion_tokens"))
                    for number, key in enumerate(row["keys"]):
                        self._places[bytes.fromhex(key)] = (path, offset, number)
                offset += len(line)
        if damaged:
            # The last line of another process may be on its way; whatever else is lost is merely asked again.
            logger.warning("%s: %d lines cannot be read as answers; what they held is asked again", path, damaged)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the file's lock until it is closed; None while another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _row(line: bytes) -> Mapping[str, Any] | None:
    """The row of a whole line of the right shape."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        keys, completions, usage = row["keys"], row["completions"], row["usage"]
        whole = len(keys) == len(completions) and isinstance(usage, dict) and all(isinstance(c["text"], str) for c in completions)
        for key in keys:
            bytes.fromhex(key)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if whole else None


def _to_keep(completion: Completion) -> dict[str, Any]:
    row = completion.to_json()
    return {name: value for name, value in row.items() if value != []}


def _kept(row: Mapping[str, Any]) -> Completion:
    return Completion(
        text=row["text"],
        token_ids=tuple(row.get("token_ids", ())),
        logprobs=tuple(row.get("logprobs", ())),
        truncated=bool(row.get("truncated", False)),
    )
