"""Names like given examples: what the examples' cards have in common goes into the prompt, and their sub-words are
favored a little.

Measured with models/mtg-base on 16 subtypes, five examples each, 60 names: the mean cosine (character n-grams, tf-idf)
to 120 *other* real names of the subtype is 0.090 for names without examples, 0.123 with the attributes alone, 0.171
with both, and 0.171 for real names of the subtype; the subtype with the nearest centroid is the right one for 6%, 17%,
30% and 53% of them.

The model has learned names from attributes, never from other names, so it cannot imitate a style that it was not
told. What it can do: make names for the kind of card that most of the examples are, and prefer the pieces of words
that the examples are made of.

Letters in the shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch

from flash_experts.data.cards import Card, load_source
from flash_experts.data.cleaning import clean
from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation.filters import NameFilter
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.vocabulary import NameVocabulary

STRENGTH = 2.0  # nats for the examples' commonest sub-word
_SHORTEST = 2  # letters: single ones say nothing of a style


def examples_of(text: str | Sequence[str]) -> list[str]:
    """The names in a list that a person wrote, separated by ";" or ",".

    A comma within a known card's name separates nothing: ``"Krenko, Mob Boss, Goblin Guide"`` are two names.

    Raises:
        ValueError: there is no name in it.
    """
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
    """What more than half of the known cards among these names have in common; nothing if none is known."""
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
    """``given``, with the inferred type line if it has none, and the inferred colors if it has none."""
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
    """Favors the sub-words of examples, as the tokenizer cuts them; nothing is forbidden.

    A sub-word that is in most examples gets the full strength, one that is in a single one the root of its share.
    What a name has already is favored no more, or it would say it again.
    """

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, examples: Sequence[str], strength: float = STRENGTH
    ) -> None:
        """Cuts the examples into tokens.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            examples: names.
            strength: nats that the commonest sub-word is favored by.
        """
        super().__init__(vocabulary, prompt_length)
        counts: Counter[int] = Counter()
        for name in examples:
            counts.update(token for token in set(vocabulary.encode(" " + name)) if self._says_much(token))
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
            said = [token for token in self.weights if self.vocabulary.texts[token] in name]
            biased[row, said] = scores[row, said]
        return biased

    def _says_much(self, token: int) -> bool:
        text = self.vocabulary.texts[token].strip()
        return len(text) >= _SHORTEST and text.isalpha() and text.lower() not in SMALL_WORDS


@cache
def _cards() -> dict[str, Card]:
    """Normal form -> the card of the embedded table."""
    return {normal_form(card.name): card for card in clean(load_source("embedded").rows).cards}
