"""The n-gram baseline: a character language model with interpolated modified Kneser-Ney smoothing.

After Chen and Goodman (1999), "An empirical study of smoothing techniques for language modeling", section 3. N-grams at
the start of a name keep raw counts in the lower orders, as in SRILM and KenLM. An n-gram is one integer with its
symbols as digits, so numpy counts by sorting and looks up by binary search.

The conditional model has n-grams for each card type, color, subtype and supertype, too. The attributes of a prompt
select layers: each predicts with Kneser-Ney discounts and backs off to the layer below, down to the model of all names.

Shape suffixes: N names, Q symbols of all names, B sampled names, G n-grams, C contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.metrics import FloatArray, IntArray

Kind = tuple[str, str]

EOS = 0  # symbols: EOS, unknown character, known characters, BOS
UNKNOWN = 1
_ORDERS = (5, 6, 7)  # their average is slightly better than each
_UNICODE = 0x110000  # unknown characters share their probability equally
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # if there are too few counts to estimate them (as in KenLM)
_LONGEST_SAMPLE = 64
_FEWEST_NAMES = 5  # names of an attribute that gets a layer, at least


@dataclass(frozen=True, slots=True)
class Order:
    """N-grams of one order.

    Attributes:
        grams: (G,) sorted codes.
        shares: (G,) (count - discount) / count of the context.
        contexts: (C,) sorted codes.
        left_over: (C,) backoff mass of the lower order, in (0, 1].
        cumulated: (G + 1,) cumulative shares, for sampling.
    """

    grams: IntArray
    shares: FloatArray
    contexts: IntArray
    left_over: FloatArray
    cumulated: FloatArray

    @property
    def num_parameters(self) -> int:
        return self.shares.size + self.left_over.size

    def probabilities(self, grams: IntArray, contexts: IntArray, lower: FloatArray) -> FloatArray:
        """(Q,) probabilities of n-grams, interpolated with those of the lower order."""
        return (
            _look_up(self.grams, self.shares, grams, 0.0)
            + _look_up(self.contexts, self.left_over, contexts, 1.0) * lower
        )

    def draw(self, contexts: IntArray, base: int, rng: np.random.Generator) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Symbols after the contexts (B,) that do not back off, and (B,) which those are."""
        first = np.searchsorted(self.grams, contexts * base)
        last = np.searchsorted(self.grams, (contexts + 1) * base)
        threshold = self.cumulated[first] + rng.random(contexts.size)
        inside = threshold < self.cumulated[last]
        at = np.searchsorted(self.cumulated, threshold[inside], side="right") - 1
        return self.grams[at] % base, inside


