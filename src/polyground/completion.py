"""Scripts that complete verbs, keys and files in bash, zsh and fish; written once, they start no Python at the Tab key.

What can be typed is handed in: nothing of the verbs is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from polyground.errors import UsageError

_WORD = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class Option:
    """One `--key`."""

    name: str
    """With its dashes."""
    about: str = ""
    values: tuple[str, ...] = ()
    """What may follow, where that is a choice; else files are offered."""
    takes_value: bool = True


@dataclass(frozen=True, slots=True)
class Command:
    """One verb."""

    about: str
    options: Sequence[Option] = field(default=())
    words: tuple[str, ...] = ()
    """What the first word after the verb may be; files otherwise."""


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script of `bash`, `zsh` or `fish`. Raises UsageError for another shell."""
    if shell not in SHELLS:
        raise UsageError(f"there is no completion for {shell!r}; known: {', '.join(SHELLS)}")
    for word in _words(commands):
        # They are written into a program: nothing but plain words may get there.
        if not _WORD.fullmatch(word):
            raise ValueError(f"{word!r} cannot stand in a shell script")
    return SHELLS[shell](commands)


def _words(commands: Mapping[str, Command]) -> Iterator[str]:
    for verb, command in commands.items():
        yield from (verb, *command.words)
        for option in command.options:
            yield from (option.name, *option.values)


def _bash(commands: Mapping[str, Command]) -> str:
    verbs = " ".join(commands)
    lines = [
        "# bash completion of polyground; load it with:  source <(polyground completion bash)",
        "_polyground() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local verb="${COMP_WORDS[1]}" keys="" words=""',
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word"))',
        "        return",
        "    fi",
        '    case "$verb $before" in',
    ]
    for verb, command in commands.items():
        lines += [
            f'        "{verb} {option.name}") COMPREPLY=($(compgen -W "{" ".join(option.values)}" -- "$word")); return ;;'
            for option in command.options
            if option.values
        ]
    lines += ["    esac", '    case "$verb" in']
    for verb, command in commands.items():
        words = f' words="{" ".join(command.words)}"' if command.words else ""
        lines.append(f'        {verb}) keys="{" ".join(option.name for option in command.options)}"{words} ;;')
    lines += [
        "    esac",
        '    if [[ "$word" == -* ]]; then',
        '        COMPREPLY=($(compgen -W "$keys" -- "$word"))',
        '    elif [ "$COMP_CWORD" -eq 2 ] && [ -n "$words" ]; then',
        '        COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "    else",
        "        compopt -o filenames 2>/dev/null",
        '        COMPREPLY=($(compgen -f -- "$word"))',
        "    fi",
        "}",
        "complete -F _polyground polyground",
    ]
    return "\n".join(lines)


def _zsh(commands: Mapping[str, Command]) -> str:
    lines = [
        "#compdef polyground",
        "# zsh completion of polyground; load it with:  source <(polyground completion zsh)",
        "_polyground() {",
        "    local -a verbs keys",
        "    if (( CURRENT == 2 )); then",
        "        verbs=(",
        *(f"            {_quoted(f'{verb}:{_plain(command.about)}')}" for verb, command in commands.items()),
        "        )",
        "        _describe -t verbs verb verbs",
        "        return",
        "    fi",
        '    case "${words[2]} ${words[CURRENT-1]}" in',
    ]
    for verb, command in commands.items():
        lines += [
            f'        "{verb} {option.name}") compadd -- {" ".join(option.values)}; return ;;'
            for option in command.options
            if option.values
        ]
    lines += ["    esac", '    case "${words[2]}" in']
    for verb, command in commands.items():
        lines.append(f"        {verb})")
        if command.words:
            lines.append(f"            if (( CURRENT == 3 )); then compadd -- {' '.join(command.words)}; return; fi")
        lines += [
            "            keys=(",
            *(f"                {_quoted(f'{option.name}:{_plain(option.about)}')}" for option in command.options),
            "            ) ;;",
        ]
    lines += [
        "    esac",
        '    if [[ "${words[CURRENT]}" == -* ]]; then',
        "        _describe -t keys key keys",
        "    else",
        "        _files",
        "    fi",
        "}",
        # Sourced, it registers itself; as a file named _polyground on $fpath it is the function.
        'if [ "${funcstack[1]}" = "_polyground" ]; then _polyground "$@"; else compdef _polyground polyground; fi',
    ]
    return "\n".join(lines)


def _fish(commands: Mapping[str, Command]) -> str:
    lines = ["# fish completion of polyground; load it with:  polyground completion fish | source", "complete -c polyground -e"]
    lines += [
        f"complete -c polyground -n __fish_use_subcommand -f -a {verb} -d {_quoted(_plain(command.about))}"
        for verb, command in commands.items()
    ]
    for verb, command in commands.items():
        seen = f"-n '__fish_seen_subcommand_from {verb}'"
        if command.words:
            lines.append(f"complete -c polyground {seen} -f -a {_quoted(' '.join(command.words))}")
        for option in command.options:
            takes = f"-x -a {_quoted(' '.join(option.values))}" if option.values else "-r" if option.takes_value else "-f"
            about = f" -d {_quoted(_plain(option.about))}" if option.about else ""
            lines.append(f"complete -c polyground {seen} -l {option.name.removeprefix('--')} {takes}{about}")
    return "\n".join(lines)


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def _plain(text: str) -> str:
    """One line that `_describe` does not take apart at a colon."""
    return " ".join(text.split()).replace(":", " -").replace("\\", "")


def _quoted(text: str) -> str:
    """Between single quotes, where no shell looks at anything."""
    return "'" + text.replace("'", "’").replace("\n", " ") + "'"
