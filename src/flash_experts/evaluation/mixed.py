"""A language model mixed with the n-gram baseline, as a row of `evaluate` and `compare`: ``MODEL+ngram``, with
``p(name) = w * p_model(name) + (1 - w) * p_ngram(name)`` and the model's own names.

Shape suffixes: N names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.costs import Costs, ModelSize
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.evaluation.scorers import LanguageModel, NGramBaseline, Prompt

SUFFIX = "+ngram"
_WEIGHTS = np.linspace(0.5, 0.99, 50)
_NAMES = 1000  # validation names that choose the weights, at most


class MixedWithNGrams:
    """A language model and the n-gram baseline, with one weight for names without a prompt and one for those with."""

    def __init__(self, model: LanguageModel, baseline: NGramBaseline, validation: Sequence[Card]) -> None:
        """Chooses the weights on validation cards; raises a ValueError if there are none."""
        if not validation:
            raise ValueError("no validation names: the weight of the n-grams is chosen on them")
        self.label = model.label if model.label.endswith(SUFFIX) else model.label + SUFFIX
        self._model, self._baseline = model, baseline
        cards = validation[:_NAMES]
        names, given = [card.name for card in cards], [Attributes.of(card) for card in cards]
        self.unconditional = self._best_weight(names, [UNCONDITIONAL] * len(names))
        self.conditional = self._best_weight(names, given)

    def _best_weight(self, names: Sequence[str], attributes: Sequence[Attributes]) -> float:
        first_N, second_N = self._model.nats(names, attributes), self._baseline.nats(names, attributes)
        totals = [mixed(first_N, second_N, np.full(len(names), weight)).sum() for weight in _WEIGHTS]
        return float(_WEIGHTS[int(np.argmin(totals))])

    @property
    def size(self) -> ModelSize:
        one, other = self._model.size, self._baseline.size
        return ModelSize(one.total + other.total, one.active + other.active)

    @property
    def costs(self) -> Costs:
        """Those of the model: the n-grams are fitted in seconds."""
        return self._model.costs

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        weight_N = np.array([self.unconditional if one == UNCONDITIONAL else self.conditional for one in attributes])
        return mixed(self._model.nats(names, attributes), self._baseline.nats(names, attributes), weight_N)

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        return self._model.sample(count, seed, attributes)

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        return self._model.sample_each(attributes, seed)

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        return self._model.show(prompts, count, seed, known)

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        return self._model.expert_loads(names, attributes)


def mixed(first_N: FloatArray, second_N: FloatArray, weight_N: FloatArray) -> FloatArray:
    """The nats (N,) of a mixture with the weight of the first, which is between 0 and 1."""
    assert ((weight_N > 0) & (weight_N < 1)).all()
    return -np.logaddexp(np.log(weight_N) - first_N, np.log1p(-weight_N) - second_N)


def without_suffix(model: str) -> str | None:
    """The model's part of ``MODEL+ngram``; None without the suffix."""
    return model.removesuffix(SUFFIX) if model.endswith(SUFFIX) and len(model) > len(SUFFIX) else None
