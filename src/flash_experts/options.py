"""Options: declared once, as fields with all that Python, command line, YAML and playground have to know of them;
and files of settings, which give them values.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from flash_experts.terminal import did_you_mean

POSITIVE, UNDER_ONE = math.nextafter(0, 1), math.nextafter(1, 0)  # bounds for more than 0, and for less than 1
Kind = Literal["text", "list", "flag", "integer", "number", "choice"]
MAX_BYTES = 2**17  # of a settings file; our longest has four thousand
_TYPES_IN_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null", Path: "a path",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is known of an option besides its name, type and default. The page is the playground's.

    Attributes:
        help: phrase for ``--help``; ends with the default where that is None.
        group: heading in the help and on the page.
        label: name on the page; None keeps the option off the page and out of shared settings.
        flag: name on the command line, where it is not the field's.
        page_bounds: narrower bounds for clients of a server; for a text its most characters, for a list its most
            entries and their most characters (default: the slider's).
        slider: lowest, highest and step.
        hint: line under the control.
        labels: names of the choices on the page.
    """

    help: str
    group: str
    label: str | None = None
    flag: str | None = None
    bounds: tuple[float, float] | None = None
    page_bounds: tuple[float, float] | None = None
    slider: tuple[float, float, float] | None = None
    hint: str = ""
    placeholder: str = ""
    labels: tuple[str, ...] = ()


def option(default: Any, help: str, group: str, **known: Any) -> Any:
    """A dataclass field with an `Option`."""
    if "slider" in known:
        known.setdefault("page_bounds", known["slider"][:2])
    return field(default=default, metadata={"option": Option(help=help, group=group, **known)})


def options_of(cls: Any) -> dict[str, Option]:
    """The options among a dataclass's fields, in their order."""
    return {each.name: each.metadata["option"] for each in fields(cls) if "option" in each.metadata}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def type_of(cls: Any, name: str) -> Any:
    """The type of a field without None: ``int`` for ``int | None``."""
    hint = _hints(cls)[name]
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return next((kind for kind in kinds if get_origin(kind) is not None), kinds[0])
    return hint


def kind_of(cls: Any, name: str) -> Kind:
    """The kind of value that an option takes."""
    hint = type_of(cls, name)
    if get_origin(hint) is Literal:
        return "choice"
    kinds: dict[Any, Kind] = {str: "text", bool: "flag", int: "integer", float: "number"}
    return kinds.get(hint, "list")


def defaults_of(cls: Any) -> dict[str, Any]:
    """The default of each field."""
    return {each.name: each.default for each in fields(cls)}


def problems_of(values: Any, cls: type) -> list[str]:
    """What is wrong with the options of a class, a phrase each: types, or numbers out of bounds and unknown choices."""
    problems = wrong_types(values, cls)
    if problems:  # which cannot be compared with bounds
        return problems
    for name, known in options_of(cls).items():
        value = getattr(values, name)
        if kind_of(cls, name) == "choice":
            choices = get_args(type_of(cls, name))
            if not isinstance(value, str) or value not in choices:
                hint = did_you_mean(str(value), choices, prefix=": ")
                problems.append(f"{name} is {value!r}, but it is one of {', '.join(choices)}{hint}")
        elif known.bounds is not None and value is not None and not known.bounds[0] <= value <= known.bounds[1]:
            problems.append(f"{name} is {value}, but it must be {_range(*known.bounds)}")
    return problems


def wrong_types(values: Any, cls: Any) -> list[str]:
    """The fields of a dataclass whose value has another type than its annotation, a phrase each."""
    hints = _hints(cls)
    found = (type_problem(each.name, getattr(values, each.name), hints[each.name]) for each in fields(cls))
    return [problem for problem in found if problem is not None]


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """A phrase if the type of a value is not ``hint``. Numbers of numpy pass; choices are left to `problems_of`."""
    if _has_type(value, hint):
        return None
    options = [kind for kind in _alternatives(hint) if kind is not NoneType]
    what = " or ".join(describe_type(kind) or f"a {kind.__name__}" for kind in options)
    shown = " ".join(f"{value!r:.60}".split())
    advice = ""
    if str in options and isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
        advice = f": write {('' if max(map(len, value)) == 1 else ' ').join(value)!r}"
    return f"{name} must be {what}, not {shown}{advice}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    return any(_is_a(value, kind) for kind in _alternatives(hint))


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):  # True is an int of Python
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return True
    if origin not in (list, tuple, Sequence):
        return isinstance(value, kind)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        return False
    if origin is tuple:
        return len(value) == len(parts) and all(map(_has_type, value, parts))
    return all(_has_type(part, parts[0]) for part in value)


def _range(least: float, most: float) -> str:
    if least == POSITIVE:
        return f"more than 0 and at most {most:,}"
    return f"from {least:,} to under 1" if most == UNDER_ONE else f"from {least:,} to {most:,}"


