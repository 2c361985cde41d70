"""Drawing tokens: the random numbers of each row, the tokens they pick, and what the rows have said so far.

Everything after `uniform` stays on the device and asks the host nothing, so that a decoding step can be recorded once and
played back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyground.sampling import sample_seed

# Shapes: R rows, T tokens decoded at most, V vocabulary.


@dataclass(frozen=True, slots=True)
class Settings:
    """What one call of a sampler asks for."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n and max_tokens must be >= 1; got {self.n} and {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1]; got {self.temperature} and {self.top_p}")


def uniform(keys: Sequence[str], settings: Settings) -> Tensor:
    """[R, T] numbers in [0, 1), each row from a generator of its own: batching cannot change them."""
    if settings.temperature == 0:
        return torch.zeros(len(keys) * settings.n, settings.max_tokens, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(sample_seed(settings.seed, key, i)) for key in keys for i in range(settings.n)]
    return torch.stack([torch.rand(settings.max_tokens, generator=g, dtype=torch.float64) for g in generators])


def draw(logits_RV: Tensor, uniform_R: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability at the temperature, before top-p (greedy: at temperature 1)."""
    if settings.temperature == 0:
        token = logits_RV.argmax(-1)
        return token, logits_RV.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs_RV = (logits_RV / settings.temperature).log_softmax(-1)
    probs_RV = logprobs_RV.exp()
    if settings.top_p < 1:
        probs_RV = nucleus(probs_RV, settings.top_p)
    mass_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    # `right` passes over tokens of no probability, even when the uniform number is 0.
    token = torch.searchsorted(mass_RV, (uniform_R * mass_RV[:, -1])[:, None], right=True)[:, 0]
    return token, logprobs_RV.gather(-1, token[:, None])[:, 0]


def nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach `top_p`, the others set to 0; not normalised."""
    ordered, order = probs_RV.sort(dim=-1, descending=True)
    before = nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    ordered = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probs_RV).scatter(-1, order, ordered)


class Written:
    """What the rows of a batch have said, in tensors that stay where they are from batch to batch.

    One row more than asked for, stopped from the start, is there for whoever decodes more slots than there are rows.
    """

    def __init__(
        self, rows: int, settings: Settings, *, stops: Sequence[int], banned: Sequence[int], pad: int, device: torch.device
    ) -> None:
        self.spare = rows
        """Number of the row that nobody reads."""
        self._settings, self._pad = settings, pad
        size = (rows + 1, settings.max_tokens)
        self.ids_RT = torch.full(size, pad, device=device)
        self.logprobs_RT = torch.zeros(size, device=device)
        self.length_R = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self.stopped_R = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        self._uniform_RT = torch.zeros(size, dtype=torch.float64, device=device)
        self._stops = torch.tensor(list(stops), device=device)
        self._banned = torch.tensor(list(banned), dtype=torch.long, device=device)

    def start(self, uniform_RT: Tensor) -> None:
        """A new batch of so many rows; the rest are taken for stopped."""
        rows = len(uniform_RT)
        self.ids_RT.fill_(self._pad)
        self.logprobs_RT.zero_()
        self.length_R.zero_()
        self.stopped_R.fill_(True)
        self.stopped_R[:rows] = False
        self._uniform_RT[:rows] = uniform_RT.to(self._uniform_RT.device)

    def take(self, logits_RV: Tensor, row_R: Tensor, column: int | Tensor) -> Tensor:
        """Draw the token in this column ([1] or a number) of these rows, and write it down where a row has not stopped."""
        logits_RV = logits_RV.float().index_fill(-1, self._banned, -torch.inf)
        token, logprob = draw(logits_RV, self._uniform_RT[row_R, column], self._settings)
        over = self.stopped_R[row_R]
        self.ids_RT[row_R, column] = token.masked_fill(over, self._pad)
        self.logprobs_RT[row_R, column] = logprob.masked_fill(over, 0)
        ends = (token[:, None] == self._stops).any(-1)
        self.stopped_R[row_R] = over | ends
        # What ends a row is part of it.
        self.length_R[row_R] = self.length_R[row_R] + ~over
        return token
