"""Sampling from a server that speaks the OpenAI chat protocol (vLLM, SGLang, a hosted teacher). No torch is needed.

The API key is read from an environment variable when the sampler is built and is never written, logged or shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from polyground.conventions import Convention
from polyground.errors import ConfigError, ModelError
from polyground.records import Completion, Message
from polyground.sampling import prompt_keys, sample_seed
from polyground.vision import canvas_of, load_image, to_data_uri

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice


class EndpointSampler:
    """Samples from `model` at `base_url` (which ends in `/v1`), `concurrency` prompts at a time.

    `api_key_env` names the environment variable that holds the key; None for servers that want none. A request that
    fails for a passing reason (connection, overload) is repeated `retries` times, waiting longer each time.

    `convention` is that of the model served, with the pixel budget it was trained on: images are then sent as large as
    they are to be read, so that a box in pixels means the same on both sides. Without it they are sent as they are.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 300.0,
        convention: Convention | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError("an endpoint sampler needs the openai package; install `polyground[serve]`") from error
        self._openai = openai
        self._url = _without_secrets(base_url)
        self._model = model
        self._key_env = api_key_env
        self._key = _key(api_key_env)
        self._convention = convention
        self._concurrency = concurrency
        self._client = openai.OpenAI(base_url=base_url, api_key=self._key or "none", max_retries=retries, timeout=timeout)

    def sample(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        n: int,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int,
        keys: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        """As the protocol says; how far the seed determines the completions is the server's affair."""
        options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        names = prompt_keys(prompts, keys)

        def group(i: int) -> list[Completion]:
            messages, extra = self._prepared(prompts[i])
            completions: list[Completion] = []
            # Some servers give one choice whatever is asked for: ask again for the rest, under another seed.
            while len(completions) < n:
                request = {
                    **options,
                    **extra,
                    "n": n - len(completions),
                    "seed": sample_seed(seed, names[i], len(completions)) % 2**31,
                }
                completions += self._ask(messages, request)
            return completions[:n]

        with ThreadPoolExecutor(max_workers=min(self._concurrency, max(1, len(prompts)))) as pool:
            return list(pool.map(group, range(len(prompts))))

    def _prepared(self, prompt: Sequence[Message]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages in the protocol's words, and what else the server must be told to read their images as we do."""
        paths = [path for message in prompt for path in message.images]
        pictures = {path: load_image(path) for path in paths}
        extra: dict[str, Any] = {}
        if self._convention is not None and paths:
            layout, budget = self._convention.layout, self._convention.pixel_budget(len(paths))
            for path, picture in pictures.items():
                canvas = canvas_of(path, picture.size, self._convention, images=len(paths))
                if layout.lasting and layout.fit(canvas.width, canvas.height) == canvas:
                    # As the image processors of these families resize: the server finds nothing left to do.
                    pictures[path] = picture.resize((canvas.width, canvas.height), Image.Resampling.BICUBIC)
                elif layout.fit(*picture.size) != canvas:
                    # vLLM hands these on to the image processor.
                    extra = {"extra_body": {"mm_processor_kwargs": layout.processor_options(budget)}}
        return [_to_openai(message, pictures) for message in prompt], extra

    def _ask(self, messages: list[dict[str, Any]], request: dict[str, Any]) -> list[Completion]:
        openai = self._openai
        try:
            # The client repeats connection errors, time-outs, 408, 409, 429 and 5xx, with exponential back-off.
            reply = self._client.chat.completions.create(model=self._model, messages=messages, **request)  # type: ignore[arg-type]
        except openai.APIConnectionError as error:
            raise ModelError(f"{self._url}: no answer from the endpoint; is the server up and the base URL right?") from error
        except openai.AuthenticationError:
            # Servers quote part of the key in this error: it is not passed on.
            where = f"check ${self._key_env}" if self._key_env else "name the variable that holds the key in `api_key_env`"
            raise ModelError(f"{self._url}: the endpoint refused the API key; {where}") from None
        except openai.APIStatusError as error:
            said = self._redacted(error.message)[:300]
            raise ModelError(f"{self._url}: the endpoint answered {error.status_code} for {self._model!r}: {said}") from None
        except (openai.APIError, ValueError) as error:
            said = self._redacted(str(error))[:300]
            raise ModelError(f"{self._url}: the endpoint's answer is not a chat completion ({said}); check the URL") from None
        choices = getattr(reply, "choices", None)
        if not choices:
            raise ModelError(f"{self._url}: the endpoint answered without a completion; is it an OpenAI-compatible server?")
        return [_completion(choice) for choice in choices]

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"the environment variable {variable} with the endpoint's API key is not set; export it first")
    return key


def _without_secrets(url: str) -> str:
    """The address as it may be shown: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _to_openai(message: Message, pictures: Mapping[Path, Image.Image]) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": "".join(str(part) for part in message.parts)}
    return {"role": message.role, "content": [_part(part, pictures) for part in message.parts]}


def _part(part: str | Path, pictures: Mapping[Path, Image.Image]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    # Encoded anew rather than sent as it lies there: upright and RGB, as a local model sees it.
    return {"type": "image_url", "image_url": {"url": to_data_uri(pictures[part])}}


def _completion(choice: Choice) -> Completion:
    text = choice.message.content or ""
    # Servers with a reasoning parser cut the thoughts out of the text.
    reasoning = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
    if reasoning and "<think>" not in text:
        text = f"<think>{reasoning}</think>{text}"
    return Completion(text=text, truncated=choice.finish_reason == "length")
