"""What a name is asked for by: attributes, and the prompt that stands before a name in their place."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from flash_experts.data.cards import (
    COLOR_WORDS,
    COLORLESS,
    RARITIES,
    SUPERTYPES,
    TYPES,
    Card,
    parse_colors,
    parse_date,
    parse_rarity,
    parse_set_code,
    split_type_line,
)
from flash_experts.data.names import normal_form

MOST_MANA = 10**7  # the dearest card costs a million (Gleemax)
_DASH = re.compile(r"—|–|--|(?:^|\s)-(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes of a card, any of them left open.

    Attributes:
        supertypes: None if not given; ``()`` says that it has none, and reads the same in the prompt.
        types: as ``supertypes``.
        subtypes: as ``supertypes``.
        colors: letters in the order WUBRG; None if not given; ``()`` says colorless.
        mana_value: None if not given.
        rarity: one of `flash_experts.data.cards.RARITIES`; None if not given. Cards of the embedded table have none,
            nor the two below: a model listens to them only if it was trained on a source that tells them.
        set_code: of the printing that a source tells of (`flash_experts.data.cards.Card`), such as ``"ZEN"``.
        released: the year of that printing.
    """

    supertypes: tuple[str, ...] | None = None
    types: tuple[str, ...] | None = None
    subtypes: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None
    mana_value: int | None = None
    rarity: str | None = None
    set_code: str | None = None
    released: int | None = None

    @classmethod
    def of(cls, card: Card) -> Attributes:
        """All that is known of a card."""
        year = None if card.released is None else int(card.released[:4])
        facts = (card.colors, card.mana_value, card.rarity, card.set_code, year)
        if not card.type_line:
            return cls(None, None, None, *facts)
        return cls(card.supertypes, card.types, card.subtypes, *facts)

    @classmethod
    def parse(
        cls,
        type_line: str | None,
        colors: str | None,
        mana_value: int | None,
        rarity: str | None = None,
        set_code: str | None = None,
        released: int | None = None,
    ) -> Attributes:
        """Attributes as a person writes them; None (or an empty text) leaves one open.

        Args:
            type_line: ``"Legendary Creature — Goblin"``, with "-" or "--" for the dash, or ``"goblin
                creature"``.
            colors: ``"R"``, ``"WU"``, ``"red"``, ``"white blue"``, ``"colorless"``, ``"C"``.
            mana_value: 0 or more.
            rarity: ``"rare"``, ``"mythic rare"``, ``"M"``.
            set_code: ``"ZEN"``, in any case.
            released: a year.

        Raises:
            ValueError: a type, color or rarity is unknown (the nearest is offered), or a mana value, set or year cannot
                be. Which sets and years a model knows is another question: `check_known`.
        """
        if mana_value is not None and (isinstance(mana_value, bool) or not 0 <= mana_value <= MOST_MANA):
            raise ValueError(f"the mana value must be from 0 to {MOST_MANA:,}, not {mana_value}")
        supertypes, types, subtypes = parse_type_line(type_line)
        year = None if released is None else int(parse_date(str(released)) or 0)
        told = (parse_rarity(rarity), parse_set_code(set_code), year)
        return cls(supertypes, types, subtypes, parse_colors(colors), mana_value, *told)

    def drop(self, rng: random.Random, probability: float) -> Attributes:
        """Leaves attributes open at random, so that a model learns to serve any subset of them.

        Each is left open with the probability, and all together with half of it besides. The same number of
        draws is taken from ``rng`` whatever is given.

        Args:
            rng: where chance comes from.
            probability: 0 keeps all, 1 drops all.
        """
        *single, everything = (rng.random() for _ in range(6))
        if everything < probability / 2:
            return NONE
        # What only some sources tell goes by the lower digits of the first draws, which say nothing of the upper ones:
        # a seventh draw would change what is dropped of the other cards, and with it every run on the embedded table.
        keep = [draw >= probability for draw in (*single, *(draw * 2**20 % 1 for draw in single[: len(SELDOM_TOLD)]))]
        return Attributes(
            supertypes=self.supertypes if keep[0] else None,
            types=self.types if keep[1] else None,
            subtypes=self.subtypes if keep[2] else None,
            colors=self.colors if keep[3] else None,
            mana_value=self.mana_value if keep[4] else None,
            rarity=self.rarity if keep[5] else None,
            set_code=self.set_code if keep[6] else None,
            released=self.released if keep[7] else None,
        )

    def prompt(self) -> str:
        """Plain English: ``"legendary creature goblin warrior, red, 3, rare, ZEN, 2009:"``; ``":"`` for nothing.

        The text that is learned is begin + prompt + " " + name + end. Types are in lower case and sets in capitals, as
        names never have them: so a tokenizer can have one token for each word of prompts and spell names letter by
        letter.
        """
        parts = [" ".join((*(self.supertypes or ()), *(self.types or ()), *(self.subtypes or ()))).lower()]
        if self.colors is not None:
            parts.append(" ".join(COLOR_WORDS[color] for color in self.colors) or COLORLESS)
        if self.mana_value is not None:
            parts.append(str(self.mana_value))
        if self.rarity is not None:
            parts.append(self.rarity)
        if self.set_code is not None:
            parts.append(self.set_code)
        if self.released is not None:
            parts.append(str(self.released))
        return ", ".join(part for part in parts if part) + ":"


