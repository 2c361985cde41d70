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
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from polyground.errors import ConfigError, PolygroundError, UsageError, visible
from polyground.extras import extra_of, install_command

if TYPE_CHECKING:
    from polyground.completion import Command, Option
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
    "init": "write a recipe for your model and your data: four questions, or flags",
    "doctor": "look at this machine: libraries, GPU, memory, disk; say what to install",
    "convert": "rewrite a data set in another format, row by row",
    "export": "write rows of ours as ShareGPT, ms-swift, TRL, …; a run's predictions as COCO, FiftyOne, hub data set, card, …",
    "validate": "check a data set or a recipe before training: rows, images, boxes, leakage, tokens, memory",
    "check-coords": "draw the truth after a round trip through prompt, grid and parser",
    "score": "score a benchmark's responses, whoever made them",
    "results": "run a study (a recipe over seeds and arms) and write the tables that say what each stage buys",
    "demo": "ask one or several models about images on a page of this machine, boxes drawn side by side",
    "browse": "look through a run or a data set row by row on the same page; mark rows and export them",
}
"""Verbs that need no recipe: a module of `polyground.stages` with `arguments(parser)` and `run(options)`, which returns text."""
OWN = {
    "ground": _GROUND,
    "completion": "print a script that completes verbs and keys: bash, zsh or fish",
}
"""Verbs that need no recipe and stand in this module."""
PAGES = ("demo", "browse")
"""Tools whose module is in `polyground.app`."""
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
        print(f"polyground: {visible(str(error), keep=_LINES)}\n  more: {where_explained(error, arguments[:1])}", file=sys.stderr)
        return REFUSED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = extra_of(missing)
        if extra is None:
            raise
        print(
            f"polyground: {missing} is not installed; {install_command(extra)} brings it\n  more: `polyground doctor`",
            file=sys.stderr,
        )
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
    if verb == "completion":
        return _completion(rest)
    if verb in TOOLS:
        return _tool(verb, rest)
    if verb not in STAGES:
        raise UsageError(f"there is no verb {verb!r}{nearest(verb, [*STAGES, *TOOLS, *OWN])}; see `polyground --help`")
    return _stage(verb, rest)


def where_explained(error: PolygroundError, verb: Sequence[str] = ()) -> str:
    """The page that says more about an error: a file, where the project's docs lie beside the code.

    What is wrong with the words given to a tool is told under that tool's own heading; `verb` is the first word, if any.
    """
    page, _, heading = error.page.partition("#")
    if isinstance(error, UsageError) and {*TOOLS, *OWN} & set(verb):
        heading = f"polyground-{verb[0]}"
    file = Path(__file__).parents[2] / "docs" / page
    shown = file
    if not file.is_file():
        shown = Path("docs") / page
    elif file.is_relative_to(Path.cwd()):
        shown = file.relative_to(Path.cwd())
    return f"{shown}#{heading}" if heading else str(shown)


def nearest(word: str, words: Sequence[str]) -> str:
    """`" (did you mean 'sft'?)"`, or nothing when no word is near."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _help() -> str:
    width = max(map(len, [*STAGES, *TOOLS, *OWN]))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in STAGES.items())
    tools = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in {**OWN, **TOOLS}.items())
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
`polyground VERB --help` lists a section's keys, `polyground VERB --help KEY` explains one; `--dry-run` shows what a verb would
do and runs nothing. The first hour: `polyground doctor`, then `polyground init mine.yaml`, and docs/tutorial.md.
"""


def _stage(verb: str, rest: Sequence[str]) -> int:
    if {"-h", "--help"} & set(rest):
        print(_verb_help(verb, [word.removeprefix("--") for word in rest if word not in {"-h", "--help"}]))
        return 0
    if not rest or rest[0].startswith("-"):
        raise UsageError(f"`polyground {verb}` needs a recipe first: polyground {verb} recipes/tiny.yaml")
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


