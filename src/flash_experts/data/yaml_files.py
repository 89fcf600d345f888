"""YAML files of settings, read with bounds: a file from a stranger costs neither memory nor time, and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MAX_BYTES = 2**17  # the longest of ours has four thousand
MAX_DEPTH = 20
MAX_VALUES = 10_000  # once aliases are written out: nine lines of them can stand for a thousand million


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice, of which YAML's own loader would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: there is no such file, it is too large or too deep, no UTF-8, no YAML (with the line), or no
            mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a YAML file" if path.exists() else f"there is no file {path}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: that is no file of settings")
        text = data.decode("utf-8-sig")
        _check_depth(path, text)
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = ": indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise ValueError(f"{path}{line} is no YAML of settings: {error.problem}{hint}") from error
    except yaml.YAMLError as error:  # a character that YAML has not
        raise ValueError(f"{path} is no YAML of settings: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: write `name: value`, one a line")
    _count(path, content, {})
    return content


def read_settings(path: str | Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that a YAML file of options holds, each value as the type of its option asks.

    YAML 1.1 takes ``1e-3`` for a text, ``2026`` and ``no`` for a number and a truth value, ``010`` for 8 and ``1:30``
    for 90: here the option says what is meant.

    Args:
        path: of the file.
        hints: types of the options, by dotted name, e.g. ``{"training.seed": int}``; others are left as they are.

    Raises:
        ValueError: as `read_yaml`, a key is no text, or a value is missing or cannot be of its type.
    """
    content = read_yaml(path)
    written = yaml.load(Path(path).read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # every value a text
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
    """A value as its type asks. ``text`` is how it stands in the file."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    what = kind_of(hint) or "settings"
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
        value, text = [value], [text]  # one value alone is a list of one
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


def kind_of(hint: Any) -> str | None:
    """A type in words; None for one that is not of options."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind_of(part) for part in get_args(hint)]
        return None if None in kinds else " or ".join(dict.fromkeys(filter(None, kinds)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}"
    if get_origin(hint) is list:
        examples = {str: ", such as [a,b]", int: ", such as [1,2]"}
        return "a list" + examples.get(get_args(hint)[0], "")
    return _KINDS.get(hint)


def _check_depth(path: Path, text: str) -> None:
    """Before anything is built: the loaders call themselves for each level."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ValueError(f"{path}:{line}: more than {MAX_DEPTH} levels are no settings")


def _count(path: Path, value: Any, counted: dict[int, int | None]) -> int:
    """How many values are in this one, aliases written out."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{path}: {value.split(chr(0))[0]!r} has a null character after it, which no value may")
    if not isinstance(value, dict | list):
        return 1
    if id(value) in counted:
        if (known := counted[id(value)]) is None:
            raise ValueError(f"{path}: a value has itself in it")
        return known
    counted[id(value)] = None
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    total = 1 + sum(_count(path, part, counted) for part in parts)
    if total > MAX_VALUES:
        raise ValueError(f"{path}: more than {MAX_VALUES:,} values, aliases written out, are no settings")
    counted[id(value)] = total
    return total
