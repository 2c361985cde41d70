"""Samples the policy in training on vLLM servers, to which it travels as its LoRA adapter.

Adapters have a name each, so that a server never answers from the cached keys of an older one. What their completions are worth
to a policy that is not quite the one that sampled them is `losses`' business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from polyground.errors import ConfigError, EndpointError, StorageError
from polyground.models import Loaded
from polyground.models.saving import saving, trained_weights
from polyground.records import Completion, Message
from polyground.sampling.endpoint import EndpointSampler, Tokens
from polyground.sampling.servers import UnknownModelError
from polyground.sampling.vllm import Adapters

logger = logging.getLogger("polyground")


class PolicySampler:
    """Samples the adapter of `loaded.model` as it was when `follow` last sent it.

    `sampler` asks the servers of `adapters`; `folder` is where adapters lie while they are served. One is sent every
    `steps_per_adapter` optimiser steps, and the one before is then let go of everywhere. Of several processes the first (`rank`
    0) sends it, the others wait for it. `version` names the weights that the adapter is for.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        sampler: EndpointSampler,
        adapters: Adapters,
        folder: Path,
        version: str,
        steps_per_adapter: int = 1,
        rank: int = 0,
    ) -> None:
        if not isinstance(loaded.model, PeftModel):
            raise ConfigError("grpo.rollout: to servers the policy travels as its LoRA adapter; set grpo.use_peft: true")
        _require_travelling(loaded)
        self._loaded, self._sampler, self._adapters = loaded, sampler, adapters
        self._folder, self._version, self._steps_per_adapter = folder, version, steps_per_adapter
        self._prefix = f"polyground-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}-"
        self._rank = rank
        self._name: str | None = None
        self._sent = 0

    def follow(self, step: int) -> int:
        """Send the adapter when its turn has come; the age of the one that is served, in optimiser steps."""
        if self._name is None or step % self._steps_per_adapter == 0:
            self._send(step)
        return step - self._sent

    def _send(self, step: int) -> None:
        written = self._folder / f"writing-{self._rank}"
        try:
            with saving(self._folder):
                weights = trained_weights(self._loaded.model)
                self._loaded.model.save_pretrained(str(written), state_dict=weights, save_embedding_layers=False)
            digest = adapter_digest(written)
            name = f"{self._prefix}{step}-{digest[:8]}"
            place = self._folder / name
            if self._rank == 0:
                # What lies there is of an attempt that was killed.
                _remove(place)
                written.rename(place)
        except OSError as error:
            raise StorageError(f"{self._folder}: the adapter cannot be written ({error}); make room there") from error
        if self._rank == 0:
            self._adapters.load(name, place)
            # Nobody asks for the others any more: all processes have ended the step before, and this folder has one run.
            self._adapters.unload(prefix=self._prefix, but=name)
            for old in self._folder.glob(f"{self._prefix}*"):
                if old != place:
                    _remove(old)
        else:
            _remove(written)
            self._adapters.wait_for(name)
        self._sampler.turn_to(name, version=f"{self._version}/{digest}")
        self._name, self._sent = name, step

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
        if self._name is None:
            raise ValueError("follow was not called: there is no adapter to sample")
        family = self._loaded.family
        self._sampler.expect({tuple(messages): family.encode(messages).input_ids.tolist() for messages in prompts})
        asked: dict[str, Any] = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        try:
            groups = self._sampler.sample(prompts, **asked, seed=seed, keys=keys)
        except UnknownModelError as error:
            # A server that was started anew has forgotten its adapters.
            logger.warning("%s; the adapter is sent again", error)
            self._adapters.load(self._name, self._folder / self._name)
            groups = self._sampler.sample(prompts, **asked, seed=seed, keys=keys)
        return [[self._read(completion) for completion in group] for group in groups]

    def _read(self, completion: Completion) -> Completion:
        """The text as our own tokenizer writes it; without any token, as a refused prompt has it, an end alone."""
        family = self._loaded.family
        if not completion.token_ids:
            return Completion(text="", token_ids=(family.end_token_id,), logprobs=(0.0,))
        return replace(completion, text=family.decode(completion.token_ids))

    @property
    def usage(self) -> Mapping[str, Any]:
        """What was asked of the servers; see `EndpointSampler.usage`."""
        return self._sampler.usage

    def close(self) -> None:
        """Let go of the adapter that is served, and of the connections."""
        if self._name is not None and self._rank == 0:
            try:
                self._adapters.unload(prefix=self._prefix)
            except EndpointError as error:
                # Perhaps the very reason why the run ends; the next one begins by letting go of them.
                logger.warning("%s; its adapters %s* stay loaded", error, self._prefix)
            _remove(self._folder)
        self._name = None
        self._sampler.close()


def _require_travelling(loaded: Loaded) -> None:
    """Refuse what is learnt beside the language model: vLLM loads such an adapter without a word and leaves that part out."""
    inside = {id(parameter) for parameter in loaded.family.language_model(loaded.model).parameters()}
    outside = [name for name, p in loaded.model.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ConfigError(
            f"grpo.rollout: vLLM applies adapters to the language model alone, and {outside[0]} is outside it; use rollout: local"
        )


def policy_tokens(loaded: Loaded) -> Tokens:
    """What a server must be asked for, so that its completions can be learnt from."""
    family = loaded.family
    return Tokens(scored=True, stops=tuple(family.stop_token_ids), banned=tuple(family.banned_token_ids))


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's weights and of what scales them."""
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps([config.get(name) for name in ("r", "lora_alpha", "use_rslora")]).encode())
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