NONE = Attributes()


def prompt_words(cards: Iterable[Card], at_least: int = 3) -> list[str]:
    """The words that prompts of cards are made of, as prompts write them; of numbers, the years of release alone.

    Args:
        cards: whose subtypes, sets and years count.
        at_least: cards that must have a subtype, set or year. A set or year that is a word of some name is left out.
    """
    cards = list(cards)
    counts = Counter(name for card in cards for name in card.subtypes)
    subtypes = sorted(name for name, count in counts.items() if count >= at_least)
    words = " ".join((*SUPERTYPES, *TYPES, *COLOR_WORDS.values(), COLORLESS, *RARITIES, *subtypes)).lower().split()
    told = [(one.set_code, one.released) for one in map(Attributes.of, cards)]
    words_of_names = {word for card in cards for word in re.findall(r"\w+", card.name)}
    for values in zip(*told, strict=True):
        seen = Counter(str(value) for value in values if value is not None)
        words += sorted(word for word, count in seen.items() if count >= at_least and word not in words_of_names)
    return list(dict.fromkeys(words))


Conditions = dict[str, list[Any]]
CONDITIONS = "conditions"  # in a model's configuration
SELDOM_TOLD = {"rarity": "rarities", "set_code": "sets", "released": "years of release"}  # attributes, and their plural


def told_conditions(cards: Iterable[Card]) -> Conditions:
    """What cards tell of the attributes that only some sources have: every value, sorted, of each that is told."""
    attributes = [Attributes.of(card) for card in cards]
    told = {name: sorted({getattr(one, name) for one in attributes} - {None}) for name in SELDOM_TOLD}
    return {name: values for name, values in told.items() if values}


def read_conditions(config: Mapping[str, Any]) -> Conditions:
    """The `told_conditions` in a model's configuration, where training writes them; {} if it has none.

    Raises:
        ValueError: they are no lists of texts and years.
    """
    conditions = config.get(CONDITIONS, {})
    kinds = {name: int if name == "released" else str for name in SELDOM_TOLD}
    if not isinstance(conditions, dict) or not all(
        name in kinds and isinstance(values, list) and all(type(value) is kinds[name] for value in values)
        for name, values in conditions.items()
    ):
        raise ValueError(f"config.json: {CONDITIONS} must hold lists of {', '.join(kinds)}")
    return conditions


