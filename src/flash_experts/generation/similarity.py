"""The nearest real card of a name, and names that resemble examples.

The model was never trained on names given other names, so it cannot imitate a style. Instead, attributes that the
examples share go into the prompt, and their sub-words get a logit bias.

Shape suffix: V tokens of the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import load_source
from flash_experts.generation.filters.base import NameFilter, NameVocabulary
from flash_experts.generation.formatting import SMALL_WORDS

_ROWS_AT_ONCE = 64  # with 35,000 cards: 9 MB of similarities
STRENGTH = 2.0  # logit bias of the examples' most common sub-word, in nats
_SHORTEST = 2  # letters: single ones do not characterize a style


@dataclass(frozen=True)
class KnownNames:
    """Names that are already on cards, in printed form."""

    names: tuple[str, ...]

    @cached_property
    def _name_of(self) -> dict[str, str]:
        forms: dict[str, str] = {}
        for name in self.names:
            forms.setdefault(normal_form(name), name)
        forms.pop("", None)  # names without letters or digits
        return forms

    @cached_property
    def normal_forms(self) -> frozenset[str]:
        return frozenset(self._name_of)

    def nearest(self, names: Sequence[str]) -> list[tuple[str | None, float]]:
        """The nearest known name of each, the first of equals, and their similarity; (None, 0.0) if no name is known.

        Similarity is 1 - edit distance / the longer length, of normal forms.
        """
        shown = list(self._name_of.values())
        if not shown:
            return [(None, 0.0)] * len(names)
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist

        known = list(self._name_of)
        found: list[tuple[str | None, float]] = []
        for start in range(0, len(names), _ROWS_AT_ONCE):
            queries = [normal_form(name) for name in names[start : start + _ROWS_AT_ONCE]]
            similarity = cdist(
                queries, known, scorer=Levenshtein.normalized_similarity, workers=torch.get_num_threads()
            )
            best = similarity.argmax(axis=1)
            found += [(shown[place], float(similarity[row, place])) for row, place in enumerate(best)]
        return found


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
