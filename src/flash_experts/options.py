"""How an option is declared: once, as a field with all that Python, the command line, YAML files and the
playground have to know of it."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flash_experts.plain_text import did_you_mean

POSITIVE, UNDER_ONE = math.nextafter(0, 1), math.nextafter(1, 0)  # bounds for more than 0, and for less than 1
Kind = Literal["text", "list", "flag", "integer", "number", "choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is known of an option besides its name, type and default.

    Attributes:
        help: Phrase for ``--help``; ends with the default where that is None.
        group: Heading that it stands under in the help and on the page.
        label: Name on the page; None keeps the option off the page and out of shared settings.
        flag: Name on the command line, where it is not the field's.
        bounds: Lowest and highest number.
        page_bounds: The same for clients of a server, for whom it is narrower; for a text its most characters, for a
            list its most entries and their most characters.
        slider: Lowest, highest and step of a slider on the page.
        hint: Line under the control.
        placeholder: Example in an empty control.
        labels: Names of the choices on the page.
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
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
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
    """What is wrong with the options of a class, a phrase each: numbers out of bounds, unknown choices."""
    problems = []
    for name, known in options_of(cls).items():
        value = getattr(values, name)
        if kind_of(cls, name) == "choice":
            choices = get_args(type_of(cls, name))
            if value not in choices:
                hint = did_you_mean(str(value), choices, prefix=": ")
                problems.append(f"{name} is {value!r}, but it is one of {', '.join(choices)}{hint}")
        elif known.bounds is not None and value is not None and not known.bounds[0] <= value <= known.bounds[1]:
            problems.append(f"{name} is {value}, but it must be {_range(*known.bounds)}")
    return problems


def _range(least: float, most: float) -> str:
    """Bounds in words."""
    if least == POSITIVE:
        return f"more than 0 and at most {most:,}"
    return f"from {least:,} to under 1" if most == UNDER_ONE else f"from {least:,} to {most:,}"


def at_least(name: str, value: int, least: int, hint: str) -> int:
    """``value``; raises a ValueError with the hint if it is less than ``least``."""
    if value < least:
        raise ValueError(f"{name} is {value}: {hint}")
    return value
