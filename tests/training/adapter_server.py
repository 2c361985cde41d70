"""A server on loopback that does with a toy model what vLLM does with a large one: it samples adapters told to it by name.

It speaks vLLM's words (token ids, log-probabilities, loading and unloading of adapters) and keeps what it was told.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from polyground.batches import pack_group
from polyground.models import Loaded, load_model
from polyground.records import Completion, Message
from polyground.sampling.local import LocalSampler
from polyground.training.scores import score_group


class AdapterServer:
    """Serves the model folder as `base`, and adapters of it."""

    def __init__(
        self,
        folder: Path,
        images: Path,
        *,
        updates: bool = True,
        before_temperature: bool = False,
        misreads: bool = False,
        forgets_after: int | None = None,
    ) -> None:
        self.folder, self.images = folder, images
        self.updates = updates
        """Whether adapters may be loaded while it runs."""
        self.before_temperature = before_temperature
        """Whether it tells log-probabilities as vLLM does unless told otherwise."""
        self.misreads = misreads
        """Whether it reads one token more than there is in every prompt."""
        self.forgets_after = forgets_after
        """The number of answers after which it loses its adapters once, as a server that is started anew."""
        self.adapters: dict[str, Loaded] = {}
        self.told: list[tuple[str, str]] = []
        """What was done with which adapter: load, unload."""
        self.answered: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def loaded(self) -> list[str]:
        return [name for what, name in self.told if what == "load"]

    def load(self, name: str, path: Path) -> None:
        plain = load_model(self.folder)
        self.adapters[name] = replace(plain, model=PeftModel.from_pretrained(plain.model, str(path)).eval())
        self.told.append(("load", name))

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        model, messages = self.adapters[request["model"]], [self._read(message) for message in request["messages"]]
        [completions] = LocalSampler(model).sample(
            [messages],
            n=request["n"],
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=request["max_tokens"],
            seed=request["seed"],
            keys=[""],
        )
        prompt = model.family.encode(messages)
        ids = prompt.input_ids.tolist() + [0] * self.misreads
        self.answered.append(request)
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "prompt_token_ids": ids,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": sum(len(c.token_ids) for c in completions)},
            "choices": [
                {
                    "index": i,
                    "finish_reason": "length" if completion.truncated else "stop",
                    "message": {"role": "assistant", "content": completion.text},
                    "token_ids": list(completion.token_ids),
                    "logprobs": {"content": [{"token": "", "logprob": p, "top_logprobs": []} for p in logprobs]},
                }
                for i, (completion, logprobs) in enumerate(
                    zip(completions, self._logprobs(model, prompt, completions, request["temperature"]), strict=True)
                )
            ],
        }

    def _logprobs(self, model: Loaded, prompt: Any, completions: Sequence[Completion], temperature: float) -> list[list[float]]:
        """Of all tokens: what a random model would have said of those it may not sample is no small part."""
        packed = pack_group(prompt, [completion.token_ids for completion in completions])
        with torch.no_grad():
            features = model.family.encode_images(model.model, prompt)
            temperature = 1.0 if self.before_temperature else temperature
            scores = score_group(model.model, model.family, packed, features, temperature=temperature)
        return [row.tolist() for row in scores.logprobs_N.split(list(packed.lengths))]

    def _read(self, message: dict[str, Any]) -> Message:
        parts: list[str | Path] = []
        for part in [message["content"]] if isinstance(message["content"], str) else message["content"]:
            if isinstance(part, str) or part["type"] == "text":
                parts.append(part if isinstance(part, str) else part["text"])
                continue
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            path = self.images / f"{hash(data)}.png"
            path.write_bytes(data)
            parts.append(path)
        return Message(message["role"], tuple(parts))


@contextmanager
def serving_adapters(folder: Path, images: Path, **options: Any) -> Iterator[AdapterServer]:
    images.mkdir(exist_ok=True)
    server = AdapterServer(folder, images, **options)
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def _handler(server: AdapterServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in ("base", *server.adapters)]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                self._meet(self.path.rpartition("/")[2], request)

        def _meet(self, verb: str, request: dict[str, Any]) -> None:
            if verb == "completions":
                if server.forgets_after == len(server.answered):
                    server.forgets_after = None
                    server.adapters.clear()
                if request["model"] not in server.adapters:
                    self._send(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
                else:
                    self._send(200, server.answer(request))
            elif not server.updates:
                self._send(404, {"detail": "Not Found"})
            elif verb == "load_lora_adapter" and request["lora_name"] not in server.adapters:
                server.load(request["lora_name"], Path(request["lora_path"]))
                self._send(200, {})
            elif verb == "unload_lora_adapter" and server.adapters.pop(request["lora_name"], None):
                server.told.append(("unload", request["lora_name"]))
                self._send(200, {})
            else:
                self._send(400, {"error": {"message": f"{verb}: {request}"}})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    return Handler
