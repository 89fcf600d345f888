"""The reranker: more names are drawn than are shown, and the best are chosen.

    score(name) = (log p(name | card) + START + match_weight * match(name)) / (characters + 1)
                  - fault_weight * (flaws(name) + borrowed(name) + repetition(name, list so far))

in nats per character, the EOS token counted as one. The match is the attribute classifier's. Flaws are faults of
wording that real names do not have, borrowed is 1 for the name of a real legend's character, and repetition keeps the
words of a list as varied as those of real cards (maximal marginal relevance; Carbonell and Goldstein 1998).
docs/experiments.md has what each part is worth, and what was tried and left out.

Shape suffixes: N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np

from flash_experts.data.prompts import Attributes
from flash_experts.generation.reranking import name_classifier
from flash_experts.generation.reranking.wording import WordRepetition, cards_of_kind, character_of, flaws

# The first characters of a name cost a model about 3 nats, whatever follows: without this, long names would win.
START_NATS = 3.0
_MOST_WAITING = 256  # candidates kept for later choices


class Candidate(Protocol):
    """A name to choose from."""

    @property
    def text(self) -> str: ...
    @property
    def log_prob(self) -> float: ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the score, chosen on validation cards: ``match`` of the attribute classifier's log-odds, ``fault`` in
    nats per character for a flaw, a borrowed name or a repeated word."""

    match: float = 0.3
    fault: float = 0.25


DEFAULT_WEIGHTS = Weights()


class Reranker(Generic[C]):
    """Chooses names one after another from the candidates that were added so far. For one request."""

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
        """The scores (N,) of candidates, apart from the list so far."""
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
