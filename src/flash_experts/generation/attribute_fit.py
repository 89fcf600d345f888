"""How well a name fits the card it was asked for, as the names of real cards tell.

`flash_experts.generation.type_fit` asks which type a name fits; here the card is given, and the question is which of
several names fits it best. For each thing told of the card, a type, "Legendary", a subtype, its colors, naive Bayes
compares the runs of characters in the names of the cards that have it with those in the names of all others: ``log
p(name | told) - log p(name | not told)``, the evidence that the name gives for it. The evidence for all that was told
is added up. (Compared with all names, what most cards have says next to nothing, and what few have is outvoted: told
all of legendary creatures, the fittest of 16 names was recognized as a legend in 62%, and so it is in 90%.)

Letters in the shapes: N names, G runs of characters in them, U distinct runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import numpy as np

from flash_experts.data.cards import Card, load_source
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import Attributes
from flash_experts.generation.type_fit import RUNS_PER_CHARACTER, FloatArray, place_of_runs, runs_of

_PRIOR_RUNS = 40_000  # of all names, added to those of either kind of card; chosen on the validation names


class AttributeJudge:
    """Tells how well names fit attributes."""

    def __init__(self, cards: Iterable[Card]) -> None:
        """Counts the runs of characters in all names.

        Args:
            cards: to learn from.
        """
        self._cards = list(cards)
        runs_G, self._name_G = runs_of([card.name for card in self._cards])
        self._runs_U, self._index_G = np.unique(runs_G, return_inverse=True)
        seen_U = np.bincount(self._index_G, minlength=len(self._runs_U))
        self._usual_U = seen_U / max(1, seen_U.sum())

    def evidence(self, attributes: Attributes) -> Callable[[Sequence[str]], FloatArray]:
        """A function from N names to (N,) the evidence, in nats, that each gives for all that is told; zeros where
        nothing is told that a real card has."""
        odds_U = np.zeros(len(self._runs_U) + 1)
        for has in _told(attributes):
            mine_N = np.array([has(card) for card in self._cards], dtype=bool)
            if mine_N.any():
                odds_U += self._log_odds(mine_N)

        def evidence_of(names: Sequence[str]) -> FloatArray:
            runs_G, name_G = runs_of(names)
            odds_G = odds_U[place_of_runs(self._runs_U, runs_G)]
            return np.bincount(name_G, odds_G, minlength=len(names)).astype(np.float64, copy=False)

        return evidence_of

    def _log_odds(self, mine_N: np.ndarray) -> FloatArray:
        """(U + 1,) how much commoner each run is in some of the names than in the others; the last is for runs of no
        name."""
        logs = []
        for some_N in (mine_N, ~mine_N):
            seen_U = np.bincount(self._index_G[some_N[self._name_G]], minlength=len(self._runs_U))
            shares_U = np.append(seen_U / self._usual_U + _PRIOR_RUNS, _PRIOR_RUNS)
            logs.append(np.log(shares_U) - np.log(seen_U.sum() + _PRIOR_RUNS))
        return (logs[0] - logs[1]) / RUNS_PER_CHARACTER


@cache
def attribute_judge_of_real_cards() -> AttributeJudge:
    """One that learned from all serious cards of the embedded table, which takes about a second once."""
    return AttributeJudge(clean(load_source("embedded").rows).cards)


def fitness_of(best_by: str, best_of: int, attributes: Attributes) -> Callable[[Sequence[str]], FloatArray] | None:
    """What the best of several names is chosen by; None for its own likelihood.

    Raises:
        ValueError: there is no such way, or nothing to choose by or from.
    """
    if best_by == "score":
        return None
    if best_by != "fit":
        raise ValueError(f"best_by is {best_by!r}: it must be score (the most natural) or fit (to the card asked for)")
    if best_of == 1:
        raise ValueError("best_by fit chooses among names: set best_of, too, to 8 for instance")
    if not _told(attributes):
        raise ValueError("best_by fit goes by what the card is: tell its type or colors")
    evidence = cache(lambda: attribute_judge_of_real_cards().evidence(attributes))  # when the first name is there
    return lambda names: evidence()(names)


def _told(attributes: Attributes) -> list[Callable[[Card], bool]]:
    """A question to cards for each thing that is told."""
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
