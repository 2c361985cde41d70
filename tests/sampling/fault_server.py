"""A chat server on loopback that misbehaves as a script says, one word per request, and well once the script is over.

It keeps what it was asked and what it was paid for, so that a test can tell what was asked twice.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from polyground.records import Message
from polyground.sampling.endpoint import EndpointSampler

FAULTS = (
    "429",
    "429-seconds",
    "429-date",
    "500",
    "503",
    "408",
    "409",
    "garbage",
    "html",
    "no-choices",
    "half",
    "nothing",
    "slow",
    "dies",
)
"""What a word of a script can be, besides `ok`, any other status, and `429-late`, which comes after another's answer."""

SLOW, PAUSE = 0.05, 0.01
"""Seconds that `slow` takes altogether and between two pieces."""


class FaultServer:
    """Answers from the request alone, so that two servers agree; `script` says what the first requests meet instead."""

    def __init__(
        self, script: Sequence[str] = (), *, most: int | None = None, usage: bool = True, text: str = "", port: int = 0
    ) -> None:
        self.script = list(script)
        self.most = most
        """The largest `n` it takes; a larger one is answered with 400. None takes any."""
        self.usage = usage
        self.text = text
        """What every completion says; empty for one that names what was asked."""
        self.says: Callable[[dict[str, Any], int], str] | None = None
        """Says of a request and the number of a completion what that one reads, instead of `text`."""
        self.prompt_tokens: int | None = None
        """What it counts in every prompt, whatever that is."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.met: list[str] = []
        """The word each request met."""
        self.answered: list[dict[str, Any]] = []
        """Requests that were answered whole: what a bill would list."""
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.hold: Callable[[], None] = lambda: None
        """Called before each answer."""
        self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def paid(self) -> list[tuple[str, int]]:
        """Prompt and seed of every answer given, sorted."""
        return sorted((json.dumps(request["messages"]), request["seed"]) for request in self.answered)


@contextmanager
def serving(script: Sequence[str] = (), **options: Any) -> Iterator[FaultServer]:
    server = FaultServer(script, **options)
    try:
        yield server
    finally:
        server.close()


def sample_texts(url: str, cache: Path, texts: Sequence[str]) -> None:
    """What a process does that a test kills; it stands here because a new process must import its module, and this is light."""
    prompts = [[Message("user", (text,))] for text in texts]
    EndpointSampler(url, "m", cache=cache, concurrency=1).sample(prompts, n=2, temperature=0.5, max_tokens=16, seed=1)


def chat(request: dict[str, Any], *, usage: bool = True, text: str | Callable[[dict[str, Any], int], str] = "") -> dict[str, Any]:
    """A calm answer: each text names the prompt, the seed and its number; a token is a word of text or 28 x 28 pixels."""
    said = " ".join(_texts(request))
    numbers = range(request.get("n", 1))
    texts = [text(request, n) if callable(text) else text or f"{said} {request['seed']} {n}" for n in numbers]
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for i, text in enumerate(texts)
        ],
    }
    if usage:
        prompt = len(said.split()) + sum(round(image.width * image.height / 28**2) for image in sent_images(request))
        completion = sum(len(text.split()) for text in texts)
        body["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return body


def _texts(request: dict[str, Any]) -> Iterator[str]:
    for message in request["messages"]:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def sent_images(request: dict[str, Any]) -> list[Image.Image]:
    """The pictures of the first message."""
    content = request["messages"][0]["content"]
    uris = [part["image_url"]["url"] for part in content if isinstance(part, dict) and part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                word = server.script.pop(0) if server.script else "ok"
                server.requests.append(request)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.met.append(word)
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
            try:
                server.hold()
                self._meet(word, request)
            finally:
                with server.lock:
                    server.under_way -= 1

        def _meet(self, word: str, request: dict[str, Any]) -> None:
            if word == "ok" and server.most is not None and request.get("n", 1) > server.most:
                word = "400"
            if word == "429-late":
                before = len(server.answered)
                while len(server.answered) == before and not server.released.wait(0.03):
                    pass
                time.sleep(0.03)
            if word[:3].isdigit():
                wait = {
                    "429-seconds": {"Retry-After": "7"},
                    "429-date": {"Retry-After": formatdate(time.time() + 9, usegmt=True)},
                }
                key = self.headers.get("Authorization", "")
                self._send(int(word[:3]), {"error": {"message": f"refused {key}", "code": word[4:] or None}}, wait.get(word, {}))
            elif word == "garbage":
                self._write(200, b'{"choices": [{"mess')
            elif word == "html":
                self._write(200, b"<html>busy</html>", {"Content-Type": "text/html"})
            elif word == "no-choices":
                self._send(200, {"hello": 1})
            elif word == "half":
                body = json.dumps(chat(request)).encode()
                self._head(200, len(body), {})
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
            elif word == "nothing":
                server.released.wait(20)
                self.close_connection = True
            elif word == "dies":
                # A reset, as from a process that was killed.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            else:
                self._answer(request, slowly=word == "slow")

        def _answer(self, request: dict[str, Any], *, slowly: bool) -> None:
            reply = chat(request, usage=server.usage, text=server.says or server.text)
            if server.prompt_tokens is not None:
                reply["usage"]["prompt_tokens"] = server.prompt_tokens
            body = json.dumps(reply).encode()
            self._head(200, len(body), {})
            pieces = 5 if slowly else 1
            step = len(body) // pieces + 1
            for start in range(0, len(body), step):
                time.sleep(PAUSE if slowly else 0)
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
            with server.lock:
                server.answered.append(request)

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self._write(status, json.dumps(body).encode(), headers or {})

        def _write(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self._head(status, len(body), headers or {})
            self.wfile.write(body)

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def finish(self) -> None:
            with suppress(OSError, ValueError):  # closed on purpose
                super().finish()

        def log_message(self, *args: object) -> None:
            pass

    return Handler
