"""Where completions come from: a model in this process, a server, or a script; all behind one protocol.

Reading and scoring completions is not done here. Each back end is imported by whoever builds it, so that the scripted
and the endpoint sampler need no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from polyground.records import Completion, Message


class Sampler(Protocol):
    """Draws completions of prompts."""

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
        """`n` completions of each prompt, in prompt order; temperature 0 takes the likeliest token.

        `keys` name the prompts for the random numbers (default: `prompt_key`): a completion depends on the seed, its key
        and its number in the group, never on what else is in the batch. Equal keys draw equal random numbers.
        """
        ...


@runtime_checkable
class Foresighted(Protocol):
    """A sampler that makes use of knowing what comes next."""

    def prepare(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Told what the next `sample` will ask for, while there is still something to do; never raises for a bad prompt."""
        ...


@runtime_checkable
class Following(Protocol):
    """A sampler of a copy of the policy, which lies elsewhere and has to be brought up to date."""

    def follow(self, step: int) -> int:
        """Told before the optimiser step whose completions will be sampled next; how many steps old the copy then is."""
        ...


def prompt_key(messages: Sequence[Message]) -> str:
    """A name for a prompt made from its text and the names (not the folders) of its images."""
    parts = [[message.role, [part if isinstance(part, str) else [part.name] for part in message.parts]] for message in messages]
    return json.dumps(parts, ensure_ascii=False)


def prompt_keys(prompts: Sequence[Sequence[Message]], keys: Sequence[str] | None) -> list[str]:
    """The given keys, or those made from the prompts; raises ValueError when the counts differ."""
    if keys is None:
        return [prompt_key(messages) for messages in prompts]
    if len(keys) != len(prompts):
        raise ValueError(f"sample needs one key per prompt; got {len(keys)} keys for {len(prompts)} prompts")
    return list(keys)


def sample_seed(seed: int, key: str, sample: int = 0) -> int:
    """The seed of one completion, in [0, 2**63)."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
