"""What a name is asked for by: attributes, and the prompt that stands before a name in their place."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from flash_experts.data.cards import (
    COLOR_WORDS,
    COLORLESS,
    RARITIES,
    SUPERTYPES,
    TYPES,
    Card,
    parse_colors,
    parse_rarity,
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
            so a model listens to it only if it was trained on a source that tells it.
    """

    supertypes: tuple[str, ...] | None = None
    types: tuple[str, ...] | None = None
    subtypes: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None
    mana_value: int | None = None
    rarity: str | None = None

    @classmethod
    def of(cls, card: Card) -> Attributes:
        """All that is known of a card."""
        if not card.type_line:
            return cls(colors=card.colors, mana_value=card.mana_value, rarity=card.rarity)
        return cls(card.supertypes, card.types, card.subtypes, card.colors, card.mana_value, card.rarity)

    @classmethod
    def parse(
        cls, type_line: str | None, colors: str | None, mana_value: int | None, rarity: str | None = None
    ) -> Attributes:
        """Attributes as a person writes them; None (or an empty text) leaves one open.

        Args:
            type_line: ``"Legendary Creature — Goblin"``, with "-" or "--" for the dash, or ``"goblin
                creature"``.
            colors: ``"R"``, ``"WU"``, ``"red"``, ``"white blue"``, ``"colorless"``, ``"C"``.
            mana_value: 0 or more.
            rarity: ``"rare"``, ``"mythic rare"``, ``"M"``.

        Raises:
            ValueError: a type, color or rarity is unknown (the nearest is offered), or the mana value cannot be.
        """
        if mana_value is not None and (isinstance(mana_value, bool) or not 0 <= mana_value <= MOST_MANA):
            raise ValueError(f"the mana value must be from 0 to {MOST_MANA:,}, not {mana_value}")
        supertypes, types, subtypes = parse_type_line(type_line)
        return cls(supertypes, types, subtypes, parse_colors(colors), mana_value, parse_rarity(rarity))

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
        # The rarity goes by the lower digits of the first draw, which say nothing of the upper ones: a seventh draw
        # would change what is dropped of cards without a rarity, and with it every run on the embedded table.
        keep = [draw >= probability for draw in (*single, single[0] * 2**20 % 1)]
        return Attributes(
            supertypes=self.supertypes if keep[0] else None,
            types=self.types if keep[1] else None,
            subtypes=self.subtypes if keep[2] else None,
            colors=self.colors if keep[3] else None,
            mana_value=self.mana_value if keep[4] else None,
            rarity=self.rarity if keep[5] else None,
        )

    def prompt(self) -> str:
        """Plain English: ``"legendary creature goblin warrior, red, 3, rare:"``; ``":"`` for nothing.

        The text that is learned is begin + prompt + " " + name + end. Types are in lower case, which names never have
        them in: so a tokenizer can have one token for each word of prompts and spell names letter by letter.
        """
        parts = [" ".join((*(self.supertypes or ()), *(self.types or ()), *(self.subtypes or ()))).lower()]
        if self.colors is not None:
            parts.append(" ".join(COLOR_WORDS[color] for color in self.colors) or COLORLESS)
        if self.mana_value is not None:
            parts.append(str(self.mana_value))
        if self.rarity is not None:
            parts.append(self.rarity)
        return ", ".join(part for part in parts if part) + ":"


NONE = Attributes()


def prompt_words(cards: Iterable[Card], at_least: int = 3) -> list[str]:
    """The words that prompts of cards are made of, as prompts write them, numbers left out.

    Args:
        cards: whose subtypes count.
        at_least: cards that must have a subtype.
    """
    counts = Counter(name for card in cards for name in card.subtypes)
    subtypes = sorted(name for name, count in counts.items() if count >= at_least)
    words = " ".join((*SUPERTYPES, *TYPES, *COLOR_WORDS.values(), COLORLESS, *RARITIES, *subtypes)).lower().split()
    return list(dict.fromkeys(words))


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
