"""What one request asks for, checked, and the string that shares it.

A request comes from anywhere on a network, so all that costs time or memory is bounded here, before a model sees it.
What a value means is checked where it is used anyway: `Attributes`, `Sampling` and `Constraints`.

The string is a query as in a web address, with a version before it and only what is not the default::

    flash-experts:1?type_line=Creature+%E2%80%94+Goblin&colors=R&preset=creative&seed=7
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

from flash_experts.data.prompts import Attributes
from flash_experts.generation import Constraints, Sampling
from flash_experts.generation.attribute_fit import fitness_of
from flash_experts.generation.presets import sampling_of

PREFIX = "flash-experts:1?"
MOST_NAMES = 100
LONGEST_STRING = 2_000  # characters of a settings string
LARGEST_SEED = 2**31 - 1
_SAMPLING = tuple(field.name for field in fields(Sampling))
_TEXTS = {
    "type_line": 120,
    "colors": 40,
    "rarity": 20,
    "set_code": 10,
    "preset": 40,
    "best_by": 10,
    "starts_with": 40,
    "ends_with": 40,
    "contains": 40,
    "regex": 100,
}
_LISTS = {"banned_words": (50, 30), "like": (20, 60)}  # how many, and how long each
_NUMBERS: dict[str, tuple[float, float]] = {
    "mana_value": (0, 20),
    "released": (1993, 2100),
    "count": (1, MOST_NAMES),
    "best_of": (1, 8),
    "seed": (0, LARGEST_SEED),
    "temperature": (0.05, 3),
    "top_k": (0, 10_000),
    "top_p": (0.01, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.5, 3),
    "guidance": (0, 5),
    "words": (1, 8),
    "min_words": (1, 8),
    "max_words": (1, 8),
    "min_length": (1, 40),
    "max_length": (1, 40),
    "min_distance": (0, 0.8),
}
_FLOATS = {"temperature", "top_p", "min_p", "repetition_penalty", "guidance", "min_distance"}
_FLAGS = ("alliterate", "allow_profanity", "allow_real_places")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One request for names; fields are those of `flash_experts.NameGenerator.generate`, and None leaves one open.

    Attributes:
        type_line: such as "Legendary Creature — Goblin".
        colors: such as "R" or "WU"; "C" is colorless.
        mana_value: 0 to 20.
        rarity, set_code, released: such as "rare", "ZEN" and 2009, for models that learned them.
        preset: of `flash_experts.generation.PRESETS`.
        temperature, top_k, top_p, min_p, repetition_penalty, guidance: each over the preset's.
        starts_with, ends_with, contains, regex, words, min_words, max_words, min_length, max_length, banned_words,
            alliterate, min_distance, allow_profanity, allow_real_places: see `flash_experts.generation.Constraints`.
        like: examples that the names shall resemble.
        count: how many names.
        best_of: names drawn for each that is given.
        best_by: which of them is best: "score", the most natural, or "fit", the truest to the card.
        seed: the same gives the same names; drawn if None.

    Raises:
        ValueError: a value is out of its bounds, of the wrong type, or contradicts another.
    """

    type_line: str | None = None
    colors: str | None = None
    mana_value: int | None = None
    rarity: str | None = None
    set_code: str | None = None
    released: int | None = None
    preset: str = "balanced"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    guidance: float | None = None
    starts_with: str | None = None
    ends_with: str | None = None
    contains: str | None = None
    regex: str | None = None
    words: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    banned_words: tuple[str, ...] = ()
    alliterate: bool = False
    min_distance: float = 0.0
    allow_profanity: bool = False
    allow_real_places: bool = False
    like: tuple[str, ...] = ()
    count: int = 20
    best_of: int = 1
    best_by: str = "score"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, longest in _TEXTS.items():
            _check_text(name, getattr(self, name), longest)
        for name, (most, longest) in _LISTS.items():
            _check_list(name, getattr(self, name), most, longest)
        for name, bounds in _NUMBERS.items():
            _check_number(name, getattr(self, name), bounds)
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {value!r:.40}")
        attributes = self.attributes()
        if not self.like:  # which tells attributes, too
            fitness_of(self.best_by, self.best_of, attributes)
        sampling_of(self.preset, **{name: getattr(self, name) for name in _SAMPLING})
        Constraints(
            **{field.name: getattr(self, field.name) for field in fields(Constraints) if hasattr(self, field.name)}
        )

    def attributes(self) -> Attributes:
        """Of the card that the names are for.

        Raises:
            ValueError: a type, color, rarity, set or year cannot be.
        """
        printing = (self.rarity, self.set_code, self.released)
        return Attributes.parse(self.type_line, self.colors, self.mana_value, *printing)

    def options(self) -> dict[str, Any]:
        """Arguments of `flash_experts.NameGenerator.stream`."""
        return asdict(self)

    def to_string(self) -> str:
        """The settings that are not the defaults, as one line to share. `from_string` reads it."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        changed = [(name, value) for name, value in given if value != _DEFAULTS[name]]
        return PREFIX + urlencode([(name, _written(value)) for name, value in changed])

    @classmethod
    def from_string(cls, text: str) -> Settings:
        """Reads what `to_string` wrote.

        Raises:
            ValueError: it is no such string, a setting is unknown or twice in it, or a value is not allowed.
        """
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
            if name not in _DEFAULTS:
                near = difflib.get_close_matches(name, _DEFAULTS, n=1)
                raise ValueError(f"unknown setting {name[:40]!r}" + (f": did you mean {near[0]!r}?" if near else ""))
            if name in values:
                raise ValueError(f"the setting {name} is given twice")
            values[name] = _reader(name)(name, value)
        return cls(**values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Settings:
        """Settings of a form or of JSON: blank texts and None are the defaults, whole floats are integers, and lists
        may be texts with ";" (or, for words, ",") between.

        Raises:
            ValueError: as the constructor.
        """
        return cls(**{name: read for name, value in values.items() if (read := _tidied(name, value)) is not None})


_KINDS_IN_JSON = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true or false",
                  int: "a number", float: "a number", type(None): "null"}  # fmt: skip
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Settings)}


# ------------------------------------------------------------------------------------------------------------- checks


def _check_text(name: str, value: Any, longest: int) -> None:
    if value is None and _DEFAULTS[name] is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {_KINDS_IN_JSON.get(type(value), 'something else')}")
    if len(value) > longest:
        raise ValueError(f"{name} has {len(value)} characters: the most is {longest}")
    if not value.isprintable():
        raise ValueError(f"{name} has a control character: leave it out")


def _check_list(name: str, value: Any, most: int, longest: int) -> None:
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
    if value is None and _DEFAULTS[name] is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float if name in _FLOATS else int):
        kind = "number" if name in _FLOATS else "whole number"
        raise ValueError(f"{name} must be a {kind}, not {value!r:.40}")
    low, high = bounds
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must be from {low:.10g} to {high:.10g}")


# --------------------------------------------------------------------------------------------- to and from plain text


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(value)
    return "1" if value is True else str(value)


def _reader(name: str) -> Callable[[str, str], Any]:
    if name in _LISTS:
        return lambda _, text: tuple(text.split(";"))
    if name in _FLAGS:
        return _read_flag
    if name in _NUMBERS:
        return _read_float if name in _FLOATS else _read_int
    return lambda _, text: text


def _read_flag(name: str, text: str) -> bool:
    if text != "1":
        raise ValueError(f"{name}={text[:40]!r}: give 1, or leave it out")
    return True


def _read_int(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):
        raise ValueError(f"{name}={text[:40]!r}: give a whole number")
    return int(text)


def _read_float(name: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,20})?(e-[0-9]{1,3})?", text):
        raise ValueError(f"{name}={text[:40]!r}: give a number such as 0.9")
    return float(text)


def _tidied(name: str, value: Any) -> Any:
    """A value of a form as `Settings` has it; None for the default."""
    if name in _LISTS:
        if isinstance(value, str):
            value = re.split("[;\n]" if name == "like" else "[;,\n]", value[: 10 * LONGEST_STRING])
        if isinstance(value, Sequence):
            value = tuple(entry.strip() if isinstance(entry, str) else entry for entry in value)
            value = tuple(entry for entry in value if entry != "")
        return value or None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float) and value.is_integer() and name not in _FLOATS:
        return int(value)
    return value
