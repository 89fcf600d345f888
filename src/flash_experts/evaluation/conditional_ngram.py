"""The baseline that listens: n-grams of a card's own kind laid over those of all names.

For each card type, color, subtype and supertype, the n-grams of its names are counted. What a prompt tells chooses
layers: where the names of a kind have been in this context, they say what follows, discounted as in Kneser-Ney
smoothing, and what the discounts leave over goes to the layer below, down to the model of all names. So ``Goblin`` is
likely at the start of a Goblin's name, and a context that no Goblin has had is read as in any name.

Letters in the shapes: N names, Q symbols of all names, B names in the making.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.ngram import (
    FloatArray,
    IntArray,
    KneserNey,
    NGramMixture,
    Order,
    draw_from,
    look_up,
    mixture_nats,
    sample_mixture,
    smooth,
)

Kind = tuple[str, str]
_FEWEST_NAMES = 5  # of a kind that is a layer


def kinds_of(attributes: Attributes) -> list[Kind]:
    """What a prompt tells, the most general first: ``("type", "Creature"), ("color", "R"), ("subtype", "Goblin")``."""
    found = [("type", value) for value in attributes.types or ()]
    found += [("supertype", value) for value in attributes.supertypes or ()]
    if attributes.colors is not None:
        found.append(("color", "".join(attributes.colors)))
    return found + [("subtype", value) for value in attributes.subtypes or ()]


class _Layered:
    """A `KneserNey` model of all names, under layers of n-grams of its order."""

    def __init__(self, model: KneserNey, layers: Sequence[Order]) -> None:
        self.order = model.order
        self.alphabet = model.alphabet
        self._model, self._layers = model, layers

    def first_contexts(self, count: int) -> IntArray:
        return self._model.first_contexts(count)

    def next_contexts(self, contexts: IntArray, symbols: IntArray) -> IntArray:
        return self._model.next_contexts(contexts, symbols)

    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]:
        """See `KneserNey.symbol_probabilities`."""
        probability = np.concatenate(self._model.symbol_probabilities(names))
        contexts, symbols = self._model.queries(names)
        context = _longest(contexts)
        grams = context * self._model.base + symbols
        for layer in self._layers:
            share = look_up(layer.grams, layer.shares, grams, 0.0)
            probability = share + look_up(layer.contexts, layer.left_over, context, 1.0) * probability
        return np.split(probability, np.cumsum([len(name) + 1 for name in names])[:-1])

    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray:
        """See `KneserNey.draw`; the top layer first."""
        context = _longest(contexts[: self.order])
        symbols = np.empty(contexts.shape[1], dtype=np.int64)
        undecided = np.arange(contexts.shape[1])
        for layer in reversed(self._layers):
            drawn, decided = draw_from(layer, context[undecided], self._model.base, rng)
            symbols[undecided[decided]] = drawn
            undecided = undecided[~decided]
        symbols[undecided] = self._model.draw(contexts[:, undecided], rng)
        return symbols


class ConditionalNGrams:
    """`NGramMixture` that takes attributes. Nothing told gives the mixture itself."""

    def __init__(self, cards: Sequence[Card]) -> None:
        """Fits the model of all names; those of kinds are fitted when a prompt first asks for them.

        Raises:
            ValueError: there is no card.
        """
        self.unconditional = NGramMixture([card.name for card in cards])
        self._names: dict[Kind, list[str]] = {}
        for card in cards:
            for kind in kinds_of(Attributes.of(card)):
                self._names.setdefault(kind, []).append(card.name)
        self._fitted: dict[Kind, list[Order]] = {}

    @property
    def num_parameters(self) -> int:
        """Numbers that the model of all names and all layers hold."""
        layers = [order for kind in self._names for order in self._layers_of(kind)]
        return self.unconditional.num_parameters + sum(order.num_parameters for order in layers)

    @property
    def num_active_parameters(self) -> int:
        """Numbers that one letter's probability is made of where nothing is told."""
        return self.unconditional.num_active_parameters

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """(N,) negative log-likelihood of each name with its end symbol after its attributes, in nats."""
        nats = np.empty(len(names))
        for told, rows in _rows_of_each(attributes).items():
            nats[rows] = mixture_nats(self._models_for(told), [names[row] for row in rows])
        return nats

    def sample(self, count: int, seed: int, attributes: Attributes) -> list[str]:
        """Draws names for a card of these attributes. The same seed gives the same names."""
        return sample_mixture(self._models_for(attributes), count, np.random.default_rng(seed))

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        """Draws one name for each of many cards."""
        names = [""] * len(attributes)
        for place, (told, rows) in enumerate(_rows_of_each(attributes).items()):
            drawn = sample_mixture(self._models_for(told), len(rows), np.random.default_rng((seed, place)))
            for row, name in zip(rows, drawn, strict=True):
                names[row] = name
        return names

    def _layers_of(self, kind: Kind) -> list[Order]:
        """The n-grams of a kind's names, of the order of each model of all names."""
        if kind not in self._fitted:
            self._fitted[kind] = [self._fit(model, self._names[kind]) for model in self.unconditional.models]
        return self._fitted[kind]

    @staticmethod
    def _fit(model: KneserNey, names: Sequence[str]) -> Order:
        contexts, symbols = model.queries(names)
        grams, counts = np.unique(_longest(contexts) * model.base + symbols, return_counts=True)
        return smooth(grams, counts.astype(np.int64), model.base)

    def _models_for(self, attributes: Attributes) -> list[_Layered]:
        kinds = [kind for kind in kinds_of(attributes) if len(self._names.get(kind, ())) >= _FEWEST_NAMES]
        layers = [self._layers_of(kind) for kind in kinds]
        return [
            _Layered(model, [of_kind[index] for of_kind in layers])
            for index, model in enumerate(self.unconditional.models)
        ]


def _rows_of_each(attributes: Sequence[Attributes]) -> dict[Attributes, list[int]]:
    """Rows of each distinct prompt, as far as n-grams listen to it."""
    rows: dict[Attributes, list[int]] = {}
    for index, one in enumerate(attributes):
        rows.setdefault(replace(one, mana_value=None, rarity=None, set_code=None, released=None), []).append(index)
    return rows


def _longest(contexts: IntArray) -> IntArray:
    """(Q,) the longest context before each symbol: fewer letters than the order's at the start of a name.

    Codes of different lengths differ, since no context begins with the symbol 0, and longer ones are larger.
    """
    return contexts.max(axis=0)