def _verb_help(verb: str, asked: Sequence[str] = ()) -> str:
    """A line per key: its default and its first sentence. Keys that are asked for are explained in full."""
    section, own = _section(verb)
    keys = {name: info for name, info in section.model_fields.items() if name in asked}
    if keys:
        return "\n\n".join(f"--{name}  ({_default(info)})\n  {_prose(info.description)}" for name, info in keys.items())
    lines = [f"usage: polyground {verb} RECIPE [--key value …] [--dry-run]", "", STAGES[verb], ""]
    lines.append(f"keys of section {verb!r}:" if own else "keys of the recipe:")
    for name, info in section.model_fields.items():
        head = f"  --{name}  ({_default(info)})".ljust(_COLUMN)
        lines.append(f"{head}  {_first_sentence(info.description, WIDTH - len(head) - 2)}".rstrip())
    pages = [f"`polyground {verb} --help KEY` explains a key; docs/reference.md has all keys of all sections"]
    return "\n".join([*lines, "", *pages])


WIDTH = 130
"""Columns of the help; whatever is longer is cut at a word."""
_COLUMN = 44
"""Where the explanations of keys begin, unless name and default need more."""


def _section(verb: str) -> tuple[Any, bool]:
    """The class that holds a verb's keys, and whether it is a section of the recipe that is called like the verb."""
    from polyground.config import Recipe

    if verb == "pretrain":
        from polyground.stages.pretrain import PretrainConfig

        return PretrainConfig, False
    field = Recipe.model_fields.get(verb)
    return (Recipe, False) if field is None else (_model_of(field.annotation), True)


def _default(info: Any) -> str:
    default = "required" if info.is_required() else f"default {_short(info.get_default(call_default_factory=True))}"
    return default if len(default) < 44 else default[:41] + "..."


def _short(value: Any) -> str:
    return "as below" if hasattr(type(value), "model_fields") else repr(value)


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


def _first_sentence(text: str | None, room: int) -> str:
    """Up to the first full stop or semicolon; cut at a word where even that is too long for the line."""
    sentence = re.split(r"(?<=[.;])\s", _prose(text), maxsplit=1)[0].rstrip(".;")
    if len(sentence) <= room:
        return sentence
    return sentence[: max(room - 1, 12)].rpartition(" ")[0].rstrip(",:;(") + " …"


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
    parser, module = _tool_parser(verb, rest)
    if verb == "demo":
        _set_threads()
    text = module.run(parser.parse_args(rest))
    if text:
        print(text)
    return 0


