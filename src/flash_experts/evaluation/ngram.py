"""The baseline: character n-grams with interpolated modified Kneser-Ney smoothing.

The strongest model of names that needs no network: a language model that does not beat it has learned nothing
but letter statistics. After Chen and Goodman (1999), "An empirical study of smoothing techniques for language
modeling", section 3; grams at the start of a name keep raw counts in the lower orders, as in SRILM and KenLM.

An n-gram is one integer, its symbols the digits. Counting is sorting and looking up is a binary search, so
numpy does all the work. Letters in the shapes: Q queries, V symbols, B prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

END = 0  # symbols: the end of a name, an unknown character, the known characters, then the begin symbol
UNKNOWN = 1
_UNICODE = 0x110000  # an unknown character is one of all those that are not known, each as likely
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where counts are too few to estimate them (KenLM's choice)
_LONGEST_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Order:
    """Grams of one length: the smoothed share of each, and what each context leaves to the shorter gram.

    Attributes:
        grams: (G,) sorted codes of the grams.
        shares: (G,) (count - discount) / count of the context.
        contexts: (C,) sorted codes of the contexts.
        left_over: (C,) mass left to the lower order, in (0, 1].
        cumulated: (G + 1,) sums of the shares before each gram, to draw from.
    """

    grams: IntArray
    shares: FloatArray
    contexts: IntArray
    left_over: FloatArray
    cumulated: FloatArray

    @property
    def num_parameters(self) -> int:
        """Numbers that the model is made of; the sums follow from them."""
        return self.shares.size + self.left_over.size


def _discounts(counts: IntArray) -> FloatArray:
    """The discounts of grams counted once, twice, and more often (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array(_FALLBACK_DISCOUNTS)
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # A small corpus may break the law behind these; outside (0, count) a share is negative or nothing is left over.
    inside = (estimated > 0).all() and (estimated < [1, 2, 3]).all()
    return estimated if inside else np.array(_FALLBACK_DISCOUNTS)


def smooth(grams: IntArray, counts: IntArray, base: int) -> Order:
    """Shares and left-over mass of counted grams (sorted, distinct)."""
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    contexts, context_of = np.unique(grams // base, return_inverse=True)
    totals = np.bincount(context_of, weights=counts)
    left_over = np.bincount(context_of, weights=discounts) / totals
    shares = (counts - discounts) / totals[context_of]
    return Order(grams, shares, contexts, left_over, np.concatenate([[0.0], np.cumsum(shares)]))


def look_up(keys: IntArray, values: FloatArray, wanted: IntArray, missing: float) -> FloatArray:
    """values[keys == wanted], or ``missing``; keys are sorted."""
    if not keys.size:  # every name is shorter than a gram of this order
        return np.full(wanted.shape, missing)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, values[at], missing)


def draw_from(
    order: Order, contexts: IntArray, base: int, rng: np.random.Generator
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Draws symbols from the grams of one order by their shares.

    Returns:
        The symbols of those contexts that drew one, and (B,) which did. The others drew what is left over to the
        lower order, as a context without grams always does.
    """
    first = np.searchsorted(order.grams, contexts * base)
    last = np.searchsorted(order.grams, (contexts + 1) * base)
    threshold = order.cumulated[first] + rng.random(contexts.size)
    inside = threshold < order.cumulated[last]
    at = np.searchsorted(order.cumulated, threshold[inside], side="right") - 1
    return order.grams[at] % base, inside


class LetterModel(Protocol):
    """What `NGramMixture` mixes."""

    @property
    def order(self) -> int: ...
    @property
    def alphabet(self) -> Sequence[str]: ...
    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]: ...
    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray: ...
    def first_contexts(self, count: int) -> IntArray: ...
    def next_contexts(self, contexts: IntArray, symbols: IntArray) -> IntArray: ...


class KneserNey:
    """An interpolated modified Kneser-Ney model of one order over characters.

    Example:
        >>> model = KneserNey(["Goblin Guide", "Goblin King"], order=4)
        >>> bits = model.nats(["Goblin Ring"]).sum() / math.log(2) / len("Goblin Ring.")
    """

    def __init__(self, names: Sequence[str], order: int = 6, alphabet: Sequence[str] | None = None) -> None:
        """Fits the model.

        Args:
            names: the training names.
            order: characters of a gram; the last is predicted from those before.
            alphabet: the known characters, sorted; those of the names if None. Models that are mixed share one.

        Raises:
            ValueError: there is no name, or the order is not in 2..8.
        """
        if not names:
            raise ValueError("no names to fit: give at least one")
        if not 2 <= order <= 8:
            raise ValueError(f"order {order} is not in 2..8")
        self.order = order
        self.alphabet = sorted(set("".join(names))) if alphabet is None else list(alphabet)
        self._symbol = {character: index for index, character in enumerate(self.alphabet, start=2)}
        self.num_symbols = len(self.alphabet) + 2
        self._begin = self.num_symbols
        self.base = self.num_symbols + 1
        if self.base**order > 2**62:
            raise ValueError(f"{self.num_symbols} characters are too many for order {order}: take a lower order")
        self.orders = self._fit(*self.queries(names))

    def queries(self, names: Sequence[str]) -> tuple[IntArray, IntArray]:
        """Codes of the context before each symbol of names (end included), longest first, and of the symbols.

        Returns:
            (order, Q) contexts of 0 .. order - 1 symbols (-1 where the name is shorter), and (Q,) symbols.
        """
        coded = [[self._begin, *(self._symbol.get(c, UNKNOWN) for c in name), END] for name in names]
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
        """Orders from 1 up. Below the highest a gram counts once for each distinct symbol before it."""
        orders: list[Order] = []
        longer: IntArray | None = None
        for length in range(self.order - 1, -1, -1):
            grams = contexts[length][contexts[length] >= 0] * self.base + symbols[contexts[length] >= 0]
            distinct, counts = np.unique(grams, return_counts=True)
            if longer is not None:
                size = self.base ** (length + 1)
                followed, kinds = np.unique(longer % size, return_counts=True)
                # Nothing stands before a begin symbol: grams that start with one keep their raw counts.
                inside = np.isin(distinct, followed, assume_unique=True)
                counts = counts.copy()
                counts[inside] = kinds
            orders.append(smooth(distinct, counts.astype(np.int64), self.base))
            longer = distinct
        return orders[::-1]

    def _probabilities(self, contexts: IntArray, symbols: IntArray) -> FloatArray:
        """(Q,) probability of each symbol after its contexts, (order, Q), as `queries` codes them."""
        probability = np.full(symbols.shape, 1.0 / self.num_symbols)
        for context, order in zip(contexts, self.orders, strict=True):
            grams = np.where(context >= 0, context * self.base + symbols, -1)
            share = look_up(order.grams, order.shares, grams, 0.0)
            left_over = look_up(order.contexts, order.left_over, context, 1.0)
            probability = share + left_over * probability
        return probability

    def symbol_probabilities(self, names: Sequence[str]) -> list[FloatArray]:
        """Of each name, the probability of every character and of the end symbol: (letters + 1,) each."""
        contexts, symbols = self.queries(names)
        probability = self._probabilities(contexts, symbols)
        probability[symbols == UNKNOWN] /= _UNICODE - len(self.alphabet)
        return np.split(probability, np.cumsum([len(name) + 1 for name in names])[:-1])

    def nats(self, names: Sequence[str]) -> FloatArray:
        """(N,) negative log-likelihood of each name with its end symbol, in nats."""
        return np.array([-np.log(p).sum() for p in self.symbol_probabilities(names)])

    def next_symbol(self, prefixes: Sequence[str]) -> FloatArray:
        """(B, V) probabilities of what follows prefixes: end, unknown, ``alphabet``. Rows sum to one."""
        contexts, _ = self.queries(prefixes)
        last = np.cumsum([len(prefix) + 1 for prefix in prefixes]) - 1  # where the end symbol was predicted
        every = np.tile(np.arange(self.num_symbols), len(prefixes))
        after = np.repeat(contexts[:, last], self.num_symbols, axis=1)
        return self._probabilities(after, every).reshape(len(prefixes), self.num_symbols)

    def draw(self, contexts: IntArray, rng: np.random.Generator) -> IntArray:
        """Draws what follows contexts, by going down the orders as the smoothing does.

        An order's grams are taken with their shares; what is left over is the chance of going on to the next lower.
        So a symbol costs a binary search per order, where `next_symbol` computes all symbols.

        Args:
            contexts: (order or more, B), as `queries` codes them.
            rng: where chance comes from.

        Returns:
            (B,) symbols; `UNKNOWN` among them.
        """
        symbols = np.asarray(rng.integers(0, self.num_symbols, size=contexts.shape[1]))  # what no order decides
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
        """(order, count) contexts before the first symbol of a name, as `queries` codes them."""
        contexts = np.full((self.order, count), -1, dtype=np.int64)
        contexts[:2] = np.array([[0], [self._begin]])
        return contexts

    def next_contexts(self, contexts: IntArray, symbols: IntArray) -> IntArray:
        """(order, B) contexts after one more symbol."""
        shifted = np.where(contexts[:-1] >= 0, contexts[:-1] * self.base + symbols, -1)
        return np.concatenate([np.zeros_like(contexts[:1]), shifted])


class NGramMixture:
    """The mean of models of several orders, symbol by symbol: a little better than any of them."""

    def __init__(self, names: Sequence[str], orders: Sequence[int] = (5, 6, 7)) -> None:
        """Fits one `KneserNey` model for each order; raises ValueError as they do."""
        self.models = [KneserNey(names, order) for order in orders]

    @property
    def num_parameters(self) -> int:
        """Numbers that the models hold: a share for each gram and a left-over mass for each context."""
        return sum(order.num_parameters for model in self.models for order in model.orders)

    @property
    def num_active_parameters(self) -> int:
        """Numbers that one letter's probability is made of: a share and a left-over mass of each order."""
        return sum(2 * model.order for model in self.models)

    def nats(self, names: Sequence[str]) -> FloatArray:
        """(N,) negative log-likelihood of each name with its end symbol, in nats."""
        return mixture_nats(self.models, names)

    def sample(self, count: int, seed: int = 0) -> list[str]:
        """Draws names, letter by letter, cut off at 64 letters. The same seed gives the same names."""
        return sample_mixture(self.models, count, np.random.default_rng(seed))


def mixture_nats(models: Sequence[LetterModel], names: Sequence[str]) -> FloatArray:
    """(N,) negative log-likelihood of each name with its end symbol under the mean of models, in nats."""
    parts = zip(*(model.symbol_probabilities(names) for model in models), strict=True)
    return np.array([-np.log(np.mean(part, axis=0)).sum() for part in parts])


def sample_mixture(models: Sequence[LetterModel], count: int, rng: np.random.Generator) -> list[str]:
    """Draws names from the mean of models of one alphabet: for each letter one of them, then a letter from it."""
    highest = max(models, key=lambda model: model.order)
    contexts = highest.first_contexts(count)
    running = np.arange(count)
    drawn: list[list[int]] = [[] for _ in range(count)]
    for _ in range(_LONGEST_SAMPLE):
        if not running.size:
            break
        symbols = _draw(models, contexts, rng)
        goes_on = symbols != END
        for index, symbol in zip(running[goes_on].tolist(), symbols[goes_on].tolist(), strict=True):
            drawn[index].append(symbol)
        contexts = highest.next_contexts(contexts[:, goes_on], symbols[goes_on])
        running = running[goes_on]
    return ["".join(highest.alphabet[symbol - 2] for symbol in symbols) for symbols in drawn]


def _draw(models: Sequence[LetterModel], contexts: IntArray, rng: np.random.Generator) -> IntArray:
    """(B,) one symbol for each context. No letter stands for an unknown character: it is drawn again."""
    symbols = np.full(contexts.shape[1], UNKNOWN, dtype=np.int64)
    while (again := np.flatnonzero(symbols == UNKNOWN)).size:
        chosen = rng.integers(0, len(models), size=again.size)
        for index, model in enumerate(models):
            rows = again[chosen == index]
            if rows.size:
                symbols[rows] = model.draw(contexts[:, rows], rng)
    return symbols
