"""The words of names: flaws within one name, and repetition within a list, measured against real cards of the kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.text_rules import words_of

_FEWEST = 40  # real cards that show how often a word repeats; with fewer, attributes are left out
_ECHO = 4  # letters: words of a name that start with the same four echo each other
_LONE_LETTER = re.compile(r"(?<![^\s])[B-HJ-NP-WYZ](?![^\s,])")
_INNER_CAPITAL = re.compile(r"(?<=[a-z])[A-Z]")


@lru_cache(maxsize=1 << 14)  # each waiting candidate is asked for again at each choice
def content_words(name: str) -> tuple[str, ...]:
    """The distinct words of a name that matter for repetition, singular and without possessive 's."""
    words = (word.removesuffix("s") if len(word) > 3 else word for word in words_of(name))
    return tuple(dict.fromkeys(word for word in words if len(word) > 1 and word not in SMALL_WORDS))


def flaws(name: str) -> int:
    """Faults of wording that almost no real name has: a word that echoes another ("Angelic Angel", "Wurm Wurmguard"),
    a lone letter, a capital inside a word."""
    words = re.split(r"[\s-]+", name)
    stems = [stem for word in words if len(stem := normal_form(word.removesuffix("'s"))[:_ECHO]) == _ECHO]
    return len(stems) - len(set(stems)) + len(_LONE_LETTER.findall(name)) + len(_INNER_CAPITAL.findall(name))


def character_of(name: str) -> str:
    """The character that a name is of: ``krenko`` for "Krenko, Mob Boss"; "" without a comma."""
    before, comma, _ = name.partition(",")
    return normal_form(before) if comma else ""


class WordRepetition:
    """Counts how far a candidate repeats the words of the names chosen so far, beyond what real cards do: a word may be
    in ``max(1, share of real names that have it * names chosen)`` of them."""

    def __init__(self, names: Iterable[str]) -> None:
        of_each = [content_words(name) for name in names]
        counts = Counter(word for words in of_each for word in words)
        self._share = {word: count / len(of_each) for word, count in counts.items()}
        self._chosen: Counter[str] = Counter()
        self._names = 0

    def add(self, name: str) -> None:
        self._chosen.update(content_words(name))
        self._names += 1

    def excess(self, name: str) -> float:
        """Occurrences over what is usual, if this name were chosen: 1 for the second use of a rare word."""
        return sum(
            max(0.0, self._chosen[word] + 1 - max(1.0, self._share.get(word, 0.0) * (self._names + 1)))
            for word in content_words(name)
        )


def cards_of_kind(cards: Iterable[Card], attributes: Attributes) -> list[Card]:
    """The cards with these attributes; attributes are left out, the most particular first, while there are few."""
    cards = list(cards)
    without: tuple[dict[str, None], ...] = (
        {}, {"colors": None}, {"supertypes": None}, {"subtypes": None}, {"types": None},
    )  # fmt: skip
    for each in without:
        attributes = replace(attributes, **each)
        found = [card for card in cards if _has_all(card, attributes)]
        if len(found) >= _FEWEST:
            return found
    return cards


def _has_all(card: Card, attributes: Attributes) -> bool:
    typed = all(
        set(getattr(attributes, field) or ()) <= set(getattr(card, field))
        for field in ("supertypes", "types", "subtypes")
    )
    return typed and attributes.colors in (None, card.colors)
