"""An attribute classifier: how well a name matches the card that it is for, learned from the names of real cards.

For each given attribute (type, supertype, subtype, colors), naive Bayes on character n-grams compares the names of
cards with it and without it; the match score is the sum of ``log p(name | with) - log p(name | without)``.

Shape suffixes: N names, G character n-grams in them, U distinct n-grams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import load_source

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Scorer = Callable[[Sequence[str]], FloatArray]  # N names to their match scores (N,), in nats

_ORDERS = range(2, 6)  # characters of an n-gram
_PER_CHARACTER = sum(_ORDERS)  # n-grams that contain a given character: together they count as one
_PRIOR = 40_000  # n-grams of all names, added to those of either group of cards; chosen on the validation names
_CODE_BITS = 9  # bits of a character; five characters fit into 63 bits


class AttributeClassifier:
    """Scores how well names match attributes."""

    def __init__(self, cards: Iterable[Card]) -> None:
        self.cards = tuple(cards)
        ngrams_G, self._name_G = character_ngrams([card.name for card in self.cards])
        self._ngrams_U, self._index_G = np.unique(ngrams_G, return_inverse=True)
        seen_U = np.bincount(self._index_G, minlength=len(self._ngrams_U))
        self._usual_U = seen_U / max(1, seen_U.sum())

    def scorer(self, attributes: Attributes) -> Scorer:
        """The match score for these attributes; zeros where no card has any of them."""
        odds_U = np.zeros(len(self._ngrams_U) + 1)
        for has in _questions(attributes):
            mine_N = np.array([has(card) for card in self.cards], dtype=bool)
            if mine_N.any():
                odds_U += self._log_odds(mine_N)

        def score(names: Sequence[str]) -> FloatArray:
            ngrams_G, name_G = character_ngrams(names)
            odds_G = odds_U[_places(self._ngrams_U, ngrams_G)]
            return np.bincount(name_G, odds_G, minlength=len(names)).astype(np.float64, copy=False)

        return score

    def _log_odds(self, mine_N: np.ndarray) -> FloatArray:
        """(U + 1,) log odds of each n-gram in the chosen names against the others; the last is for unseen ones."""
        logs = []
        for some_N in (mine_N, ~mine_N):
            seen_U = np.bincount(self._index_G[some_N[self._name_G]], minlength=len(self._ngrams_U))
            shares_U = np.append(seen_U / self._usual_U + _PRIOR, _PRIOR)
            logs.append(np.log(shares_U) - np.log(seen_U.sum() + _PRIOR))
        return (logs[0] - logs[1]) / _PER_CHARACTER


@cache
def real_card_classifier() -> AttributeClassifier:
    """The classifier of all serious cards in the embedded table, made once."""
    return AttributeClassifier(clean(load_source("embedded").rows).cards)


def has_questions(attributes: Attributes) -> bool:
    """Whether there is an attribute to match."""
    return bool(_questions(attributes))


def _questions(attributes: Attributes) -> list[Callable[[Card], bool]]:
    questions: list[Callable[[Card], bool]] = []
    for field in ("supertypes", "types", "subtypes"):
        questions += [partial(_has, field, one) for one in getattr(attributes, field) or ()]
    if attributes.supertypes == ():
        questions.append(lambda card: not card.supertypes)
    if attributes.colors is not None:
        questions.append(lambda card: card.colors == attributes.colors)
    return questions


def _has(field: str, one: str, card: Card) -> bool:
    return one in getattr(card, field)


def character_ngrams(names: Sequence[str]) -> tuple[IntArray, IntArray]:
    """(G,) a number for each character n-gram (the ends of a name count as characters), and (G,) its name."""
    texts = [f"\n{name.lower()}\n" for name in names]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
    codes = np.minimum(codes, (1 << _CODE_BITS) - 1)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    ngrams, owners = [], []
    for order in _ORDERS:
        last = owner[order - 1 :]
        starts = np.flatnonzero(owner[: len(last)] == last)
        ngram = np.zeros(len(starts), dtype=np.int64)
        for offset in range(order):
            ngram = ngram << _CODE_BITS | codes[starts + offset]
        ngrams.append(ngram)
        owners.append(owner[starts])
    return np.concatenate(ngrams), np.concatenate(owners)


def _places(known_U: IntArray, ngrams_G: IntArray) -> IntArray:
    """(G,) the place of each n-gram among the known ones, which ascend; U for unknown ones."""
    index_G = np.searchsorted(known_U, ngrams_G)
    index_G[index_G == len(known_U)] = 0
    index_G[known_U[index_G] != ngrams_G] = len(known_U)
    return index_G
