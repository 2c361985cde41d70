"""A vLLM server of one's own: started on loopback, waited for, stopped; and the adapters of any vLLM server.

vLLM lives in an environment of its own and is only ever talked to. What it samples is `endpoint`'s business.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from polyground.config import VllmConfig
from polyground.errors import ConfigError, EndpointError, StorageError
from polyground.sampling import guard
from polyground.sampling.servers import without_secrets

logger = logging.getLogger("polyground")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM can be started for."""

_TAIL = 2000
"""Characters of the server's log that an error quotes."""

_GRACE = 1.0
"""Seconds between a server's last word and its end, which is seen only when its guard has ended too."""


class VllmServer:
    """vLLM serving one model folder as `name` until it is closed; use it in a `with`. What it says goes to the file `log`."""

    def __init__(
        self, model: Path, config: VllmConfig, *, name: str, log: Path, dtype: str = "auto", adapter_rank: int | None = None
    ) -> None:
        self.name = name
        self._config, self._log = config, log
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        self.url = f"{self._address}/v1"
        command = server_command(model, config, name=name, port=port, dtype=dtype, adapter_rank=adapter_rank)
        environment = {**os.environ, **config.environment}
        if adapter_rank is not None:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                self._process = subprocess.Popen(  # noqa: S603 - the recipe's own interpreter
                    [sys.executable, guard.__file__, *command],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
        except OSError as error:
            raise StorageError(f"{log}: cannot be written ({error.strerror}); make room for the server's log") from error
        logger.warning("starting vLLM on %s at %s; it says more in %s", model, self.url, log)
        with ExitStack() as unready:
            unready.callback(self.close)
            self._wait_until_ready()
            unready.pop_all()

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + self._config.start_timeout
        while not _is_healthy(self._address):
            if (code := self._process.poll()) is not None:
                raise EndpointError(
                    f"vLLM ended ({code}) before it was ready; is it installed for {_interpreter(self._config)} "
                    f"(servers.vllm.python)? {self._last_words()}"
                )
            if time.monotonic() > until:
                raise EndpointError(
                    f"vLLM was not ready after {self._config.start_timeout:g} s; raise servers.vllm.start_timeout. "
                    f"{self._last_words()}"
                )
            time.sleep(0.5)

    def require_running(self) -> None:
        """Raise EndpointError where the server has ended by itself: nobody starts it again, so that no wait helps."""
        if (code := self._process.poll()) is not None:
            raise EndpointError(f"the vLLM server that was started for this has ended ({code}); {self._log} says why")

    def _last_words(self) -> str:
        try:
            said = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        except OSError:
            said = ""
        return f"The end of {self._log}:\n{said}"

    def close(self) -> None:
        """Stop the server and wait until it is gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(guard.PATIENCE + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def server_command(
    model: Path, config: VllmConfig, *, name: str, port: int, dtype: str = "auto", adapter_rank: int | None = None
) -> list[str]:
    """What starts vLLM's OpenAI-compatible server.

    Log-probabilities are told at the sampling temperature, which is what a policy compares with its own.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if adapter_rank is not None:
        options |= {"enable_lora": True, "max_lora_rank": lora_rank(adapter_rank), "max_cpu_loras": 2}
    own = {name.strip("-").replace("-", "_"): value for name, value in config.options.items()}
    return [
        _interpreter(config),
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name),
        *("--host", "127.0.0.1", "--port", str(port), "--logprobs-mode", "processed_logprobs"),
        *(word for option, value in (options | own).items() for word in _words(option, value)),
    ]


def lora_rank(rank: int) -> int:
    """The least rank vLLM can be started with that holds adapters of this one; raises ConfigError above its largest."""
    fitting = [allowed for allowed in RANKS if allowed >= rank]
    if not fitting:
        raise ConfigError(f"grpo.lora_r {rank}: vLLM serves ranks up to {RANKS[-1]}; lower it, or use rollout: local")
    return fitting[0]


def _words(option: str, value: Any) -> list[str]:
    flag = f"--{option.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, json.dumps(value) if isinstance(value, list | dict) else str(value)]


def _interpreter(config: VllmConfig) -> str:
    return sys.executable if config.python is None else str(config.python)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Adapters:
    """LoRA adapters that vLLM servers are told to load and to let go of while they run.

    The servers read an adapter's folder themselves: on another machine it must be there under the same path.
    """

    def __init__(
        self, urls: Sequence[str], *, key: str | None, timeout: float = 300.0, require_running: Callable[[], None] = lambda: None
    ) -> None:
        if odd := [url for url in urls if urlsplit(url).scheme not in ("http", "https")]:
            raise ConfigError(f"{without_secrets(odd[0])}: not an address of a server; write http://HOST:PORT/v1")
        self._urls, self._timeout = [url.rstrip("/") for url in urls], timeout
        self._require_running = require_running
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def names(self) -> list[set[str]]:
        """What each server answers as, adapters among it."""
        return [{str(model.get("id")) for model in self._ask(i, "GET", "models").get("data", [])} for i in range(len(self._urls))]

    def load(self, name: str, folder: Path) -> None:
        """Make every server answer as `name` that does not yet."""
        for i, known in enumerate(self.names()):
            if name not in known:
                self._ask(i, "POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})

    def unload(self, *, prefix: str, but: str | None = None) -> None:
        """Let every server forget the adapters whose names begin so, except one."""
        for i, known in enumerate(self.names()):
            for name in sorted(known):
                if name.startswith(prefix) and name != but:
                    self._ask(i, "POST", "unload_lora_adapter", {"lora_name": name})

    def wait_for(self, name: str) -> None:
        """Until every server answers as `name`, which another process loads; raises EndpointError when it does not come."""
        until = time.monotonic() + self._timeout
        while not all(name in known for known in self.names()):
            if time.monotonic() > until:
                raise EndpointError(f"the adapter {name} was not loaded in {self._timeout:g} s by the first process of the run")
            time.sleep(0.1)

    def _ask(self, server: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        url = without_secrets(self._urls[server])
        content = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._urls[server]}/{path}", content, self._headers, method=method)  # noqa: S310 - see __init__
        try:
            with _opener(self._urls[server]).open(request, timeout=self._timeout) as answer:
                status, text = answer.status, answer.read().decode(errors="replace")
        except HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            time.sleep(_GRACE)
            self._require_running()
            raise EndpointError(f"{url}/{path}: no answer ({type(error).__name__}); is the server up?") from None
        if status == 404 and path == "load_lora_adapter" and "adapter" not in text.lower():
            raise EndpointError(
                f"{url}: loads no adapters while it runs; start vLLM with --enable-lora and with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        if status == 401:
            raise EndpointError(f"{url}: refused the API key; check the variable in api_key_env")
        if status != 200:
            said = " ".join(text.split())[:300]
            raise EndpointError(f"{url}/{path}: answered {status} for {dict(body or {})}: {said}")
        try:
            told = json.loads(text) if path == "models" else {}
        except ValueError:
            raise EndpointError(f"{url}/{path}: the answer is not JSON; is it an OpenAI-compatible server?") from None
        return told if isinstance(told, dict) else {}


def _opener(url: str) -> OpenerDirector:
    """Loopback is not reached through a proxy."""
    near = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return build_opener(ProxyHandler({})) if near else build_opener()


def _is_healthy(address: str) -> bool:
    try:
        with _opener(address).open(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False
