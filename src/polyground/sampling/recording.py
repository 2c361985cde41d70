"""Recording a function of tensors that stay where they are, to be played back without its Python: CUDA graphs.

Here is all that only a GPU can run. It has not been run: no GPU was at hand when it was written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

logger = logging.getLogger("polyground")

Step = Callable[[], None]


class Recorder(Protocol):
    """Makes a step playable."""

    def warm_up(self, step: Step) -> bool:
        """Run it as it is; whether it can be recorded."""
        ...

    def record(self, step: Step) -> Step:
        """What does the same when called; the step has not run yet."""
        ...


class GraphRecorder:
    """CUDA graphs that share one pool of memory: nothing in them outlives a step, and one is played at a time."""

    def __init__(self, device: torch.device) -> None:
        self._aside = torch.cuda.Stream(device)
        # Its pool lives as long as some graph of it.
        self._last: Any = None

    def warm_up(self, step: Step) -> bool:
        """On another stream, as PyTorch asks. A step that makes the host wait for the device cannot be recorded."""
        here = torch.cuda.current_stream(self._aside.device)
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside), _waits() as waits:
            step()
        here.wait_stream(self._aside)
        if waits:
            logger.info("decoding steps are not recorded, because the host waits for the GPU at %s", ", ".join(waits))
        return not waits

    def record(self, step: Step) -> Step:
        """Run the step once into a CUDA graph; what comes back replays it on the same buffers."""
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        # Other threads may talk to the device meanwhile: they encode images and load batches.
        with torch.cuda.graph(graph, pool=pool, stream=self._aside, capture_error_mode="thread_local"):
            step()
        self._last = graph
        replay: Step = graph.replay
        return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on this device; None where steps run as they are."""
    return GraphRecorder(device) if device.type == "cuda" else None


@contextmanager
def _waits() -> Iterator[list[str]]:
    """The places at which the code inside makes the host wait for the GPU; known when it is left."""
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A warning, not an error: other threads are watched as well, and may wait.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
