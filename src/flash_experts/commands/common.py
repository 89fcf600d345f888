"""Shared parts of the commands: parser, one-line errors, common options, and printing of results."""

from __future__ import annotations

import json
import re
import sys
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from flash_experts.files import check_out_file, free_name
from flash_experts.options import defaults_of, describe_type, options_of, read_settings, read_yaml
from flash_experts.released import configuration
from flash_experts.terminal import did_you_mean, nearest, one_line, say

Run = Callable[[Namespace], None]
# Messages for an unknown option, key in YAML, and key in a list in YAML.
_UNKNOWN = (
    r"does not accept (?:option|key) '([^']+)'|unrecognized arguments?: --(\S+)|^Option '([^']+)' is not accepted"
)
# Message for a value of a wrong type; for a union it lists each type first.
_INVALID = r'option "([\w.]+)"(?: element \d+)?: (?:Does not validate|Expected a )(?:.*(?:Got|Given) value: ?(.*))?$'
# Message for a problem inside a list of settings, such as a stage of training; the last reason is that it is not null.
_INSIDE = (
    r"""option "([\w.]+)": .*?Problem with given class_path '[\w.]+': (.*) - Expected a <class 'NoneType'> Given"""
)
MAX_SEEDS = 2**32
_GENERAL_HELP = {"help": "print this help", "print_config": "print the settings as YAML"}
_MAX_CHARACTERS = 10_000  # limit for an argument: the YAML parser recurses for each bracket
_MAX_MESSAGE = 400  # characters of a message


def _value_of(text: str) -> Any:
    """The value of an argument. Null, ~ and #1 are texts: only null is null, which jsonargparse reads before."""
    value = get_loader("yaml")(text)
    return text if value is None else value


set_loader(_MODE := "flash_experts", _value_of, (yaml.YAMLError,))


