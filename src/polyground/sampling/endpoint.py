"""Sampling from servers that speak the OpenAI chat protocol (vLLM, SGLang, a hosted teacher). No torch is needed.

The API key is read from an environment variable when the sampler is built and is never written, logged or shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from PIL import Image

from polyground.config import EndpointConfig
from polyground.conventions import Canvas, Convention
from polyground.errors import BudgetError, ConfigError, EndpointError
from polyground.records import Completion, Message
from polyground.sampling import prompt_keys, sample_seed
from polyground.sampling.responses import Prices, Responses
from polyground.sampling.servers import Clock, ContentRefusedError, Patience, RefusedError, Reply, Servers, without_secrets
from polyground.tokens import PromptCounter
from polyground.vision import canvas_of, load_image, to_data_uri

logger = logging.getLogger("polyground")

Result = TypeVar("Result")

_SLACK = 4
"""Tokens by which a server's count of a prompt may differ from an exact one: a template may open the reasoning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What a server of one's own model is asked for beside the text. The words are vLLM's; others skip or refuse them."""

    scored: bool = False
    """Token ids and log-probabilities must come with every completion, for a policy to learn from."""
    stops: tuple[int, ...] = ()
    """Ids that end a completion, besides those the server knows."""
    banned: tuple[int, ...] = ()
    """Ids that are never sampled."""

    def body(self) -> dict[str, Any]:
        """Beside the protocol: control tokens stay in the text, as in a sampler of our own."""
        extra = {"return_token_ids": True, "skip_special_tokens": False}
        return extra | ({"stop_token_ids": list(self.stops)} if self.stops else {})

    def options(self) -> dict[str, Any]:
        """What a request says of them, in the words of the OpenAI interface."""
        scored = {"logprobs": True} if self.scored else {}
        return scored | ({"logit_bias": {str(number): -100 for number in self.banned}} if self.banned else {})


