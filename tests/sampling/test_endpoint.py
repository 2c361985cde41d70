"""The endpoint sampler against a small server in this process."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from polyground.conventions import Convention, Layout, SmartResize, Splits, Tiles
from polyground.errors import ConfigError, DataError, ModelError
from polyground.records import Completion, Message
from polyground.sampling.endpoint import EndpointSampler
from toys import write_image

PROMPT = [Message("user", ("where?",))]
KEY = "sk-very-secret"

Reply = Callable[[dict], tuple[int, dict]]


class Server:
    """Answers every chat request by calling `reply`, and remembers what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.requests: list[dict] = []
        self.keys: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                server.keys.append(self.headers["Authorization"])
                status, body = server.reply(request)
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.reply = reply
        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(lambda request: (200, _chat(*["fine"] * request["n"])))
    yield server
    server.http.shutdown()
    server.http.server_close()


def _chat(*texts: str, finish: str = "stop", **message: str) -> dict:
    choices = [
        {"index": i, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        for i, text in enumerate(texts)
    ]
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}


def _sample(sampler: EndpointSampler, prompt: list[Message] = PROMPT, n: int = 2) -> list[Completion]:
    [group] = sampler.sample([prompt], n=n, temperature=0.5, top_p=0.9, max_tokens=16, seed=1)
    return group


def test_a_group_is_one_request_with_all_settings(server: Server) -> None:
    assert _sample(EndpointSampler(server.url, "m")) == [Completion(text="fine")] * 2
    [request] = server.requests
    assert {k: request[k] for k in ("model", "n", "temperature", "top_p", "max_tokens")} == {
        "model": "m",
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 16,
    }


def test_images_are_sent_as_data_uris_in_their_place(server: Server, tmp_path: Path) -> None:
    _sample(EndpointSampler(server.url, "m"), [Message("user", ("a", write_image(tmp_path / "x.png"), "b"))])
    parts = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")


def _sent(request: dict) -> list[Image.Image]:
    uris = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


PIXELS = SmartResize(28, 28 * 28, 56 * 84)
TILES = Tiles(tile=56, min_tiles=1, max_tiles=4, tokens_per_tile=4)
SPLITS = Splits(longest=112, tile=56, tokens_per_tile=4)


@pytest.mark.parametrize(
    ("layout", "budget", "sizes", "options"),
    [
        pytest.param(PIXELS, None, [(112, 28), (56, 56)], None, id="pixels"),
        pytest.param(PIXELS, 2 * 28 * 28, [(28, 28), (28, 28)], None, id="pixels-shared-budget"),
        pytest.param(TILES, None, [(168, 56), (56, 56)], None, id="tiles"),
        pytest.param(TILES, 2 * 2 * 56 * 56, [(112, 56), (56, 56)], None, id="tiles-shared-budget"),
        pytest.param(SPLITS, None, [(300, 90), (60, 60)], None, id="splits"),
        pytest.param(SPLITS, 2 * 56 * 56, [(300, 90), (60, 60)], SPLITS.processor_options(56 * 56), id="splits-shared-budget"),
    ],
)
def test_images_are_sent_as_the_convention_of_the_served_model_reads_them(
    server: Server, tmp_path: Path, layout: Layout, budget: int | None, sizes: list[tuple[int, int]], options: dict | None
) -> None:
    convention = Convention(model_type="m", native=None, layout=layout, per_mille=False, max_pixels_total=budget)
    shapes = [(300, 90), (60, 60)]
    images = [write_image(tmp_path / f"{width}.png", width=width, height=height) for width, height in shapes]
    _sample(EndpointSampler(server.url, "m", convention=convention), [Message("user", (*images, "where?"))], n=1)
    [request] = server.requests
    sent = _sent(request)
    assert [image.size for image in sent] == sizes
    assert request.get("mm_processor_kwargs") == options
    if options is None:
        # A server with the folder's own limits makes of what it is sent what the grids here were made for.
        assert [layout.fit(*image.size) for image in sent] == convention.canvases(shapes)


def test_an_image_the_served_model_cannot_take_is_named(server: Server, tmp_path: Path) -> None:
    thin = write_image(tmp_path / "thin.png", width=300, height=1)
    convention = Convention(model_type="m", native=None, layout=PIXELS)
    with pytest.raises(DataError, match=r"thin\.png"):
        _sample(EndpointSampler(server.url, "m", convention=convention), [Message("user", (thin, "where?"))])


def test_prompts_come_back_in_order(server: Server) -> None:
    server.reply = lambda request: (200, _chat(request["messages"][0]["content"]))
    prompts = [[Message("user", (str(i),))] for i in range(20)]
    sampled = EndpointSampler(server.url, "m").sample(prompts, n=1, temperature=1.0, max_tokens=1, seed=0)
    assert [group[0].text for group in sampled] == [str(i) for i in range(20)]


def test_a_server_that_gives_one_choice_at_a_time_is_asked_again_under_another_seed(server: Server) -> None:
    server.reply = lambda request: (200, _chat("one"))
    assert len(_sample(EndpointSampler(server.url, "m"), n=3)) == 3
    assert len({request["seed"] for request in server.requests}) == 3


def test_a_cut_completion_is_truncated_and_split_off_reasoning_is_put_back(server: Server) -> None:
    server.reply = lambda request: (200, _chat("<answer>A</answer>", finish="length", reasoning_content="hm"))
    [completion] = _sample(EndpointSampler(server.url, "m"), n=1)
    assert completion == Completion(text="<think>hm</think><answer>A</answer>", truncated=True)


def test_a_passing_failure_is_repeated(server: Server) -> None:
    server.reply = lambda request: (503, {}) if len(server.requests) < 3 else (200, _chat("late"))
    assert _sample(EndpointSampler(server.url, "m"), n=1)[0].text == "late"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        pytest.param(401, {"error": {"message": f"Incorrect key {KEY}"}}, r"refused the API key; check \$SECRET", id="key"),
        pytest.param(404, {"error": {"message": f"no model m for {KEY}"}}, r"answered 404 for 'm'.*\*\*\*", id="model"),
    ],
)
def test_a_failure_for_good_is_explained_and_the_key_is_not_in_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, body: dict, message: str
) -> None:
    monkeypatch.setenv("SECRET", KEY)
    server.reply = lambda request: (status, body)
    with pytest.raises(ModelError, match=message) as raised:
        _sample(EndpointSampler(server.url, "m", api_key_env="SECRET"))
    assert KEY not in str(raised.value)
    assert server.keys == [f"Bearer {KEY}"]


def test_a_server_of_another_kind_is_recognised(server: Server) -> None:
    server.reply = lambda request: (200, {"hello": 1})
    with pytest.raises(ModelError, match="without a completion; is it an OpenAI-compatible server"):
        _sample(EndpointSampler(server.url, "m", retries=0))


def test_a_dead_endpoint_is_named_without_its_password() -> None:
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1: no answer") as raised:
        _sample(EndpointSampler("http://user:pass@127.0.0.1:9/v1", "m", retries=0))
    assert "pass@" not in str(raised.value)


def test_a_key_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        EndpointSampler("http://127.0.0.1:9/v1", "m", api_key_env="NO_SUCH_VARIABLE")