class _ConfigFile(ActionConfigFile):
    """--config: a YAML file of settings or the name of one of ours, checked before jsonargparse reads it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            path = configuration(values)
            if "training" in read_yaml(path) and "training" not in parser.option_groups:
                raise ValueError(f"{values} is a configuration of train: flash-experts train --config {values}")
            settings = read_settings(path, parser.hints)
            if "config" in settings:
                raise ValueError(f"{values}: a file of settings cannot name another with `config`")
        except ValueError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, yaml.dump(settings, Dumper=_Quoted), option_string)
        cfg[self.dest][-1] = str(values)


class _Quoted(yaml.SafeDumper):
    """Quotes every text, so that jsonargparse does not read it as a number."""


_Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


class HelpFormatter(DefaultHelpFormatter):
    """Formats help as option, phrase and default, without Python types."""

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
        hint = hint_of(action)
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


def hint_of(action: Action) -> Any:
    """The type of an option, whichever class jsonargparse has made for it."""
    return getattr(action, "_typehint", None) or action.type


def _item_of(action: Action) -> Any:
    """The type of an element of an option that takes a list; None for other options."""
    hint = hint_of(action)
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
    """Argument parser with one-line errors and suggestions, options with dashes, grouped help, and uniform lists."""

    _section: Any = None  # current group of the help

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **{"parser_mode": _MODE, **kwargs})

    def section(self, title: str) -> None:
        """Starts a group of the help for the options that are added next."""
        self._section = self.add_argument_group(title)

    def add_options_of(self, cls: type, group: str) -> None:
        """Adds the fields of a dataclass, and of those in it, as ``--GROUP.FIELD``, with the help of each `Option`."""
        self.add_class_arguments(cls, group)
        known = {f"{group}.{name}": each for name, each in options_of(cls).items()}
        for name, default in defaults_of(cls).items():
            if is_dataclass(default):
                known |= {f"{group}.{name}.{inner}": each for inner, each in options_of(default).items()}
        for action in self._actions:
            if action.dest in known:
                action.help = known[action.dest].help

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() & {"type", "action"}:
            kwargs["type"] = str  # without a type, a file of settings could give anything
        section = getattr(self, "_section", None)  # jsonargparse copies this method into its groups, which have none
        if section is not None and args[0].startswith("-"):
            return section.add_argument(*args, **kwargs)
        return super().add_argument(*args, **kwargs)

    def add_optional(self, option: str, help: str, kind: Any = str) -> None:
        """Adds an option that is None where it is not given."""
        self.add_argument(option, type=kind | None, default=None, help=help)

    def _joined_lists(self, arguments: Sequence[str]) -> list[str]:
        """Joins each list into one argument: lists may be repeated, separated by commas, or YAML."""
        lists = {each.dest: each for each in self._actions if each.option_strings and _item_of(each) is not None}
        others: list[str] = []
        found: dict[str, list[str]] = {}
        remaining = list(arguments)
        while remaining:
            argument = remaining.pop(0)
            option, equals, value = argument.partition("=")
            action = lists.get(option.removeprefix("--")) if option.startswith("--") else None
            values = [value] if equals else []
            while action and not equals and remaining and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
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
            if len(argument) > _MAX_CHARACTERS:
                self.error(f"{argument[:30]}...: {len(argument):,} characters are too long for an option")
            if argument.partition("=")[0].removeprefix("--") in self.option_groups:
                self.error(f"{argument.partition('=')[0]} is a group of options and takes no value")
        namespace = super().parse_args(args, *others, **options)
        seed = namespace.get("seed")
        if seed is not None and not 0 <= seed < MAX_SEEDS:
            self.error(f"--seed must be from 0 to {MAX_SEEDS - 1:,}, not {seed}")
        return namespace

    @property
    def hints(self) -> dict[str, Any]:
        """The type of each option."""
        found: dict[str, Any] = {}
        for action in self._actions:
            hint: Any = hint_of(action)
            if action.nargs == 0 and isinstance(action.default, bool):
                hint = bool
            if hint is not None and not action.dest.endswith(".help"):
                hint = list[hint] if action.nargs in ("+", "*") else hint
                found[action.dest] = hint | None if action.default is None else hint
        return found

    @property
    def option_groups(self) -> set[str]:
        """``training`` and ``training.lr_scale`` of ``training.lr_scale.router``."""
        dests = [action.dest for action in self._actions if not action.dest.endswith(".help")]
        return {dest.rpartition(".")[0] for dest in dests} - {""}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, such as of a training stage: the outer one reports
            raise ArgumentError(None, message) from ex
        text = " ".join(str(message).split()).replace("Parser key", "option")
        unknown = re.search(_UNKNOWN, text)
        wrong = next(filter(None, unknown.groups()), "") if unknown else ""
        choice = re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", text)
        inside, invalid = re.match(_INSIDE, text), re.match(_INVALID, text)
        if inside and (problem := self._problem_inside(*inside.groups())):
            text = problem
        elif wrong:
            text = f"unknown option {wrong!r}{self._similar_option(wrong)}"
        elif choice:
            choices = ", ".join(re.findall(r"[\w-]+", choice[3]))
            text = _wrong_value(choice[1], f"one of {choices}", choice[2])
        elif invalid and (expected := self._expected_kind(*invalid.groups())):
            text = expected
        say(f"{self.prog.split(' [')[0]}: {shortened(one_line(text))} (see --help)", sys.stderr)
        raise SystemExit(2)

    def _similar_option(self, wrong: str) -> str:
        """A suggestion; a file of settings has ``max_stepz`` under ``training`` for ``training.max_steps``."""
        key = wrong.split("=")[0].replace("-", "_")
        options = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
        if found := did_you_mean(key, options, prefix=": "):
            return found
        by_last_part = {option.rpartition(".")[2]: option for option in options}
        near = nearest(key, by_last_part)
        return "" if near is None else f": did you mean {by_last_part[near]!r}?"

    def _problem_inside(self, key: str, message: str) -> str | None:
        """Error message for an item of a list of settings; None to keep jsonargparse's message."""
        lists = [get_args(part) for part in get_args(self.hints.get(key))]
        item = next((part for parts in lists for part in parts if is_dataclass(part)), None)
        if item is None:
            return None
        hints = get_type_hints(item)
        if unknown := re.match(_UNKNOWN, message):
            wrong = next(filter(None, unknown.groups()))
            return f"{key} has no setting {wrong!r}{did_you_mean(wrong, hints, prefix=': ')}"
        if lacking := re.search(r"arguments are required: (.*)", message):
            return f"{key}: each of them needs a {lacking[1]}"
        invalid = re.match(_INVALID, message)
        kind = describe_type(hints.get(invalid[1])) if invalid else None
        return _wrong_value(f"{key}: {invalid[1]}", kind, invalid[2]) if invalid and kind else None

    def _expected_kind(self, key: str, value: str | None) -> str | None:
        """Error message with the kind of value that an option takes; None to keep jsonargparse's message."""
        action = next((action for action in self._actions if action.dest == key), None)
        kind = None if action is None else describe_type(hint_of(action))
        if kind is None or value is None:
            return None
        return _wrong_value(key, kind, value)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, with the command's own groups before the general options."""
        general = self._optionals
        self._positionals.title = "Arguments"
        grouped = any(group not in (general, self._positionals) for group in self._action_groups)
        general.title = "Other options" if grouped else "Options"
        self._action_groups = sorted(self._action_groups, key=lambda group: group is general)
        for action in self._actions:
            group = action.dest in self.option_groups or action.dest.endswith(".help")
            action.help = SUPPRESS if group else _GENERAL_HELP.get(action.dest, action.help)
        return super().format_help(*args, **kwargs)


