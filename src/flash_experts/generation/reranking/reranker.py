"""The reranker: more names are drawn than are shown, and the best are chosen, also by their words.

    score(name) = (log p(name | card) + START + match_weight * match(name)) / (characters + 1)
                  - fault_weight * (flaws(name) + borrowed(name) + repetition(name, list so far))

in nats per character, the EOS token counted as one. The match is the attribute classifier's, borrowed is 1 for the name
of a real legend's character, and repetition keeps the words of a list as varied as those of real cards (maximal
marginal relevance; Carbonell and Goldstein 1998). docs/experiments.md has what each part is worth.

Shape suffixes: N candidates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.reranking import name_classifier
from flash_experts.generation.text_rules import words_of

START_NATS = 3.0
_MOST_WAITING = 256  # candidates kept for later choices
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
    """Counts faults of wording that almost no real name has: echoes ("Angelic Angel"), lone letters, inner capitals."""
    words = re.split(r"[\s-]+", name)
    stems = [stem for word in words if len(stem := normal_form(word.removesuffix("'s"))[:_ECHO]) == _ECHO]
    return len(stems) - len(set(stems)) + len(_LONE_LETTER.findall(name)) + len(_INNER_CAPITAL.findall(name))


def character_of(name: str) -> str:
    """The character that a name is of: ``krenko`` for "Krenko, Mob Boss"; "" without a comma."""
    before, comma, _ = name.partition(",")
    return normal_form(before) if comma else ""


class WordRepetition:
    """How far a candidate repeats the words of the names chosen so far, beyond what real cards do.

    A word may be in ``max(1, share of real names that have it * names chosen)`` of them.
    """

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


# The first characters of a name cost a model about 3 nats, whatever follows: without this, long names would win.


class Candidate(Protocol):
    """A name to choose from."""

    @property
    def text(self) -> str: ...
    @property
    def log_prob(self) -> float: ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the score, chosen on validation cards; ``fault`` is in nats per character."""

    match: float = 0.3
    fault: float = 0.25


DEFAULT_WEIGHTS = Weights()


class Reranker(Generic[C]):
    """Chooses names one after another from the candidates added so far. For one request."""

    def __init__(
        self,
        attributes: Attributes,
        weights: Weights = DEFAULT_WEIGHTS,
        classifier: name_classifier.AttributeClassifier | None = None,
    ) -> None:
        """``classifier`` is of the cards that names are compared with (default: `real_card_classifier`)."""
        self._attributes, self._weights, self._given = attributes, weights, classifier
        self._waiting: list[C] = []
        self._score_N: name_classifier.FloatArray = np.empty(0)

    def add(self, candidates: Sequence[C]) -> None:
        self._waiting += candidates
        self._score_N = np.append(self._score_N, self.scores(candidates))
        if len(self._waiting) > _MOST_WAITING:
            kept = np.sort(np.argsort(-self._score_N, kind="stable")[:_MOST_WAITING])
            self._waiting, self._score_N = [self._waiting[index] for index in kept], self._score_N[kept]

    def choose(self) -> C | None:
        """Takes the best waiting candidate; None if none waits."""
        if not self._waiting:
            return None
        repetition_N = np.array([self._repetition.excess(one.text) for one in self._waiting])
        best = int(np.argmax(self._score_N - self._weights.fault * repetition_N))
        self._score_N = np.delete(self._score_N, best)
        chosen = self._waiting.pop(best)
        self._repetition.add(chosen.text)
        return chosen

    def scores(self, candidates: Sequence[C]) -> name_classifier.FloatArray:
        """The scores (N,) of candidates, apart from repetition."""
        if not candidates:
            return np.empty(0)
        texts = [one.text for one in candidates]
        nats_N = np.array([one.log_prob for one in candidates]) + START_NATS
        if self._weights.match and name_classifier.has_questions(self._attributes):
            nats_N += self._weights.match * self._match(texts)
        faults_N = np.array([flaws(text) + (character_of(text) in known_characters()) for text in texts])
        return nats_N / np.array([len(text) + 1 for text in texts]) - self._weights.fault * faults_N

    @cached_property
    def _match(self) -> name_classifier.Scorer:
        return self._classifier.scorer(self._attributes)

    @cached_property
    def _classifier(self) -> name_classifier.AttributeClassifier:
        return self._given or name_classifier.real_card_classifier()

    @cached_property
    def _repetition(self) -> WordRepetition:
        return WordRepetition([card.name for card in cards_of_kind(self._classifier.cards, self._attributes)])


@cache
def known_characters() -> frozenset[str]:
    """The characters of real legends, as `character_of` writes them."""
    return frozenset(character_of(card.name) for card in name_classifier.real_card_classifier().cards) - {""}
