"""Write docs/reference.md and docs/cli.md: every key of a recipe, every verb and flag, from the definitions the program reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from polyground.cli import OWN, STAGES, TOOLS, command_parser, export_parsers
from polyground.config import DataSource, EndpointConfig, JudgeConfig, Recipe, RewardConfig, Section, ServedConfig, VllmConfig
from polyground.storage import atomic_write_text

HEAD = """# Reference

Written by `make docs` from the program's own definitions; edit those instead.

## Verbs

`polyground VERB RECIPE [--section.key value | --key value]`; a bare key is one of the recipe's own or of the verb's section.
The tools and their flags are on the page of the [command line](cli.md).
"""

CLI_HEAD = """# Command line

Written by `make docs` from the program's own definitions; edit those instead.

`polyground --help` lists the verbs, `polyground VERB --help` the keys of a verb in a line each, `polyground VERB --help KEY`
explains a key. `polyground completion bash` (or `zsh`, `fish`) prints a script that completes all of them:

```sh
source <(polyground completion bash)                                        # bash: add it to ~/.bashrc
source <(polyground completion zsh)                                         # zsh: add it to ~/.zshrc, after compinit
polyground completion fish > ~/.config/fish/completions/polyground.fish     # fish
```

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | something must be changed: one line says where, what and what to do, the next names the page that explains it |
| 130 | interrupted; the same command goes on where it stopped |

| environment variable | meaning |
|---|---|
| `POLYGROUND_VERBOSE=1` | keep the libraries' own warnings and progress bars |
| `OMP_NUM_THREADS` | threads of a process; by default as many as cores may be used |

Keys of servers are read from the environment variables that a recipe names, and are never written anywhere.

## Verbs with a recipe

`polyground VERB RECIPE [--section.key value | --key value] [--dry-run]`; [reference](reference.md) lists the keys.
"""


def reference() -> str:
    parts = [HEAD, _table(("verb", "what it does"), [(f"`{verb}`", text) for verb, text in STAGES.items()])]
    own = [name for name, field in Recipe.model_fields.items() if not _is_section(field.annotation)]
    parts += ["\n## Recipe\n", f"{_doc(Recipe)}\n", _keys(Recipe, own)]
    for name, field in Recipe.model_fields.items():
        if _is_section(field.annotation):
            section: type[Section] = field.annotation  # type: ignore[assignment]
            parts += [f"\n## `{name}`\n", f"{_doc(section)}\n", _keys(section, list(section.model_fields))]
    for title, section in (
        ("`endpoint` in `synthesize` and `servers`", EndpointConfig),
        ("`judge` in `synthesize`", JudgeConfig),
        ("`base`, `sft` and `rl` in `servers`", ServedConfig),
        ("`vllm` in `servers`", VllmConfig),
        ("An entry of `rewards`", RewardConfig),
        ("An entry of a split in `data`", DataSource),
    ):
        parts += [f"\n## {title}\n", f"{_doc(section)}\n", _keys(section, list(section.model_fields))]
    return "\n".join(parts) + "\n"


def command_line() -> str:
    parts = [CLI_HEAD, _table(("verb", "what it does"), [(f"`{verb}`", text) for verb, text in STAGES.items()])]
    for verb, text in {**OWN, **TOOLS}.items():
        parts += [f"\n## `polyground {verb}`\n", f"{text[0].upper()}{text[1:]}.\n"]
        if verb != "export":
            parts.append(_flags(command_parser(verb)))
            continue
        for what, parser in export_parsers().items():
            parts += [f"\n### To export {what}\n", _flags(parser)]
    return "\n".join(parts) + "\n"


def _flags(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        takes = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        long = next((name for name in action.option_strings if name.startswith("--")), None)
        name = f"`{long}{takes}`" if long else f"`{action.metavar or action.dest.upper()}`"
        about = (action.help or "") % {"default": action.default, "prog": parser.prog}
        about = about.replace("<", "&lt;")
        if action.choices and (action.metavar or not long):
            about += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
        elif action.choices:
            name, about = f"`{long}`", f"{about} ({', '.join(f'`{choice}`' for choice in action.choices)})"
        rows.append((name, "yes" if action.required else "", about))
    return _table(("argument", "needed", "meaning"), rows)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _doc(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _keys(section: type[Section], names: list[str]) -> str:
    fields = [(name, section.model_fields[name]) for name in names]
    rows = [(f"`{name}`", _type(f), _default(f), " ".join((f.description or "").split())) for name, f in fields]
    return _table(("key", "type", "default", "meaning"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _type(field: FieldInfo) -> str:
    limits = []
    for limit in field.metadata:
        match limit:
            case Ge(ge=value):
                limits.append(f"≥ {value}")
            case Gt(gt=value):
                limits.append(f"> {value}")
            case Le(le=value):
                limits.append(f"≤ {value}")
            case Lt(lt=value):
                limits.append(f"< {value}")
            case MinLen():
                limits.append("not empty")
    return ", ".join([_name(field.annotation), *limits])


def _name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " | ".join("null" if part is type(None) else _name(part) for part in inner)
    if origin in (list, tuple):
        return f"list of {_name(inner[0])}"
    if origin is dict:
        return "mapping"
    plain = {str: "text", int: "whole number", float: "number", bool: "true | false", Path: "path"}
    return plain.get(annotation, "entries" if _is_section(annotation) else str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, list) and value and isinstance(value[0], RewardConfig):
        return ", ".join(f"{reward.weight:g} {reward.name}" for reward in value)
    return f"`{list(value) if isinstance(value, tuple) else value}`" if value != "" else "empty"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    atomic_write_text(folder / "reference.md", reference())
    atomic_write_text(folder / "cli.md", command_line())
