"""What the endpoint sampler makes of a server that misbehaves: the calm server's answers, and nothing paid twice."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import FAULTS, FaultServer, sample_texts, sent_images, serving

from polyground.conventions import Convention, SmartResize, load_convention
from polyground.errors import BudgetError, ConfigError, EndpointError
from polyground.records import Completion, Message
from polyground.sampling.endpoint import EndpointSampler
from polyground.sampling.responses import Prices, Responses
from polyground.sampling.servers import Clock, Patience, Reply
from polyground.tokens import PromptCounter
from toys import write_image

TEXTS = [f"question {i}" for i in range(6)]
PROMPTS = [[Message("user", (text,))] for text in TEXTS]
CANARY = "sk-canary-0123456789"


class FakeTime:
    """Sleeps take no time, and are written down."""

    def __init__(self) -> None:
        self.time = 0.0
        self.naps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        over = self.time + seconds
        await asyncio.sleep(0)
        self.time = max(self.time, over)

    def clock(self, chance: float = 1.0) -> Clock:
        return Clock(now=lambda: self.time, sleep=self.sleep, chance=lambda: chance)


@pytest.fixture
def calm() -> Iterator[FaultServer]:
    with serving() as server:
        yield server


def sampler_at(*servers: FaultServer | str, time: FakeTime | None = None, **options: Any) -> EndpointSampler:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    options = {"concurrency": 1, "patience": Patience(timeout=20)} | options
    return EndpointSampler(urls, "m", clock=(time or FakeTime()).clock(), **options)


def draw(sampler: EndpointSampler, prompts: list[list[Message]] = PROMPTS, n: int = 2, seed: int = 1) -> list[list[Completion]]:
    try:
        return sampler.sample(prompts, n=n, temperature=0.5, max_tokens=16, seed=seed)
    finally:
        sampler.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_after_each_fault_the_answers_are_a_calm_servers(fault: str, calm: FaultServer) -> None:
    script, timeout = ([fault, "ok", fault, fault], 20) if fault != "nothing" else (["ok", fault], 2)
    with serving(script) as server:
        sampler = sampler_at(server, patience=Patience(timeout=timeout))
        assert draw(sampler) == draw(sampler_at(calm))
        assert server.paid() == calm.paid()
        failed = 0 if fault == "slow" else script.count(fault)
        assert len(server.requests) == len(PROMPTS) + failed
        assert sum(sampler.usage["failed_tries"].values()) == failed


def test_all_faults_at_once_change_no_answer_and_nothing_is_paid_twice(calm: FaultServer, tmp_path: Path) -> None:
    prompts = [[Message("user", (f"question {i}",))] for i in range(40)]
    script = [word for fault in FAULTS for word in (fault, "ok", "ok")]
    with serving(script) as server:
        hurried = sampler_at(server, concurrency=8, cache=tmp_path, patience=Patience(timeout=4))
        assert draw(hurried, prompts) == draw(sampler_at(calm), prompts)
        assert server.paid() == calm.paid()
        assert server.script == []
        assert server.most_under_way > 1
        assert hurried.usage["requests"] == 40
    again = sampler_at("http://127.0.0.1:9/v1", cache=tmp_path)
    assert draw(again, prompts) == draw(sampler_at(calm), prompts)
    assert (again.usage["tries"], again.usage["reused"]) == (0, 80)


@pytest.mark.parametrize(
    ("script", "naps"),
    [
        pytest.param(["500"] * 5, [0.5, 1.0, 2.0, 4.0], id="the-wait-doubles"),
        pytest.param(["429-seconds"], [7.5], id="seconds"),
        pytest.param(["429-date"], [9.5], id="date"),
    ],
)
def test_how_long_is_waited_at_most(script: list[str], naps: list[float]) -> None:
    time = FakeTime()
    with serving(script) as server:
        draw(sampler_at(server, time=time, patience=Patience(failures=9)), PROMPTS[:1])
    assert time.naps[: len(naps)] == pytest.approx(naps, abs=1.1 if "429-date" in script else 1e-9)


def test_the_wait_is_drawn_anew_each_time() -> None:
    time = FakeTime()
    with serving(["500", "500"]) as server:
        clock = time.clock(chance=0.25)
        draw(EndpointSampler(server.url, "m", clock=clock), PROMPTS[:1])
    assert time.naps == [0.125, 0.25]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param("400", "answered 400 for 'm'", id="400"),
        pytest.param("401", r"refused the API key; check \$CANARY_KEY", id="401"),
        pytest.param("403", r"answered 403: the key in \$CANARY_KEY has no right to 'm'", id="403"),
        pytest.param("404", r"answered 404 for 'm'.*check the base URL", id="404"),
        pytest.param("429-insufficient_quota", "no credit left", id="no-credit"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    status: str, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CANARY_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    with serving(["ok", *[status] * 9]) as server:
        with pytest.raises(EndpointError, match=message) as raised:
            draw(sampler_at(server, cache=tmp_path, api_key_env="CANARY_KEY"), n=1)
        assert server.met == ["ok", status]
        assert server.headers[0]["authorization"] == f"Bearer {CANARY}"
    assert f"{server.url}: " in str(raised.value)
    assert f"The 1 completions answered so far are kept in {tmp_path}; the same command goes on" in str(raised.value)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*"))
    assert written != b""
    for text in (str(raised.value), repr(raised.value), caplog.text, written.decode()):
        assert CANARY not in text
        assert CANARY[:6] not in text


def test_answers_under_way_are_kept_when_another_request_fails_for_good(tmp_path: Path) -> None:
    with serving(["slow", "slow", "401"]) as server:
        with pytest.raises(EndpointError, match="refused the API key"):
            draw(sampler_at(server, concurrency=3, cache=tmp_path), n=1)
        assert len(server.requests) == 3
    kept = Responses(tmp_path)
    assert len(kept) == 2
    kept.close()


def test_a_server_that_never_answered_is_given_up_after_a_few_failures() -> None:
    with serving(["500"] * 99) as server:
        with pytest.raises(EndpointError, match=r"the endpoint has not answered ever: http://127.*answered 500"):
            draw(sampler_at(server, patience=Patience(retries=99, failures=3)))
        assert len(server.requests) == 3


def test_an_outage_is_waited_for_and_one_try_at_a_time_asks_whether_it_is_over(calm: FaultServer) -> None:
    time = FakeTime()
    with serving(["ok", *["dies"] * 12]) as server:
        patient = sampler_at(server, time=time, concurrency=3, patience=Patience(failures=3, retries=4))
        assert draw(patient) == draw(sampler_at(calm))
        assert server.paid() == calm.paid()
    assert time.time > 60


def test_an_outage_that_lasts_ends_the_sampling_and_names_every_server(tmp_path: Path) -> None:
    time = FakeTime()
    with serving(["ok", *["500"] * 99]) as one, serving(["503"] * 99) as other:
        patience = Patience(failures=2, outage=60)
        with pytest.raises(EndpointError, match="none of the 2 endpoints has answered for") as raised:
            draw(sampler_at(one, other, time=time, patience=patience, cache=tmp_path))
    assert f"{one.url}: the endpoint answered 500" in str(raised.value)
    assert f"{other.url}: the endpoint answered 503" in str(raised.value)
    assert f"are kept in {tmp_path}; the same command goes on" in str(raised.value)


def test_a_broken_server_rests_while_another_does_the_work(calm: FaultServer) -> None:
    prompts = [[Message("user", (f"question {i}",))] for i in range(20)]
    with serving(["500"] * 99) as broken, serving() as whole:
        # Its clock stands still between the failures, so that the rest is never over.
        assert draw(sampler_at(broken, whole, patience=Patience(failures=2, rest=1e6, longest_wait=1e6)), prompts) == draw(
            sampler_at(calm), prompts
        )
        assert len(broken.requests) == 2
        assert whole.paid() == calm.paid()


def test_a_caller_with_an_event_loop_of_its_own_may_sample(calm: FaultServer) -> None:
    async def notebook() -> list[list[Completion]]:
        return draw(sampler_at(calm))

    assert asyncio.run(notebook()) == draw(sampler_at(calm))


def test_a_busy_server_that_answers_others_is_not_held_against_a_request(calm: FaultServer) -> None:
    with serving(["ok", *["429"] * 3]) as server, pytest.raises(EndpointError, match="answered 429"):
        draw(sampler_at(server, patience=Patience(retries=2)), n=1)
    with serving(["429-late"]) as server:
        # No request may fail even once, and yet.
        assert draw(sampler_at(server, concurrency=2, patience=Patience(retries=0))) == draw(sampler_at(calm))
        assert server.met.count("429-late") == 1


def test_servers_share_the_work_evenly() -> None:
    prompts = [[Message("user", (f"question {i}",))] for i in range(20)]
    with serving() as one, serving() as other:
        draw(sampler_at(one, other), prompts)
        assert (len(one.requests), len(other.requests)) == (10, 10)


def test_no_more_than_so_many_requests_are_under_way(calm: FaultServer) -> None:
    prompts = [[Message("user", (f"question {i}",))] for i in range(20)]
    calm.script = ["slow"] * 20
    draw(sampler_at(calm, concurrency=3), prompts)
    assert calm.most_under_way == 3


def test_a_server_that_refuses_several_completions_is_asked_for_one_at_a_time_and_learned_about_once() -> None:
    with serving(most=1) as server:
        groups = draw(sampler_at(server), PROMPTS[:2], n=3)
        assert [request["n"] for request in server.requests] == [3, 1, 1, 1, 1, 1, 1]
    assert all(len({completion.text for completion in group}) == 3 for group in groups)


def test_a_group_that_grows_pays_for_the_new_completions_only(calm: FaultServer, tmp_path: Path) -> None:
    two = draw(sampler_at(calm, cache=tmp_path), PROMPTS[:1], n=2)
    five = draw(sampler_at(calm, cache=tmp_path), PROMPTS[:1], n=5)
    assert five[0][:2] == two[0]
    assert [request["n"] for request in calm.requests] == [2, 3]


@pytest.mark.parametrize("other", [{"seed": 2}, {"prompt": "another"}, {"model": "n"}, {"image": "blue"}])
def test_another_request_is_another_answer_and_another_address_is_not(
    other: dict[str, Any], calm: FaultServer, tmp_path: Path
) -> None:
    def ask(seed: int = 1, prompt: str = "where?", model: str = "m", image: str = "red") -> int:
        path = write_image(tmp_path / "x.png", colour=image)
        with serving() as server:
            sampler = EndpointSampler(server.url, model, cache=tmp_path / "cache")
            draw(sampler, [[Message("user", (path, prompt))]], n=1, seed=seed)
            return len(server.requests)

    assert [ask(), ask(), ask(**other)] == [1, 0, 1]


def test_torn_and_damaged_lines_are_asked_again_and_the_others_are_not(calm: FaultServer, tmp_path: Path) -> None:
    before = draw(sampler_at(calm, cache=tmp_path))
    [file] = tmp_path.glob("answers-*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"\x00damaged\n", *lines[2:5], lines[5][:30]]))
    calm.requests.clear()
    assert draw(sampler_at(calm, cache=tmp_path)) == before
    assert len(calm.requests) == 2


def test_two_samplers_share_a_folder_without_writing_to_the_same_file(tmp_path: Path) -> None:
    one, other = Responses(tmp_path), Responses(tmp_path)
    reply = Reply(completions=(Completion(text="a"),), prompt_tokens=3, completion_tokens=1)
    one.put(["00" * 16], reply, "m")
    other.put(["11" * 16], reply, "m")
    one.close()
    other.close()
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 2
    both = Responses(tmp_path)
    assert (len(both), both.spending.tokens) == (2, 8)
    both.close()


def test_tokens_and_money_are_counted_over_resumptions(calm: FaultServer, tmp_path: Path) -> None:
    prices = Prices(prompt=1.0, completion=10.0)
    draw(sampler_at(calm, cache=tmp_path, prices=prices), PROMPTS[:4], n=1)
    sampler = sampler_at(calm, cache=tmp_path, prices=prices)
    draw(sampler, n=1)
    # A prompt has two words, a completion four.
    assert sampler.usage == {
        "requests": 6,
        "prompt_tokens": 12,
        "completion_tokens": 24,
        "cost": pytest.approx((12 + 240) / 1e6),
        "reused": 4,
        "tries": 2,
        "failed_tries": {},
    }


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        pytest.param({"max_tokens": 12}, r"the budget of 12 tokens is spent \(12\)", id="tokens"),
        pytest.param({"max_cost": 12e-6, "prices": Prices(prompt=1.0, completion=1.0)}, "the budget of 1.2e-05", id="money"),
    ],
)
def test_a_budget_stops_between_requests_and_a_larger_one_goes_on(
    budget: dict[str, Any], message: str, calm: FaultServer, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=message):
        draw(sampler_at(calm, cache=tmp_path, **budget), n=1)
    assert len(calm.requests) == 2
    draw(sampler_at(calm, cache=tmp_path, max_tokens=1000), n=1)
    assert len(calm.requests) == 6


def test_a_budget_needs_a_price_and_a_server_that_counts() -> None:
    with pytest.raises(ConfigError, match="max_cost needs a price"):
        sampler_at("http://127.0.0.1:9/v1", max_cost=1.0)
    with serving(usage=False) as server, pytest.raises(EndpointError, match="reports no token usage"):
        draw(sampler_at(server, max_tokens=100))


def test_the_first_answer_must_have_read_the_images_as_we_do(calm: FaultServer, tmp_path: Path) -> None:
    image = write_image(tmp_path / "x.png", width=560, height=560)
    prompts = [[Message("user", (image, f"where is number {i}?"))] for i in range(4)]
    # 28 x 28 pixels of its images are a token to the server; to this convention a quarter of one, or just one.
    layout = SmartResize(28, 28 * 28, 10**6)
    same = Convention(model_type="qwen2_vl", native=None, layout=layout, path=tmp_path)
    draw(sampler_at(calm, convention=same, concurrency=4), prompts, n=1)
    assert [image.size for image in sent_images(calm.requests[0])] == [(560, 560)]

    class Coarse(SmartResize):
        def fit(self, width: int, height: int, *, max_pixels: int | None = None) -> Any:
            canvas = super().fit(width, height, max_pixels=max_pixels)
            return type(canvas)(canvas.width, canvas.height, canvas.tokens // 4)

    coarse = Convention(model_type="qwen2_vl", native=None, layout=Coarse(28, 28 * 28, 10**6), path=tmp_path)
    calm.requests.clear()
    with pytest.raises(EndpointError, match=r"counts 404 tokens in the first prompt.* gives 1\d\d .*check_prompt_tokens: false"):
        draw(sampler_at(calm, convention=coarse, concurrency=4), prompts, n=1)
    assert len(calm.requests) == 1
    draw(sampler_at(calm, convention=coarse, concurrency=4, check_prompt_tokens=False), prompts, n=1)


@pytest.mark.parametrize("off", [-5, -4, 0, 4, 5])
def test_with_a_tokenizer_the_counts_may_differ_by_four(off: int, calm: FaultServer, tmp_path: Path) -> None:
    convention = load_convention("tiny")
    prompt = [Message("user", (write_image(tmp_path / "x.png"), "where is the red star?"))]
    counter = PromptCounter(convention)
    assert counter.exact
    calm.prompt_tokens = counter.count(prompt, convention.canvases([(56, 56)])).total + off
    sampler = sampler_at(calm, convention=convention)
    if abs(off) <= 4:
        draw(sampler, [prompt])
    else:
        with pytest.raises(EndpointError, match=f"counts {calm.prompt_tokens} tokens .* gives {calm.prompt_tokens - off},"):
            draw(sampler, [prompt])


def test_a_killed_process_goes_on_without_paying_twice(calm: FaultServer, tmp_path: Path) -> None:
    before = draw(sampler_at(calm))
    with serving() as server:
        process = multiprocessing.get_context("spawn").Process(target=sample_texts, args=(server.url, tmp_path, TEXTS))

        def kill_at_the_fourth() -> None:
            if len(server.requests) == 4 and process.pid:
                os.kill(process.pid, signal.SIGKILL)
                process.join()

        server.hold = kill_at_the_fourth
        process.start()
        process.join(30)
        server.hold = lambda: None
        assert len(server.requests) == 4
        assert draw(sampler_at(server, cache=tmp_path)) == before
        # The fourth was under way when the process died: it alone is asked again.
        assert len(server.requests) == 7
        asked = [json.dumps(request["messages"]) for request in server.requests]
        assert [asked.count(text) for text in dict.fromkeys(asked)] == [1, 1, 1, 2, 1, 1]