class EndpointSampler:
    """Samples from `model` at `base_url` (one address or several, each ending in `/v1`), `concurrency` prompts at a time.

    `api_key_env` names the environment variable that holds the key; None for servers that want none. A request that
    fails for a passing reason (connection, overload) is repeated `retries` times, waiting longer each time; `patience`
    says the rest, and stands in for `retries` and `timeout` where it is given.

    `convention` is that of the model served, with the pixel budget it was trained on: images are then sent as large as
    they are to be read, so that a box in pixels means the same on both sides. Without it they are sent as they are. The
    first answer's count of prompt tokens is then compared with our own, unless `check_prompt_tokens` is False.

    `tokens` says what is asked for beside the text. `version` names the weights behind `model` where that name may come to stand
    for others: answers of one version are not those of another. A prompt that a server's policy on contents forbids is answered
    by an empty text.

    `require_running` is called before every try; what it raises ends the sampling, where it is known that nobody will answer.

    Answers are kept in the folder `cache`, and one that is there is not asked for again. With `max_tokens` or `max_cost`
    (at these `prices`), no request is started once so much is spent; those under way are still kept. `section` is what a recipe
    calls these settings.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 300.0,
        patience: Patience | None = None,
        convention: Convention | None = None,
        check_prompt_tokens: bool = True,
        cache: Path | None = None,
        prices: Prices | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        section: str = "endpoint",
        tokens: Tokens | None = None,
        version: str | None = None,
        require_running: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ConfigError("an endpoint sampler needs at least one base URL")
        self._tokens, self._version = tokens, version
        self._convention = convention
        self._checks = check_prompt_tokens
        self._unchecked = check_prompt_tokens and convention is not None
        self._concurrency = concurrency
        self._prices = prices or Prices()
        self._max_tokens, self._max_cost = max_tokens, max_cost
        self._section = section
        if max_cost is not None and Responses(None).spending.cost(self._prices) is None:
            raise ConfigError("max_cost needs a price: give prompt_price or completion_price, per million tokens")
        self._servers = Servers(
            urls,
            model,
            key=api_key(api_key_env),
            key_env=api_key_env,
            patience=patience or Patience(retries=retries, timeout=timeout),
            clock=clock or Clock(),
            require_running=require_running,
        )
        self._urls = ", ".join(map(without_secrets, urls))
        self._responses = Responses(cache)
        self._reused = 0
        self._refused = 0
        self._expected: Mapping[tuple[Message, ...], Sequence[int]] = {}
        self._one_at_a_time = False
        """Whether the server was found to refuse several completions of one request."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first = asyncio.Lock()

    @classmethod
    def from_config(
        cls,
        base_url: str | Sequence[str],
        model: str,
        config: EndpointConfig,
        *,
        cache: Path,
        api_key_env: str | None = None,
        convention: Convention | None = None,
        section: str = "endpoint",
        tokens: Tokens | None = None,
        version: str | None = None,
        require_running: Callable[[], None] = lambda: None,
    ) -> Self:
        """As a recipe says; `cache` where it names no folder."""
        return cls(
            base_url,
            model,
            api_key_env=api_key_env,
            concurrency=config.concurrency,
            patience=Patience(retries=config.retries, timeout=config.timeout, outage=config.outage),
            convention=convention,
            check_prompt_tokens=config.check_prompt_tokens,
            cache=config.cache or cache,
            prices=Prices(prompt=config.prompt_price, completion=config.completion_price),
            max_tokens=config.max_tokens,
            max_cost=config.max_cost,
            section=section,
            tokens=tokens,
            version=version,
            require_running=require_running,
        )

    def turn_to(self, model: str, *, version: str | None = None) -> None:
        """Ask for another model of the same servers from now on, such as a newer adapter."""
        self._servers.model, self._version = model, version

    def expect(self, prompts: Mapping[tuple[Message, ...], Sequence[int]]) -> None:
        """The token ids that the next prompts are made of: a server that tells how it reads them must read them so."""
        if self._checks:
            self._expected = prompts

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
        """As the protocol says; how far the seed determines the completions is the server's affair.

        After a failure for good no further request is started; the answers under way are waited for and kept.
        """
        options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        return self._wait_for(self._sample(prompts, prompt_keys(prompts, keys), n=n, options=options, seed=seed))

    @property
    def usage(self) -> dict[str, Any]:
        """What was asked and spent. Requests, tokens and cost include the earlier attempts whose answers are kept."""
        return {
            **self._responses.spending.told(self._prices),
            "reused": self._reused,
            **({"refused": self._refused} if self._refused else {}),
            "tries": self._servers.tries,
            "failed_tries": dict(sorted(self._servers.failed.items())),
        }

    def close(self) -> None:
        """Let go of the connections and the cache; the sampler is of no use afterwards."""
        if self._loop is not None:
            self._wait_for(self._servers.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None
        self._responses.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run on the sampler's own loop, which lives in a thread: the caller may have a loop of its own, as a notebook has."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(self._loop,), name="endpoint", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            # Left early by Ctrl-C: what is under way is of no use to anybody.
            future.cancel()

    async def _sample(
        self, prompts: Sequence[Sequence[Message]], names: Sequence[str], *, n: int, options: Mapping[str, Any], seed: int
    ) -> list[list[Completion]]:
        self._servers.closing.clear()
        free = asyncio.Semaphore(self._concurrency)
        failed: list[int] = []

        async def group(i: int) -> list[Completion]:
            async with free:
                if failed:
                    return []
                found: list[Completion] | None = None
                try:
                    found = await self._group(prompts[i], names[i], n=n, options=options, seed=seed)
                finally:
                    if found is None:
                        # The others' answers are paid for: those under way are awaited, and no more are asked for.
                        failed.append(i)
                        self._servers.closing.set()
            return found

        groups = await asyncio.gather(*(group(i) for i in range(len(prompts))), return_exceptions=True)
        mishap = groups[failed[0]] if failed else None
        if isinstance(mishap, EndpointError):
            said = str(mishap)
            raise type(mishap)(f"{said}{'' if said.endswith('?') else '.'} {self._remedy()}") from None
        if isinstance(mishap, BaseException):
            raise mishap
        return [found for found in groups if not isinstance(found, BaseException)]

    def _remedy(self) -> str:
        if self._responses.folder is None:
            return "No answers are kept"
        return (
            f"The {len(self._responses)} completions answered so far are kept in {self._responses.folder}; "
            "the same command goes on from there and pays for none of them twice"
        )

    async def _group(
        self, prompt: Sequence[Message], name: str, *, n: int, options: Mapping[str, Any], seed: int
    ) -> list[Completion]:
        keys = await asyncio.to_thread(self._keys, prompt, name, n, options, seed)
        found = {number: kept for number, key in enumerate(keys) if (kept := self._responses.get(key)) is not None}
        self._reused += len(found)
        if len(found) < n:
            messages, extra, canvases = await asyncio.to_thread(self._prepared, prompt)
            # Some servers give one choice whatever is asked for: ask again for the rest, under another seed.
            while missing := [number for number in range(n) if number not in found]:
                self._keep_to_the_budget()
                request = {**options, **extra, "messages": messages, "seed": sample_seed(seed, name, missing[0]) % 2**31}
                try:
                    reply = await self._checked(request, len(missing), prompt, canvases)
                except ContentRefusedError as error:
                    # What a model answers badly is a value, and so is what it may not answer.
                    self._refused += 1
                    logger.warning("%s; taken for an empty answer", error)
                    reply = Reply(completions=(Completion(text=""),) * len(missing), prompt_tokens=0, completion_tokens=0)
                else:
                    self._require_tokens(prompt, reply)
                self._responses.put([keys[number] for number in missing], reply, self._servers.model)
                found |= dict(zip(missing, reply.completions, strict=False))
                if reply.prompt_tokens is None and (self._max_tokens is not None or self._max_cost is not None):
                    raise EndpointError(f"{self._urls}: reports no token usage, so that no budget can be kept; take it out")
        return [found[number] for number in range(n)]

    def _require_tokens(self, prompt: Sequence[Message], reply: Reply) -> None:
        """What a policy learns from must be what it said, to what it was asked."""
        if self._tokens is not None and self._tokens.scored:
            for completion in reply.completions:
                if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
                    told = f"{len(completion.token_ids)} token ids and {len(completion.logprobs)} log-probabilities"
                    raise EndpointError(
                        f"{self._urls}: gives {told} of a completion; a policy needs both: serve it with vLLM 0.10.2 or later"
                    )
        expected = self._expected.get(tuple(prompt))
        if expected is None or reply.prompt_ids is None or reply.prompt_ids == tuple(expected):
            return
        pairs = zip(expected, reply.prompt_ids, strict=False)
        place = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(expected), len(reply.prompt_ids)))
        raise EndpointError(
            f"{self._urls}: the endpoint reads a prompt otherwise than the policy, from token {place} on ({len(expected)} tokens "
            f"here, {len(reply.prompt_ids)} there); serve the folder that the policy starts from, with the chat template and "
            "the pixel limits it has, or set check_prompt_tokens: false to go on all the same"
        )

    def _keep_to_the_budget(self) -> None:
        spending = self._responses.spending
        cost = spending.cost(self._prices)
        if self._max_tokens is not None and spending.tokens >= self._max_tokens:
            spent = f"the budget of {self._max_tokens:,} tokens is spent ({spending.tokens:,})"
            raise BudgetError(f"{spent}; raise {self._section}.max_tokens")
        if self._max_cost is not None and cost is not None and cost >= self._max_cost:
            raise BudgetError(f"the budget of {self._max_cost:g} is spent ({cost:.4f}); raise {self._section}.max_cost")

    async def _checked(self, request: Mapping[str, Any], n: int, prompt: Sequence[Message], canvases: Sequence[Canvas]) -> Reply:
        """The answer; the very first one, which goes alone, must have read the prompt as we count it."""
        if self._convention is None or not (self._unchecked and canvases):
            return await self._ask(request, n)
        async with self._first:
            if not self._unchecked:
                return await self._ask(request, n)
            reply = await self._ask(request, n)
            if reply.prompt_tokens is not None:
                await asyncio.to_thread(self._compare, self._convention, prompt, canvases, reply.prompt_tokens)
            self._unchecked = False
            return reply

    async def _ask(self, request: Mapping[str, Any], n: int) -> Reply:
        if n > 1 and not self._one_at_a_time:
            try:
                return await self._servers.ask({**request, "n": n})
            except ContentRefusedError:
                raise
            except RefusedError:
                reply = await self._servers.ask({**request, "n": 1})
                # It was the number that it refused, not the prompt.
                self._one_at_a_time = True
                return reply
        return await self._servers.ask({**request, "n": 1})

    def _compare(self, convention: Convention, prompt: Sequence[Message], canvases: Sequence[Canvas], theirs: int) -> None:
        counter = PromptCounter(convention)
        ours = counter.count(prompt, canvases)
        slack = _SLACK if counter.exact else _SLACK + ours.total - ours.images
        if abs(ours.total - theirs) <= slack:
            return
        about = "" if counter.exact else f" (the text estimated: {counter.why_not_exact})"
        raise EndpointError(
            f"{self._urls}: the endpoint counts {theirs} tokens in the first prompt, {convention.path} gives {ours.total}"
            f"{about}, {ours.images} of them for {len(canvases)} images. Boxes would not mean the same on both sides: serve that "
            "very model, with the same limits of pixels, or set check_prompt_tokens: false to go on all the same"
        )

    def _keys(self, prompt: Sequence[Message], name: str, n: int, options: Mapping[str, Any], seed: int) -> list[str]:
        return sample_keys(
            prompt,
            model=self._servers.model,
            convention=self._convention,
            options=options,
            seed=seed,
            name=name,
            n=n,
            tokens=self._tokens,
            version=self._version,
        )

    def _prepared(self, prompt: Sequence[Message]) -> tuple[list[dict[str, Any]], dict[str, Any], list[Canvas]]:
        """The messages in the protocol's words, what else the server must be told to read their images as we do, and as what."""
        paths = [path for message in prompt for path in message.images]
        pictures = {path: load_image(path) for path in paths}
        body: dict[str, Any] = {} if self._tokens is None else self._tokens.body()
        canvases: dict[Path, Canvas] = {}
        if self._convention is not None and paths:
            layout, budget = self._convention.layout, self._convention.pixel_budget(len(paths))
            for path, picture in pictures.items():
                canvas = canvases[path] = canvas_of(path, picture.size, self._convention, images=len(paths))
                if layout.lasting and layout.fit(canvas.width, canvas.height) == canvas:
                    # As the image processors of these families resize: the server finds nothing left to do.
                    pictures[path] = picture.resize((canvas.width, canvas.height), Image.Resampling.BICUBIC)
                elif layout.fit(*picture.size) != canvas:
                    # vLLM hands these on to the image processor.
                    body["mm_processor_kwargs"] = layout.processor_options(budget)
        extra = ({} if self._tokens is None else self._tokens.options()) | ({"extra_body": body} if body else {})
        return [_to_openai(message, pictures) for message in prompt], extra, [canvases[path] for path in paths if canvases]