def at_least(name: str, value: int, least: int, hint: str) -> int:
    """``value``; raises a ValueError with the hint if it is less than ``least``."""
    if value < least:
        raise ValueError(f"{name} is {value}: {hint}")
    return value


# ---------------------------------------------------------------------------------------------------- files of settings
# Plain values of bounded size, without aliases, since a file may be untrusted.


class _Loader(yaml.SafeLoader):
    """Loads plain values; dates are text.

    Refuses repeated keys, of which YAML's own loader silently drops the first, and aliases, nine lines of which can
    stand for 10^9 values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not supported: write the value", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a number of 5,000 digits, or not of its `!!tag`
            raise yaml.constructor.ConstructorError(None, None, str(error).split(";")[0], node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [known for known in kinds if known[0] != "tag:yaml.org,2002:timestamp"]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        ValueError: the file does not exist, is too large, or is not UTF-8, YAML (with the line) or a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a YAML file" if path.exists() else f"there is no file {path}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: it is not a settings file")
        text = data.decode("utf-8-sig")
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = ": indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise ValueError(f"{path}{line} is not valid YAML: {error.problem}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path} has too many levels for settings") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: write `name: value`, one per line")
    return content


def read_settings(path: str | Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a YAML file of options and converts each value to its type in ``hints``, by dotted name.

    YAML 1.1 reads ``1e-3`` as text, ``no`` as a boolean, ``010`` as 8 and ``1:30`` as 90: here the option's type rules.

    Raises:
        ValueError: as `read_yaml`, or a key is not text, or a value is missing or has a wrong type.
    """
    content = read_yaml(path)
    written = yaml.load(Path(path).read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # all values as text
    return _typed_group(content, written, hints, f"{path}: ", "")


def _typed_group(content: Any, written: Any, hints: Mapping[str, Any], where: str, group: str) -> dict[str, Any]:
    typed = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}the key {key!r} is not the name of a setting: write it as text")
        name = f"{group}{key}"
        text = written.get(key, str(value)) if isinstance(written, dict) else str(value)
        inside = any(hint.startswith(f"{name}.") for hint in hints)
        if name in hints:
            value = _typed(value, text, hints[name], f"{where}{name}")
        elif inside and isinstance(value, dict):
            value = _typed_group(value, text, hints, where, f"{name}.")
        elif inside:
            empty = "is empty: write its settings under it, or delete the line"
            raise ValueError(f"{where}{name} {empty if value is None else f'must have settings under it, not {text}'}")
        typed[key] = value
    return typed


def _typed(value: Any, text: Any, hint: Any, where: str) -> Any:
    """Converts a value to its type. ``text`` is its spelling in the file."""
    options = _alternatives(hint)
    what = describe_type(hint) or "settings"
    if value is None and NoneType not in options:
        raise ValueError(f"{where} is empty, but it must be {what}: write a value, or delete the line for the default")
    if value is None:
        return None
    if lists := [option for option in options if get_origin(option) in (list, tuple)]:
        return _typed_list(value, text, lists[0], where, what)
    groups = [option for option in options if is_dataclass(option)]
    if groups and isinstance(value, dict):
        found = get_type_hints(groups[0])
        hints = {field.name: found[field.name] for field in fields(groups[0])}
        return _typed_group(value, text, hints, f"{where}.", "")
    if groups or (bool in options and not isinstance(value, bool)):
        raise ValueError(f"{where} must be {what}, not {text!r}")
    return _typed_scalar(value, text, options, where, what) if isinstance(text, str) else value


def _typed_list(value: Any, text: Any, hint: Any, where: str, what: str) -> list[Any]:
    part = get_args(hint)[0]
    if isinstance(text, str) and part in (str, int):
        value, text = [value], [text]  # a single value is a list of one
    if not isinstance(value, list):
        raise ValueError(f"{where} must be {what}, not {text!r}")
    texts = text if isinstance(text, list) and len(text) == len(value) else list(map(str, value))
    return [_typed(one, texts[place], part, f"{where}[{place}]") for place, one in enumerate(value)]


def _typed_scalar(value: Any, text: str, options: tuple[Any, ...], where: str, what: str) -> Any:
    if not {int, float} & set(options):
        return value if bool in options else text
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) or (is_number and ":" in text):
        raise ValueError(f"{where} must be {what}, not {text!r}")
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", text):
        return int(text)
    if not is_number and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        number = float(text)
        return int(number) if float not in options and number.is_integer() else number
    return value if is_number else text


def describe_type(hint: Any) -> str | None:
    """Describes a type in words; None for a type that options do not have."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [describe_type(part) for part in get_args(hint)]
        return None if None in kinds else " or ".join(dict.fromkeys(filter(None, kinds)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}"
    if get_origin(hint) in (list, Sequence):
        examples = {str: ", such as [a,b]", int: ", such as [1,2]"}
        return "a list" + examples.get(get_args(hint)[0], "")
    return _TYPES_IN_WORDS.get(hint)
