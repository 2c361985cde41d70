"""`polyground VERB RECIPE`: which verb runs which stage, and how errors reach a person.

Every stage is imported only when its verb is called, so `--help` and a misspelt verb cost no time.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyground.errors import ConfigError, PolygroundError, visible

if TYPE_CHECKING:
    from polyground.config import Recipe

STAGES = {
    "world": "build the simulated world: images and annotation in MIG-Bench's format",
    "synthesize": "let the teacher reason about training questions; keep what the scorer confirms",
    "sft": "cold start: LoRA fine-tuning on the kept reasoning",
    "merge": "merge each adapter there is (SFT, then GRPO) into the model it was trained on",
    "reject": "sample the SFT model several times per question; keep questions it sometimes gets right",
    "grpo": "reinforcement learning with rule rewards from the merged SFT model",
    "evaluate": "answer every benchmark split with the base, the SFT and the RL model",
    "report": "write one HTML page about the run",
    "run": "the whole figure, stage by stage, skipping what is complete",
    "pretrain": "make the embedded tiny base model anew (long; not part of `run`)",
}
_GROUND = "ask a model about image files and see the box"
TOOLS = {
    "convert": "rewrite a data set in another format, row by row",
    "export": "write rows of ours as ShareGPT, ms-swift, TRL, …; a run's predictions as COCO, FiftyOne, hub data set, card, …",
    "validate": "check a data set or a recipe before training: rows, images, boxes, leakage, tokens, memory",
    "check-coords": "draw the truth after a round trip through prompt, grid and parser",
    "score": "score a benchmark's responses, whoever made them",
    "results": "run a study (a recipe over seeds and arms) and write the tables that say what each stage buys",
}
"""Verbs that need no recipe: a module of `polyground.stages` with `arguments(parser)` and `run(options)`, which returns text."""
SHARED = ("synthesize", "reject", "evaluate")
"""Verbs whose questions may be shared out over processes and machines."""
TRAINED = ("sft", "grpo")
"""Verbs whose every step all processes of a launcher do together."""
INTERRUPTED = 130
REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 when the user must change something, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _quiet_libraries()
    _log_visibly()
    try:
        return _dispatch(arguments)
    except PolygroundError as error:
        print(f"polyground: {visible(str(error), keep=_LINES)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\npolyground: interrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) left: not an error of ours, and nothing more can be said to it.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 0


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_help())
        return 0
    if arguments[0] in {"-V", "--version"}:
        from polyground import __version__

        print(f"polyground {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "ground":
        return _ground(rest)
    if verb in TOOLS:
        return _tool(verb, rest)
    if verb not in STAGES:
        raise ConfigError(f"there is no verb {verb!r}{nearest(verb, [*STAGES, *TOOLS, 'ground'])}; see `polyground --help`")
    return _stage(verb, rest)


def nearest(word: str, words: Sequence[str]) -> str:
    """`" (did you mean 'sft'?)"`, or nothing when no word is near."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _help() -> str:
    width = max(map(len, [*STAGES, *TOOLS, "ground"]))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in STAGES.items())
    tools = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in {"ground": _GROUND, **TOOLS}.items())
    return f"""usage: polyground VERB RECIPE [--key value …] [--dry-run]
       polyground ground --model FOLDER IMAGE [IMAGE …] -q QUESTION [--out FILE]
       polyground TOOL …

Multi-image visual grounding: cold start on synthesised reasoning, then GRPO with rule rewards.

verbs, each with a recipe:
{verbs}

tools, which need none (`polyground TOOL --help`):
{tools}

Any key of the recipe can be given on the command line: `polyground grpo recipes/tiny.yaml --learning_rate 1e-4`
(a key of the verb's own section) or `--reject.num_generations 16` (section and key).
`polyground VERB --help` lists a section's keys; `--dry-run` shows what a verb would do and runs nothing.
"""


def _stage(verb: str, rest: Sequence[str]) -> int:
    if {"-h", "--help"} & set(rest):
        print(_verb_help(verb))
        return 0
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"`polyground {verb}` needs a recipe first: polyground {verb} recipes/tiny.yaml")
    if verb == "pretrain":
        return _pretrain(Path(rest[0]), rest[1:])
    from polyground.config import load_recipe

    overrides = [word for word in rest[1:] if word != "--dry-run"]
    recipe = load_recipe(Path(rest[0]), overrides, section=verb)
    if "--dry-run" in rest:
        from polyground.stages.run import plan

        print(plan(recipe, verb))
        return 0
    _set_threads()
    _say(verb, _run(verb, recipe))
    return 0


def _run(verb: str, recipe: Recipe) -> Any:
    """All of a stage, or this process's part of it; the first process of a launcher puts the parts together at the end."""
    from polyground.shards import launched_shard, shared_stages, wait_for_parts

    stage = importlib.import_module(f"polyground.stages.{verb}")
    if recipe.shard is not None and verb not in SHARED:
        raise ConfigError(f"shard {recipe.shard}: `{verb}` is not shared out; leave it out, or give it to {', '.join(SHARED)}")
    launched = launched_shard() if recipe.shard is None and verb not in TRAINED else None
    if launched is None:
        return stage.run(recipe)
    if verb not in SHARED:
        raise ConfigError(
            f"`{verb}` runs in one process, and {launched.count} were launched; start it without torchrun or accelerate, "
            f"which are for {', '.join((*SHARED, *TRAINED))}"
        )
    done = stage.run(recipe.model_copy(update={"shard": str(launched)}))
    if launched.index > 0:
        return done
    wait_for_parts(recipe.out, shared_stages(recipe.out, verb, launched.count), launched.count)
    return stage.run(recipe)


