"""The conditional n-gram baseline: n-grams of cards with the given attributes, backing off to those of all names.

Each card type, color, subtype and supertype has n-gram counts of its own. The attributes of a prompt select layers:
each predicts with Kneser-Ney discounts and backs off to the layer below, down to the model of all names. So ``Goblin``
is likely at the start of a Goblin's name.

Shape suffixes: N names, Q symbols of all names, B sampled names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.generation.reranking import ngram

Kind = tuple[str, str]
_FEWEST_NAMES = 5  # names of an attribute that gets a layer, at least


def kinds_of(attributes: Attributes) -> list[Kind]:
    """Lists attributes, the most general first: ``("type", "Creature"), ("color", "R"), ("subtype", "Goblin")``."""
    found = [("type", value) for value in attributes.types or ()]
    found += [("supertype", value) for value in attributes.supertypes or ()]
    if attributes.colors is not None:
        found.append(("color", "".join(attributes.colors)))
    return found + [("subtype", value) for value in attributes.subtypes or ()]


class _Layered:
    """A `KneserNey` model of all names below layers of n-grams of its order."""

    def __init__(self, model: ngram.KneserNey, layers: Sequence[ngram.Order]) -> None:
        self.order = model.order
        self.alphabet = model.alphabet
        self._model, self._layers = model, layers

    def first_contexts(self, count: int) -> ngram.IntArray:
        return self._model.first_contexts(count)

    def next_contexts(self, contexts: ngram.IntArray, symbols: ngram.IntArray) -> ngram.IntArray:
        return self._model.next_contexts(contexts, symbols)

    def symbol_probabilities(self, names: Sequence[str]) -> list[ngram.FloatArray]:
        probability = np.concatenate(self._model.symbol_probabilities(names))
        contexts, symbols = self._model.queries(names)
        context = _longest(contexts)
        grams = context * self._model.base + symbols
        for layer in self._layers:
            share = ngram.look_up(layer.grams, layer.shares, grams, 0.0)
            probability = share + ngram.look_up(layer.contexts, layer.left_over, context, 1.0) * probability
        return np.split(probability, np.cumsum([len(name) + 1 for name in names])[:-1])

    def draw(self, contexts: ngram.IntArray, rng: np.random.Generator) -> ngram.IntArray:
        """See `KneserNey.draw`; the top layer first."""
        context = _longest(contexts[: self.order])
        symbols = np.empty(contexts.shape[1], dtype=np.int64)
        undecided = np.arange(contexts.shape[1])
        for layer in reversed(self._layers):
            drawn, decided = ngram.draw_from(layer, context[undecided], self._model.base, rng)
            symbols[undecided[decided]] = drawn
            undecided = undecided[~decided]
        symbols[undecided] = self._model.draw(contexts[:, undecided], rng)
        return symbols


class ConditionalNGrams:
    """A conditional `NGramMixture`. Without attributes it is the unconditional mixture."""

    def __init__(self, cards: Sequence[Card]) -> None:
        """Fits the model of all names of one card or more; layers are fitted when first needed."""
        self.unconditional = ngram.NGramMixture([card.name for card in cards])
        self._names: dict[Kind, list[str]] = {}
        for card in cards:
            for kind in kinds_of(Attributes.of(card)):
                self._names.setdefault(kind, []).append(card.name)
        self._fitted: dict[Kind, list[ngram.Order]] = {}

    @property
    def num_parameters(self) -> int:
        layers = [order for kind in self._names for order in self._layers_of(kind)]
        return self.unconditional.num_parameters + sum(order.num_parameters for order in layers)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that one character's unconditional probability uses."""
        return self.unconditional.num_active_parameters

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> ngram.FloatArray:
        """(N,) negative log-likelihood of each name and EOS given its attributes, in nats."""
        nats = np.empty(len(names))
        for given, rows in _rows_of_each(attributes).items():
            nats[rows] = ngram.mixture_nats(self._models_for(given), [names[row] for row in rows])
        return nats

    def sample(self, count: int, seed: int, attributes: Attributes) -> list[str]:
        """Samples names for a card with these attributes, reproducible by ``seed``."""
        return ngram.sample_mixture(self._models_for(attributes), count, np.random.default_rng(seed))

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        names = [""] * len(attributes)
        for place, (given, rows) in enumerate(_rows_of_each(attributes).items()):
            drawn = ngram.sample_mixture(self._models_for(given), len(rows), np.random.default_rng((seed, place)))
            for row, name in zip(rows, drawn, strict=True):
                names[row] = name
        return names

    def _layers_of(self, kind: Kind) -> list[ngram.Order]:
        if kind not in self._fitted:
            self._fitted[kind] = [self._fit(model, self._names[kind]) for model in self.unconditional.models]
        return self._fitted[kind]

    @staticmethod
    def _fit(model: ngram.KneserNey, names: Sequence[str]) -> ngram.Order:
        contexts, symbols = model.queries(names)
        grams, counts = np.unique(_longest(contexts) * model.base + symbols, return_counts=True)
        return ngram.smooth(grams, counts.astype(np.int64), model.base)

    def _models_for(self, attributes: Attributes) -> list[_Layered]:
        kinds = [kind for kind in kinds_of(attributes) if len(self._names.get(kind, ())) >= _FEWEST_NAMES]
        layers = [self._layers_of(kind) for kind in kinds]
        return [
            _Layered(model, [of_kind[index] for of_kind in layers])
            for index, model in enumerate(self.unconditional.models)
        ]


def _rows_of_each(attributes: Sequence[Attributes]) -> dict[Attributes, list[int]]:
    """Groups indices by the attributes that the n-grams use."""
    rows: dict[Attributes, list[int]] = {}
    for index, one in enumerate(attributes):
        rows.setdefault(replace(one, mana_value=None, rarity=None, set_code=None, released=None), []).append(index)
    return rows


def _longest(contexts: ngram.IntArray) -> ngram.IntArray:
    """(Q,) longest available contexts; longer ones have larger codes, since none starts with 0."""
    return contexts.max(axis=0)
