"""What asking a server would come to, in requests, tokens and money, before it is asked. No server is asked here.

Prompts are counted as `tokens` counts them for a model folder, else by a rule of thumb; how long the answers will be is a guess
until there are some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyground.config import EndpointConfig
from polyground.conventions import Canvas, Convention
from polyground.imagefile import image_size
from polyground.records import Message
from polyground.sampling.endpoint import sample_keys
from polyground.sampling.responses import Prices, Responses, Spending
from polyground.tokens import PromptCounter, estimated_tokens
from polyground.vision import canvas_of

PIXELS_PER_TOKEN = 28 * 28
"""Of an image, where nothing better is known: Qwen2.5-VL's."""

TURN_TOKENS = 20
"""What a chat template is taken to add, where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What one kind of request would come to, tries that fail aside."""

    what: str
    questions: int
    """Prompts asked about, without those whose answers are all kept."""
    completions: int
    """Without those that are kept."""
    requests: int
    """With all completions of a prompt in one request."""
    prompt_tokens: int
    most_prompt_tokens: int
    """Where the server gives one completion at a time, each pays for the prompt."""
    completion_tokens: int
    """At the length that answers are taken to have."""
    most_completion_tokens: int
    """At the limit."""
    prices: Prices

    @property
    def most_requests(self) -> int:
        """One per completion, where the server answers no more at a time."""
        return self.completions

    @property
    def tokens(self) -> int:
        """Prompts and completions together, as expected."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def most_tokens(self) -> int:
        """Prompts and completions together, at most."""
        return self.most_prompt_tokens + self.most_completion_tokens

    @property
    def cost(self) -> float | None:
        """None without a price."""
        return Spending(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens).cost(self.prices)

    @property
    def most_cost(self) -> float | None:
        """In the currency of the prices; None without prices."""
        return Spending(prompt_tokens=self.most_prompt_tokens, completion_tokens=self.most_completion_tokens).cost(self.prices)

    def scaled(self, factor: float) -> Forecast:
        """As for `factor` times as many prompts of this kind."""
        return replace(self, **{name: round(getattr(self, name) * factor) for name in _COUNTS})

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "questions": self.questions,
            "completions": self.completions,
            "requests": [self.requests, self.most_requests],
            "prompt_tokens": [self.prompt_tokens, self.most_prompt_tokens],
            "completion_tokens": [self.completion_tokens, self.most_completion_tokens],
            "cost": None if self.cost is None or self.most_cost is None else [round(self.cost, 6), round(self.most_cost, 6)],
        }


_COUNTS = (
    "questions",
    "completions",
    "requests",
    "prompt_tokens",
    "most_prompt_tokens",
    "completion_tokens",
    "most_completion_tokens",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How prompts would be put to a server: what an `EndpointSampler` is built and called with, as far as it decides the cost."""

    model: str
    config: EndpointConfig
    cache: Path
    """Where answers are kept if `config` names no folder."""
    convention: Convention | None = None
    n: int
    options: dict[str, Any]
    """Temperature, top-p and token limit."""
    seed: int

    def forecast(
        self, what: str, prompts: Sequence[Sequence[Message]], keys: Sequence[str], *, answer: int, extra: int = 0
    ) -> Forecast:
        """What these prompts come to, answers that are kept left out.

        An answer is taken to have `answer` tokens, or as many as the kept ones of these prompts have on average. `extra` stands
        for text that is still to be put into each prompt.
        """
        kept = self._kept_answers()
        counter = PromptCounter(self.convention) if self.convention is not None else None
        lengths: list[int] = []
        questions = missing = once = apart = 0
        for prompt, key in zip(prompts, keys, strict=True):
            texts = self._kept(kept, prompt, key)
            lengths += [estimated_tokens(text) for text in texts]
            lacking = self.n - len(texts)
            if lacking == 0:
                continue
            tokens = self._prompt_tokens(prompt, counter) + extra
            questions, missing, once, apart = questions + 1, missing + lacking, once + tokens, apart + lacking * tokens
        limit = int(self.options["max_tokens"])
        each = min(limit, sum(lengths) / len(lengths) if lengths else answer)
        return Forecast(
            what=what,
            questions=questions,
            completions=missing,
            requests=questions,
            prompt_tokens=once,
            most_prompt_tokens=apart,
            completion_tokens=round(missing * each),
            most_completion_tokens=missing * limit,
            prices=self.prices,
        )

    @property
    def prices(self) -> Prices:
        """Per million tokens, as the recipe says."""
        return Prices(prompt=self.config.prompt_price, completion=self.config.completion_price)

    def spent(self) -> Spending:
        """On the answers that are kept."""
        return self._kept_answers().spending

    def _kept_answers(self) -> Responses:
        return Responses.looked_at(self.config.cache or self.cache)

    def how_counted(self) -> str:
        """How exact the count of the prompts is."""
        if self.convention is None:
            each = self.config.image_tokens
            image = "a token for 28 x 28 pixels" if each is None else f"{each:,} tokens each"
            return f"by a rule of thumb, images as {image}"
        counter = PromptCounter(self.convention)
        return "exactly" if counter.exact else f"by a rule of thumb, images exactly ({counter.why_not_exact})"

    def _kept(self, kept: Responses, prompt: Sequence[Message], name: str) -> list[str]:
        """The texts of this prompt that need not be asked for. Images are only read where anything is kept at all."""
        if not len(kept):
            return []
        keys = sample_keys(
            prompt,
            model=self.model,
            convention=self.convention,
            options=self.options,
            seed=self.seed,
            name=name,
            n=self.n,
        )
        return [found.text for key in keys if (found := kept.get(key)) is not None]

    def _prompt_tokens(self, prompt: Sequence[Message], counter: PromptCounter | None) -> int:
        images = [path for message in prompt for path in message.images]
        if counter is not None and self.convention is not None:
            return counter.count(prompt, _canvases(images, self.convention)).total
        text = sum(estimated_tokens(part) for message in prompt for part in message.parts if isinstance(part, str))
        return TURN_TOKENS + text + sum(self._image_tokens(path) for path in images)

    def _image_tokens(self, path: Path) -> int:
        if self.config.image_tokens is not None:
            return self.config.image_tokens
        width, height = image_size(path)
        return max(1, round(width * height / PIXELS_PER_TOKEN))


