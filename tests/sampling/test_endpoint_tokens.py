"""What a server is asked for beside the text, what it may refuse, and which answers are whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_server import serving

from polyground.errors import EndpointError
from polyground.records import Completion, Message
from polyground.sampling.endpoint import EndpointSampler, Tokens
from polyground.sampling.responses import Responses
from polyground.sampling.servers import RefusedError, Reply

PROMPT = [Message("user", ("where?",))]


def sample(sampler: EndpointSampler, prompt: list[Message] = PROMPT, n: int = 2) -> list[Completion]:
    with sampler:
        [group] = sampler.sample([prompt], n=n, temperature=0.5, max_tokens=16, seed=1)
    return group


def test_token_ids_log_probabilities_and_limits_are_asked_for_in_vllms_words() -> None:
    with serving() as server, pytest.raises(EndpointError, match=r"gives 0 token ids and 0 log-probabilities.*vLLM"):
        sample(EndpointSampler(server.url, "m", tokens=Tokens(scored=True, stops=(7,), banned=(3, 4))))
    request = server.requests[0]
    assert request["logprobs"] is True
    assert request["logit_bias"] == {"3": -100, "4": -100}
    assert request["stop_token_ids"] == [7]
    assert request["return_token_ids"] is True
    # As our own tokenizer writes completions.
    assert request["skip_special_tokens"] is False


def test_a_server_of_unknown_make_is_asked_for_nothing_but_the_protocol() -> None:
    with serving() as server:
        sample(EndpointSampler(server.url, "m"))
    assert set(server.requests[0]) == {"model", "messages", "n", "temperature", "top_p", "max_tokens", "seed"}


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation", "data_inspection_failed"])
def test_a_prompt_that_a_policy_on_contents_forbids_is_answered_by_nothing_once(code: str, tmp_path: Path) -> None:
    with serving([f"400-{code}"]) as server:
        sampler = EndpointSampler(server.url, "m", cache=tmp_path)
        assert sample(sampler) == [Completion(text="")] * 2
        assert sampler.usage["refused"] == 1
        # Neither with a smaller n nor by the next attempt.
        assert sample(EndpointSampler(server.url, "m", cache=tmp_path)) == [Completion(text="")] * 2
        assert len(server.requests) == 1


def test_any_other_refusal_still_stops() -> None:
    with serving(["400-too_long"] * 2) as server, pytest.raises(RefusedError, match="400"):
        sample(EndpointSampler(server.url, "m"))


def test_tokens_survive_on_disk(tmp_path: Path) -> None:
    told = Completion(text="a", token_ids=(5, 6), logprobs=(-0.5, -0.25), truncated=True)
    plain = Completion(text="b")
    kept = Responses(tmp_path)
    kept.put(["00" * 16, "01" * 16], Reply(completions=(told, plain)), "m")
    kept.close()
    again = Responses(tmp_path)
    assert (again.get("00" * 16), again.get("01" * 16)) == (told, plain)
    again.close()


@pytest.mark.parametrize(
    ("second", "asked"),
    [
        pytest.param({"model": "other-name", "version": "1"}, 1, id="same-weights-under-another-name"),
        pytest.param({"model": "m", "version": "2"}, 2, id="other-weights-under-the-same-name"),
        pytest.param({"model": "m", "version": "1", "tokens": Tokens(banned=(3,))}, 2, id="other-tokens-allowed"),
    ],
)
def test_answers_belong_to_the_weights_and_not_to_their_name(tmp_path: Path, second: dict[str, Any], asked: int) -> None:
    with serving() as server:
        sample(EndpointSampler(server.url, "m", version="1", cache=tmp_path))
        sample(EndpointSampler(server.url, second.pop("model"), cache=tmp_path, **second))
        assert len(server.requests) == asked


def test_a_sampler_can_be_turned_to_a_newer_model() -> None:
    with serving() as server, EndpointSampler(server.url, "old") as sampler:
        for name in ("old", "new"):
            sampler.turn_to(name, version=name)
            sampler.sample([PROMPT], n=1, temperature=0.5, max_tokens=16, seed=1)
    assert [request["model"] for request in server.requests] == ["old", "new"]
