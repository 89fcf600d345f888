"""A card as this project knows it: its name and the attributes that a name can be asked for by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_experts.data.names import faces_of, is_rebalanced, shown_form

if TYPE_CHECKING:
    from flash_experts.data.sources import CardSource

COLORS = "WUBRG"  # the order in which Magic writes them
COLOR_WORDS = {"W": "white", "U": "blue", "B": "black", "R": "red", "G": "green"}
COLORLESS = "colorless"
RARITIES = ("common", "uncommon", "rare", "mythic")
_RARITY_WORDS = {"c": "common", "u": "uncommon", "r": "rare", "m": "mythic", "mythic rare": "mythic"}
SUPERTYPES = ("Basic", "Legendary", "World", "Snow")
# In the order in which a type line has them: "Kindred Instant", "Artifact Land", "Enchantment Artifact Creature".
TYPES = (
    *("Kindred", "Enchantment", "Artifact", "Land", "Planeswalker"),
    *("Battle", "Creature", "Instant", "Sorcery"),
)
_OLD_TYPES = {"Tribal": "Kindred"}  # renamed by Wizards of the Coast in 2023
_DASH = re.compile(r"\s*(?:—|–|--)\s*|\s+-\s+")
_SUBTYPES_OF_TWO_WORDS = ("Time Lord",)
_SET_CODE = re.compile(r"(?=.*[A-Z])[A-Z0-9_]{2,10}", re.ASCII)  # with a letter: no mana value, no year
_DATE = re.compile(r"(?:19|20)\d\d(?:-\d\d(?:-\d\d)?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Card:
    """One name and what is known of the card (of the face, where a card has two).

    Attributes:
        name: as it is shown.
        type_line: e.g. ``"Legendary Creature — Goblin Warrior"``; ``""`` if unknown.
        supertypes: e.g. ``("Legendary",)``.
        types: e.g. ``("Creature",)``; ``()`` if unknown.
        subtypes: e.g. ``("Goblin", "Warrior")``.
        colors: letters in the order WUBRG; ``()`` is colorless, None unknown.
        mana_value: what its mana cost adds up to, X counting 0; None without a mana cost, or if unknown.
        source_id: where it comes from: ``"embedded:123"`` (row), ``"mine.csv:7"`` (line), or the source's id.
        rarity: one of `RARITIES`; None if the source does not tell it (the embedded table has none).
        set_code: of a printing, in capitals, e.g. ``"ZEN"``; None if unknown. A card has many printings: MTGJSON tells
            of the first, Scryfall of the one that it takes for the best known.
        released: the date of that printing, ``"2009-10-02"``, or its year alone; None if unknown.
    """

    name: str
    type_line: str
    supertypes: tuple[str, ...]
    types: tuple[str, ...]
    subtypes: tuple[str, ...]
    colors: tuple[str, ...] | None
    mana_value: int | None
    source_id: str
    rarity: str | None = None
    set_code: str | None = None
    released: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of a prepared line. What only some sources tell is there where it is told."""
        told = {name: value for name in _TOLD_BY_SOME if (value := getattr(self, name)) is not None}
        return {
            "name": self.name,
            "type_line": self.type_line,
            "types": list(self.types),
            "subtypes": list(self.subtypes),
            "supertypes": list(self.supertypes),
            "colors": None if self.colors is None else list(self.colors),
            "mana_value": self.mana_value,
            "source_id": self.source_id,
            **told,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> Card:
        """The card of a prepared line.

        Args:
            fields: what `to_json` gave.
            where: ``file:line``, for the error.

        Raises:
            ValueError: a field is missing or has a wrong type.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a card must be a JSON object, not {type(fields).__name__}")
        missing = [name for name in cls.__slots__ if name not in fields and name not in _TOLD_BY_SOME]
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
            **{name: _told(fields.get(name), name, where) for name in _TOLD_BY_SOME},
        )


_TOLD_BY_SOME = ("rarity", "set_code", "released")


def _told(value: Any, field: str, where: str) -> str | None:
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
    """Distinct color letters in the order WUBRG; other letters are left out."""
    return tuple(color for color in COLORS if color in letters)


def parse_colors(text: str | None) -> tuple[str, ...] | None:
    """Color letters in the order WUBRG of what a person wrote; ``()`` for colorless, None for nothing.

    ``"R"``, ``"WU"``, ``"red"``, ``"white and blue"``, ``"{W}{U}"``, ``"colorless"`` and ``"C"`` are
    understood.

    Raises:
        ValueError: a word is no color; the nearest is offered.
    """
    letter_of = {word: letter for letter, word in COLOR_WORDS.items()}
    words = [word for word in re.split(r"[\s,/{}&+]+|\band\b", (text or "").casefold()) if word]
    if not words:
        return None
    letters: set[str] = set()
    colorless = False
    for word in words:
        if word in letter_of:
            letters.add(letter_of[word])
        elif word in ("c", COLORLESS, "colourless"):
            colorless = True
        elif set(word.upper()) <= {*COLORS, "C"}:
            letters.update(set(word.upper()) - {"C"})
            colorless |= "c" in word
        else:
            near = difflib.get_close_matches(word, [*letter_of, COLORLESS], n=1, cutoff=0.5)
            others = f"use {', '.join(letter_of)}, {COLORLESS}, or letters of {COLORS} (C for {COLORLESS})"
            raise ValueError(f"unknown color {word!r}: " + (f"did you mean {near[0]!r}?" if near else others))
    found = in_color_order(letters)
    if colorless and found:
        others = " and ".join(COLOR_WORDS[letter] for letter in found)
        raise ValueError(f"{COLORLESS} cannot be combined with {others}: leave out one of them")
    return found


def parse_rarity(text: str | None) -> str | None:
    """One of `RARITIES` of what a person wrote: ``"Rare"``, ``"mythic rare"``, ``"M"``; None for nothing.

    Raises:
        ValueError: there is no such rarity; the nearest is offered.
    """
    word = " ".join((text or "").casefold().split())
    if not word:
        return None
    rarity = _RARITY_WORDS.get(word, word)
    if rarity not in RARITIES:
        near = difflib.get_close_matches(word, RARITIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"take {', '.join(RARITIES)}"
        raise ValueError(f"unknown rarity {word!r}: {hint}")
    return rarity


def parse_set_code(text: str | None) -> str | None:
    """A set's code in capitals, ``"ZEN"``, of what a person or a source wrote; None for nothing.

    Raises:
        ValueError: it is no code.
    """
    code = (text or "").strip().upper()
    if code and not _SET_CODE.fullmatch(code):
        raise ValueError(f"a set is told by its code, 2 to 10 letters and digits such as ZEN, not {code[:50]!r}")
    return code or None


def parse_date(text: str | None) -> str | None:
    """A date of release, ``"2009-10-02"``, or a year, as it is written; None for nothing.

    Raises:
        ValueError: it is neither.
    """
    date = (text or "").strip()
    if date and not _DATE.fullmatch(date):
        raise ValueError(f"a release is told by its date or year, such as 2009-10-02 or 2009, not {date[:50]!r}")
    return date or None


def split_type_line(type_line: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Supertypes, types and subtypes of one face's type line. Nothing is checked against the known types.

    ``"Legendary Creature — Goblin Warrior"`` gives ``("Legendary",), ("Creature",), ("Goblin", "Warrior")``.
    """
    line, *rest = _DASH.split(type_line, maxsplit=1)
    words = [_OLD_TYPES.get(word, word) for word in line.split()]
    supertypes = tuple(word for word in words if word in SUPERTYPES)
    return supertypes, tuple(word for word in words if word not in SUPERTYPES), _subtypes("".join(rest))


def join_type_line(supertypes: tuple[str, ...], types: tuple[str, ...], subtypes: tuple[str, ...]) -> str:
    """The type line as cards print it; the inverse of `split_type_line`."""
    line = " ".join((*supertypes, *types))
    return f"{line} — {' '.join(subtypes)}" if subtypes else line


def _subtypes(text: str) -> tuple[str, ...]:
    for pair in _SUBTYPES_OF_TWO_WORDS:
        text = text.replace(pair, pair.replace(" ", "\0"))
    return tuple(word.replace("\0", " ") for word in text.split())


def load_source(source: str | Path) -> CardSource:
    """Raw cards: ``"embedded"``, one of `flash_experts.data.sources.LIVE`, or a csv, json, jsonl or txt file.

    Raises:
        ValueError: there is no such source (the nearest is named), a file is malformed (file and line), or a live
            source can be had neither from the network nor from the cache.
    """
    from flash_experts.data.sources import read_source

    return read_source(source)


@cache
def _embedded_names() -> tuple[str, ...]:
    from flash_experts.data.sources import read_embedded

    return names_on(row.name for row in read_embedded().rows)


def names_on(row_names: Iterable[str]) -> tuple[str, ...]:
    """Every distinct face name among names of cards, in order.

    Rebalanced doubles ("A-" before a name that is there too) are not names of their own.
    """
    faces = dict.fromkeys(shown_form(face) for name in row_names for face in faces_of(name))
    return tuple(face for face in faces if face and not is_rebalanced(face, faces))


def known_names() -> list[str]:
    """Every name that is already a card in the embedded table, jokes and franchises and all."""
    return list(_embedded_names())