def _canvases(images: Sequence[Path], convention: Convention) -> list[Canvas]:
    return [canvas_of(path, image_size(path), convention, images=len(images)) for path in images]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Forecasts of all kinds of requests, what they sum to, and how that lies with the budgets."""

    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...]
    """How it was counted, and which budgets will not do."""

    @classmethod
    def of(cls, forecasts: Sequence[tuple[Forecast, str]], *, payers: Mapping[str, Asking], notes: Sequence[str]) -> Estimate:
        """Each forecast with the section whose budget pays for it, and who asks by that section."""
        short = [line for section, asking in payers.items() for line in _too_small(forecasts, section, asking)]
        return cls(forecasts=tuple(forecast for forecast, _ in forecasts), notes=(*notes, *short))

    @property
    def requests(self) -> tuple[int, int]:
        """With all completions of a prompt in one request, and one by one."""
        return sum(f.requests for f in self.forecasts), sum(f.most_requests for f in self.forecasts)

    @property
    def tokens(self) -> tuple[int, int]:
        """At the length answers are taken to have, and at the limit with every completion paying for its prompt."""
        return sum(f.tokens for f in self.forecasts), sum(f.most_tokens for f in self.forecasts)

    @property
    def cost(self) -> tuple[float, float] | None:
        """In the same two cases; None where a forecast has no price."""
        costs = [(f.cost, f.most_cost) for f in self.forecasts]
        known = [(low, high) for low, high in costs if low is not None and high is not None]
        return (sum(low for low, _ in known), sum(high for _, high in known)) if len(known) == len(costs) else None

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """Header and rows, each figure as a range."""
        header = ("cost of asking", "prompts", "requests", "prompt tokens", "completion tokens", "money")
        rows: list[Sequence[str]] = [
            (
                f.what,
                f"{f.questions:,}",
                _range(f.requests, f.most_requests),
                _range(f.prompt_tokens, f.most_prompt_tokens),
                _range(f.completion_tokens, f.most_completion_tokens),
                _money(None if f.cost is None or f.most_cost is None else (f.cost, f.most_cost)),
            )
            for f in self.forecasts
        ]
        if len(rows) > 1:
            sums = [
                (sum(getattr(f, name) for f in self.forecasts), sum(getattr(f, f"most_{name}") for f in self.forecasts))
                for name in ("requests", "prompt_tokens", "completion_tokens")
            ]
            rows.append(("together", "", *(_range(*found) for found in sums), _money(self.cost)))
        return header, rows

    def to_json(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "requests": list(self.requests),
            "tokens": list(self.tokens),
            "cost": None if cost is None else [round(found, 6) for found in cost],
            "kinds": [forecast.to_json() for forecast in self.forecasts],
            "notes": list(self.notes),
        }


def _too_small(forecasts: Sequence[tuple[Forecast, str]], section: str, asking: Asking) -> list[str]:
    """The budgets of a section that the lower figures exceed, with what was spent before."""
    paid, config, spent = [forecast for forecast, paid_by in forecasts if paid_by == section], asking.config, asking.spent()
    tokens = spent.tokens + sum(f.tokens for f in paid)
    cost = (spent.cost(asking.prices) or 0.0) + sum(f.cost or 0.0 for f in paid)
    said = []
    if config.max_tokens is not None and tokens > config.max_tokens:
        said.append(f"{section}.max_tokens {config.max_tokens:,} is less than {tokens:,} with what is spent: it may not last")
    if config.max_cost is not None and cost > config.max_cost:
        said.append(f"{section}.max_cost {config.max_cost:g} is less than {cost:.2f} with what is spent: it may not last")
    return said


def _range(low: float, high: float) -> str:
    return f"{low:,}" if low == high else f"{low:,} - {high:,}"


def _money(cost: tuple[float, float] | None) -> str:
    if cost is None:
        return "no price"
    low, high = (f"{value:,.2f}" if value >= 0.01 else f"{value:.2g}" for value in cost)
    return low if low == high else f"{low} - {high}"