class _Parser(argparse.ArgumentParser):
    """What is wrong in one line, as every other error is told; `--help` has the flags."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = ""
        if wrong is not None:
            near = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        elif unknown is not None:
            near = nearest(unknown[1], [name for action in self._actions for name in action.option_strings])
        raise UsageError(f"{message}{near}; see `{self.prog} --help`")


def _tool_parser(verb: str, rest: Sequence[str] = ()) -> tuple[argparse.ArgumentParser, Any]:
    """What a tool takes, and the module that runs it; that of `export` depends on the words given."""
    parser = _Parser(prog=f"polyground {verb}", description=TOOLS[verb], allow_abbrev=False)
    if verb == "export":
        module = _export(parser, rest)
    else:
        package = "app" if verb in PAGES else "stages"
        module = importlib.import_module(f"polyground.{package}.{verb.replace('-', '_')}")
        module.arguments(parser)
    return parser, module


def export_parsers() -> dict[str, argparse.ArgumentParser]:
    """What `export` takes, by what it is asked to write."""
    layouts = {"rows": "trl", "the predictions of a run": "coco", "a benchmark as a task": "lmms-eval"}
    return {what: _tool_parser("export", ["--to", layout])[0] for what, layout in layouts.items()}


def _export(parser: argparse.ArgumentParser, rest: Sequence[str]) -> Any:
    """The stage that writes what `--to` names: predictions of a run, tasks for lmms-eval, or else rows."""
    from polyground.lmms_eval import LAYOUT
    from polyground.predictions import LAYOUTS

    further = {**LAYOUTS, **LAYOUT}
    finder = _Parser(prog="polyground export", add_help=False, allow_abbrev=False)
    finder.add_argument("--to")
    to = finder.parse_known_args([word for word in rest if word != "--"])[0].to
    name = "convert" if to not in further else "export_tasks" if to in LAYOUT else "export"
    module = importlib.import_module(f"polyground.stages.{name}")
    if name == "convert":
        module.arguments(parser, source="polyground", further=further)
    else:
        module.arguments(parser)
    return module


def _completion_parser() -> argparse.ArgumentParser:
    from polyground.completion import SHELLS

    parser = _Parser(prog="polyground completion", description=OWN["completion"], allow_abbrev=False)
    parser.add_argument("shell", choices=SHELLS, help="the shell it is for")
    return parser


def _completion(rest: Sequence[str]) -> int:
    from polyground.completion import script

    print(script(_completion_parser().parse_args(rest).shell, commands()))
    return 0


def command_parser(verb: str) -> argparse.ArgumentParser:
    """What a verb without a recipe takes."""
    if verb == "ground":
        return _ground_parser()
    return _completion_parser() if verb == "completion" else _tool_parser(verb)[0]


def commands() -> dict[str, Command]:
    """Everything that can be typed, from the verbs' own definitions."""
    from polyground.completion import SHELLS, Command, Option

    told: dict[str, Command] = {}
    for verb, about in STAGES.items():
        section, _ = _section(verb)
        own = [_key(name, info) for name, info in section.model_fields.items() if verb != "pretrain"]
        told[verb] = Command(about, [*own, _dry_run(), _help_option()])
    for verb, about in TOOLS.items():
        parsers = export_parsers().values() if verb == "export" else [_tool_parser(verb)[0]]
        options = [option for parser in parsers for option in _flags(parser)]
        told[verb] = Command(about, list({option.name: option for option in reversed(options)}.values())[::-1])
    told["ground"] = Command(_GROUND, _flags(_ground_parser()))
    told["completion"] = Command(OWN["completion"], [Option("--help", takes_value=False)], words=tuple(SHELLS))
    return told


def _dry_run() -> Option:
    from polyground.completion import Option

    return Option("--dry-run", "show what would be done, and do nothing", takes_value=False)


def _help_option() -> Option:
    from polyground.completion import Option

    return Option("--help", "list the keys", takes_value=False)


def _key(name: str, info: Any) -> Option:
    """A key of a section as an option; a choice, or true and false, are offered as its values."""
    from typing import Literal, get_args, get_origin

    from polyground.completion import Option

    parts = [info.annotation, *get_args(info.annotation)] if get_origin(info.annotation) is not Literal else [info.annotation]
    literal = next((part for part in parts if get_origin(part) is Literal), None)
    values = tuple(map(str, get_args(literal))) if literal is not None else ("true", "false") if bool in parts else ()
    return Option(f"--{name}", _first_sentence(info.description, 80), values)


def _flags(parser: argparse.ArgumentParser) -> list[Option]:
    """The long options of a tool."""
    from polyground.completion import Option

    found = []
    for action in parser._actions:
        name = next((text for text in action.option_strings if text.startswith("--")), None)
        if name is not None:
            values = tuple(str(choice) for choice in action.choices or ())
            about = _first_sentence((action.help or "") % {"default": action.default, "prog": parser.prog}, 80)
            found.append(Option(name, about, values, takes_value=action.nargs != 0))
    return found


def _ground_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="polyground ground", description=_GROUND, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, help="image files, in the order the question counts them")
    parser.add_argument("-q", "--question", required=True)
    parser.add_argument("--model", required=True, help='a model folder, a run folder, or "tiny" for the embedded base')
    parser.add_argument("--role", choices=("base", "sft", "rl"), help="which model of a run (default: the last one there is)")
    parser.add_argument("--out", type=Path, help="write the images side by side, the answer drawn, to this file")
    parser.add_argument("--instruction", help="appended to the question (default: as in the run that trained the model)")
    parser.add_argument("--max-tokens", type=int, default=256, help="length of the reply (default %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as stored")
    return parser


def _ground(rest: Sequence[str]) -> int:
    found = _ground_parser().parse_args(rest)
    from polyground.demo import ground

    _set_threads()
    reply = ground(
        found.model,
        found.images,
        question=found.question,
        role=found.role,
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
