"""Data cleaning: a pure function from raw cards to the names of the dataset.

Increase `CLEANING_VERSION` with any change of the output, so that metrics of different data are not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from flash_experts.data.cards import (
    TYPES,
    UNKNOWN,
    Card,
    RawCard,
    Unread,
    in_color_order,
    join_type_line,
    split_type_line,
)
from flash_experts.data.names import FACE_SEPARATOR, faces_of, is_rebalanced, normal_form, shown_form

CLEANING_VERSION = 2
FLAGS = ("jokes", "franchises")  # left out unless asked for
# Layouts of objects that are not cards: their names do not count as known.
NOT_CARDS = frozenset({"token", "double_faced_token", "emblem", "art_series", "front_card"})
_BLANK = re.compile(r"_{2,}")
# Types, subtypes and layouts of cards that cannot be in a deck, with the reason that is counted.
_EXCLUDED_TYPES = {
    **{
        kind: kind
        for kind in ("plane", "phenomenon", "scheme", "vanguard", "stickers", "conspiracy", "hero", "dungeon")
    },
    **dict.fromkeys(("token", "emblem", "card"), "token"),
}
_EXCLUDED_SUBTYPES = {"Attraction": "attraction", "Contraption": "contraption"}
_EXCLUDED_LAYOUTS = {
    **{layout: layout for layout in ("host", "augment", "scheme", "vanguard", "dungeon", "front_card")},
    **dict.fromkeys(("token", "double_faced_token", "emblem"), "token"),
    **{"planar": "plane", "art_series": "art_card"},
}


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The cleaned cards, one for each name, and how many faces were dropped, by reason."""

    cards: tuple[Card, ...]
    dropped: dict[str, int]
    faces: int
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)  # mana costs, as `Unread.counts`


def clean(rows: Iterable[RawCard], include: Collection[str] = ()) -> Cleaned:
    """Turns raw cards into the names of the dataset; each face is a name of its own.

    Cards that cannot be in a deck, rebalanced duplicates ("A-"), names with blanks, flagged names (but for the flags
    ``include``; a ValueError for an unknown one) and repeated names are dropped and counted. Of two faces with the same
    name the one with a type stays, else that with a mana value, else that with colors, at the position of the first.
    """
    unknown = sorted(set(include) - set(FLAGS))
    if unknown:
        raise ValueError(f"cannot include {unknown[0]!r}: use {' or '.join(FLAGS)}")
    dropped: Counter[str] = Counter()
    rows = tuple(rows)
    face_names = {shown_form(face) for row in rows for face in faces_of(row.name)}
    kept: dict[str, Card] = {}
    unread = Unread()
    faces = 0
    for row in rows:
        for card in face_cards(row, unread):
            faces += 1
            rebalanced = is_rebalanced(card.name, face_names)
            reason = "rebalanced" if rebalanced else _reason(row, card, include)
            key = normal_form(card.name)
            if reason is None and key in kept:
                reason = "repeated"
                if _completeness(card) > _completeness(kept[key]):
                    kept[key] = card
            if reason is None:
                kept[key] = card
            else:
                dropped[reason] += 1
    return Cleaned(tuple(kept.values()), dict(sorted(dropped.items())), faces, unread.counts)


def face_cards(row: RawCard, unread: Unread) -> Iterator[Card]:
    """One card per face. Values of fewer faces than the name has belong to the first faces."""
    type_lines = faces_of(row.type_line or "")
    costs = (row.mana_cost or "").split(FACE_SEPARATOR)
    colors = (UNKNOWN if row.colors is None else row.colors).split(FACE_SEPARATOR)
    for place, name in enumerate(faces_of(row.name)):
        type_line = type_lines[place] if place < len(type_lines) else ""
        cost = costs[place].strip() if place < len(costs) else ""
        given = colors[place].strip() if place < len(colors) else UNKNOWN
        supertypes, types, subtypes = split_type_line(type_line)
        symbols = read_cost(cost)
        if symbols is None:
            unread.add("mana_cost", row.source_id, cost)
        # Sources give lands, which have no mana cost, a mana value of 0.
        given_value = row.mana_value if place == 0 and (row.mana_value or "Land" not in types) else None
        # "2WU" can be three symbols or two: without braces the source's mana value takes precedence.
        from_cost = bool(symbols) and (given_value is None or cost.startswith("{"))
        yield Card(
            name=shown_form(name),
            type_line=join_type_line(supertypes, types, subtypes),
            supertypes=supertypes,
            types=types,
            subtypes=subtypes,
            colors=_colors(given, symbols, types),
            mana_value=mana_value(cost) if from_cost else given_value,
            source_id=row.source_id,
            rarity=row.rarity,
            set_code=row.set_code,
            released=row.released,
        )


@lru_cache(8192)
def _colors(given: str, symbols: tuple[str, ...] | None, types: tuple[str, ...]) -> tuple[str, ...] | None:
    if given != UNKNOWN:
        return in_color_order(given)
    if symbols:
        return in_color_order("".join(symbols))
    return () if "Land" in types and "Creature" not in types else None