def _look_up(keys: IntArray, values: FloatArray, wanted: IntArray, missing: float) -> FloatArray:
    """Returns values[keys == wanted], or ``missing``; ``keys`` are sorted."""
    if not keys.size:  # every name is shorter than this order
        return np.full(wanted.shape, missing)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def _smooth(grams: IntArray, counts: IntArray, base: int) -> Order:
    """Shares and backoff masses of counted n-grams (sorted, distinct)."""
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    contexts, context_of = np.unique(grams // base, return_inverse=True)
    totals = np.bincount(context_of, weights=counts)
    left_over = np.bincount(context_of, weights=discounts) / totals
    shares = (counts - discounts) / totals[context_of]
    return Order(grams, shares, contexts, left_over, np.concatenate([[0.0], np.cumsum(shares)]))


def _discounts(counts: IntArray) -> FloatArray:
    """Estimates the discounts of counts 1, 2, and 3 or more (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array(_FALLBACK_DISCOUNTS)
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # On a small corpus an estimate may leave (0, count), which would give negative shares or no backoff mass.
    inside = (estimated > 0).all() and (estimated < [1, 2, 3]).all()
    return estimated if inside else np.array(_FALLBACK_DISCOUNTS)


class KneserNey:
    """A character n-gram model of one order; `layered` puts n-grams of some names on top."""

    def __init__(self, names: Sequence[str], order: int = 6) -> None:
        """Fits a model of an order from 2 to 8, or a lower one where the n-grams would not fit into 62 bits.

        Order 7 is for up to 460 distinct characters, 6 for 1,287, 5 for 5,401.
        """
        if not names:
            raise ValueError("no names to fit: give at least one")
        if not 2 <= order <= 8:
            raise ValueError(f"order {order} is not in 2..8")
        self.alphabet = sorted(set("".join(names)))
        self._codes = np.array([ord(character) for character in self.alphabet])  # ascending, as the alphabet is
        self._num_symbols = self._bos = len(self.alphabet) + 2
        self._base = self._num_symbols + 1
        self.order = max(lower for lower in range(2, order + 1) if self._base**lower <= 2**62)
        self.orders = self._fit(*self._queries(names))
        self._layers: Sequence[Order] = ()

    def layer(self, names: Sequence[str]) -> Order:
        """The n-grams of some names, as long as possible."""
        contexts, symbols = self._queries(names)
        grams, counts = np.unique(_longest(contexts) * self._base + symbols, return_counts=True)
        return _smooth(grams, counts.astype(np.int64), self._base)

    def layered(self, layers: Sequence[Order]) -> KneserNey:
        """The same model below layers from `layer`."""
        model = copy(self)
        model._layers = layers
        return model

    def _queries(self, names: Sequence[str]) -> tuple[IntArray, IntArray]:
        """(order, Q) contexts of 0 .. order - 1 symbols, -1 where the name is shorter, and (Q,) symbols with EOS."""
        lengths = np.array([len(name) + 2 for name in names])
        ends = lengths.cumsum()
        flat = np.full(lengths.sum(), self._bos, dtype=np.int64)
        flat[ends - 1] = EOS
        position = np.arange(flat.size) - np.repeat(ends - lengths, lengths)
        flat[(position > 0) & (flat != EOS)] = self._symbols("".join(names))
        contexts = np.full((self.order, flat.size), -1, dtype=np.int64)
        contexts[0] = 0
        for length in range(1, self.order):
            reached = position >= length
            before = np.roll(flat, length)[reached]
            contexts[length, reached] = contexts[length - 1, reached] + before * self._base ** (length - 1)
        predicted = position > 0
        return contexts[:, predicted], flat[predicted]

    def _symbols(self, text: str) -> IntArray:
        """(characters,) the symbol of each character."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        places = np.searchsorted(self._codes, codes)
        return np.where(np.append(self._codes, 0)[places] == codes, places + 2, UNKNOWN)

    def _fit(self, contexts: IntArray, symbols: IntArray) -> list[Order]:
        """All orders from 1 up. Lower ones use continuation counts: distinct symbols before each n-gram."""
        orders: list[Order] = []
        longer: IntArray | None = None
        for length in range(self.order - 1, -1, -1):
            grams = contexts[length][contexts[length] >= 0] * self._base + symbols[contexts[length] >= 0]
            distinct, counts = np.unique(grams, return_counts=True)
            if longer is not None:
                size = self._base ** (length + 1)
                followed, kinds = np.unique(longer % size, return_counts=True)
                # Nothing precedes BOS: n-grams that start with it keep raw counts.
                inside = np.isin(distinct, followed, assume_unique=True)
                counts = counts.copy()
                counts[inside] = kinds
            orders.append(_smooth(distinct, counts.astype(np.int64), self._base))
            longer = distinct
        return orders[::-1]

    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]:
        """(characters + 1,) probabilities of the characters and EOS, for each name."""
        contexts, symbols = self._queries(names)
        probability = np.full(symbols.shape, 1.0 / self._num_symbols)
        for context, order in zip(contexts, self.orders, strict=True):
            grams = np.where(context >= 0, context * self._base + symbols, -1)
            probability = order.probabilities(grams, context, probability)
        probability[symbols == UNKNOWN] /= _UNICODE - len(self.alphabet)
        longest = _longest(contexts)
        for layer in self._layers:
            probability = layer.probabilities(longest * self._base + symbols, longest, probability)
        return np.split(probability, np.cumsum([len(name) + 1 for name in names])[:-1])

    def nats(self, names: Sequence[str]) -> FloatArray:
        """(N,) negative log-likelihood of each name and EOS, in nats."""
        return np.array([-np.log(p).sum() for p in self.symbol_probabilities(names)])

    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray:
        """Samples the next symbols (B,), possibly `UNKNOWN`, after contexts (order or more, B)."""
        symbols = np.empty(contexts.shape[1], dtype=np.int64)
        undecided = np.arange(contexts.shape[1])
        longest = _longest(contexts[: self.order])
        for layer in reversed(self._layers):
            drawn, decided = layer.draw(longest[undecided], self._base, rng)
            symbols[undecided[decided]] = drawn
            undecided = undecided[~decided]
        symbols[undecided] = rng.integers(0, self._num_symbols, size=undecided.size)  # if all orders back off
        for length in range(self.order - 1, -1, -1):
            reached = contexts[length, undecided] >= 0
            drawn, inside = self.orders[length].draw(contexts[length, undecided[reached]], self._base, rng)
            decided = np.zeros(undecided.size, dtype=np.bool_)
            decided[np.flatnonzero(reached)[inside]] = True
            symbols[undecided[decided]] = drawn
            undecided = undecided[~decided]
        return symbols

    def first_contexts(self, count: int) -> IntArray:
        """(order, count) contexts at the start of a name."""
        contexts = np.full((self.order, count), -1, dtype=np.int64)
        contexts[:2] = np.array([[0], [self._bos]])
        return contexts

    def next_contexts(self, contexts: IntArray, symbols: IntArray) -> IntArray:
        """Appends one symbol to the contexts (order, B)."""
        shifted = np.where(contexts[:-1] >= 0, contexts[:-1] * self._base + symbols, -1)
        return np.concatenate([np.zeros_like(contexts[:1]), shifted])


