"""Finished runs to figures: means over seeds, paired differences with intervals, verdicts on the aims, and a page of Markdown.

Figures come from each run's `evaluate/outcomes.json` alone. No verdict is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyground import __version__
from polyground.errors import DataError
from polyground.metrics import SAME_LETTER, Outcomes, across_seeds, difference_across_seeds, pooled
from polyground.runs import ROLES
from polyground.stages.results.running import Run, runs_of
from polyground.stages.results.study import PAIRS, Study, Target
from polyground.storage import read_json

LABELS = {"base": "base", "sft": "SFT", "rl": "RL"}
POOLS = ("ood", "perception")
TITLES = {
    "test": "in domain",
    "validation": "validation",
    "ood (all)": "out of domain",
    "perception (all)": "perception",
    "ood": "out of domain",
}

ABOUT_HOURS = (
    "Wall time by stage in hours, mean over seeds. `training` adds up what makes the final model, from synthesis on, wherever it "
    "was made; `spent` is what the run took here, evaluation included, having taken over what an earlier run had finished."
)

ABOUT_LETTERS = (
    f"Models that answer at least {SAME_LETTER:.0%} of a set's questions by one and the same letter: what they have right there "
    "they have right by chance."
)

Answered = Mapping[str, Mapping[str, Outcomes]]
"""What one run's models had right: by split (pools among them), then by role."""


def gather(study: Study, *, command: str) -> dict[str, Any]:
    """Everything the page and the pictures show, of the runs that are finished."""
    runs = {arm.name: [run for run in runs_of(study, only=[arm.name]) if run.finished] for arm in study.arms}
    answered = {arm: {run.seed: read_answered(run.folder) for run in found} for arm, found in runs.items()}
    arms = {arm.name: _arm(study, arm.name, runs[arm.name], answered) for arm in study.arms}
    every = [run for found in runs.values() for run in found]
    return {
        "study": study.name,
        "title": study.title or study.name,
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "polyground": __version__,
        "iou": _iou(every),
        "bootstrap": study.bootstrap,
        "seeds": study.seeds,
        "baseline": study.baseline,
        "commits": _seen(every, "commit"),
        "machines": _seen(every, "machine"),
        "hours": sum(run.hours for run in every),
        "targets": [_verdict(target, arms[study.baseline], wanted=len(study.seeds)) for target in study.targets],
        "arms": arms,
    }


