"""Names that resemble examples.

The model was never trained on names given other names, so it cannot imitate a style. Instead, attributes that the
examples share go into the prompt, and their sub-words get a logit bias.

Shape suffix: V tokens of the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import load_source
from flash_experts.generation.filters.base import NameFilter, NameVocabulary
from flash_experts.generation.text_rules import SMALL_WORDS

STRENGTH = 2.0  # logit bias of the examples' most common sub-word, in nats
_SHORTEST = 2  # letters: single ones do not characterize a style


def examples_of(text: str | Sequence[str]) -> list[str]:
    """The names in a list separated by ";" or ",": "Krenko, Mob Boss, Goblin Guide" are two, as Krenko is a card."""
    if not isinstance(text, str):
        found = [shown_form(name) for name in text]
    else:
        found, cards = [], _cards()
        for part in re.split(r"[;\n]", text):
            pieces = [shown_form(piece) for piece in part.split(",")]
            while pieces:
                joined = (size for size in range(len(pieces), 1, -1) if normal_form(" ".join(pieces[:size])) in cards)
                size = next(joined, 1)
                found.append(", ".join(pieces[:size]))
                del pieces[:size]
    found = [name for name in found if normal_form(name)]
    if not found:
        raise ValueError('like has no name in it: give examples such as "Goblin Guide; Lightning Bolt"')
    return found


def shared_attributes(names: Iterable[str]) -> Attributes:
    """Attributes that more than half of the known cards among these names share."""
    cards = [card for name in names if (card := _cards().get(normal_form(name))) is not None]
    most = len(cards) / 2

    def common(values: Iterable[Collection[str]]) -> tuple[str, ...]:
        counts = Counter(value for one in values for value in one)
        return tuple(value for value, count in counts.items() if count > most)

    types, colors = common(card.types for card in cards), common(card.colors or () for card in cards)
    return Attributes(
        supertypes=common(card.supertypes for card in cards) or None,
        types=types or None,
        subtypes=common(card.subtypes for card in cards) or None,
        colors=tuple(color for color in "WUBRG" if color in colors) or None,
    )


def filled_in(given: Attributes, inferred: Attributes) -> Attributes:
    """``given``, with the inferred type line and colors where it has none."""
    has_type = (given.supertypes, given.types, given.subtypes) != (None, None, None)
    typed = given if has_type else inferred
    return replace(
        given,
        supertypes=typed.supertypes,
        types=typed.types,
        subtypes=typed.subtypes,
        colors=inferred.colors if given.colors is None else given.colors,
    )


class Resembles(NameFilter):
    """Adds a bias of ``strength sqrt(count / largest count)`` to the examples' sub-words that a name lacks so far."""

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, examples: Sequence[str], strength: float = STRENGTH
    ) -> None:
        super().__init__(vocabulary, prompt_length)
        counts: Counter[int] = Counter()
        for name in examples:
            counts.update(token for token in set(vocabulary.encode(" " + name)) if self._is_characteristic(token))
        most = max(counts.values(), default=1)
        self.weights = {token: strength * (count / most) ** 0.5 for token, count in counts.items()}

    def rule(self, name: str) -> Hashable | None:
        return None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return torch.zeros(self.vocabulary.size, dtype=torch.bool)

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        bias_V = torch.zeros(self.vocabulary.size, dtype=scores.dtype)
        bias_V[list(self.weights)] = torch.tensor(list(self.weights.values()), dtype=scores.dtype)
        biased = scores + bias_V.to(scores.device)
        for row, name in enumerate(names):
            used = [token for token in self.weights if self.vocabulary.texts[token] in name]
            biased[row, used] = scores[row, used]
        return biased

    def _is_characteristic(self, token: int) -> bool:
        text = self.vocabulary.texts[token].strip()
        return len(text) >= _SHORTEST and text.isalpha() and text.lower() not in SMALL_WORDS


@cache
def real_cards() -> tuple[Card, ...]:
    """The serious cards of the embedded table."""
    return tuple(clean(load_source("embedded").rows).cards)


@cache
def _cards() -> dict[str, Card]:
    return {normal_form(card.name): card for card in real_cards()}
