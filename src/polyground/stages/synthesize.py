"""Let a teacher reason about training questions, and keep only what the scorer, and a judge if there is one, confirm.

Rows of `kept.jsonl` are the example itself plus `reasoning`, `answer` (on unit coordinates: written on the student's grid
by the training stage), `score` and where they come from. What was dropped, and why, is in `rejected.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from polyground.answer import Answer, reasoning_of
from polyground.config import EndpointConfig, Recipe, SynthesizeConfig
from polyground.conventions import GRIDS, Convention, load_convention, named_grid
from polyground.curation import Attempt, GridsOf, Judge, Teacher, attempts_at, best_of, furthest_of, taught_answer
from polyground.errors import BudgetError, ConfigError, NothingKeptError, PolygroundError
from polyground.geometry import PER_MILLE, Grid
from polyground.imagefile import image_size
from polyground.prompts import PROMPT_VERSION, TEACHER_VERSION, can_be_explained, judge_messages, teacher_messages
from polyground.records import Example, Message, answer_to_json
from polyground.rewards import Scorer
from polyground.rollout import Ask
from polyground.sampling import Sampler, sample_seed
from polyground.sampling.forecast import Asking, Estimate, Forecast
from polyground.sampling.scripted import ScriptedSampler
from polyground.stages import (
    PLACEHOLDER,
    aligned,
    answers_folder,
    gather_parts,
    own_share,
    own_splits,
    read_split,
    say,
    scene_paths,
    split_identity,
    stage_folder,
    track,
)
from polyground.storage import RunFolder
from polyground.teaching import MARKS
from polyground.vision import grids_by
from polyground.worlds.teacher import read_scene_rows, row_of, scripted_completion

if TYPE_CHECKING:
    from polyground.sampling.endpoint import EndpointSampler

REASONED, MARKED = 150, 40
"""Tokens that an answer with its reasoning, and a judge's reply, are taken to have until there are some."""

LOOKED_AT = 1000
"""Questions, spread over the split, that an estimate measures; more are taken to be alike."""


def run(recipe: Recipe) -> Mapping[str, Any]:
    """Ask the teacher every training question; keep the best attempt that the scorer, the rules and the judge confirm."""
    config = recipe.synthesize
    examples = read_split(recipe, "train")[: config.limit]
    identity = {
        "seed": recipe.seed,
        "synthesize": _deciding(config),
        "rewards": [reward.to_json() for reward in recipe.rewards],
        "prompt_version": PROMPT_VERSION,
        "data": split_identity(recipe, "train"),
    }
    shard = own_share(recipe)
    with stage_folder(recipe, "synthesize", "synthesize", identity, shard=shard) as folder:
        if folder.complete:
            return folder.summary
        keys = [example.key for example in examples]
        if shard is not None:
            examples = shard.of(examples, keys)
        else:
            gather_parts(recipe, folder, {"kept.jsonl": keys, "rejected.jsonl": keys})
        done = folder.done_keys("kept.jsonl") | folder.done_keys("rejected.jsonl")
        left = [example for example in examples if example.key not in done]
        for line in cost_lines(recipe, left):
            say(line)
        with open_teacher(recipe, "train", examples) as teacher, open_judge(recipe, teacher) as judge:
            spent = _ask_all(recipe, folder, left, teacher=teacher, judge=judge, done=done)
        summary = _summarize(folder, asked=len(done)) | spent
        if shard is not None:
            return folder.finish({"shard": str(shard), **summary}).summary
        if not summary["kept"]:
            raise NothingKeptError(
                f"{folder.path}: the teacher's answers were all dropped ({summary['dropped']}); see rejected.jsonl"
            )
        return folder.finish(summary).summary


