"""The n-gram baseline: a character language model with interpolated modified Kneser-Ney smoothing.

After Chen and Goodman (1999), "An empirical study of smoothing techniques for language modeling", section 3. N-grams at
the start of a name keep raw counts in the lower orders, as in SRILM and KenLM. An n-gram is one integer with its
symbols as digits, so numpy counts by sorting and looks up by binary search.

Shape suffixes: Q queries, V symbols, B prefixes, G n-grams, C contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EOS = 0  # symbols: EOS, unknown character, known characters, BOS
UNKNOWN = 1
_UNICODE = 0x110000  # unknown characters share their probability equally
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # if there are too few counts to estimate them (as in KenLM)
_LONGEST_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Order:
    """N-grams of one order: their discounted probabilities and the backoff mass of each context.

    Attributes:
        grams: (G,) sorted codes of the n-grams.
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


def smooth(grams: IntArray, counts: IntArray, base: int) -> Order:
    """Computes shares and backoff masses of counted n-grams (sorted, distinct)."""
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    contexts, context_of = np.unique(grams // base, return_inverse=True)
    totals = np.bincount(context_of, weights=counts)
    left_over = np.bincount(context_of, weights=discounts) / totals
    shares = (counts - discounts) / totals[context_of]
    return Order(grams, shares, contexts, left_over, np.concatenate([[0.0], np.cumsum(shares)]))


def look_up(keys: IntArray, values: FloatArray, wanted: IntArray, missing: float) -> FloatArray:
    """Returns values[keys == wanted], or ``missing``; ``keys`` are sorted."""
    if not keys.size:  # every name is shorter than this order
        return np.full(wanted.shape, missing)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def draw_from(
    order: Order, contexts: IntArray, base: int, rng: np.random.Generator
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Samples symbols from one order, for the contexts that do not back off; (B,) says which those are."""
    first = np.searchsorted(order.grams, contexts * base)
    last = np.searchsorted(order.grams, (contexts + 1) * base)
    threshold = order.cumulated[first] + rng.random(contexts.size)
    inside = threshold < order.cumulated[last]
    at = np.searchsorted(order.cumulated, threshold[inside], side="right") - 1
    return order.grams[at] % base, inside


class CharacterModel(Protocol):
    """A character language model that `NGramMixture` can average."""

    @property
    def order(self) -> int: ...
    @property
    def alphabet(self) -> Sequence[str]: ...
    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]: ...
    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray: ...
    def first_contexts(self, count: int) -> IntArray: ...
    def next_contexts(self, contexts: IntArray, symbols: IntArray) -> IntArray: ...


class KneserNey:
    """A character n-gram model of one order."""

    def __init__(self, names: Sequence[str], order: int = 6, alphabet: Sequence[str] | None = None) -> None:
        """Fits the model; averaged models share a sorted ``alphabet``, by default that of the names.

        Raises:
            ValueError: there are no names, or the order is not in 2..8.
        """
        if not names:
            raise ValueError("no names to fit: give at least one")
        if not 2 <= order <= 8:
            raise ValueError(f"order {order} is not in 2..8")
        self.order = order
        self.alphabet = sorted(set("".join(names))) if alphabet is None else list(alphabet)
        self._symbol = {character: index for index, character in enumerate(self.alphabet, start=2)}
        self.num_symbols = len(self.alphabet) + 2
        self._bos = self.num_symbols
        self.base = self.num_symbols + 1
        if self.base**order > 2**62:
            raise ValueError(f"{self.num_symbols} characters are too many for order {order}: take a lower order")
        self.orders = self._fit(*self.queries(names))

    def queries(self, names: Sequence[str]) -> tuple[IntArray, IntArray]:
        """Encodes the contexts of each symbol of names, EOS included, and the symbols (Q,).

        Contexts are (order, Q), of 0 .. order - 1 symbols, -1 where the name is shorter.
        """
        coded = [[self._bos, *(self._symbol.get(c, UNKNOWN) for c in name), EOS] for name in names]
        flat = np.array([symbol for name in coded for symbol in name], dtype=np.int64)
        position = np.concatenate([np.arange(len(name)) for name in coded])
        contexts = np.full((self.order, flat.size), -1, dtype=np.int64)
        contexts[0] = 0
        for length in range(1, self.order):
            reached = position >= length
            before = np.roll(flat, length)[reached]
            contexts[length, reached] = contexts[length - 1, reached] + before * self.base ** (length - 1)
        predicted = position > 0
        return contexts[:, predicted], flat[predicted]

    def _fit(self, contexts: IntArray, symbols: IntArray) -> list[Order]:
        """Fits all orders from 1 up. Lower orders use continuation counts: distinct symbols before each n-gram."""
        orders: list[Order] = []
        longer: IntArray | None = None
        for length in range(self.order - 1, -1, -1):
            grams = contexts[length][contexts[length] >= 0] * self.base + symbols[contexts[length] >= 0]
            distinct, counts = np.unique(grams, return_counts=True)
            if longer is not None:
                size = self.base ** (length + 1)
                followed, kinds = np.unique(longer % size, return_counts=True)
                # Nothing precedes BOS: n-grams that start with it keep raw counts.
                inside = np.isin(distinct, followed, assume_unique=True)
                counts = counts.copy()
                counts[inside] = kinds
            orders.append(smooth(distinct, counts.astype(np.int64), self.base))
            longer = distinct
        return orders[::-1]

    def _probabilities(self, contexts: IntArray, symbols: IntArray) -> FloatArray:
        """(Q,) probability of each symbol after its contexts (order, Q), encoded by `queries`."""
        probability = np.full(symbols.shape, 1.0 / self.num_symbols)
        for context, order in zip(contexts, self.orders, strict=True):
            grams = np.where(context >= 0, context * self.base + symbols, -1)
            share = look_up(order.grams, order.shares, grams, 0.0)
            left_over = look_up(order.contexts, order.left_over, context, 1.0)
            probability = share + left_over * probability
        return probability

    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]:
        """(characters + 1,) probabilities of the characters and EOS, for each name."""
        contexts, symbols = self.queries(names)
        probability = self._probabilities(contexts, symbols)
        probability[symbols == UNKNOWN] /= _UNICODE - len(self.alphabet)
        return np.split(probability, np.cumsum([len(name) + 1 for name in names])[:-1])

    def nats(self, names: Sequence[str]) -> FloatArray:
        """(N,) negative log-likelihood of each name and EOS, in nats."""
        return np.array([-np.log(p).sum() for p in self.symbol_probabilities(names)])

    def next_symbol(self, prefixes: Sequence[str]) -> FloatArray:
        """(B, V) next-symbol distribution after prefixes: EOS, unknown, ``alphabet``."""
        contexts, _ = self.queries(prefixes)
        last = np.cumsum([len(prefix) + 1 for prefix in prefixes]) - 1  # position at which EOS is predicted
        every = np.tile(np.arange(self.num_symbols), len(prefixes))
        after = np.repeat(contexts[:, last], self.num_symbols, axis=1)
        return self._probabilities(after, every).reshape(len(prefixes), self.num_symbols)

    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray:
        """Samples the next symbols (B,), possibly `UNKNOWN`, for contexts (order or more, B) encoded by `queries`."""
        symbols = np.asarray(rng.integers(0, self.num_symbols, size=contexts.shape[1]))  # if all orders back off
        undecided = np.arange(contexts.shape[1])
        for length in range(self.order - 1, -1, -1):
            reached = contexts[length, undecided] >= 0
            drawn, inside = draw_from(self.orders[length], contexts[length, undecided[reached]], self.base, rng)
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
        shifted = np.where(contexts[:-1] >= 0, contexts[:-1] * self.base + symbols, -1)
        return np.concatenate([np.zeros_like(contexts[:1]), shifted])


class NGramMixture:
    """The average of n-gram models of several orders, symbol by symbol; slightly better than each."""

    def __init__(self, names: Sequence[str], orders: Sequence[int] = (5, 6, 7)) -> None:
        self.models = [KneserNey(names, order) for order in orders]

    @property
    def num_parameters(self) -> int:
        return sum(order.num_parameters for model in self.models for order in model.orders)

    @property
    def num_active_parameters(self) -> int:
        return sum(2 * model.order for model in self.models)

    def nats(self, names: Sequence[str]) -> FloatArray:
        """As `KneserNey.nats`."""
        return mixture_nats(self.models, names)

    def sample(self, count: int, seed: int = 0) -> list[str]:
        """Samples names of at most 64 characters, reproducible by ``seed``."""
        return sample_mixture(self.models, count, np.random.default_rng(seed))


def mixture_nats(models: Sequence[CharacterModel], names: Sequence[str]) -> FloatArray:
    """(N,) negative log-likelihood of each name and EOS under the average of models, in nats."""
    parts = zip(*(model.symbol_probabilities(names) for model in models), strict=True)
    return np.array([-np.log(np.mean(part, axis=0)).sum() for part in parts])


def sample_mixture(models: Sequence[CharacterModel], count: int, rng: np.random.Generator) -> list[str]:
    """Samples names: for each character a random model, then a character from it."""
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


def _draw(models: Sequence[CharacterModel], contexts: IntArray, rng: np.random.Generator) -> IntArray:
    """Samples one symbol per context, (B,). Unknown characters have no text, so they are drawn again."""
    symbols = np.full(contexts.shape[1], UNKNOWN, dtype=np.int64)
    while (again := np.flatnonzero(symbols == UNKNOWN)).size:
        chosen = rng.integers(0, len(models), size=again.size)
        for index, model in enumerate(models):
            rows = again[chosen == index]
            if rows.size:
                symbols[rows] = model.draw(contexts[:, rows], rng)
    return symbols