def _longest(contexts: IntArray) -> IntArray:
    """(Q,) longest available contexts; longer ones have larger codes, since none starts with 0."""
    return contexts.max(axis=0)


def mixture_nats(models: Sequence[KneserNey], names: Sequence[str]) -> FloatArray:
    """(N,) negative log-likelihood of each name and EOS under the average of models, in nats."""
    parts = zip(*(model.symbol_probabilities(names) for model in models), strict=True)
    return np.array([-np.log(np.mean(part, axis=0)).sum() for part in parts])


def sample_mixture(models: Sequence[KneserNey], count: int, rng: np.random.Generator) -> list[str]:
    """Samples names of at most 64 characters: for each character a random model, then a character from it."""
    highest = max(models, key=lambda model: model.order)
    contexts = highest.first_contexts(count)
    running = np.arange(count)
    drawn: list[list[int]] = [[] for _ in range(count)]
    for _ in range(_LONGEST_SAMPLE):
        if not running.size:
            break
        symbols = _draw(models, contexts, rng)
        continues = symbols != EOS
        for index, symbol in zip(running[continues].tolist(), symbols[continues].tolist(), strict=True):
            drawn[index].append(symbol)
        contexts = highest.next_contexts(contexts[:, continues], symbols[continues])
        running = running[continues]
    return ["".join(highest.alphabet[symbol - 2] for symbol in symbols) for symbols in drawn]


def _draw(models: Sequence[KneserNey], contexts: IntArray, rng: np.random.Generator) -> IntArray:
    """One symbol per context, (B,). Unknown characters have no text, so they are drawn again."""
    symbols = np.full(contexts.shape[1], UNKNOWN, dtype=np.int64)
    while (again := np.flatnonzero(symbols == UNKNOWN)).size:
        chosen = rng.integers(0, len(models), size=again.size)
        for index, model in enumerate(models):
            rows = again[chosen == index]
            if rows.size:
                symbols[rows] = model.draw(contexts[:, rows], rng)
    return symbols


def kinds_of(attributes: Attributes) -> list[Kind]:
    """Lists attributes, the most general first: ``("type", "Creature"), ("color", "R"), ("subtype", "Goblin")``."""
    found = [("type", value) for value in attributes.types or ()]
    found += [("supertype", value) for value in attributes.supertypes or ()]
    if attributes.colors is not None:
        found.append(("color", "".join(attributes.colors)))
    return found + [("subtype", value) for value in attributes.subtypes or ()]


class ConditionalNGrams:
    """The average of n-gram models of several orders, with layers for the attributes."""

    def __init__(self, cards: Sequence[Card]) -> None:
        """Fits the models of all names; layers are fitted when first needed."""
        names = [card.name for card in cards]
        models = [KneserNey(names, order) for order in _ORDERS]
        self._models = list({model.order: model for model in models}.values())  # a large alphabet has no high orders
        self._names: dict[Kind, list[str]] = {}
        for card in cards:
            for kind in kinds_of(Attributes.of(card)):
                self._names.setdefault(kind, []).append(card.name)
        self._fitted: dict[Kind, list[Order]] = {}

    @property
    def num_parameters(self) -> int:
        orders = [order for model in self._models for order in model.orders]
        layers = [layer for kind in self._names for layer in self._layers_of(kind)]
        return sum(order.num_parameters for order in (*orders, *layers))

    @property
    def num_active_parameters(self) -> int:
        """Those that one character's unconditional probability uses."""
        return sum(2 * model.order for model in self._models)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """As `mixture_nats`, given the attributes of each name."""
        nats = np.empty(len(names))
        for given, rows in _rows_of_each(attributes).items():
            nats[rows] = mixture_nats(self._models_for(given), [names[row] for row in rows])
        return nats

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        return sample_mixture(self._models_for(attributes), count, np.random.default_rng(seed))

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        names = [""] * len(attributes)
        for place, (given, rows) in enumerate(_rows_of_each(attributes).items()):
            drawn = sample_mixture(self._models_for(given), len(rows), np.random.default_rng((seed, place)))
            for row, name in zip(rows, drawn, strict=True):
                names[row] = name
        return names

    def _layers_of(self, kind: Kind) -> list[Order]:
        if kind not in self._fitted:
            self._fitted[kind] = [model.layer(self._names[kind]) for model in self._models]
        return self._fitted[kind]

    def _models_for(self, attributes: Attributes) -> list[KneserNey]:
        kinds = [kind for kind in kinds_of(attributes) if len(self._names.get(kind, ())) >= _FEWEST_NAMES]
        layers = [self._layers_of(kind) for kind in kinds]
        return [model.layered([each[index] for each in layers]) for index, model in enumerate(self._models)]


def _rows_of_each(attributes: Sequence[Attributes]) -> dict[Attributes, list[int]]:
    rows: dict[Attributes, list[int]] = {}
    for index, one in enumerate(attributes):
        rows.setdefault(replace(one, mana_value=None, rarity=None, set_code=None, released=None), []).append(index)
    return rows