def _ask_all(
    recipe: Recipe, folder: RunFolder, left: Sequence[Example], *, teacher: Teacher, judge: Judge | None, done: set[str]
) -> dict[str, Any]:
    """Keep or drop what comes of each example, whose key is then among `done`; what was spent, and what stopped it early."""
    config = recipe.synthesize
    scoring = Scorer(recipe.rewards).score
    tried = partial(attempts_at, config=config, teacher=teacher, judge=judge, scoring=scoring, seed=recipe.seed)

    def outcomes() -> Iterator[tuple[Example, list[Attempt]]]:
        for few in (left[start : start + teacher.batch] for start in range(0, len(left), teacher.batch)):
            yield from zip(few, tried(few), strict=True)

    def record(example: Example, attempts: Sequence[Attempt]) -> None:
        _keep_or_drop(folder, example, attempts, origin=_origin(recipe, teacher, judge))
        done.add(example.key)

    stopped: dict[str, Any] = {}
    try:
        for example, attempts in track(outcomes(), "synthesize", total=len(done) + len(left), done=len(done)):
            record(example, attempts)
    except BudgetError as error:
        if config.endpoint.on_budget == "stop":
            raise
        stopped = {"stopped": str(error)}
        # Of the batch that was cut, what has been answered.
        for example in [example for example in left if example.key not in done][: teacher.batch]:
            with suppress(BudgetError):
                record(example, *tried([example]))
    return stopped | _usage(teacher, judge)


@contextmanager
def open_teacher(recipe: Recipe, split: str, examples: Sequence[Example]) -> Iterator[Teacher]:
    """The recipe's teacher for the examples of a split; its servers are let go of at the end."""
    config = recipe.synthesize
    grids_of, convention = teacher_grids(config)
    ask, explain = (ask_of(grids_of, template=template, advice=config.task_advice) for template in ("ask", "explain"))
    if config.teacher == "scripted":
        sampler, name, batch = _scripted(recipe, split, examples)
        yield Teacher(name=name, sampler=sampler, ask=ask, explain=explain, batch=batch)
        return
    if not config.teacher_base_url or config.teacher_model is None:
        raise ConfigError("synthesize.teacher: endpoint needs teacher_base_url and teacher_model")
    if config.teacher_base_url == PLACEHOLDER:
        raise ConfigError(
            f"synthesize.teacher_base_url is still the placeholder {PLACEHOLDER}: name a server with an OpenAI-compatible "
            "address and its teacher_model, in the recipe or as --synthesize.teacher_base_url URL --synthesize.teacher_model NAME"
        )
    url, model = config.teacher_base_url, config.teacher_model
    with _served(recipe, url, model, config.endpoint, "synthesize", config.api_key_env, convention) as served:
        # Enough that the servers are not idle while the last answers of a batch come in.
        batch = max(16, 4 * config.endpoint.concurrency)
        yield Teacher(name=model, sampler=served, ask=ask, explain=explain, batch=batch, usage=lambda: served.usage)


@contextmanager
def open_judge(recipe: Recipe, teacher: Teacher) -> Iterator[Judge | None]:
    """The recipe's judge, who may be the teacher; None for no judge. Its servers are let go of at the end."""
    config = recipe.synthesize.judge
    if config is None:
        yield None
        return
    if not config.base_url or config.model is None:
        grids_of, _ = teacher_grids(recipe.synthesize)
        yield Judge(name=teacher.name, sampler=teacher.sampler, grids_of=grids_of)
        return
    grids_of, convention = judge_grids(recipe.synthesize)
    with _served(recipe, config.base_url, config.model, config.endpoint, "judge", config.api_key_env, convention) as served:
        yield Judge(name=config.model, sampler=served, grids_of=grids_of, usage=lambda: served.usage)


def ask_of(grids_of: GridsOf, *, template: str = "ask", advice: Mapping[str, str] | None = None) -> Ask:
    """How the teacher is asked: with a text of `prompt_texts/teacher.yaml`, and the grid of its boxes told."""

    def ask(example: Example) -> tuple[Sequence[Message], Sequence[Grid]]:
        grids = grids_of(example.images)
        return teacher_messages(example, grids, template=template, advice=advice or {}), grids

    return ask


