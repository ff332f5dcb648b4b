"""Completion scripts for bash, zsh and fish, generated from the parser, so that they cannot fall behind it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class _Option:
    flags: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    options: tuple[_Option, ...]
    choices: tuple[str, ...]
    paths: bool


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for ``bash``, ``zsh`` or ``fish``."""
    writers: dict[str, Callable[[str, tuple[_Option, ...], tuple[_Command, ...]], str]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    return writers[shell](parser.prog, tuple(_options(parser)), tuple(_commands(parser)))


def _options(parser: argparse.ArgumentParser) -> Iterator[_Option]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            choices = tuple(str(c) for c in action.choices) if action.choices is not None else ()
            yield _Option(tuple(action.option_strings), _sentence(action.help), action.nargs != 0, choices)


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: _sentence(choice.help) for choice in action._choices_actions}
        for name, sub in action.choices.items():
            positionals = [a for a in sub._actions if not a.option_strings]
            choices = tuple(str(c) for a in positionals if a.choices is not None for c in a.choices)
            paths = any(a.choices is None for a in positionals)
            yield _Command(name, helps.get(name, ""), tuple(_options(sub)), choices, paths)


def _sentence(text: str | None) -> str:
    """The first sentence, in characters that mean nothing to a shell or to zsh's specifications."""
    first = re.split(r"[.;:(]\s|\s\(", (text or "").replace("%%", "%"), maxsplit=1)[0]
    return re.sub(r"[^\w ,./+=-]", "", first).strip()


def _flags(options: tuple[_Option, ...]) -> str:
    return " ".join(flag for option in options for flag in option.flags)


def _bash(prog: str, top: tuple[_Option, ...], commands: tuple[_Command, ...]) -> str:
    names = " ".join(c.name for c in commands)
    lines = [
        f"# bash completion for {prog}: source this file, or put it into ~/.local/share/bash-completion/completions/",
        f"_{prog}() {{",
        '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" command="" word',
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'        case "$word" in {"|".join(c.name for c in commands)}) command="$word"; break;; esac',
        "    done",
        "    COMPREPLY=()",
        '    case "$command" in',
        '    "")',
        f'        COMPREPLY=($(compgen -W "{names} {_flags(top)}" -- "$cur"));;',
    ]
    for c in commands:
        lines += [f"    {c.name})", '        case "$prev" in']
        for option in c.options:
            if option.choices:
                reply = f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$cur"))'
                lines.append(f"        {'|'.join(option.flags)}) {reply}; return;;")
            elif option.takes_value:
                lines.append(f"        {'|'.join(option.flags)}) return;;")
        lines += [
            "        esac",
            f'        if [[ "$cur" == -* ]]; then COMPREPLY=($(compgen -W "{_flags(c.options)}" -- "$cur"))',
        ]
        if c.choices:
            lines.append(f'        else COMPREPLY=($(compgen -W "{" ".join(c.choices)}" -- "$cur"))')
        elif c.paths:
            lines.append('        else compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur")')
        lines.append("        fi;;")
    lines += ["    esac", "}", f"complete -F _{prog} {prog}"]
    return "\n".join(lines) + "\n"


def _zsh(prog: str, top: tuple[_Option, ...], commands: tuple[_Command, ...]) -> str:
    def spec(option: _Option) -> Iterator[str]:
        for flag in option.flags:
            value = ""
            if option.choices:
                value = f":value:({' '.join(option.choices)})"
            elif option.takes_value:
                value = ":value:"
            # A star: some options may be repeated, and none does harm when it is offered twice.
            yield f"'*{flag}[{option.help}]{value}'"

    lines = [
        f"#compdef {prog}",
        f"_{prog}() {{",
        "    local -a commands",
        "    commands=(",
        *(f"        '{c.name}:{c.help}'" for c in commands),
        "    )",
        "    local context state state_descr line",
        "    typeset -A opt_args",
        f"    _arguments -C {' '.join(s for o in top for s in spec(o))} '1:command:->command' '*::argument:->argument'",
        '    case "$state" in',
        "    command) _describe command commands;;",
        "    argument)",
        '        case "$line[1]" in',
    ]
    for c in commands:
        rest = f"'*:value:({' '.join(c.choices)})'" if c.choices else "'*:path:_files'" if c.paths else ""
        parts = [s for o in c.options for s in spec(o)] + ([rest] if rest else [])
        lines.append(f"        {c.name}) _arguments {' '.join(parts)};;")
    lines += ["        esac;;", "    esac", "}", f'if [ "$funcstack[1]" = "_{prog}" ]; then _{prog} "$@"; else']
    lines += [f"    compdef _{prog} {prog}", "fi"]
    return "\n".join(lines) + "\n"


def _fish(prog: str, top: tuple[_Option, ...], commands: tuple[_Command, ...]) -> str:
    def spec(option: _Option) -> str:
        parts = [f"-s {f[1:]}" if not f.startswith("--") else f"-l {f[2:]}" for f in option.flags]
        if option.choices:
            parts.append(f"-x -a '{' '.join(option.choices)}'")
        elif option.takes_value:
            parts.append("-x")
        return " ".join([*parts, f"-d '{option.help}'"])

    lines = [f"# fish completion for {prog}: put this file into ~/.config/fish/completions/", f"complete -c {prog} -f"]
    lines += [f"complete -c {prog} -n __fish_use_subcommand {spec(o)}" for o in top]
    for c in commands:
        seen = f"'__fish_seen_subcommand_from {c.name}'"
        lines.append(f"complete -c {prog} -n __fish_use_subcommand -a {c.name} -d '{c.help}'")
        lines += [f"complete -c {prog} -n {seen} {spec(o)}" for o in c.options]
        if c.choices:
            lines.append(f"complete -c {prog} -n {seen} -a '{' '.join(c.choices)}'")
        elif c.paths:
            lines.append(f"complete -c {prog} -n {seen} -F")
    return "\n".join(lines) + "\n"
