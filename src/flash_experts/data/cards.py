"""Card records: a name and the attributes that generation can be conditioned on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from flash_experts.terminal import did_you_mean

UNKNOWN = "?"  # in the colors of a face
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
FILE_KINDS = ", ".join(FILE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class RawCard:
    """One card as a source lists it. Values of several faces are joined by " // ", as names are; None is unknown."""

    name: str
    type_line: str | None = None
    mana_cost: str | None = None  # as `flash_experts.data.cleaning.read_cost` takes it; None also if there is none
    colors: str | None = None  # "WU"; "" for colorless, "?" for unknown; None for those of the mana cost
    mana_value: int | None = None  # where there is no mana cost
    layout: str = ""
    flag: str = ""  # "jokes", "franchises" or ""
    source_id: str = ""
    rarity: str | None = None
    set_code: str | None = None
    released: str | None = None
    excluded: str = ""  # why the source itself rules the card out, such as "memorabilia"


@dataclass(frozen=True, slots=True)
class CardSource:
    """Raw cards in the source's order, and their provenance."""

    name: str  # "embedded", a live source such as "scryfall", or the file's name
    version: str
    sha256: str
    rows: tuple[RawCard, ...]
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `Unread.counts`


class Unread:
    """Counts unreadable values by column: ``{"rarity": {"count": 3, "first": "mine.csv:7: 'Promo'"}}``."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, column: str, where: str, value: object) -> None:
        entry = self.counts.setdefault(column, {"count": 0, "first": f"{Path(where).name}: {str(value)[:50]!r}"})
        entry["count"] += 1


COLORS = "WUBRG"  # in the order that Magic uses
COLOR_WORDS = {"W": "white", "U": "blue", "B": "black", "R": "red", "G": "green"}
COLORLESS = "colorless"
RARITIES = ("common", "uncommon", "rare", "mythic")
_RARITY_WORDS = {"c": "common", "u": "uncommon", "r": "rare", "m": "mythic", "mythic rare": "mythic"}
SUPERTYPES = ("Basic", "Legendary", "World", "Snow")

# In the order of a type line: "Kindred Instant", "Artifact Land", "Enchantment Artifact Creature".
TYPES = ("Kindred", "Enchantment", "Artifact", "Land", "Planeswalker", "Battle", "Creature", "Instant", "Sorcery")
_OLD_TYPES = {"Tribal": "Kindred"}  # renamed by Wizards of the Coast in 2023
_DASH = re.compile(r"\s*(?:—|–|--)\s*|\s+-\s+")
_SUBTYPES_OF_TWO_WORDS = ("Time Lord",)
_SET_CODE = re.compile(r"(?=.*[A-Z])[A-Z0-9_]{2,10}", re.ASCII)  # a letter tells it from a mana value or a year
_DATE = re.compile(r"(?:19|20)\d\d(?:-\d\d(?:-\d\d)?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Card:
    """One name and the attributes of its card (of the face, where a card has two); None is unknown."""

    name: str
    type_line: str  # "Legendary Creature — Goblin Warrior"; unknown: "", and () for its three parts
    supertypes: tuple[str, ...]
    types: tuple[str, ...]
    subtypes: tuple[str, ...]
    colors: tuple[str, ...] | None  # letters in the order WUBRG; () for colorless
    mana_value: int | None  # total of the mana cost with X as 0; None also without a mana cost
    source_id: str  # "embedded:123" (row), "mine.csv:7" (line), or the source's id
    rarity: str | None = None  # one of `RARITIES`
    set_code: str | None = None  # of one printing: MTGJSON gives the first, Scryfall the best-known one
    released: str | None = None  # date of that printing, "2009-10-02", or its year alone

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a prepared line, without unknown optional fields."""
        optional = {name: value for name in _OPTIONAL_FIELDS if (value := getattr(self, name)) is not None}
        return {
            "name": self.name,
            "type_line": self.type_line,
            "types": list(self.types),
            "subtypes": list(self.subtypes),
            "supertypes": list(self.supertypes),
            "colors": None if self.colors is None else list(self.colors),
            "mana_value": self.mana_value,
            "source_id": self.source_id,
            **optional,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> Card:
        """The card of a prepared line; a ValueError with ``where`` (``file:line``) if a field is missing or wrong."""
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a card must be a JSON object, not {type(fields).__name__}")
        missing = [name for name in cls.__slots__ if name not in fields and name not in _OPTIONAL_FIELDS]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r} (run `flash-experts prepare` again)")
        colors, mana_value = fields["colors"], fields["mana_value"]
        if not all(isinstance(fields[name], str) for name in ("name", "type_line", "source_id")):
            raise ValueError(f"{where}: name, type_line and source_id must be text")
        if not fields["name"].strip():
            raise ValueError(f"{where}: the name is empty")
        if mana_value is not None and type(mana_value) is not int:
            raise ValueError(f"{where}: mana_value must be a whole number or null, not {mana_value!r}")
        if colors is not None and (not isinstance(colors, list) or not set(map(str, colors)) <= set(COLORS)):
            raise ValueError(f"{where}: colors must be a list of letters of {COLORS}, not {colors!r}")
        return cls(
            name=fields["name"],
            type_line=fields["type_line"],
            supertypes=_texts(fields["supertypes"], "supertypes", where),
            types=_texts(fields["types"], "types", where),
            subtypes=_texts(fields["subtypes"], "subtypes", where),
            colors=None if colors is None else in_color_order(colors),
            mana_value=mana_value,
            source_id=fields["source_id"],
            **{name: _parse_optional(fields.get(name), name, where) for name in _OPTIONAL_FIELDS},
        )