def teacher_grids(config: SynthesizeConfig) -> tuple[GridsOf, Convention | None]:
    """The grids a teacher writes boxes of a prompt's images on, and its convention where `teacher_grid` is a model folder.

    Raises ConfigError for neither a known name nor a folder.
    """
    return _grids(config.teacher_grid, config.teacher_max_pixels_total, "teacher_grid", "teacher_max_pixels_total")


def judge_grids(config: SynthesizeConfig) -> tuple[GridsOf, Convention | None]:
    """As `teacher_grids`, of the judge: the teacher's where the teacher judges."""
    judge = config.judge
    if judge is None or judge.model is None:
        return teacher_grids(config)
    return _grids(judge.grid, judge.max_pixels_total, "judge.grid", "judge.max_pixels_total")


def _grids(name: str, max_pixels_total: int | None, key: str, pixels_key: str) -> tuple[GridsOf, Convention | None]:
    if name in GRIDS:
        if max_pixels_total is not None:
            raise ConfigError(
                f"synthesize.{pixels_key} needs the folder of the model served as synthesize.{key}; "
                f"with {name!r} images are sent as they are"
            )
        if named_grid(name, 1, 1) == named_grid(name, 2, 2):
            return lambda images: [named_grid(name, 1, 1)] * len(images), None
        return lambda images: [named_grid(name, *image_size(image)) for image in images], None
    if not Path(name).is_dir():
        raise ConfigError(
            f"synthesize.{key} {name!r} is neither one of {', '.join(GRIDS)} nor a model folder; name how the model there "
            "writes boxes"
        )
    convention = load_convention(name, max_pixels_total=max_pixels_total)
    return grids_by(convention), convention


def _scripted(recipe: Recipe, split: str, examples: Sequence[Example]) -> tuple[Sampler, str, int]:
    if split in own_splits(recipe):
        raise ConfigError(
            "synthesize.teacher is scripted, which knows the simulated world only; for data of your own set "
            "synthesize.teacher to endpoint, with synthesize.teacher_base_url and synthesize.teacher_model"
        )
    rows = {key: row for path in scene_paths(recipe, split) for key, row in read_scene_rows(path).items()}
    by_key: Mapping[str, Example] = {example.key: example for example in examples}
    rates = {"error_rate": recipe.synthesize.error_rate, "brief_rate": recipe.synthesize.brief_rate}

    def script(key: str, sample: int, seed: int) -> str:
        example = by_key[key]
        rng = Random(sample_seed(seed, key, sample))
        return scripted_completion(row_of(example, rows), example, [PER_MILLE] * len(example.images), rng, **rates)

    return ScriptedSampler(script), "scripted", 32


def _served(
    recipe: Recipe,
    url: str | list[str],
    model: str,
    config: EndpointConfig,
    role: str,
    key_env: str | None,
    convention: Convention | None,
) -> EndpointSampler:
    """A sampler whose answers are kept under its role, which is the name of a folder."""
    from polyground.sampling.endpoint import EndpointSampler

    return EndpointSampler.from_config(
        url,
        model,
        config,
        cache=answers_folder(recipe, role),
        api_key_env=key_env,
        convention=convention,
        section="judge.endpoint" if role == "judge" else "endpoint",
    )


def _deciding(config: SynthesizeConfig) -> dict[str, Any]:
    """What decides the rows: not where teacher and judge are served, nor how patiently they are asked.

    What is not used is left out, so that rows made before it existed are known again.
    """
    decides = {name: value for name, value in config.to_json().items() if name != "endpoint"}
    decides |= {"teacher_base_url": None, "api_key_env": None}
    if config.judge is not None:
        elsewhere = {"base_url", "api_key_env", "endpoint"}
        decides["judge"] = {name: value for name, value in decides["judge"].items() if name not in elsewhere}
    unused: dict[str, Any] = {"aid": "never", "task_advice": {}, "self_consistency": None, "judge": None}
    decides = {name: value for name, value in decides.items() if name not in unused or value != unused[name]}
    if config.teacher == "endpoint" or config.judge is not None:
        decides["teacher_version"] = TEACHER_VERSION
    return decides