def _wrong_value(key: str, kind: str, value: str) -> str:
    hint = did_you_mean(value, kind.removeprefix("one of ").split(", "), prefix=": ")
    return f"{key} must be {kind}, not {value!r}{hint}"


def _split(text: str) -> list[str]:
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
    """Shortens a very long line by leaving out its middle."""
    half = _MAX_MESSAGE // 2
    return text if len(text) <= _MAX_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def command_parser(name: str, run: Run) -> CommandParser:
    """Creates a command's parser with the general options."""
    parser = CommandParser(prog=f"flash-experts {name}", description=run.__doc__, allow_abbrev=False)
    settings = "YAML file with any of these options, or a name that flash-experts configs lists (default: none)"
    parser.add_argument("--config", action=_ConfigFile, help=settings)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_measuring_options(parser: CommandParser) -> None:
    """Adds the options that evaluate and compare share."""
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_argument("--samples", type=int, default=10_000, help="names to draw from each model")
    parser.add_optional("--max_names", "held-out names of each set to score (default: all)", int)
    parser.add_argument("--seed", type=int, default=0, help="random seed of drawing and shuffling")
    parser.section("The model")
    add_device(parser)
    add_model_family(parser)


def add_device(parser: CommandParser) -> None:
    text = "cpu, cuda or cuda:1 (default: a GPU if there is one)"
    parser.add_optional("--device", text)


def add_model_family(parser: CommandParser) -> None:
    """Adds --model-family, for model families other than GPT-2 and Llama."""
    parser.add_argument(
        "--model_family",
        type=Literal["known", "any"],
        default="known",
        help="model families to load; any: every family of transformers, for models whose source you trust; known: "
        "gpt2, gpt2_moe and llama",
    )


def add_overwrite(parser: CommandParser) -> None:
    """Adds --overwrite; see `flash_experts.files` for the rule."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def add_out_file(parser: CommandParser, default: str, what: str) -> None:
    numbered = Path(default).with_stem(Path(default).stem + "-2")
    text = f"{what} (default: {default}; {numbered} and so on where that exists; with --json none)"
    parser.add_optional("--out", text)
    add_overwrite(parser)


def out_file(args: Namespace, default: str, also: Sequence[str] = ()) -> Path | None:
    """Picks and checks the output file of `add_out_file` before anything is computed.

    None with --json and without --out: the result is only printed.
    """
    name = args.out
    if name is None and args.json:
        return None
    if name is None:
        name = default if args.overwrite else free_name(default, also)
    check_out_file(name, args.overwrite, also=also)
    return Path(name)


def refuse_unused(parser: CommandParser, args: Namespace, names: Sequence[str], why: str) -> None:
    """Reports the first of these options that is not at its default; ``why`` precedes ``: leave out --OPTION``."""
    for name in names:
        if args[name] != parser.get_default(name):
            parser.error(f"{why}: leave out --{name.replace('_', '-')}")


def check_samples(args: Namespace) -> None:
    """Checks --samples and --max-names before anything is loaded."""
    if args.max_names is not None and args.max_names < 1:
        raise ValueError(f"--max-names must be 1 or more, not {args.max_names}: leave it out to score all")
    if not 0 <= args.samples <= 10_000_000:
        raise ValueError(f"--samples must be from 0 (draw none) to 10,000,000, not {args.samples}")


def print_result(args: Namespace, result: Any, text: str) -> None:
    """Prints the result as JSON with --json, else the text."""
    say(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)
