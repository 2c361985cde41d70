"""Questions made of the words of an annotation, with or without a template around them."""

from __future__ import annotations

from polyground.errors import DataError
from polyground.sources.reading import RowError, shortened

_MARKS = ("<image>", "<box>")


def ask(template: str, **words: str) -> str:
    """The template with every `{name}` replaced; RowError of reason malformed for words that are empty or hold a placeholder.

    >>> ask("Locate every {category}.", category="cat")
    'Locate every cat.'
    """
    for name, text in words.items():
        if f"{{{name}}}" not in template:
            raise DataError(f"template {template!r} has no {{{name}}}; put it where the annotation's words belong")
        text = " ".join(plain(text).split())
        if not text:
            raise RowError("malformed", f"the {name} is empty")
        template = template.replace(f"{{{name}}}", text)
    return template


def plain(text: str) -> str:
    """The text, unless it holds what stands for an image or a box in a question: RowError of reason malformed."""
    for mark in _MARKS:
        if mark in text:
            raise RowError("malformed", f"the text holds {mark}, which would be taken for a placeholder: {shortened(text)}")
    return text
