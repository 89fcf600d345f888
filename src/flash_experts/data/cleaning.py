"""From raw cards to names worth learning: one pure function with a version.

Change the version with any change of what comes out, so that figures of different data are not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from flash_experts.data.cards import TYPES, Card, in_color_order, join_type_line, split_type_line
from flash_experts.data.names import FACE_SEPARATOR, faces_of, is_rebalanced, normal_form, shown_form
from flash_experts.data.sources import UNKNOWN, RawCard

CLEANING_VERSION = 1
FLAGS = ("jokes", "franchises")  # left out unless asked for
# Objects that sources list beside the cards: their names are no names of cards, and do not count as known.
NOT_CARDS = frozenset({"token", "double_faced_token", "emblem", "art_series", "front_card"})

_SYMBOL = re.compile(r"\{([^}]*)\}")
_BLANK = re.compile(r"_{2,}")
# Types that no deck holds, subtypes and layouts of such cards: the reason that is counted.
_TYPES_OUT = {
    "plane": "plane",
    "phenomenon": "phenomenon",
    "scheme": "scheme",
    "vanguard": "vanguard",
    "stickers": "stickers",
    "conspiracy": "conspiracy",
    "hero": "hero",
    "dungeon": "dungeon",
    "token": "token",
    "emblem": "token",
    "card": "token",
}
_SUBTYPES_OUT = {"Attraction": "attraction", "Contraption": "contraption"}
_LAYOUTS_OUT = {
    "host": "host",
    "augment": "augment",
    "planar": "plane",
    "scheme": "scheme",
    "vanguard": "vanguard",
    "token": "token",
    "double_faced_token": "token",
    "emblem": "token",
    "dungeon": "dungeon",
    "art_series": "art_card",
    "front_card": "front_card",
}


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What came out.

    Attributes:
        cards: one for each name, in the source's order.
        dropped: names left out, by reason.
        faces: names that came in; ``len(cards) + sum(dropped.values())``.
    """

    cards: tuple[Card, ...]
    dropped: dict[str, int]
    faces: int


def clean(rows: Iterable[RawCard], include: Collection[str] = ()) -> Cleaned:
    """Names worth learning from raw cards.

    Each face is a name of its own. Cards that no deck holds, rebalanced doubles ("A-"), names with blanks,
    flagged names and names that were there already are dropped and counted. Of two faces with one name the
    one that more is known of stays, at the place of the first. Cleaning what came out changes nothing.

    Args:
        rows: raw cards of any source.
        include: flags whose names stay: ``"jokes"``, ``"franchises"``.

    Raises:
        ValueError: ``include`` has an unknown flag.
    """
    unknown = sorted(set(include) - set(FLAGS))
    if unknown:
        raise ValueError(f"cannot include {unknown[0]!r}: take {' or '.join(FLAGS)}")
    dropped: Counter[str] = Counter()
    rows = tuple(rows)
    face_names = {shown_form(face) for row in rows for face in faces_of(row.name)}
    kept: dict[str, Card] = {}
    faces = 0
    for row in rows:
        for card in _faces(row):
            faces += 1
            rebalanced = is_rebalanced(card.name, face_names)
            reason = "rebalanced" if rebalanced else _reason(row, card, include)
            key = normal_form(card.name)
            if reason is None and key in kept:
                reason = "repeated"
                if _facts(card) > _facts(kept[key]):
                    kept[key] = card
            if reason is None:
                kept[key] = card
            else:
                dropped[reason] += 1
    return Cleaned(tuple(kept.values()), dict(sorted(dropped.items())), faces)


def _faces(row: RawCard) -> Iterator[Card]:
    """A card for each face. Facts that are told of fewer faces belong to the first ones."""
    type_lines = faces_of(row.type_line or "")
    costs = (row.mana_cost or "").split(FACE_SEPARATOR)
    colors = (UNKNOWN if row.colors is None else row.colors).split(FACE_SEPARATOR)
    for place, name in enumerate(faces_of(row.name)):
        type_line = type_lines[place] if place < len(type_lines) else ""
        cost = costs[place].strip() if place < len(costs) else ""
        told = colors[place].strip() if place < len(colors) else UNKNOWN
        supertypes, types, subtypes = split_type_line(type_line)
        # A mana value of 0 is what sources give a land: it has no mana cost.
        told_value = row.mana_value if place == 0 and (row.mana_value or "Land" not in types) else None
        yield Card(
            name=shown_form(name),
            type_line=join_type_line(supertypes, types, subtypes),
            supertypes=supertypes,
            types=types,
            subtypes=subtypes,
            colors=_colors(told, cost, types),
            mana_value=mana_value(cost) if cost else told_value,
            source_id=row.source_id,
            rarity=row.rarity,
            set_code=row.set_code,
            released=row.released,
        )


def _colors(told: str, cost: str, types: tuple[str, ...]) -> tuple[str, ...] | None:
    if told != UNKNOWN:
        return in_color_order(told)
    if cost:
        return colors_of_cost(cost)
    return () if types == ("Land",) else None


def _facts(card: Card) -> int:
    """How much is known of a card."""
    return 4 * bool(card.types) + 2 * (card.mana_value is not None) + (card.colors is not None)


def _reason(row: RawCard, card: Card, include: Collection[str]) -> str | None:
    """Why a face is left out; None if it stays."""
    if _BLANK.search(card.name):
        return "blank"
    if not normal_form(card.name):
        return "no_letters"
    if row.layout in _LAYOUTS_OUT:
        return _LAYOUTS_OUT[row.layout]
    for kind in card.types:
        if kind not in TYPES:
            return _TYPES_OUT.get(kind.lower(), "odd_type")
    for kind in card.subtypes:
        if kind in _SUBTYPES_OUT:
            return _SUBTYPES_OUT[kind]
    if row.out:
        return row.out
    if row.flag in FLAGS and row.flag not in include:
        return row.flag
    return None


def colors_of_cost(cost: str) -> tuple[str, ...]:
    """Colors of a mana cost; a hybrid symbol counts both: ``"{1}{W/U}"`` gives ``("W", "U")``."""
    return in_color_order("".join(_SYMBOL.findall(cost)))


def mana_value(cost: str) -> int:
    """What a mana cost adds up to: ``"{X}{2}{R/G}"`` gives 3.

    X, Y and Z count 0, a hybrid symbol its larger half (``"{2/R}"`` is 2), a half symbol (``"{HW}"``, on
    jokes) one half, and the sum is rounded down.
    """
    return int(sum(map(_symbol_value, _SYMBOL.findall(cost))))


def _symbol_value(symbol: str) -> float:
    if symbol.startswith("H"):
        return 0.5
    if "/" in symbol:
        return max(map(_symbol_value, symbol.split("/")))
    if symbol.isdecimal():
        return int(symbol)
    return 0 if symbol in ("X", "Y", "Z", "") else 1