def _completeness(card: Card) -> int:
    return 4 * bool(card.types) + 2 * (card.mana_value is not None) + (card.colors is not None)


def _reason(row: RawCard, card: Card, include: Collection[str]) -> str | None:
    if _BLANK.search(card.name):
        return "blank"
    if not normal_form(card.name):
        return "no_letters"
    if row.layout in _EXCLUDED_LAYOUTS:
        return _EXCLUDED_LAYOUTS[row.layout]
    for kind in card.types:
        if kind not in TYPES:
            return _EXCLUDED_TYPES.get(kind.lower(), "odd_type")
    for kind in card.subtypes:
        if kind in _EXCLUDED_SUBTYPES:
            return _EXCLUDED_SUBTYPES[kind]
    if row.excluded:
        return row.excluded
    return row.flag if row.flag in FLAGS and row.flag not in include else None


_PART = "[WUBRGCSH]"
_HYBRID = rf"(?:[0-9]{{1,2}}|{_PART})(?:/(?:[0-9]{{1,2}}|[WUBRGCPH]))+"
_ONE = re.compile(rf"[0-9]{{1,7}}|[WUBRGCSXYZDL]|H[WUBRG]|{_HYBRID}")  # {D} and {L} are on jokes
_SHORT_HYBRID = re.compile(r"(2|[WUBRG])([WUBRG])(P?)|([WUBRG])([2P])")  # {2W}, {WU}, {WUP}, Forge's W2, WP
_BRACKETED = re.compile(r"\{([^{}]*)\}|\(([^()]*)\)|\[([^\[\]]*)\]")
_BARE = re.compile(rf"{_HYBRID}|[0-9]+|[WUBRG]P|H[WUBRG]|[WUBRGCSXYZ]")
_LONGEST_COST = 100  # characters; the longest real one has 42
_NEGATIVE = re.compile(r"-([0-9]{1,2})")  # what Excel makes of (3)
_DECIMAL = re.compile(r"([0-9]{1,7})\.0")  # what pandas makes of 3


@lru_cache(4096)  # 35,000 cards have 900 different costs
def read_cost(cost: str) -> tuple[str, ...] | None:
    """Parses a mana cost into symbols in capitals; ``()`` for an empty one, None if it cannot be read.

    ``"{4}{W}"``, ``"4W"``, ``"(4)(W)"`` and ``"4 W"`` give ``("4", "W")``; ``"2/W"`` and ``"wp"`` are one symbol. Two
    adjacent colors are a hybrid symbol in brackets, and as one of several words (Forge's ``"1 GW GW"``), else
    (``"4WU"``) two symbols.
    """
    text = cost.strip().upper().replace("|", "/")
    if len(text) > _LONGEST_COST:
        return None
    if number := _NEGATIVE.fullmatch(text) or _DECIMAL.fullmatch(text):
        return (number[1],)
    apart = _BRACKETED.sub(_set_apart, text)
    words = [word for word in re.split(r"[\s,+]+", apart) if word]
    symbols: list[str] = []
    for marked in words:
        word = marked.removeprefix("\1")
        may_be_short = word != marked or (len(words) > 1 and apart == text)
        found = [word] if _ONE.fullmatch(word) else _short_hybrid(word) if may_be_short else None
        found = found or _bare(word)
        if found is None:
            return None
        symbols += found
    return tuple(symbols)


def _set_apart(match: re.Match[str]) -> str:
    """A bracketed symbol as a word with a mark in front; an empty one stays unreadable."""
    return f" \1{''.join(next(filter(None, match.groups()), '?').split())} "


def _short_hybrid(word: str) -> list[str] | None:
    match = _SHORT_HYBRID.fullmatch(word)
    parts = [] if match is None else [part for part in match.groups() if part]
    return ["/".join(parts)] if parts and len(set(parts)) == len(parts) else None


def _bare(word: str) -> list[str] | None:
    """Symbols without brackets, such as ``"10WW"``."""
    found: list[str] = _BARE.findall(word)
    if "".join(found) != word or any(len(symbol) > 7 for symbol in found):
        return None
    return [f"{symbol[0]}/P" if symbol[0] != "H" and symbol[1:] == "P" else symbol for symbol in found]


def colors_of_cost(cost: str) -> tuple[str, ...] | None:
    """Colors of a mana cost, None if it cannot be read; a hybrid symbol has two: ``"{W/U}"`` gives ``("W", "U")``."""
    symbols = read_cost(cost)
    return None if symbols is None else in_color_order("".join(symbols))


@lru_cache(4096)
def mana_value(cost: str) -> int | None:
    """Total of a mana cost, rounded down; None if it cannot be read.

    X, Y and Z count 0, a hybrid symbol its larger half, a half symbol (``"{HW}"``, on jokes) one half.
    """
    symbols = read_cost(cost)
    return None if symbols is None else int(sum(map(_symbol_value, symbols)))


def _symbol_value(symbol: str) -> float:
    if "/" in symbol:
        return max(map(_symbol_value, symbol.split("/")))
    if symbol.startswith("H"):
        return 0.5
    if symbol.isdecimal():
        return int(symbol)
    return 0 if symbol in ("X", "Y", "Z") else 1
