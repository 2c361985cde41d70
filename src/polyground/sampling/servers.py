"""One chat request, put to several servers until one of them answers: whose turn it is, what is tried again, and when to stop.

What is asked and what becomes of the answer is not known here. Every try is made and counted here: the client repeats nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from polyground.errors import EndpointError, MissingLibraryError, visible
from polyground.extras import install_command
from polyground.records import Completion

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

logger = logging.getLogger("polyground")

_PASSING = (408, 409, 425, 429)
"""Statuses below 500 that a later try may not meet again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How often a request is tried, and how long a silent server is waited for. Times are seconds."""

    retries: int = 5
    """Tries of one request after the first, where the server is not plainly down."""
    timeout: float = 300.0
    """Of one try."""
    first_wait: float = 0.5
    """The longest wait before the second try; it doubles from try to try, and the wait is drawn from 0 up to it."""
    longest_wait: float = 60.0
    """The doubling ends here. A server that asks for more (Retry-After) gets it, up to `outage`."""
    failures: int = 5
    """In a row, after which a server rests. Then one try at a time asks whether it is back."""
    rest: float = 5.0
    """The first rest; every further one is twice as long, up to `longest_wait`."""
    outage: float = 600.0
    """With every server at rest, and none having answered for so long, sampling ends. At once where none ever answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Time and chance, replaced in tests."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    chance: Callable[[], float] = random.random
    """Uniform in [0, 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a server answered to one request."""

    completions: tuple[Completion, ...]
    """Not empty; perhaps fewer than were asked for."""
    prompt_tokens: int | None = None
    """None where the server does not report it."""
    completion_tokens: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    """The prompt as the server read it; None where it does not say."""


class RefusedError(EndpointError):
    """The request itself is at fault (400, 422): another try would meet the same."""


class ContentRefusedError(RefusedError):
    """The server's policy on contents forbids an answer to this prompt."""


class UnknownModelError(EndpointError):
    """The server has no model of that name (404)."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a try gave nothing, where another may."""

    kind: str
    said: str
    wait: float | None = None
    """What the server asked for."""


class _Clients(Protocol):
    """A connection to one server."""

    @property
    def chat(self) -> Any: ...

    async def close(self) -> None: ...


class _Server:
    """One address and how it has fared."""

    def __init__(self, url: str, client: _Clients) -> None:
        self.url = url
        self.client = client
        self.outstanding = 0
        self.given = 0
        self.answers = 0
        self.failures = 0
        """In a row."""
        self.rests = 0
        """In a row."""
        self.rested_at = 0.0
        self.wakes = 0.0
        self.said = ""
        self.probe: asyncio.Event | None = None
        """Set when the one try that asks whether it is back has ended."""


