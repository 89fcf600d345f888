"""What every command shares: its parser with one-line errors, and how a result is printed."""

from __future__ import annotations

import difflib
import json
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

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
_GENERAL_HELP = {"help": "print this help", "print_config": "print the settings as YAML"}
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


class HelpFormatter(DefaultHelpFormatter):
    """Help for users: the option, a phrase, and its default; no types of Python."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_usage(self, usage: Any, actions: Any, *_: Any) -> str:
        shown = [self._format_args(each, each.dest) for each in actions if not each.option_strings]
        shown += [self._format_action_invocation(each) for each in actions if each.option_strings and each.required]
        return f"usage: {' '.join([self._prog, *shown, '[options]'])}\n\n"

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return self._format_args(action, action.dest)
        names = ", ".join(name.replace("_", "-") for name in action.option_strings if not name.endswith("+"))
        return names if action.nargs == 0 else f"{names} {self._format_args(action, '')}"

    def _format_args(self, action: Action, default_metavar: str) -> str:
        name = action.dest.rpartition(".")[2].upper()
        if action.dest == "print_config":
            return ""
        if _item_of(action) is not None:
            return "A,B,..." if action.option_strings else f"{name} ..."
        if action.choices or isinstance(action.metavar, str):
            return str(action.metavar) if action.metavar else f"{{{','.join(map(str, action.choices or ()))}}}"
        hint = getattr(action, "_typehint", None) or action.type
        return "N" if int in (hint, *get_args(hint)) else "X" if float in (hint, *get_args(hint)) else name

    def _get_help_string(self, action: Action) -> str:
        text = " ".join((action.help or "").replace("``", "").split()).rstrip(".")
        given = action.default
        if action.required and action.option_strings:
            text += " (required)"
        elif not action.option_strings or "default:" in text or given is SUPPRESS or action.nargs == 0:
            pass
        elif given is not None or "null" in text:
            text += f" (default: {_shown_default(action)})"
        return re.sub("%(?![(]|%)", "%%", text)


def _item_of(action: Action) -> Any:
    """The type of the items of an option that takes several; None of any other option."""
    hint = getattr(action, "_typehint", None) or action.type
    kinds = (hint, *(get_args(hint) if get_origin(hint) not in (list, tuple) else ()))
    found = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)), None)
    if action.nargs in ("+", "*"):
        found = str if action.choices else hint
    return found if found in (str, int, float) else None


def _shown_default(action: Action) -> str:
    given = action.default
    if isinstance(given, list | tuple):
        return "all" if given and given == list(action.choices or ()) else ",".join(map(str, given)) or "none"
    if given is None or isinstance(given, bool):
        return {None: "null", True: "true", False: "false"}[given]
    return f"{given:g}" if isinstance(given, float) else str(given)


class CommandParser(ArgumentParser):
    """One-line errors with the nearest name, options spelled with dashes, help in groups, and one way to give lists."""

    _section: Any = None  # of the help, where options are added now

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def section(self, title: str) -> None:
        """Starts a group of the help, to which the options belong that are added next."""
        self._section = self.add_argument_group(title)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() & {"type", "action"}:
            kwargs["type"] = str  # without a type, a file of settings could give anything
        section = getattr(self, "_section", None)  # jsonargparse copies this method into its groups, which have none
        if section is not None and args[0].startswith("-"):
            return section.add_argument(*args, **kwargs)
        return super().add_argument(*args, **kwargs)

    def _joined_lists(self, arguments: Sequence[str]) -> list[str]:
        """The arguments, where each list is given once: it may be repeated, and may have commas or be a YAML list."""
        lists = {each.dest: each for each in self._actions if each.option_strings and _item_of(each) is not None}
        others: list[str] = []
        found: dict[str, list[str]] = {}
        waiting = list(arguments)
        while waiting:
            argument = waiting.pop(0)
            option, equals, value = argument.partition("=")
            action = lists.get(option.removeprefix("--")) if option.startswith("--") else None
            values = [value] if equals else []
            while action and not equals and waiting and not waiting[0].startswith("--"):
                values.append(waiting.pop(0))
                if action.nargs not in ("+", "*"):
                    break
            if action is None or not values:
                others.append(argument)
            else:
                found.setdefault(action.dest, []).extend(each for text in values for each in _split(text))
        for dest, items in found.items():
            if lists[dest].nargs in ("+", "*"):
                others += [f"--{dest}", *items]
            else:
                quoted = _item_of(lists[dest]) is str
                others.append(f"--{dest}=[{','.join(json.dumps(each) if quoted else each for each in items)}]")
        return others

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        args = self._joined_lists(args or ())
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
        """The help, with the groups of the command before the options that every command has."""
        general = self._optionals
        general.title = "Other options" if self._section else "Options"
        self._positionals.title = "Arguments"
        self._action_groups = sorted(self._action_groups, key=lambda group: group is general)
        for action in self._actions:
            group = action.dest in self._groups or action.dest.endswith(".help")
            action.help = SUPPRESS if group else _GENERAL_HELP.get(action.dest, action.help)
        return super().format_help(*args, **kwargs)


def _split(text: str) -> list[str]:
    """The items of a list on the command line, as commas or YAML's brackets separate them."""
    if text.startswith("[") and text.endswith("]"):
        try:
            items = yaml.load(text, yaml.BaseLoader)
        except yaml.YAMLError:
            items = None
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
        return [text]
    return [item.strip() for item in text.split(",") if item.strip()]


def shortened(text: str) -> str:
    """One line for a person: the middle of a very long one is left out."""
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} ... {text[-half:]}"


def command_parser(name: str, run: Run) -> CommandParser:
    """The parser of a command, with the options that every command takes."""
    parser = CommandParser(prog=f"flash-experts {name}", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with any of these options (default: none)")
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
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_argument("--samples", type=int, default=10_000, help="names to draw from each model")
    parser.add_argument(
        "--max_names",
        type=int | None,
        default=None,
        help="held-out names of each set to score (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of drawing and shuffling")
    add_device(parser)
    add_model_family(parser)


def add_device(parser: CommandParser) -> None:
    """The device of the commands that run a model."""
    text = "cpu, cuda or cuda:1 (default: a GPU if there is one)"
    parser.add_argument("--device", type=str | None, default=None, help=text)


def add_model_family(parser: CommandParser) -> None:
    """The option of the commands that take models of other families than GPT-2 and Llama."""
    parser.add_argument(
        "--model_family",
        type=Literal["known", "any"],
        default="known",
        help="model families to load; any: every family of transformers, for models whose source you trust; known: "
        "gpt2, gpt2_moe and llama",
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