def _origin(recipe: Recipe, teacher: Teacher, judge: Judge | None) -> dict[str, Any]:
    origin: dict[str, Any] = {"teacher": teacher.name, "seed": recipe.seed, "prompt_version": PROMPT_VERSION}
    if teacher.usage is not None:
        origin["teacher_version"] = TEACHER_VERSION
    return origin if judge is None else {**origin, "judge": judge.name}


def _keep_or_drop(folder: RunFolder, example: Example, attempts: Sequence[Attempt], *, origin: Mapping[str, Any]) -> None:
    """A row of one of the two files. `reasons` has one entry per attempt, null for one that was fit."""
    about = {**origin, "attempts": len(attempts), "reasons": [attempt.why for attempt in attempts]}
    taught = best_of(attempts)
    if taught is not None:
        folder.append("kept.jsonl", _row(example, taught, about))
        return
    nearest = furthest_of(attempts)
    row = {"key": example.key, "task": example.task, "reason": nearest.why, **about}
    folder.append("rejected.jsonl", {**row, "text": nearest.rollout.completion.text, **_details(nearest)})


def _row(example: Example, attempt: Attempt, origin: Mapping[str, Any]) -> dict[str, Any]:
    rollout = attempt.rollout
    return {
        **example.to_json(),
        "reasoning": reasoning_of(rollout.completion.text),
        "answer": answer_to_json(taught_answer(example.target, rollout.score.answer or example.target)),
        "score": rollout.score.to_json(),
        **origin,
        **_details(attempt),
    }


def _details(attempt: Attempt) -> dict[str, Any]:
    """What there is to say of an attempt beyond its score."""
    details = {"agreement": attempt.agreement, "marks": attempt.marks and dict(attempt.marks)}
    return {"aided": attempt.aided} | {name: value for name, value in details.items() if value is not None}