def check_known(attributes: Attributes, conditions: Conditions) -> None:
    """Whether a model that learned from these `told_conditions` knows what only some sources tell.

    Raises:
        ValueError: it never read of such a thing, or not of this value (the nearest is offered).
    """
    for name, plural in SELDOM_TOLD.items():
        value, known = getattr(attributes, name), conditions.get(name, [])
        if value is None or value in known:
            continue
        if not known:
            raise ValueError(
                f"this model was not trained with {plural}: leave {value!r} out, or train on a source that tells them "
                "(`flash-experts prepare --source scryfall`)"
            )
        if isinstance(value, int):
            near = [min(known, key=lambda year: abs(year - value))]
        else:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)
        raise ValueError(
            f"{value!r} is none of the {plural} that this model was trained with: the nearest is {near[0]!r}"
        )


def known_part(attributes: Attributes, conditions: Conditions) -> Attributes:
    """The attributes without those that `check_known` refuses: to a model that never read of them they are noise."""
    unknown = [name for name in SELDOM_TOLD if getattr(attributes, name) not in conditions.get(name, [])]
    return replace(attributes, **dict.fromkeys(unknown)) if unknown else attributes


Parts = tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None]


def parse_type_line(text: str | None) -> Parts:
    """Supertypes, types and subtypes of a type line that a person wrote; three times None for nothing.

    Case does not matter. Supertypes and types come out in the order of real cards; subtypes stay as they were
    after a dash, and without one come in the order of real cards too (``"warrior goblin"`` is a Goblin
    Warrior).

    Raises:
        ValueError: a word is no known type; the nearest is offered.
    """
    if text is None or not text.strip():
        return None, None, None
    vocabulary = _type_vocabulary()
    words = _DASH.sub(" ", text).split()
    found = []
    while words:
        length = 2 if normal_form("".join(words[:2])) in vocabulary.pairs else 1
        found.append(_known_type(" ".join(words[:length]), vocabulary))
        del words[:length]
    subtypes = [name for name in found if name not in SUPERTYPES and name not in TYPES]
    if not _DASH.search(text):
        subtypes.sort(key=lambda name: vocabulary.place[name])
    return (
        tuple(name for name in SUPERTYPES if name in found),
        tuple(name for name in TYPES if name in found),
        tuple(dict.fromkeys(subtypes)),
    )


def known_subtypes() -> tuple[str, ...]:
    """All subtypes that `parse_type_line` knows, in the order of the alphabet."""
    return tuple(sorted(set(_type_vocabulary().names.values()) - {*SUPERTYPES, *TYPES}))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Known words of type lines.

    Attributes:
        names: normal form -> as cards write it.
        pairs: normal forms of subtypes of two words.
        place: mean place of each subtype among a card's subtypes, 0 (first) to 1 (last): Goblin before
            Warrior.
    """

    names: dict[str, str]
    pairs: frozenset[str]
    place: dict[str, float]


@cache
def _type_vocabulary() -> _Vocabulary:
    """Of all playable type lines in the embedded table."""
    from flash_experts.data.sources import read_embedded

    places: dict[str, list[float]] = {}
    for row in read_embedded().rows:
        for line in (row.type_line or "").split(" // "):
            _, types, subtypes = split_type_line(line)
            if types and set(types) <= set(TYPES):
                for place, name in enumerate(subtypes):
                    places.setdefault(name, []).append(place / max(1, len(subtypes) - 1))
    # The commoner of two spellings wins: jokes have a "Human?".
    names = {normal_form(name): name for name in sorted(places, key=lambda name: len(places[name]))}
    names |= {normal_form(name): name for name in (*SUPERTYPES, *TYPES)} | {"tribal": "Kindred"}
    pairs = frozenset(normal_form(name) for name in places if " " in name)
    return _Vocabulary(names, pairs, {name: sum(seen) / len(seen) for name, seen in places.items()})


def _known_type(word: str, vocabulary: _Vocabulary) -> str:
    known = vocabulary.names.get(normal_form(word))
    if known is None:
        near = difflib.get_close_matches(normal_form(word), vocabulary.names, n=1)
        others = 'a type line is like "Legendary Creature — Goblin"'
        hint = f"did you mean {vocabulary.names[near[0]]!r}?" if near else others
        raise ValueError(f"unknown type {word!r}: {hint}")
    return known
