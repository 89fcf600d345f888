"""``flash-experts completion``: a script for the shell, made from the parsers of all commands."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from jsonargparse import Namespace

from flash_experts import commands
from flash_experts.commands.common import CommandParser, command_parser, hint_of, print_result
from flash_experts.released import configurations

Shell = Literal["bash", "zsh"]
# zsh can read bash's completions; in bash "--option=value" is three words, in zsh one. Where nothing is offered, as for
# a folder, file names are.
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -U +X bashcompinit && bashcompinit
"""
_SCRIPT = """\
_flash_experts() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} offered= joined=
  case "$word" in --*=*) before=${{word%%=*}} joined=${{word%%=*}}= word=${{word#*=}} ;; esac
  if [ "$word" = = ]; then word=; elif [ "$before" = = ]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [ "$COMP_CWORD" -eq 1 ]; then
    offered="{names}"
  elif [ "${{COMP_WORDS[1]}}" = help ]; then
    offered="{names}"
  else
    case "${{COMP_WORDS[1]}} $before" in
      *" --config") offered="{configurations}" ;;
{values}
      *)
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
        case "$word" in -*) ;; *) offered=${{offered%%--*}} ;; esac
        ;;
    esac
  fi
  COMPREPLY=($(compgen -P "$joined" -W "$offered" -- "$word"))
}}
complete -o default -F _flash_experts flash-experts
"""


def run(args: Namespace) -> None:
    """Print a script with which bash or zsh completes commands, options and values."""
    parsers = dict(_parsers())
    script = _SCRIPT.format(
        names=" ".join([*parsers, "help"]),
        configurations=" ".join(configurations()),
        values="\n".join(
            f'      "{name} {flag}") offered="{" ".join(values)}" ;;'
            for name, found in parsers.items()
            for parser in found
            for flag, values in _values(parser)
        ),
        options="\n".join(
            f'          {name}) offered="{" ".join(_words(found))}" ;;' for name, found in parsers.items()
        ),
    )
    script = _ZSH + script if args.shell == "zsh" else script
    print_result(args, {"shell": args.shell, "script": script}, script.rstrip())


def _parsers() -> Iterator[tuple[str, list[CommandParser]]]:
    """The name of each command, and its parsers: more than one where it has topics."""
    for found in pkgutil.iter_modules(commands.__path__):
        module: Any = importlib.import_module(f"{commands.__name__}.{found.name}")
        if hasattr(module, "make_parser"):
            topics = [module.topic_parser(topic) for topic in getattr(module, "TOPICS", ())]
            yield found.name.replace("_", "-"), [module.make_parser(), *topics]


def _words(parsers: list[CommandParser]) -> list[str]:
    """What may follow a command: the choices of its arguments, then its options."""
    actions = [action for parser in parsers for action in parser._actions]
    choices = [str(choice) for action in actions if not action.option_strings for choice in _choices(action)]
    flags = [flag.replace("_", "-") for action in actions for flag in action.option_strings]
    return list(dict.fromkeys(choices + [flag for flag in flags if flag.startswith("--") and not flag.endswith("+")]))


def _values(parser: CommandParser) -> Iterator[tuple[str, list[str]]]:
    """Each option that takes one of a few values, with these."""
    for action in parser._actions:
        values = _choices(action)
        for flag in action.option_strings if values else ():
            yield flag.replace("_", "-"), values


def _choices(action: Any) -> list[str]:
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(choice) for choice in action.choices]
    hint = hint_of(action)
    kinds = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    return [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]


def make_parser() -> CommandParser:
    parser = command_parser("completion", run)
    parser.add_argument("shell", type=Shell, help="shell that reads the script")
    return parser