def _pretrain(path: Path, options: Sequence[str]) -> int:
    """It has a recipe of its own, which the other verbs know nothing of."""
    from polyground.stages.pretrain import load_config, run

    config = load_config(path)
    if "--dry-run" in options:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        return 0
    if options:
        raise ConfigError(f"pretrain takes its keys from {path} alone; {options[0]!r} is not understood")
    _say("pretrain", run(config, _tell_point))
    return 0


def _tell_point(point: Mapping[str, float]) -> None:
    """A point of the curve, as it is reached: this stage takes an hour or two."""
    print("pretrain: " + "  ".join(f"{name} {value:g}" for name, value in point.items()), file=sys.stderr, flush=True)


def _verb_help(verb: str) -> str:
    from polyground.config import Recipe
    from polyground.stages.pretrain import PretrainConfig

    lines = [f"usage: polyground {verb} RECIPE [--key value …] [--dry-run]", "", STAGES[verb], ""]
    field = Recipe.model_fields.get(verb)
    whole = PretrainConfig if verb == "pretrain" else Recipe
    section: Any = whole if field is None else _model_of(field.annotation)
    lines.append(f"keys of section {verb!r}:" if field is not None else "keys of the recipe:")
    for name, info in section.model_fields.items():
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        lines.append(f"  --{name}  ({default if len(default) < 60 else default[:57] + '...'})")
        if info.description:
            lines.append(f"      {' '.join(info.description.split())}")
    return "\n".join(lines)


def _model_of(annotation: Any) -> Any:
    """The section class in `Section` or `Section | None`."""
    from typing import get_args

    return next((part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields")), annotation)


def _say(verb: str, summary: Any) -> None:
    """One readable line or block; whatever a stage has already shown (tables) is not repeated."""
    if isinstance(summary, Path):
        print(f"{verb}: wrote {summary}")
    elif isinstance(summary, Mapping) and verb not in {"run", "evaluate"}:
        flat = {key: value for key, value in summary.items() if not isinstance(value, list | tuple) or len(value) <= 12}
        print(f"{verb}: {json.dumps(flat, default=str, ensure_ascii=False)}")


def _tool(verb: str, rest: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"polyground {verb}", description=TOOLS[verb], allow_abbrev=False)
    if verb == "export":
        module = _export(parser, rest)
    else:
        module = importlib.import_module(f"polyground.stages.{verb.replace('-', '_')}")
        module.arguments(parser)
    text = module.run(parser.parse_args(rest))
    if text:
        print(text)
    return 0


def _export(parser: argparse.ArgumentParser, rest: Sequence[str]) -> Any:
    """The stage that writes what `--to` names: predictions of a run, tasks for lmms-eval, or else rows."""
    from polyground.lmms_eval import LAYOUT
    from polyground.predictions import LAYOUTS

    further = {**LAYOUTS, **LAYOUT}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--to")
    to = finder.parse_known_args([word for word in rest if word != "--"])[0].to
    name = "convert" if to not in further else "export_tasks" if to in LAYOUT else "export"
    module = importlib.import_module(f"polyground.stages.{name}")
    if name == "convert":
        module.arguments(parser, source="polyground", further=further)
    else:
        module.arguments(parser)
    return module


def _ground(rest: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="polyground ground", description=_GROUND, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, help="image files, in the order the question counts them")
    parser.add_argument("-q", "--question", required=True)
    parser.add_argument("--model", required=True, help='a model folder, or "tiny" for the embedded base')
    parser.add_argument("--out", type=Path, help="write the images side by side, the answer drawn, to this file")
    parser.add_argument("--instruction", default="", help="appended to the question, as in the recipe the model was trained with")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found = parser.parse_args(rest)
    from polyground.demo import ground

    _set_threads()
    reply = ground(
        found.model,
        found.images,
        question=found.question,
        instruction=found.instruction,
        out=found.out,
        max_tokens=found.max_tokens,
        dtype=found.dtype,
    )
    print(json.dumps(reply, indent=2, ensure_ascii=False))
    return 0


def _quiet_libraries() -> None:
    """Library chatter that tells a user nothing he can act on; `POLYGROUND_VERBOSE=1` keeps it."""
    if os.environ.get("POLYGROUND_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft|tensorboard)(\..*)?")
    for name in ("transformers", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Visible(logging.Formatter):
    """The message alone; what it quotes of models and annotations moves no cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep=_LINES)


_LINES = "\n\t"


def _log_visibly() -> None:
    # Nothing else configures logging: warnings reach standard error through the handler of last resort.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Visible("%(message)s"))


def _set_threads() -> None:
    """As many threads as cores we may use, unless the user says otherwise: containers often show torch the whole host."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(cores)