_OPTIONAL_FIELDS = ("rarity", "set_code", "released")  # only some sources have them


def _parse_optional(value: Any, field: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {field} must be text or null, not {value!r}")
    if field == "rarity" and value not in (None, *RARITIES):
        raise ValueError(f"{where}: rarity must be one of {', '.join(RARITIES)}, not {value!r}")
    try:
        return parse_set_code(value) if field == "set_code" else parse_date(value) if field == "released" else value
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _texts(value: Any, field: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where}: {field} must be a list of texts, not {value!r}")
    return tuple(value)


def in_color_order(letters: list[str] | tuple[str, ...] | set[str] | str) -> tuple[str, ...]:
    """Distinct color letters in the order WUBRG, without other letters."""
    return tuple(color for color in COLORS if color in letters)


def parse_colors(text: str | None) -> tuple[str, ...] | None:
    """Parses ``"WU"``, ``"white and blue"``, ``"{W}{U}"``, ``"colorless"`` or ``"C"`` into letters in the order WUBRG.

    ``()`` for colorless, None for an empty text, a ValueError (with a suggestion) if a word is not a color.
    """
    letter_of = {word: letter for letter, word in COLOR_WORDS.items()}
    words = [word for word in re.split(r"(?i:[\s,/{}&+]+|\band\b)", text or "") if word]
    if not words:
        return None
    letters: set[str] = set()
    colorless = False
    for written in words:
        word = written.casefold()
        if word in letter_of:
            letters.add(letter_of[word])
        elif word in ("c", COLORLESS, "colourless"):
            colorless = True
        elif set(word.upper()) <= {*COLORS, "C"}:
            letters.update(set(word.upper()) - {"C"})
            colorless |= "c" in word
        else:
            others = f"use {', '.join(letter_of)}, {COLORLESS}, or letters of {COLORS} (C for {COLORLESS})"
            hint = did_you_mean(word, [*letter_of, COLORLESS], others, cutoff=0.5)
            raise ValueError(f"unknown color {written!r}: {hint}")
    found = in_color_order(letters)
    if colorless and found:
        others = " and ".join(COLOR_WORDS[letter] for letter in found)
        raise ValueError(f"{COLORLESS} cannot be combined with {others}: leave out one of them")
    return found


def parse_rarity(text: str | None) -> str | None:
    """Parses a rarity (``"mythic rare"``, ``"M"``); None for an empty text, a ValueError for others."""
    written = " ".join((text or "").split())
    word = written.casefold()
    if not word:
        return None
    rarity = _RARITY_WORDS.get(word, word)
    if rarity not in RARITIES:
        hint = did_you_mean(word, RARITIES, f"use {', '.join(RARITIES)}", cutoff=0.5)
        raise ValueError(f"unknown rarity {written!r}: {hint}")
    return rarity


def parse_set_code(text: str | None) -> str | None:
    """A set code in capitals; None for an empty text, a ValueError for a malformed one."""
    written = (text or "").strip()
    code = written.upper()
    if code and not _SET_CODE.fullmatch(code):
        raise ValueError(f"a set is given by its code, 2 to 10 letters and digits such as ZEN, not {written[:50]!r}")
    return code or None


def parse_date(text: str | None) -> str | None:
    """A release date (``"2009-10-02"``) or year; None for an empty text, a ValueError for a malformed one."""
    date = (text or "").strip()
    if date and not _DATE.fullmatch(date):
        raise ValueError(f"a release is given by its date or year, such as 2009-10-02 or 2009, not {date[:50]!r}")
    return date or None


@lru_cache(8192)  # 35,000 cards have 4,200 different type lines
def split_type_line(type_line: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Splits one face's type line into supertypes, types and subtypes, without checking that they exist."""
    line, *rest = _DASH.split(type_line, maxsplit=1)
    words = [_OLD_TYPES.get(word, word) for word in line.split()]
    supertypes = tuple(word for word in words if word in SUPERTYPES)
    return supertypes, tuple(word for word in words if word not in SUPERTYPES), _subtypes("".join(rest))


@lru_cache(8192)
def join_type_line(supertypes: tuple[str, ...], types: tuple[str, ...], subtypes: tuple[str, ...]) -> str:
    """The type line as printed; the inverse of `split_type_line`."""
    line = " ".join((*supertypes, *types))
    return f"{line} — {' '.join(subtypes)}" if subtypes else line


def _subtypes(text: str) -> tuple[str, ...]:
    for pair in _SUBTYPES_OF_TWO_WORDS:
        text = text.replace(pair, pair.replace(" ", "\0"))
    return tuple(word.replace("\0", " ") for word in text.split())
