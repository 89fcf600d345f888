"""What every command shares: its parser with one-line errors, and how a result is printed."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

Run = Callable[[Namespace], None]
# Of an option, of a key in YAML, and of a key in a list in YAML.
_UNKNOWN = (
    r"does not accept (?:option|key) '([^']+)'|unrecognized arguments?: --(\S+)|^Option '([^']+)' is not accepted"
)


# The first that is there, where --model is not given.
RELEASED_MODELS = ("models/mtg-names", "models/mtg-base")


class CommandParser(ArgumentParser):
    """One-line errors with the nearest name, and options spelled with dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split()).replace("Parser key", "option")
        unknown = re.search(_UNKNOWN, text)
        wrong = next(filter(None, unknown.groups()), "") if unknown else ""
        choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
        if wrong:
            key = wrong.split("=")[0].replace("-", "_")
            options = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
            near = difflib.get_close_matches(key, options, n=1)
            text = f"unknown option {wrong!r}" + (f": did you mean {near[0]!r}?" if near else "")
        elif choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
            text += f": did you mean {near[0]!r}?" if near else ""
        print(f"{self.prog.split(' [')[0]}: {text} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), super().format_help(*args, **kwargs))


def command_parser(name: str, run: Run) -> CommandParser:
    """The parser of a command, with the options that every command takes."""
    parser = CommandParser(prog=f"flash-experts {name}", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def default_model() -> str:
    """The newest released model that is here.

    Raises:
        ValueError: none is.
    """
    for source in RELEASED_MODELS:
        if Path(source).is_dir():
            return source
    raise ValueError(f"no model: give --model DIR (there is no {' and no '.join(RELEASED_MODELS)} here)")


def add_measuring_options(parser: CommandParser) -> None:
    """The options that evaluate and compare share."""
    parser.add_argument("--data", default="data/mtg", help="folder that prepare wrote")
    parser.add_argument("--samples", type=int, default=10_000, help="names to draw from each model")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and shuffling")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1; the best there is")


def print_result(args: Namespace, result: Any, text: str) -> None:
    """The result as JSON with --json, else the text."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)