def sample_keys(
    prompt: Sequence[Message],
    *,
    model: str,
    convention: Convention | None,
    options: Mapping[str, Any],
    seed: int,
    name: str,
    n: int,
    tokens: Tokens | None = None,
    version: str | None = None,
) -> list[str]:
    """What the answers of a prompt are kept under: a digest of everything that decides them, images by their bytes; which server
    is asked does not."""
    images = [path for message in prompt for path in message.images]
    parts = [[m.role, [part if isinstance(part, str) else [_digest(part)] for part in m.parts]] for m in prompt]
    reading = None
    if convention is not None and images:
        reading = [repr(convention.layout), convention.pixel_budget(len(images))]
    asked: list[Any] = [model, parts, reading, dict(options), seed, name]
    if version is not None or tokens is not None:
        # The name of a served model of one's own says less than its version does.
        asked[0] = [version or model, None if tokens is None else asdict(tokens)]
    base = hashlib.sha256(json.dumps(asked, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return [_sample_key(base, number) for number in range(n)]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; raises ConfigError where that is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"the environment variable {variable} with the endpoint's API key is not set; export it first")
    return key


def _sample_key(base: str, number: int) -> str:
    return hashlib.blake2b(f"{base}/{number}".encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of an image file; what cannot be read is explained where it is loaded."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        load_image(path)
        raise


def _to_openai(message: Message, pictures: Mapping[Path, Image.Image]) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": "".join(str(part) for part in message.parts)}
    return {"role": message.role, "content": [_part(part, pictures) for part in message.parts]}


def _part(part: str | Path, pictures: Mapping[Path, Image.Image]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    # Encoded anew rather than sent as it lies there: upright and RGB, as a local model sees it.
    return {"type": "image_url", "image_url": {"url": to_data_uri(pictures[part])}}
