"""Examples in docstrings as code: Markdown would take `>>>` for a quotation in a quotation in a quotation.

A Griffe extension, used by mkdocs.yml.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLES = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Doctests(Extension):
    """Puts every run of lines that begins with `>>>`, up to the next empty line, between fences."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The docstring with its examples as blocks of Python."""
    return _EXAMPLES.sub(lambda example: f"\n```python\n{example[0]}\n```\n", text)
