"""What the words of a question or an answer say: which image they name, which lettered options they list."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORDS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_ORDINALS = {word: number for number, word in enumerate(_WORDS, start=1)}
_IMAGE = re.compile(
    # The look-ahead is only for speed: most words start with none of these.
    rf"\b(?=[\dfstein])(?:(?:(\d{{1,9}})(?:st|nd|rd|th)|({'|'.join(_ORDINALS)}))[ -]image\b|image[ -]?(\d{{1,9}}))",
    re.IGNORECASE,
)
_OPTION_LINE = re.compile(r"[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*")
_OPTION_INLINE = re.compile(r"\(([A-Z])\)[ \t]*")


@dataclass(frozen=True, slots=True)
class Mention:
    """A place where a text names an image."""

    start: int
    end: int
    image: int


def image_mentions(text: str) -> list[Mention]:
    """Every image that a text names by its number, in order.

    >>> [mention.image for mention in image_mentions("the 2nd image, then the third image, then image-1")]
    [2, 3, 1]
    """
    return [
        Mention(found.start(), found.end(), _ORDINALS[found[2].lower()] if found[2] else int(found[1] or found[3]))
        for found in _IMAGE.finditer(text)
    ]


def named_image(text: str) -> int | None:
    """The last image a text names: "in the 2th image", "the second image", "image-2"; None when it names none.

    >>> named_image("Find where the object in image-1 is in the second image.")
    2
    """
    mentions = image_mentions(text)
    return mentions[-1].image if mentions else None


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    r"""A question without its lettered option lines, and those options in letter order; no options when there are not two.

    Options that stand in one line, "(A) left (B) right", stay in the question: the prompt then does not list them again.

    >>> split_options("Which one?\nA. the cat\nB. the dog")
    ('Which one?', ('the cat', 'the dog'))
    """
    kept: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        found = _OPTION_LINE.fullmatch(line)
        if found is not None and ord(found[1]) - ord("A") == len(options):
            options.append(found[2])
        else:
            kept.append(line)
    if len(options) > 1:
        return "\n".join(kept).strip(), tuple(options)
    return text, _inline_options(text)


def _inline_options(text: str) -> tuple[str, ...]:
    marks = list(_OPTION_INLINE.finditer(text))
    if len(marks) < 2 or [mark[1] for mark in marks] != [chr(ord("A") + n) for n in range(len(marks))]:
        return ()
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(text[mark.end() : end].split("\n")[0].strip(" \t,;") for mark, end in zip(marks, ends, strict=True))
