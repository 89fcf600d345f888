"""What every command shares: its parser with one-line errors, and how a result is printed."""

from __future__ import annotations

import difflib
import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from flash_experts.data.yaml_files import kind_of, read_settings
from flash_experts.files import check_out_file, free_name
from flash_experts.plain_text import one_line, say

Run = Callable[[Namespace], None]
# The first that is there, where --model is not given.
RELEASED_MODELS = ("models/mtg-names", "models/mtg-base")
# Of an option, of a key in YAML, and of a key in a list in YAML.
_UNKNOWN = (
    r"does not accept (?:option|key) '([^']+)'|unrecognized arguments?: --(\S+)|^Option '([^']+)' is not accepted"
)
# Of a value that has not the type of its option; a union tells of each of its types first.
_INVALID = r'option "([\w.]+)"(?: element \d+)?: (?:Does not validate|Expected a )(?:.*(?:Got|Given) value: ?(.*))?$'
MOST_SEEDS = 2**32
_MOST_CHARACTERS = 10_000  # of an argument: a value is read as YAML, which calls itself for each bracket
_MOST_SHOWN = 400  # of a message


class _ConfigFile(ActionConfigFile):
    """--config: a YAML file of settings, looked at before anything is made of it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            settings = read_settings(values, parser.hints)
            if "config" in settings:
                raise ValueError(f"{values}: a file of settings cannot name another with `config`")
        except ValueError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, yaml.dump(settings, Dumper=_Quoted), option_string)
        cfg[self.dest][-1] = str(values)


class _Quoted(yaml.SafeDumper):
    """Writes every text in quotes: it must not be taken for a number when jsonargparse reads it."""


_Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


class CommandParser(ArgumentParser):
    """One-line errors with the nearest name, and options spelled with dashes."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() & {"type", "action"}:
            kwargs["type"] = str  # without a type, a file of settings could give anything
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        for argument in args or ():
            if len(argument) > _MOST_CHARACTERS:
                self.error(f"{argument[:30]}...: {len(argument):,} characters are too long for an option")
            if argument.partition("=")[0].removeprefix("--") in self._groups:
                self.error(f"{argument.partition('=')[0]} is a group of options, with no value of its own")
        namespace = super().parse_args(args, *others, **options)
        seed = namespace.get("seed")
        if seed is not None and not 0 <= seed < MOST_SEEDS:
            self.error(f"--seed must be from 0 to {MOST_SEEDS - 1:,}, not {seed}")
        return namespace

    @property
    def hints(self) -> dict[str, Any]:
        """The type of each option."""
        found: dict[str, Any] = {}
        for action in self._actions:
            hint: Any = getattr(action, "_typehint", None) or action.type
            if action.nargs == 0 and isinstance(action.default, bool):
                hint = bool
            if hint is not None and not action.dest.endswith(".help"):
                hint = list[hint] if action.nargs in ("+", "*") else hint
                found[action.dest] = hint | None if action.default is None else hint
        return found

    @property
    def _groups(self) -> set[str]:
        """``training`` and ``training.lr_scale`` of ``training.lr_scale.router``."""
        dests = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        return {dest.rpartition(".")[0] for dest in dests} - {""}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a part, such as a stage of training: the whole one tells it
            raise ArgumentError(None, message) from ex
        text = " ".join(str(message).split()).replace("Parser key", "option")
        unknown = re.search(_UNKNOWN, text)
        wrong = next(filter(None, unknown.groups()), "") if unknown else ""
        choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
        invalid = re.match(_INVALID, text)
        if wrong:
            key = wrong.split("=")[0].replace("-", "_")
            options = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
            near = difflib.get_close_matches(key, options, n=1)
            text = f"unknown option {wrong!r}" + (f": did you mean {near[0]!r}?" if near else "")
        elif choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
            text += f": did you mean {near[0]!r}?" if near else ""
        elif invalid and (told := self._told(*invalid.groups())):
            text = told
        say(f"{self.prog.split(' [')[0]}: {shortened(one_line(text))} (see --help)", sys.stderr)
        raise SystemExit(2)

    def _told(self, key: str, value: str | None) -> str | None:
        """What an option takes, for a value that it does not; None for what only jsonargparse can tell."""
        action = next((action for action in self._actions if action.dest == key), None)
        kind = None if action is None else kind_of(getattr(action, "_typehint", None) or action.type)
        if kind is None or value is None:
            return None
        near = difflib.get_close_matches(value, kind.removeprefix("one of ").split(", "), n=1)
        return f"{key} must be {kind}, not {value!r}" + (f": did you mean {near[0]!r}?" if near else "")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), super().format_help(*args, **kwargs))


def shortened(text: str) -> str:
    """One line for a person: the middle of a very long one is left out."""
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} ... {text[-half:]}"


def command_parser(name: str, run: Run) -> CommandParser:
    """The parser of a command, with the options that every command takes."""
    parser = CommandParser(prog=f"flash-experts {name}", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of these options")
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
    parser.add_argument(
        "--max_names",
        type=int | None,
        default=None,
        help="held-out names of each set to score (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawing and shuffling")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1; the best there is")
    add_model_family(parser)


def add_model_family(parser: CommandParser) -> None:
    """The option of the commands that take models of other families than GPT-2 and Llama."""
    parser.add_argument(
        "--model_family",
        type=Literal["known", "any"],
        default="known",
        help="known: gpt2, gpt2_moe and llama; any: every family of transformers, for models whose source you trust",
    )


def add_overwrite(parser: CommandParser) -> None:
    """--overwrite, of every command that writes files. The rule is in `flash_experts.files`."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def add_out_file(parser: CommandParser, default: str, what: str) -> None:
    """--out of a command that writes one file, under a free name unless one is given, and --overwrite."""
    numbered = Path(default).with_stem(Path(default).stem + "-2")
    text = f"{what} (default: {default}; {numbered} and so on where that exists)"
    parser.add_argument("--out", type=str | None, default=None, help=text)
    add_overwrite(parser)


def out_file(args: Namespace, default: str, also: Sequence[str] = ()) -> Path:
    """The file of `add_out_file`, looked at before anything is computed.

    Raises:
        ValueError: it exists, or cannot be written.
    """
    name = args.out
    if name is None:
        name = default if args.overwrite else free_name(default, also)
    check_out_file(name, args.overwrite, also=also)
    return Path(name)


def check_samples(args: Namespace) -> None:
    """Looks at --samples and --max-names before anything is loaded.

    Raises:
        ValueError: the number of names to draw or to score cannot be.
    """
    if args.max_names is not None and args.max_names < 1:
        raise ValueError(f"--max-names must be 1 or more, not {args.max_names}: leave it out to score all")
    if not 0 <= args.samples <= 10_000_000:
        raise ValueError(f"--samples must be from 0 (draws none) to 10,000,000, not {args.samples}")


def print_result(args: Namespace, result: Any, text: str) -> None:
    """The result as JSON with --json, else the text."""
    say(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)
