"""The n-gram baseline as a model to evaluate."""

from __future__ import annotations

from collections.abc import Sequence

from flash_experts.data.cards import Card
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation.conditional_ngram import ConditionalNGrams
from flash_experts.evaluation.costs import Costs, ModelSize
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.evaluation.scorers import Prompt, show_unfiltered


class NGramBaseline:
    """`ConditionalNGrams` fitted on the training cards. It takes no mana values."""

    label = "ngram"

    def __init__(self, train: Sequence[Card]) -> None:
        self._model = ConditionalNGrams(train)

    @property
    def size(self) -> ModelSize:
        return ModelSize(self._model.num_parameters, self._model.num_active_parameters)

    @property
    def costs(self) -> Costs:
        """It is fitted by counting: no training to tell of. Eight bytes a number."""
        return Costs(8 * self._model.num_parameters, None, None, None, 0.0)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """See `Scorer.nats`."""
        return self._model.nats(names, attributes)

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]:
        """See `Scorer.sample`."""
        return self._model.sample(count, seed, attributes)

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        """See `Scorer.sample_each`."""
        return self._model.sample_each(attributes, seed)

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """See `Scorer.show`."""
        return show_unfiltered(self, prompts, count, seed, known)

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        """It has no experts."""
        return {}
