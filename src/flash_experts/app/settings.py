"""Validated settings of a request, and the settings string that shares them.

Requests are untrusted, so the `page_bounds` of each option limit time and memory before a model runs. `NameRequest`
checks what values mean.

A settings string is a version and a URL query of the settings that differ from the defaults::

    flash-experts:1?type_line=Creature+%E2%80%94+Goblin&colors=R&preset=creative&seed=7
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from flash_experts.generation.request import NameRequest
from flash_experts.options import Kind, defaults_of, kind_of, options_of
from flash_experts.terminal import did_you_mean

PREFIX = "flash-experts:1?"
LONGEST_STRING = 2_000  # characters of a settings string
# The options that clients can set: those with a label.
OPTIONS = {name: known for name, known in options_of(NameRequest).items() if known.label is not None}
KINDS: dict[str, Kind] = {name: kind_of(NameRequest, name) for name in OPTIONS}
DEFAULTS: dict[str, Any] = {name: defaults_of(NameRequest)[name] for name in OPTIONS}
# Lists are tuples here, since settings are immutable.
DEFAULTS |= {name: () for name, kind in KINDS.items() if kind == "list"}
MOST_NAMES, LARGEST_SEED = (int(OPTIONS[name].page_bounds[1]) for name in ("count", "seed"))  # type: ignore[index]
_WORD = re.compile(r"(?<!\S)[^\s,:!?]+?(?='s(?!\w)|[\s,:!?]|$)")  # without 's and punctuation after it
_GAP = "___"
# Rules that the other words replace.
_REPLACED = ("regex", "starts_with", "contains", "ends_with", "min_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(NameRequest):
    """A `NameRequest` from a client of the playground, within the narrower bounds of the page, else a ValueError."""

    def __post_init__(self) -> None:
        if self.like is None:
            object.__setattr__(self, "like", ())
        for name in OPTIONS:
            _check(name, getattr(self, name))
        NameRequest.__post_init__(self)
        self.attributes()
        self.sampling()

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def changed(self) -> dict[str, Any]:
        """Those of `options` that differ from the defaults."""
        return {name: value for name, value in self.options().items() if value != DEFAULTS[name]}

    def to_string(self) -> str:
        return PREFIX + urlencode([(name, _written(value)) for name, value in self.changed().items()])

    @classmethod
    def from_string(cls, text: str) -> Settings:
        """Reads what `to_string` wrote; raises a ValueError for anything else."""
        text = text.strip()
        if len(text) > LONGEST_STRING:
            raise ValueError(f"the settings string has {len(text)} characters: the most is {LONGEST_STRING}")
        if not text.startswith(PREFIX):
            raise ValueError(f"not a settings string: it must begin with {PREFIX}")
        query = text.removeprefix(PREFIX)
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict") if query else []
        except ValueError:
            raise ValueError(f"not a settings string: after {PREFIX} there must be name=value, joined by &") from None
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name not in DEFAULTS:
                raise ValueError(f"unknown setting {name[:40]!r}" + did_you_mean(name, DEFAULTS, prefix=": "))
            if name in values:
                raise ValueError(f"the setting {name} is given twice")
            values[name] = _read(name, value)
        return cls(**values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a form or JSON.

        Blank texts and None stand for the defaults, whole floats for integers, texts with ";" or "," for lists.
        """
        return cls(**{name: read for name, value in values.items() if (read := _tidied(name, value)) is not None})


_KINDS_IN_JSON = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true or false",
                  int: "a number", float: "a number", type(None): "null"}  # fmt: skip


def _check(name: str, value: Any) -> None:
    kind, bounds = KINDS[name], OPTIONS[name].page_bounds or (0, 0)
    if value is None and DEFAULTS[name] is None:
        return
    if kind in ("text", "choice"):
        _check_text(name, value, 10 if kind == "choice" else bounds[1])
    elif kind == "list":
        _check_list(name, value, *bounds)
    elif kind == "flag":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r:.40}")
    else:
        _check_number(name, value, bounds)


def _check_text(name: str, value: Any, longest: float) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {_KINDS_IN_JSON.get(type(value), 'something else')}")
    if len(value) > longest:
        raise ValueError(f"{name} has {len(value)} characters: the most is {longest}")
    if not value.isprintable():
        raise ValueError(f"{name} has a control character: leave it out")


def _check_list(name: str, value: Any, most: float, longest: float) -> None:
    if not isinstance(value, tuple):
        raise ValueError(f"{name} must be a list, not {_KINDS_IN_JSON.get(type(value), 'something else')}")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} entries: the most is {most}")
    for entry in value:
        _check_text(name, entry, longest)
        if not entry or not entry.strip():
            raise ValueError(f"{name} has a blank entry: leave it out")
        if ";" in entry:
            raise ValueError(f"{name} has ';' in {entry!r}: ';' separates entries")


def _check_number(name: str, value: Any, bounds: tuple[float, float]) -> None:
    is_whole = KINDS[name] == "integer"
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
        raise ValueError(f"{name} must be a {'whole number' if is_whole else 'number'}, not {value!r:.40}")
    low, high = bounds
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must be from {low:.10g} to {high:.10g}")


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(value)
    return "1" if value is True else str(value)


# How numbers and flags are written in a settings string, and what reads them.
_WRITTEN_AS: dict[Kind, tuple[str, Callable[[str], Any], str]] = {
    "flag": ("1", bool, "1, or leave it out"),
    "integer": ("[0-9]{1,10}", int, "a whole number"),
    "number": (r"[0-9]{1,6}(\.[0-9]{1,20})?(e-[0-9]{1,3})?", float, "a number such as 0.9"),
}


def _read(name: str, text: str) -> Any:
    kind = KINDS[name]
    if kind not in _WRITTEN_AS:
        return tuple(text.split(";")) if kind == "list" else text
    pattern, convert, wanted = _WRITTEN_AS[kind]
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{name}={text[:40]!r}: give {wanted}")
    return convert(text)


def _tidied(name: str, value: Any) -> Any:
    """A form's value in the type of `Settings`; None for the default."""
    kind = KINDS.get(name)
    if kind == "list":
        if isinstance(value, str):
            value = re.split("[;\n]" if name == "like" else "[;,\n]", value[: 10 * LONGEST_STRING])
        if isinstance(value, Sequence):
            value = tuple(entry.strip() if isinstance(entry, str) else entry for entry in value)
            value = tuple(entry for entry in value if entry != "")
        return value or None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float) and value.is_integer() and kind != "number":
        return int(value)
    return value


def words_of(name: str) -> list[str]:
    """The words that can be replaced; none where a name has only one."""
    words = _WORD.findall(name)
    return words if len(words) > 1 else []


def with_gap(settings: Settings, name: str, number: Any) -> Settings:
    """The settings of names that differ from ``name`` in the word of this index.

    Raises a ValueError if there is no such word, or the name is too long for a pattern.
    """
    places = {str(index): match for index, match in enumerate(_WORD.finditer(name))}
    word = places.get(str(number)[:6])
    if word is None or len(places) < 2:
        raise ValueError(f"{name!r:.60} has no such word")
    pattern = name[: word.start()] + _GAP + name[word.end() :]
    num_words = len(name.split())
    own: dict[str, Any] = {rule: DEFAULTS[rule] for rule in _REPLACED}
    own |= {"pattern": pattern, "min_words": num_words, "max_words": num_words, "words": None}
    return replace(settings, **own, seed=None, count=DEFAULTS["count"])
