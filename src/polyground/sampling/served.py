"""Where a model of the figure is served: by a server started here while it is needed, or by one that the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from polyground.config import Sampling, ServedConfig, ServersConfig
from polyground.errors import ConfigError
from polyground.sampling.vllm import VllmServer


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Whom to ask for a model."""

    urls: tuple[str, ...]
    model: str
    api_key_env: str | None = None
    require_running: Callable[[], None] = lambda: None
    """Raises EndpointError where it is known that nobody will answer any more."""


@contextmanager
def serving_of(
    how: Sampling, servers: ServersConfig, role: str, *, model: Path, dtype: str, log: Path, adapter_rank: int | None = None
) -> Iterator[Served]:
    """The servers of the model of this role; with `adapter_rank`, a server started here takes adapters of that rank.

    Raises ConfigError where the recipe does not say where it is served.
    """
    if how == "vllm":
        with VllmServer(model, servers.vllm, name=role, log=log, dtype=dtype, adapter_rank=adapter_rank) as server:
            yield Served(urls=(server.url,), model=server.name, require_running=server.require_running)
        return
    named: ServedConfig | None = getattr(servers, role)
    if named is None:
        raise ConfigError(f"servers.{role}: say where the {role} model is served (base_url, model), or sample it with `vllm`")
    urls = (named.base_url,) if isinstance(named.base_url, str) else tuple(named.base_url)
    yield Served(urls=urls, model=named.model, api_key_env=named.api_key_env)