class Servers:
    """Puts requests to the server with the fewest outstanding; belongs to one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        key: str | None,
        key_env: str | None,
        patience: Patience,
        clock: Clock,
        require_running: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingLibraryError(f"an endpoint sampler needs the openai package; {install_command('serve')}") from error
        self._openai = openai
        self.model = model
        """Name of the model that the next requests are for."""
        self._key, self._key_env = key, key_env
        self._patience, self._clock = patience, clock
        self._require_running = require_running
        self._servers = [
            _Server(
                without_secrets(url),
                openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=patience.timeout),
            )
            for url in urls
        ]
        self._answered_at: float | None = None
        self.tries = 0
        self.failed: Counter[str] = Counter()
        """Tries that gave nothing, by reason."""
        self.closing = asyncio.Event()
        """Set when failed tries are no longer repeated, because the sampling has failed elsewhere."""

    async def ask(self, request: Mapping[str, Any]) -> Reply:
        """The answer of one of the servers. Raises EndpointError for a failure that will not pass or has lasted too long."""
        failures = 0
        while True:
            self._go_on()
            server = await self._turn()
            probing = self._rests(server)
            started, answers = self._clock.now(), server.answers
            if probing:
                server.probe = asyncio.Event()
            server.outstanding += 1
            server.given += 1
            self.tries += 1
            try:
                outcome = await self._try(server, request)
            finally:
                server.outstanding -= 1
                if probing and server.probe is not None:
                    server.probe.set()
                    server.probe = None
            if isinstance(outcome, Reply):
                self._note_answer(server)
                return outcome
            self.failed[outcome.kind] += 1
            self._note_failure(server, outcome, started)
            # What says nothing of this request: a busy server that answers others, or one that is known to be down.
            excused = (outcome.kind == "429" and server.answers > answers) or (probing and self._answered_at is not None)
            failures += not excused
            if failures > self._patience.retries:
                raise EndpointError(f"{server.url}: {outcome.said}" + (f" ({failures} tries)" if failures > 1 else ""))
            await self._nap(self._wait(failures, outcome))

    def _wait(self, failures: int, trouble: _Trouble) -> float:
        ceiling = min(self._patience.longest_wait, self._patience.first_wait * 2 ** max(0, failures - 1))
        jitter = ceiling * self._clock.chance()
        if trouble.wait is None:
            return jitter
        # Those who were told the same time to come back should not all come at once; another server may be asked meanwhile.
        return min(jitter, trouble.wait) + (trouble.wait if len(self._servers) == 1 else 0.0)

    async def _nap(self, seconds: float) -> None:
        """Wait, unless the sampling fails elsewhere meanwhile; then EndpointError."""
        over = [asyncio.ensure_future(self._clock.sleep(seconds)), asyncio.ensure_future(self.closing.wait())]
        try:
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in over:
                task.cancel()
        self._go_on()

    def _go_on(self) -> None:
        if self.closing.is_set():
            raise EndpointError("sampling has failed elsewhere")
        self._require_running()

    def _rests(self, server: _Server) -> bool:
        return server.failures >= self._patience.failures

    async def _turn(self) -> _Server:
        """The server to ask next; waits while none may be asked."""
        while True:
            now = self._clock.now()
            ready = [s for s in self._servers if s.wakes <= now and not (self._rests(s) and s.probe is not None)]
            if ready:
                return min(ready, key=lambda s: (self._rests(s), s.outstanding, s.given))
            self._stop_if_all_are_gone(now)
            probes = [s.probe for s in self._servers if s.probe is not None]
            if probes:
                await probes[0].wait()
            else:
                await self._nap(max(0.001, min(s.wakes for s in self._servers) - now))

    def _stop_if_all_are_gone(self, now: float) -> None:
        if not all(self._rests(s) for s in self._servers):
            return
        if any(s.probe is not None for s in self._servers):
            return
        if self._answered_at is None or now - self._answered_at > self._patience.outage:
            said = "; ".join(f"{s.url}: {s.said}" for s in self._servers)
            silent = "ever" if self._answered_at is None else f"for {now - self._answered_at:.0f} s"
            number = "the endpoint has not" if len(self._servers) == 1 else f"none of the {len(self._servers)} endpoints has"
            raise EndpointError(f"{number} answered {silent}: {said}")

    def _note_answer(self, server: _Server) -> None:
        self._answered_at = self._clock.now()
        server.answers += 1
        if self._rests(server):
            server.wakes = self._answered_at
        server.failures = server.rests = 0

    def _note_failure(self, server: _Server, trouble: _Trouble, started: float) -> None:
        now = self._clock.now()
        server.said = trouble.said
        if trouble.wait is not None:
            server.wakes = max(server.wakes, now + trouble.wait)
        # A busy server is not a broken one; and tries under way when the rest began tell nothing new.
        if trouble.kind == "429" or (self._rests(server) and started < server.rested_at):
            return
        server.failures += 1
        if self._rests(server):
            server.rested_at = now
            rest = min(self._patience.longest_wait, self._patience.rest * 2**server.rests)
            server.rests += 1
            server.wakes = max(server.wakes, now + rest)
            logger.warning("%s rests for %.0f s after %d failures in a row: %s", server.url, rest, server.failures, server.said)

    async def _try(self, server: _Server, request: Mapping[str, Any]) -> Reply | _Trouble:
        openai = self._openai
        try:
            async with asyncio.timeout(self._patience.timeout):
                reply = await server.client.chat.completions.create(model=self.model, **request)
        except (TimeoutError, openai.APITimeoutError):
            return _Trouble("timeout", f"no answer in {self._patience.timeout:g} s; is the server overloaded?")
        except openai.APIConnectionError:
            return _Trouble("connection", "no answer from the endpoint; is the server up and the base URL right?")
        except openai.APIStatusError as error:
            return self._status(server, error)
        except (openai.APIError, ValueError) as error:
            said = self._redacted(str(error))[:300]
            return _Trouble("garbage", f"the endpoint's answer is not a chat completion ({said}); check the URL")
        return _reply(reply)

    def _status(self, server: _Server, error: Any) -> _Trouble:
        """A passing trouble, or raises what will not pass. None of it shows the key, of which servers quote a part."""
        status: int = error.status_code
        said = self._redacted(error.message)[:300]
        if status == 401:
            where = f"check ${self._key_env}" if self._key_env else "name the variable that holds the key in `api_key_env`"
            raise EndpointError(f"{server.url}: the endpoint refused the API key; {where}") from None
        if status == 403:
            where = f"the key in ${self._key_env}" if self._key_env else "a request without a key"
            raise EndpointError(f"{server.url}: the endpoint answered 403: {where} has no right to {self.model!r}") from None
        said = f"the endpoint answered {status} for {self.model!r}: {said}"
        if getattr(error, "code", None) == "insufficient_quota":
            raise EndpointError(f"{server.url}: {said}; the account has no credit left: add some") from None
        if status in _PASSING or status >= 500:
            wait = _asked_wait(error.response.headers, self._clock.wall())
            return _Trouble(str(status), said, None if wait is None else min(wait, self._patience.outage))
        raise _refusal(server, status, said, forbidden=_forbids_content(error)) from None

    def _redacted(self, text: str) -> str:
        return visible(text.replace(self._key, "***") if self._key else text)

    async def close(self) -> None:
        for server in self._servers:
            await server.client.close()


def _refusal(server: _Server, status: int, said: str, *, forbidden: bool) -> EndpointError:
    if status in (400, 422):
        return (ContentRefusedError if forbidden else RefusedError)(f"{server.url}: {said}")
    if status == 404:
        return UnknownModelError(f"{server.url}: {said}; check the base URL (it ends in /v1) and the model's name there")
    return EndpointError(f"{server.url}: {said}")


_FORBIDDEN = re.compile(r"content[_ -]?(?:filter|policy|management)|responsible_?ai|data_inspection_failed", re.IGNORECASE)
"""How OpenAI, Azure and DashScope say that a prompt offends their policy."""


def _forbids_content(error: Any) -> bool:
    told = [getattr(error, "code", None), getattr(error, "type", None)]
    body = getattr(error, "body", None)
    if isinstance(body, Mapping):
        inner = body.get("innererror")
        told.append(inner.get("code") if isinstance(inner, Mapping) else None)
    return any(isinstance(word, str) and _FORBIDDEN.search(word) for word in told)


def without_secrets(url: str) -> str:
    """The address as it may be shown: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _asked_wait(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds until the server wants to be asked again: `Retry-After` in seconds or as a date, or in milliseconds."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        text = headers.get("retry-after")
        if text is None:
            return None
        if text.strip().replace(".", "", 1).isdigit():
            return float(text)
        return max(0.0, parsedate_to_datetime(text).timestamp() - wall)
    except (ValueError, OverflowError):
        return None


def _reply(reply: Any) -> Reply | _Trouble:
    """The answer as our own value; a body of another shape is a trouble."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or any(getattr(choice, "message", None) is None for choice in choices):
        return _Trouble("garbage", "the endpoint answered without a completion; is it an OpenAI-compatible server?")
    try:
        completions = [_completion(choice) for choice in choices]
    except (TypeError, ValueError):
        return _Trouble("garbage", "the endpoint's tokens are no numbers; is it an OpenAI-compatible server?")
    if not all(isinstance(completion.text, str) for completion in completions):
        return _Trouble("garbage", "the endpoint answered with something that is no text; is it an OpenAI-compatible server?")
    usage = getattr(reply, "usage", None)
    return Reply(
        completions=tuple(completions),
        prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
        completion_tokens=_count(getattr(usage, "completion_tokens", None)),
        prompt_ids=_ids(getattr(reply, "prompt_token_ids", None)),
    )


def _ids(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(isinstance(number, int) for number in value) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _completion(choice: Choice) -> Completion:
    text = getattr(choice.message, "content", None) or ""
    # Servers with a reasoning parser cut the thoughts out of the text.
    reasoning = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
    if reasoning and "<think>" not in text:
        text = f"<think>{reasoning}</think>{text}"
    scored = getattr(getattr(choice, "logprobs", None), "content", None) or []
    return Completion(
        text=text,
        # vLLM tells them when asked.
        token_ids=_ids(getattr(choice, "token_ids", None)) or (),
        logprobs=tuple(float(token.logprob) for token in scored),
        truncated=getattr(choice, "finish_reason", None) == "length",
    )