def _summarize(folder: RunFolder, *, asked: int) -> dict[str, Any]:
    kept, rejected = ([_told(row) for row in folder.rows(name)] for name in ("kept.jsonl", "rejected.jsonl"))
    attempts = Counter(why for row in [*kept, *rejected] for why in row.get("reasons", ()) if why is not None)
    summary: dict[str, Any] = {
        "asked": asked,
        "kept": len(kept),
        "dropped": dict(sorted(Counter(row["reason"] for row in rejected).items())),
        "dropped_attempts": dict(sorted(attempts.items())),
        "kept_by_task": dict(sorted(Counter(row["task"] for row in kept).items())),
        "mean_words": sum(row["words"] for row in kept) / max(1, len(kept)),
    }
    if aided := sum(row.get("aided", False) for row in kept):
        summary["kept_aided"] = aided
    if agreed := [row["agreement"] for row in kept if "agreement" in row]:
        summary["mean_agreement"] = fmean(agreed)
    if marked := [row["marks"] for row in [*kept, *rejected] if "marks" in row]:
        summary["mean_marks"] = {name: fmean(marks[name] for marks in marked) for name in MARKS}
    return summary


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary tells of a row; the rest of many rows is not held."""
    told = {key: row[key] for key in ("task", "reason", "reasons", "aided", "agreement", "marks") if key in row}
    return told | {"words": len(row.get("reasoning", "").split())}


def _usage(teacher: Teacher, judge: Judge | None) -> dict[str, Any]:
    """What was asked and spent, of each server; a teacher that judges is one."""
    found = {} if teacher.usage is None else {"endpoint": teacher.usage()}
    return found if judge is None or judge.usage is None else {**found, "judge_endpoint": judge.usage()}


# ---------------------------------------------------------------- what it will cost


def cost_lines(recipe: Recipe, examples: Sequence[Example]) -> list[str]:
    """The estimate as text, or why there is none; nothing where no server is to be asked."""
    try:
        found = estimate(recipe, examples)
    except PolygroundError as error:
        return [f"cost not estimated: {error}"]
    if not found.forecasts:
        return []
    return [aligned(*found.table()), *(f"  {note}" for note in found.notes)]


def estimate(recipe: Recipe, examples: Sequence[Example]) -> Estimate:
    """What asking these examples would come to, in requests, tokens and, with prices, money. Asks no server and writes nothing.

    Whether an attempt will be kept is not known: what depends on it is told as what it comes to at most.
    """
    config = recipe.synthesize
    step = max(1, -(-len(examples) // LOOKED_AT))
    few = examples[::step]
    forecasts: list[tuple[Forecast, str]] = []
    notes: list[str] = []
    payers: dict[str, Asking] = {}
    if config.teacher == "endpoint" and few:
        asking = payers["endpoint"] = _teacher_asking(recipe)
        grids_of, _ = teacher_grids(config)
        explicable = [example for example in few if can_be_explained(example)]
        unaided = few if config.aid != "always" else [example for example in few if not can_be_explained(example)]
        aided = {"never": [], "failed": explicable, "always": explicable}[config.aid]
        for what, asked, template in (
            ("unaided", unaided, "ask"),
            ("aided" if config.aid == "always" else "aided, at most", aided, "explain"),
        ):
            if asked:
                ask = ask_of(grids_of, template=template, advice=config.task_advice)
                prompts, keys = [ask(example)[0] for example in asked], [example.key for example in asked]
                forecasts.append((asking.forecast(what, prompts, keys, answer=REASONED), "endpoint"))
        notes.append(f"teacher: prompts counted {asking.how_counted()}; an answer as {REASONED} tokens, or as the kept ones are")
    if config.judge is not None and few:
        judging, section = _judge_asking(recipe)
        payers.setdefault(section, judging)
        forecasts.append((_forecast_of_judge(recipe, few, judging), section))
        notes.append(f"judge: prompts counted {judging.how_counted()}; a reply as {MARKED} tokens")
    if step > 1:
        notes.append(f"measured on {len(few):,} of {len(examples):,} questions")
    scale = len(examples) / len(few) if few else 1.0
    return Estimate.of([(found.scaled(scale), section) for found, section in forecasts], payers=payers, notes=notes)


def _forecast_of_judge(recipe: Recipe, examples: Sequence[Example], judging: Asking) -> Forecast:
    """Every question's best candidates are judged, and with `aid: failed` those of both kinds."""
    config = recipe.synthesize
    grids_of, _ = judge_grids(config)
    most = min(config.judge.candidates if config.judge else 0, config.samples_per_example)
    prompts: list[Sequence[Message]] = []
    keys: list[str] = []
    for example in examples:
        grids = grids_of(example.images)
        explicable = can_be_explained(example)
        prompt = judge_messages(example, grids, reasoning="", answer=example.target if explicable else Answer())
        times = most * (2 if config.aid == "failed" and explicable else 1)
        prompts += [prompt] * times
        keys += [f"{example.key}#{number}" for number in range(times)]
    return judging.forecast("judged, at most", prompts, keys, answer=MARKED, extra=REASONED)


def _teacher_asking(recipe: Recipe) -> Asking:
    config = recipe.synthesize
    return Asking(
        model=str(config.teacher_model),
        config=config.endpoint,
        cache=answers_folder(recipe, "synthesize"),
        convention=teacher_grids(config)[1],
        n=config.samples_per_example,
        options={"temperature": config.temperature, "top_p": 1.0, "max_tokens": config.max_completion_length},
        seed=recipe.seed,
    )


def _judge_asking(recipe: Recipe) -> tuple[Asking, str]:
    """The judge, and the section its prices and its budget stand in."""
    config, judge = recipe.synthesize, recipe.synthesize.judge
    if judge is None:
        raise ConfigError("synthesize.judge is null: there is nobody to ask")
    own = judge.model is not None
    asking = Asking(
        model=str(judge.model if own else config.teacher_model),
        config=judge.endpoint if own else config.endpoint,
        cache=answers_folder(recipe, "judge" if own else "synthesize"),
        convention=judge_grids(config)[1],
        n=judge.samples,
        options={"temperature": judge.temperature, "top_p": 1.0, "max_tokens": judge.max_completion_length},
        seed=recipe.seed,
    )
    return asking, "judge.endpoint" if own else "endpoint"
