"""How many tokens a prompt has for a model folder, without the model: no torch, no transformers.

Image tokens are those of the folder's convention. Text tokens are the tokenizer's own, through the chat template, where the
`tokenizers` library and both files are there; else an estimate, which says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polyground.conventions import Canvas, Convention, read_json, without_opened_thought
from polyground.errors import ModelError
from polyground.records import Message

_TEMPLATE_TOKENS = 20
"""What a chat template is taken to add to a prompt where it cannot be rendered: two turns, a short system prompt."""

# Byte-pair tokenizers of the supported families give each digit its own token, and mostly a token to a short English word.
_WORDS = re.compile(r"\d|[^\W\d_]{1,6}|[^\w\s]|_|\n")


@dataclass(frozen=True, slots=True)
class PromptLength:
    """Tokens of one prompt."""

    total: int
    images: int
    """Tokens that stand for image features."""


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has for the tokenizers of the supported families.

    >>> estimated_tokens("Image 12 shows a wheelbarrow.")
    8
    """
    return len(_WORDS.findall(text))


class PromptCounter:
    """Counts prompts for one model folder."""

    def __init__(self, convention: Convention) -> None:
        self._marks = convention.marks
        self._template, self._special = _chat_template(convention.path)
        self._tokenizer, self.why_not_exact = _tokenizer(convention.path)
        """`why_not_exact`: why the text tokens are an estimate; empty where they are the tokenizer's own."""
        if self._template is None and not self.why_not_exact:
            self.why_not_exact = "the folder has no chat template that can be rendered here"

    @property
    def exact(self) -> bool:
        """Whether it counts with the folder's own tokenizer and template; `why_not_exact` says why it does not."""
        return not self.why_not_exact

    def count(self, messages: Sequence[Message], canvases: Sequence[Canvas]) -> PromptLength:
        """Tokens of the conversation up to where the completion starts; one canvas per image, in order."""
        image_tokens = sum(canvas.tokens for canvas in canvases)
        if self._template is None or self._tokenizer is None:
            text = "".join(part for message in messages for part in message.parts if isinstance(part, str))
            markers = 2 * len(canvases)
            return PromptLength(image_tokens + estimated_tokens(text) + markers + _TEMPLATE_TOKENS, image_tokens)
        pieces = self._rendered(self._template, messages).split(self._marks.image)
        # A run of image tokens is as good as one of them, and sooner tokenized.
        held = [self._marks.shortened(canvas) for canvas in canvases]
        if len(pieces) != len(held) + 1:
            raise ModelError(
                f"the chat template wrote {len(pieces) - 1} images, the prompt has {len(held)}; is it the right file?"
            )
        text = pieces[0] + "".join(mark + piece for mark, piece in zip(held, pieces[1:], strict=True))
        short = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return PromptLength(short - sum(mark.count(self._marks.image) for mark in held) + image_tokens, image_tokens)

    def control_token(self, messages: Sequence[Message]) -> str | None:
        """The first control token that stands in the text of a prompt, which would break it."""
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        return next((token for text in texts if (token := self._marks.in_text(text))), None)

    def _rendered(self, template: jinja2.Template, messages: Sequence[Message]) -> str:
        rows = []
        for message in messages:
            parts = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in message.parts]
            rows.append({"role": message.role, "content": parts})
        text = template.render(messages=rows, add_generation_prompt=True, tools=None, documents=None, **self._special)
        return without_opened_thought(text)


def _tokenizer(folder: Path) -> tuple[Any, str]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None, "the folder has no tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None, "the tokenizers library is not installed (pip install tokenizers)"
    try:
        return Tokenizer.from_file(str(file)), ""
    except Exception as error:
        # The library raises `Exception` itself and nothing narrower; its subclasses are somebody else's.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{file}: not a tokenizer ({error}); copy the file again") from error


def _chat_template(folder: Path) -> tuple[jinja2.Template | None, dict[str, str]]:
    """The template, where there is one that compiles, and the named tokens it may write."""
    config = read_json(folder / "tokenizer_config.json") or {}
    special = {name: _named(config[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(name)}
    source = _template_source(folder, config)
    if source is None:
        return None, special
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
        template.render(messages=_SAMPLE, add_generation_prompt=True, tools=None, documents=None, **special)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None, special
    return template, special


_SAMPLE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    found = config.get("chat_template") or (read_json(folder / "chat_template.json") or {}).get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _named(token: Any) -> str:
    """A token that some files write as an object."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
