"""A server of one's own, by a small stand-in for vLLM's program: started, waited for, and gone whatever ends the stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_server import serving

from polyground.config import Recipe, ServersConfig, VllmConfig
from polyground.errors import ConfigError, EndpointError
from polyground.sampling.served import serving_of
from polyground.sampling.vllm import Adapters, VllmServer, lora_rank, server_command
from polyground.stages import reject, world

PROGRAM = """#!{python}
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open({pids!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
print("reading weights", os.environ.get("FLAVOUR"), flush=True)
{deed}
"""
SERVES = """
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

ANSWERS_TWICE = """
import json
from http.server import ThreadingHTTPServer
left = [1, 1]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        if not left:
            print("the engine is dead", flush=True)
            os._exit(7)
        left.pop()
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "none"}}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        told = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "usage": usage}
        body = json.dumps({**told, "choices": [{**choice, "index": i} for i in range(asked["n"])]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def program(folder: Path, deed: str, **options: Any) -> VllmConfig:
    """An interpreter that does this whatever module it is to run."""
    path = folder / "python"
    path.write_text(PROGRAM.format(python=sys.executable, pids=str(folder / "pids"), deed=deed), encoding="utf-8")
    path.chmod(0o755)
    return VllmConfig(python=path, **options)


def alive(folder: Path) -> list[int]:
    """Of the program and its child, those still there a moment later."""
    found = [int(pid) for pid in (folder / "pids").read_text().split()]
    until = time.monotonic() + 15
    while (left := [pid for pid in found if _runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_there_inside_and_gone_after_with_its_children(tmp_path: Path) -> None:
    config = program(tmp_path, SERVES, environment={"FLAVOUR": "vanilla"})
    log = tmp_path / "logs" / "vllm.log"
    with VllmServer(tmp_path, config, name="sft", log=log) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.name == "sft"
        assert log.read_text() == "reading weights vanilla\n"
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        pytest.param(
            "sys.exit('no module named vllm')", r"(?s)ended \(1\).*servers\.vllm\.python.*no module named vllm", id="dies"
        ),
        pytest.param("time.sleep(60)", "not ready after 0.5 s; raise servers.vllm.start_timeout", id="never-ready"),
    ],
)
def test_a_server_that_does_not_come_up_is_explained_and_leaves_nothing(tmp_path: Path, deed: str, message: str) -> None:
    config = program(tmp_path, deed, start_timeout=0.5 if "sleep" in deed else 30)
    with pytest.raises(EndpointError, match=message):
        VllmServer(tmp_path, config, name="sft", log=tmp_path / "vllm.log")
    if (tmp_path / "pids").exists():
        assert alive(tmp_path) == []


def test_a_stage_whose_server_ends_stops_at_once_and_goes_on_with_a_new_one(tmp_path: Path) -> None:
    questions = 6
    recipe = Recipe.model_validate(
        {
            "out": str(tmp_path / "out"),
            "world": {"train": 0, "rl": questions, "validation": 0, "test": 0, "ood": 0, "perception": 0},
            "reject": {"sampler": "vllm", "num_generations": 2, "min_pass_rate": None, "max_pass_rate": None},
            "grpo": {"start": "base"},
            "servers": {
                "vllm": {"python": str(program(tmp_path, ANSWERS_TWICE).python)},
                # More patience than the test has.
                "endpoint": {"concurrency": 1, "check_prompt_tokens": False, "retries": 1000},
            },
        }
    )
    world.run(recipe)
    log = tmp_path / "out" / "logs" / "vllm-reject-base.log"
    for asked in (2, 4):
        with pytest.raises(EndpointError, match=rf"has ended \(7\); {log} says why.*answers/reject; the same command goes on"):
            reject.run(recipe)
        assert log.read_text().count("the engine is dead") == asked / 2
    assert reject.run(recipe)["endpoint"]["requests"] == questions


def test_an_adapter_for_a_server_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    with VllmServer(tmp_path, program(tmp_path, SERVES), name="sft", log=tmp_path / "log") as server:
        adapters = Adapters([server.url], key=None, require_running=server.require_running)
        os.kill(int((tmp_path / "pids").read_text().split()[0]), signal.SIGKILL)
        with pytest.raises(EndpointError, match=r"has ended \(137\)"):
            adapters.names()


def test_a_killed_stage_takes_its_server_along(tmp_path: Path) -> None:
    program(tmp_path, SERVES)
    code = f"""
import os, signal
from pathlib import Path
from polyground.config import VllmConfig
from polyground.sampling.vllm import VllmServer
folder = Path({str(tmp_path)!r})
server = VllmServer(folder, VllmConfig(python=folder / "python"), name="m", log=folder / "log")
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert alive(tmp_path) == []


def test_the_recipes_options_become_arguments_and_the_temperature_is_in_the_log_probabilities() -> None:
    config = VllmConfig(
        python=Path("py"), options={"max_model_len": 64, "limit_mm_per_prompt": {"image": 6}, "enforce_eager": True}
    )
    words = server_command(Path("folder"), config, name="sft", port=1, dtype="float32", adapter_rank=20)
    assert words[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    text = " ".join(words)
    for part in (
        "--model folder --served-model-name sft",
        "--host 127.0.0.1 --port 1",
        "--logprobs-mode processed_logprobs",
        "--dtype float32",
        "--enable-lora --max-lora-rank 32",
        '--max-model-len 64 --limit-mm-per-prompt {"image": 6} --enforce-eager',
    ):
        assert part in text
    # What is not wanted is said so, or left to vLLM.
    other = VllmConfig(options={"enable_prefix_caching": False, "dtype": None})
    assert server_command(Path("folder"), other, name="sft", port=1)[-1] == "--no-enable-prefix-caching"
    assert "--dtype" not in server_command(Path("folder"), other, name="sft", port=1)


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (64, 64), (65, 128), (512, 512)])
def test_a_server_is_started_for_the_next_rank_it_knows(rank: int, served: int) -> None:
    assert lora_rank(rank) == served


def test_a_rank_beyond_the_largest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"grpo\.lora_r 513"):
        lora_rank(513)


def test_what_the_stage_sets_itself_is_not_for_the_recipe() -> None:
    with pytest.raises(ValueError, match="enable_lora, port: set by the stage itself"):
        VllmConfig(options={"port": 8000, "enable_lora": True, "seed": 0})


def test_an_endpoint_is_what_the_recipe_names(tmp_path: Path) -> None:
    servers = ServersConfig.model_validate({"sft": {"base_url": ["http://a/v1", "http://b/v1"], "model": "m"}})
    options: dict[str, Any] = {"model": tmp_path, "dtype": "float32", "log": tmp_path / "log"}
    with serving_of("endpoint", servers, "sft", **options) as served:
        assert (served.urls, served.model, served.api_key_env) == (("http://a/v1", "http://b/v1"), "m", None)
    with pytest.raises(ConfigError, match=r"servers\.rl: say where"), serving_of("endpoint", servers, "rl", **options):
        pass


@pytest.mark.parametrize(
    ("url", "message"),
    [
        pytest.param("http://user:secret@127.0.0.1:9/v1", r"^http://127\.0\.0\.1:9/v1/models: no answer", id="dead"),
        pytest.param(None, r"/models: answered 501", id="no-such-route"),
    ],
)
def test_a_server_that_cannot_be_asked_for_adapters_is_named(url: str | None, message: str) -> None:
    with serving() as server, pytest.raises(EndpointError, match=message) as raised:
        Adapters([url or server.url], key="sk-secret").names()
    assert "secret" not in str(raised.value)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an address of a server"):
        Adapters(["file:///etc/passwd"], key=None)