def read_answered(folder: Path) -> dict[str, dict[str, Outcomes]]:
    """A run's outcomes by split and role; `ood (all)` and `perception (all)` pool the splits of their group."""
    path = folder / "evaluate" / "outcomes.json"
    try:
        splits: dict[str, dict[str, Outcomes]] = dict(read_json(path)["splits"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not written by `polyground evaluate`; run `polyground evaluate` there again") from error
    for group in POOLS:
        members = [split for split in splits if split.startswith(f"{group}_")]
        if len(members) > 1:
            roles = splits[members[0]]
            splits[f"{group} (all)"] = {role: pooled({split: splits[split][role] for split in members}) for role in roles}
    return splits


def heading(split: str) -> str:
    """A split in words.

    >>> heading("test"), heading("ood (all)"), heading("perception_blink")
    ('in domain', 'out of domain', 'perception: blink')
    """
    group, _, member = split.partition("_")
    return TITLES[split] if split in TITLES else f"{TITLES.get(group, group)}: {member}" if member else split


def headlines(splits: Iterable[str]) -> list[str]:
    """Splits in the order they are told: in domain, the pools, then each set."""
    order = ("test", "ood (all)", "perception (all)", "validation")
    return sorted(splits, key=lambda split: order.index(split) if split in order else len(order))


def main_splits(splits: Iterable[str]) -> list[str]:
    """What is told of every arm: a pool instead of its sets, but the sets of perception by themselves where there are two.

    >>> main_splits(["test", "ood (all)", "ood_a", "ood_b", "perception (all)", "perception_blink", "perception_mmiu"])
    ['test', 'ood (all)', 'perception_blink', 'perception_mmiu']
    >>> main_splits(main_splits(["ood (all)", "ood_a", "ood_b"]))
    ['ood (all)']
    """
    names = headlines(splits)
    sets = {group: [name for name in names if name.startswith(f"{group}_")] for group in POOLS}
    few = {"ood": (1,), "perception": (1, 2)}
    whole = {group for group in POOLS if len(sets[group]) not in few[group]}
    left_out = {f"{group} (all)" for group in POOLS if group not in whole}
    left_out |= {name for group in whole for name in sets[group]}
    return [name for name in names if name not in left_out]


def _arm(study: Study, name: str, runs: Sequence[Run], answered: Mapping[str, Mapping[int, Answered]]) -> dict[str, Any]:
    arm, own = study.arm(name), answered[name]
    seeds = [run.seed for run in runs]
    found: dict[str, Any] = {
        "shows": arm.shows,
        "overrides": arm.overrides,
        "model": arm.model,
        "seeds": seeds,
        "seeds_missing": [seed for seed in study.seeds_of(arm) if seed not in seeds],
        "hours": {str(run.seed): run.hours for run in runs},
        "warnings": {str(run.seed): run.warnings for run in runs},
        "letters": {str(run.seed): run.letters for run in runs},
        "stage_seconds": {str(run.seed): run.stages for run in runs},
        "splits": {},
    }
    shared = [split for split in own[seeds[0]] if all(split in own[seed] for seed in seeds)] if seeds else []
    # Of an arm that is only compared, what is not in its table would make a large file of nobody's interest.
    for split in headlines(shared) if name == study.baseline else main_splits(shared):
        found["splits"][split] = _split(study, [own[seed][split] for seed in seeds])
        if name != study.baseline:
            versus = _versus(study, name, split, answered)
            found["splits"][split]["versus_baseline"] = versus
    return found


def _split(study: Study, runs: Sequence[Mapping[str, Outcomes]]) -> dict[str, Any]:
    """One split of one arm: each model, and each pair of them."""
    roles = [role for role in ROLES if all(role in run for run in runs)]
    models = {role: across_seeds([run[role] for run in runs], bootstrap=study.bootstrap) for role in roles}
    differences = {}
    for pair in PAIRS:
        second, first = pair.split("-")
        if first in roles and second in roles:
            found = difference_across_seeds(
                [run[first] for run in runs], [run[second] for run in runs], bootstrap=study.bootstrap
            )
            differences[pair] = found.to_json()
    return {
        "questions": models[roles[0]].examples if roles else 0,
        "models": {role: table.to_json() for role, table in models.items()},
        "differences": differences,
    }


def _versus(study: Study, name: str, split: str, answered: Mapping[str, Mapping[int, Answered]]) -> dict[str, Any] | None:
    """The arm's model minus the baseline's under the seeds that both have; None where they have none in common."""
    role, ground = study.arm(name).model, study.arm(study.baseline)
    own, other = answered[name], answered[ground.name]
    seeds = [
        seed
        for seed in own
        if seed in other and split in other[seed] and role in own[seed][split] and ground.model in other[seed][split]
    ]
    if not seeds:
        return None
    first = [other[seed][split][ground.model] for seed in seeds]
    second = [own[seed][split][role] for seed in seeds]
    return {"seeds": seeds, **difference_across_seeds(first, second, bootstrap=study.bootstrap).to_json()}


def _verdict(target: Target, arm: Mapping[str, Any], *, wanted: int) -> dict[str, Any]:
    """Whether the baseline reaches an aim: the mean over seeds, and an interval above zero."""
    second, first = target.difference.split("-")
    what = f"{heading(target.headline)}, {LABELS[second]} − {LABELS[first]}"
    aim = f"aim ≥ {target.points:+g} points and the interval above zero"
    split = arm["splits"].get(target.headline)
    found = split and split["differences"].get(target.difference)
    row = {"headline": target.headline, "difference": target.difference, "points": target.points}
    if not found:
        return {**row, "met": None, "text": f"{what}: not measured yet ({aim})"}
    mean = found["macro"]
    met = 100 * mean["value"] >= target.points and mean["low"] > 0
    seeds = len(mean["seeds"])
    over = _counted(seeds, "seed") if seeds >= wanted else f"{seeds} of {wanted} seeds, so far,"
    text = (
        f"{what}: {_points(mean)} points over {over} and {split['questions']:,} questions ({aim}): {'met' if met else 'missed'}"
    )
    return {**row, "met": met, "value": mean["value"], "low": mean["low"], "high": mean["high"], "seeds": seeds, "text": text}


def verdict_lines(results: Mapping[str, Any]) -> list[str]:
    """One line per aim."""
    return [target["text"] for target in results["targets"]]


def written(results: Mapping[str, Any]) -> str:
    """The page."""
    arms: Mapping[str, Any] = results["arms"]
    ground = arms[results["baseline"]]
    others = {name: arm for name, arm in arms.items() if name != results["baseline"]}
    parts = [f"# {results['title']}", _provenance(results)]
    if results["targets"]:
        parts += ["## Aims", "\n".join(f"- {line}" for line in verdict_lines(results))]
    if ground["splits"]:
        parts += [f"![figures]({results['study']}.png)"]
    if others:
        parts += ["## Against the baseline", _about_versus(results), _versus_table(results), *_sentences(results)]
    if ground["splits"]:
        parts += [f"## Base, SFT and RL of `{results['baseline']}`", _about_cells(results), _headline_table(ground)]
    if ground["splits"] and not others:
        for split in (split for split in headlines(ground["splits"]) if not split.endswith("(all)")):
            parts += [f"### {heading(split)[0].upper()}{heading(split)[1:]}, task by task", _task_table(ground["splits"][split])]
        parts += ["## Seed by seed", _seed_table(ground)]
    if any(found for arm in arms.values() for found in arm["warnings"].values()):
        parts += ["## Warned of while RL trained", "\n".join(_warnings(arms))]
    if letters := list(_letters(arms)):
        parts += ["## Letters", ABOUT_LETTERS, "\n".join(letters)]
    parts += ["## Hours", ABOUT_HOURS, _hours_table(arms)]
    return "\n\n".join(parts) + "\n"


def _provenance(results: Mapping[str, Any]) -> str:
    missing = {name: arm["seeds_missing"] for name, arm in results["arms"].items() if arm["seeds_missing"]}
    rows = [
        ("command", f"`{results['command']}`"),
        ("commit", ", ".join(f"`{commit}`" for commit in results["commits"]) or "not known"),
        ("machine", "; ".join(results["machines"]) or "not known"),
        ("hours", f"{results['hours']:.2f} of wall time in all"),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("written", f"{results['written']}, polyground {results['polyground']}"),
    ]
    if missing:
        told = "; ".join(f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in missing.items())
        rows.append(("not finished", told))
    return _table(["", ""], rows)


def _about_cells(results: Mapping[str, Any]) -> str:
    return (
        f"Accuracy at IoU {results['iou']:g} (right letters in perception) in percent, averaged over tasks and then over seeds; "
        "in a pool of several sets each set weighs the same. After ± the standard deviation over seeds; in brackets the 95 % "
        f"bootstrap interval over questions and seeds together ({results['bootstrap']:,} draws; `metrics.across_seeds` has the "
        "formula). Differences are in points, paired by seed and question; bold where the interval leaves out zero."
    )


def _about_versus(results: Mapping[str, Any]) -> str:
    about = (
        f"Each arm is `{results['baseline']}` with one thing changed, same seeds, same questions: points of its final model "
        "minus the baseline's, paired by seed and question, with the 95 % interval over both; bold where it leaves out zero. "
        "Hours are those of all that makes the final model, what was taken over from the baseline included: the budgets."
    )
    if any(len(arm["seeds"]) == 1 for arm in results["arms"].values()):
        about += " Of one seed the interval is over its questions alone: what another seed would change is not in it."
    return about


def _headline_table(arm: Mapping[str, Any]) -> str:
    roles = [role for role in ROLES if any(role in split["models"] for split in arm["splits"].values())]
    pairs = [pair for pair in PAIRS if any(pair in split["differences"] for split in arm["splits"].values())]
    header = ["", "questions", *(LABELS[role] for role in roles), *map(_pair, pairs)]
    rows = []
    for split in headlines(arm["splits"]):
        found = arm["splits"][split]
        cells = [_cell(found["models"][role]["macro"]) if role in found["models"] else "" for role in roles]
        gains = [_gain(found["differences"][pair]["macro"]) if pair in found["differences"] else "" for pair in pairs]
        rows.append([f"**{heading(split)}**", f"{found['questions']:,}", *cells, *gains])
    return _table(header, rows)


def _task_table(found: Mapping[str, Any]) -> str:
    roles, pairs = list(found["models"]), list(found["differences"])
    header = ["task", *(LABELS[role] for role in roles), *map(_pair, pairs)]
    tasks = found["models"][roles[0]]["tasks"] if roles else {}
    rows = [
        [
            task,
            *(_cell(found["models"][r]["tasks"][task]) for r in roles),
            *(_gain(found["differences"][p]["tasks"][task]) for p in pairs),
        ]
        for task in tasks
    ]
    return _table(header, rows)


def _seed_table(arm: Mapping[str, Any]) -> str:
    rows = []
    for split in headlines(arm["splits"]):
        for role, table in arm["splits"][split]["models"].items():
            values = [f"{100 * value:.1f}" for value in table["macro"]["seeds"]]
            rows.append([heading(split), LABELS[role], *values])
    return _table(["", "model", *(f"seed {seed}" for seed in arm["seeds"])], rows)


def _versus_table(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    ground = arms[results["baseline"]]
    shown = main_splits(ground["splits"])
    header = ["arm", "seeds", *map(heading, shown), "training hours"]
    own = [
        _cell(ground["splits"][split]["models"][ground["model"]]["macro"])
        if ground["model"] in ground["splits"][split]["models"]
        else ""
        for split in shown
    ]
    rows = [[f"`{results['baseline']}` ({LABELS[ground['model']]})", str(len(ground["seeds"])), *own, _training(ground)]]
    for name, arm in arms.items():
        if name == results["baseline"]:
            continue
        cells = []
        for split in shown:
            versus = arm["splits"].get(split, {}).get("versus_baseline")
            cells.append(_gain(versus["macro"]) if versus else "")
        model = "" if arm["model"] == ground["model"] else f" ({LABELS[arm['model']]})"
        rows.append([f"`{name}`{model}", str(len(arm["seeds"])), *cells, _training(arm)])
    return _table(header, rows)


def _sentences(results: Mapping[str, Any]) -> list[str]:
    """Per arm: the question it answers, and what was measured."""
    lines = []
    for name, arm in results["arms"].items():
        if name == results["baseline"]:
            continue
        told = []
        for split in main_splits(arm["splits"]):
            versus = arm["splits"][split].get("versus_baseline")
            if versus:
                told.append(f"{heading(split)}, {_compared(versus['macro'])}")
        measured = f"Against `{results['baseline']}`: {'; '.join(told)}." if told else "Not measured yet."
        lines.append(f"- **{name}**: {arm['shows']} {measured}")
    return ["\n".join(lines)]


def _compared(macro: Mapping[str, Any]) -> str:
    text = f"({_points(macro)})"
    if macro["low"] > 0:
        return f"it ends higher {text}"
    return f"it ends lower {text}" if macro["high"] < 0 else f"no difference is seen {text}"


def _warnings(arms: Mapping[str, Any]) -> Iterator[str]:
    """A line per arm and kind of warning: at which step, under which seeds, and its text the first time."""
    for name, arm in arms.items():
        kinds = dict.fromkeys(row["kind"] for found in arm["warnings"].values() for row in found)
        for kind in kinds:
            rows = {seed: row for seed, found in arm["warnings"].items() for row in found if row["kind"] == kind}
            where = ", ".join(f"seed {seed} at step {row['step']}" for seed, row in rows.items())
            yield f"- **{name}**, {kind} ({where}): {next(iter(rows.values()))['text']}"


def _letters(arms: Mapping[str, Any]) -> Iterator[str]:
    """A line per arm, set and model that answers by one letter, with the seeds."""
    for name, arm in arms.items():
        found: dict[tuple[str, str], list[str]] = {}
        for seed, letters in arm["letters"].items():
            for split, role, letter in letters:
                found.setdefault((split, role), []).append(f"{letter} (seed {seed})")
        for (split, role), told in found.items():
            yield f"- **{name}**, {heading(split)}, {LABELS[role]}: {', '.join(told)}"


def _hours_table(arms: Mapping[str, Any]) -> str:
    stages = list(dict.fromkeys(stage for arm in arms.values() for found in arm["stage_seconds"].values() for stage in found))
    rows = []
    for name, arm in arms.items():
        if not arm["seeds"]:
            continue
        seconds = arm["stage_seconds"].values()
        cells = [f"{_mean([found.get(stage, 0.0) for found in seconds]) / 3600:.2f}" for stage in stages]
        rows.append([f"`{name}`", *cells, _training(arm), f"{_mean(arm['hours'].values()):.2f}"])
    return _table(["arm", *stages, "training", "spent"], rows) if rows else "Nothing is finished yet."


def _training(arm: Mapping[str, Any]) -> str:
    """Hours of all that makes the final model: neither the world nor an evaluation."""
    found = [
        sum(seconds for stage, seconds in stages.items() if stage != "world" and not stage.startswith("evaluate/"))
        for stages in arm["stage_seconds"].values()
    ]
    return f"{_mean(found) / 3600:.2f}" if found else ""


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def _cell(found: Mapping[str, Any]) -> str:
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['value']:.1f}{spread} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _gain(found: Mapping[str, Any]) -> str:
    text = _points(found)
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def _points(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _pair(pair: str) -> str:
    return " − ".join(LABELS[role] for role in pair.split("-"))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _seen(runs: Iterable[Run], what: str) -> list[str]:
    """What the attempts of finished runs say of themselves, each once."""
    return list(dict.fromkeys(attempt[what] for run in runs for attempt in run.made["attempts"] if attempt.get(what)))


def _iou(runs: Sequence[Run]) -> float:
    return float(read_json(runs[0].folder / "evaluate" / "outcomes.json")["iou"]) if runs else 0.5
