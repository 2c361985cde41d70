"""The exceptions a user can cause, each with a message that says where, what and what to do, and how they are shown."""

from __future__ import annotations

import unicodedata
from typing import ClassVar


class PolygroundError(Exception):
    """Base of everything the command line prints as one clear line instead of a traceback."""

    page: ClassVar[str] = "how-to.md"
    """Where the documentation says more: a page of docs/, perhaps with the heading it is under."""


class ConfigError(PolygroundError):
    """A recipe or an override is wrong: the key and the remedy are in the message."""

    page = "recipe.md"


class DataError(PolygroundError):
    """A row, an annotation or an image is wrong: file, row and remedy are in the message."""

    page = "data.md#bad-rows"


class GridError(DataError):
    """Numbers are given as a box and nothing says on which grid: the choices are in the message."""

    page = "coordinates.md"


class SplitError(DataError):
    """The recipe has no questions of this name: those it has are in the message."""

    page = "recipe.md"


class NothingKeptError(DataError):
    """A stage that chooses rows has chosen none: why, and what to change, are in the message."""

    page = "tutorial.md#if-it-does-not-work"


class ModelError(PolygroundError):
    """A model folder cannot be used: the path and the remedy are in the message."""

    page = "models.md"


class StorageError(PolygroundError):
    """A run folder cannot be read or continued: the path and the remedy are in the message."""

    page = "reliability.md#what-is-promised"


class EndpointError(ModelError):
    """A server that samples cannot be used, or answers no longer: its address, what it said and the remedy are in the message."""

    page = "endpoints.md"


class BudgetError(EndpointError):
    """What the recipe allows to be spent on a server is spent; what was answered is kept."""

    page = "endpoints.md#what-it-costs"


class MissingLibraryError(ConfigError):
    """What is asked for needs a library that is not installed: what installs it is in the message."""

    page = "how-to.md#install"


class UsageError(ConfigError):
    """The command line itself is wrong: no such verb, no recipe, a key that is none."""

    page = "cli.md"


def visible(text: str, *, keep: str = "") -> str:
    """The text with its control characters written out, so that a terminal shows them and obeys none; `keep` are left.

    What models, annotations and servers say may hold the sequences that clear a screen or turn a line round.

    >>> visible("a\\x1b[2Jb", keep="\\n")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c in keep or not _obeyed(c) else ascii(c)[1:-1] for c in text)


def _obeyed(character: str) -> bool:
    """Control characters, other ends of a line, what turns the direction of writing, and halves of a surrogate pair."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or character in _DIRECTIONS


_DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
