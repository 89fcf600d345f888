"""Metrics of names as pure functions: bits per character, bootstrap intervals, near-duplicates, diversity, AUC.

Shape suffixes: N names, P pairs of names, R resamples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flash_experts.data.card_table import is_since_2025
from flash_experts.data.cards import Card

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
NATS_PER_BIT = math.log(2.0)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
NEAR = 0.2  # edits per character of the longer name, at most, between near-duplicates
_Z = 1.959964  # standard deviations of a 95% interval
_COMPARED_AT_ONCE = 64  # names against all known ones, to bound the memory of the distances
_RESAMPLED_AT_ONCE = 2**22  # numbers drawn at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point estimate with its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether it differs from zero significantly (5% level, two-sided)."""
        return self.low > 0.0 or self.high < 0.0

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bits_per_character(nats_N: npt.ArrayLike, characters_N: npt.ArrayLike) -> float:
    """Sum of nats / ln 2 / sum of characters: independent of the vocabulary, and an upper bound of the true value.

    Args:
        nats_N: negative log-likelihood of each name and its EOS token.
        characters_N: characters of each name, plus one for the EOS token.
    """
    nats, characters = _same_length(nats_N, characters_N)
    return float(nats.sum() / NATS_PER_BIT / characters.sum())


def ratio_of_sums(
    numerators_N: npt.ArrayLike, denominators_N: npt.ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), with a 95% percentile bootstrap interval over names (Efron 1979).

    Names of one family are not independent, so on a split by family the interval is somewhat narrow.
    """
    numerators, denominators = _same_length(numerators_N, denominators_N)
    count = numerators.size
    rng = np.random.default_rng(seed)
    ratios = []
    left = resamples
    while left:
        rows = max(1, min(left, _RESAMPLED_AT_ONCE // count))
        drawn_RN = rng.integers(0, count, size=(rows, count))
        ratios.append(numerators[drawn_RN].sum(axis=1) / denominators[drawn_RN].sum(axis=1))
        left -= rows
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Estimate(float(numerators.sum() / denominators.sum()), float(low), float(high))


def bits_estimate(nats_N: npt.ArrayLike, characters_N: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """`bits_per_character` with its interval."""
    return ratio_of_sums(np.asarray(nats_N, dtype=np.float64) / NATS_PER_BIT, characters_N, seed=seed)


def paired_bits_difference(nats_a_N: npt.ArrayLike, nats_b_N: npt.ArrayLike, characters_N: npt.ArrayLike) -> Estimate:
    """Bits per character of ``a`` minus ``b`` on the same names, by a paired bootstrap.

    The interval is much narrower than that of either, since both find the same names hard.
    """
    nats_a, nats_b = _same_length(nats_a_N, nats_b_N)
    return bits_estimate(nats_a - nats_b, characters_N)


def word_association(nats_own_P: npt.ArrayLike, nats_swapped_P: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """How many bits the first word of a two-word name saves on the second word, per name.

    In a pair of names whose second words are swapped, the first words cancel, which leaves the pointwise mutual
    information of the two words: zero if they are independent.
    """
    own, swapped = _same_length(nats_own_P, nats_swapped_P)
    return ratio_of_sums((swapped - own) / NATS_PER_BIT, np.full(own.size, 2.0), seed=seed)


def share(hits_N: npt.ArrayLike) -> Estimate:
    """A proportion with its 95% interval: bootstrap, or Wilson's (1927) where none or all are hits."""
    hits = np.asarray(hits_N, dtype=np.float64)
    total = hits.size
    if total and hits.min() == hits.max():
        return Estimate(float(hits[0]), *wilson(int(hits.sum()), total))
    return ratio_of_sums(hits, np.ones(total))


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927)."""
    share, square = hits / total, _Z**2
    middle = (hits + square / 2) / (total + square)
    spread = _Z / (total + square) * math.sqrt(total * share * (1 - share) + square / 4)
    return max(0.0, middle - spread), min(1.0, middle + spread)


def words(name: str) -> list[str]:
    """Splits a name into words in lower case: ``"Lim-Dûl's Vault"`` gives ``lim-dûl's`` and ``vault``."""
    return [word.casefold().replace("’", "'") for word in _WORD.findall(name)]


def near_duplicates(keys: Sequence[str], known: Sequence[str], at_least: int = 1) -> npt.NDArray[np.bool_]:
    """(N,) whether a name has known ones within a normalized edit distance of `NEAR`, all in normal form.

    ``at_least``: number of near known names; 2 for names that are known themselves.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    near = np.zeros(len(keys), dtype=np.bool_)
    if not known:
        return near
    for start in range(0, len(keys), _COMPARED_AT_ONCE):
        some = slice(start, start + _COMPARED_AT_ONCE)
        # Distances over the cutoff are returned as 1.
        distances = cdist(keys[some], known, scorer=Levenshtein.normalized_distance, score_cutoff=NEAR)
        near[some] = (distances <= NEAR).sum(axis=1) >= at_least
    return near


@dataclass(frozen=True, slots=True)
class Memorization:
    """The hit ratio and its counts.

    Attributes:
        ratio: hit rate of training names / hit rate of held-out names: 1 without memorization; 10 means that nine of
            ten generated training names were memorized. None without hits. Use 10,000 samples or more.
    """

    train_hits: int
    held_out_hits: int
    ratio: Estimate | None


def hit_ratio(samples: Set[str], train: Set[str], held_out: Set[str]) -> Memorization:
    """Measures memorization by the hit ratio of names in normal form.

    Half a hit is added on each side (Haldane 1956); the interval is the normal approximation of the logarithm (Katz et
    al. 1978). ``held_out`` are unseen names of the same families: others are hit less often, as after memorization.
    """
    held_out = held_out - train
    in_train, in_held_out = len(samples & train), len(samples & held_out)
    if not (in_train or in_held_out) or not train or not held_out:
        return Memorization(in_train, in_held_out, None)
    value = ((in_train + 0.5) / len(train)) / ((in_held_out + 0.5) / len(held_out))
    spread = _Z * math.sqrt(1 / (in_train + 0.5) + 1 / (in_held_out + 0.5))
    return Memorization(in_train, in_held_out, Estimate(value, value * math.exp(-spread), value * math.exp(spread)))


def distinct_in(items: Sequence[Hashable], count: int) -> float | None:
    """The expected number of distinct items in ``count`` drawn ones: rarefaction (Hurlbert 1971); None for fewer."""
    total = len(items)
    if total < count:
        return None
    # An item that occurs n times is missed with probability C(total - n, count) / C(total, count).
    log_missed = {
        n: math.lgamma(total - n + 1) - math.lgamma(total - n - count + 1) if total - n >= count else -math.inf
        for n in set(Counter(items).values())
    }
    offset = math.lgamma(total - count + 1) - math.lgamma(total + 1)
    return sum(1.0 - math.exp(log_missed[n] + offset) for n in Counter(items).values())


@dataclass(frozen=True, slots=True)
class WordMetrics:
    """Words of a list of names; ``unseen_share`` is on no training name."""

    total: int
    distinct: int
    unseen_share: float


def word_metrics(names: Iterable[str], seen: frozenset[str] | set[str]) -> WordMetrics:
    """Counts words; ``seen`` has those of the training names."""
    counts = Counter(word for name in names for word in words(name))
    total = sum(counts.values())
    unseen = sum(count for word, count in counts.items() if word not in seen)
    return WordMetrics(total, len(counts), unseen / total if total else 0.0)


def jensen_shannon(first: Iterable[int], second: Iterable[int]) -> float:
    """The Jensen-Shannon divergence of two samples in bits (Lin 1991): 0 if equally distributed, 1 if disjoint."""
    counts, others = Counter(first), Counter(second)
    if not counts or not others:
        raise ValueError("no names to measure: give at least one of each kind")
    divergence = 0.0
    for value in counts.keys() | others.keys():
        p, q = counts[value] / counts.total(), others[value] / others.total()
        middle = (p + q) / 2.0
        divergence += sum(0.5 * x * math.log2(x / middle) for x in (p, q) if x)
    return divergence


def auc_estimate(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> Estimate:
    """The area under the ROC curve with DeLong et al.'s (1988) interval, by midranks (Sun and Xu 2014).

    ``scores_N`` are higher for label 1. Where they separate all, whose variance is 0, the interval is Wilson's for as
    many names as the smaller kind has.
    """
    scores, labels = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N)
    ones, zeros = scores[labels == 1], scores[labels == 0]
    if not ones.size or not zeros.size:
        raise ValueError("no names to measure: an AUC needs names of both kinds")
    ranks = _midranks(np.concatenate([ones, zeros]))
    beaten_by_ones = (ranks[: ones.size] - _midranks(ones)) / zeros.size
    beating_zeros = 1.0 - (ranks[ones.size :] - _midranks(zeros)) / ones.size
    value = float(beaten_by_ones.mean())
    if value in (0.0, 1.0):
        fewer = min(ones.size, zeros.size)
        return Estimate(value, *wilson(round(value * fewer), fewer))
    variance = sum(float(some.var(ddof=1)) / some.size for some in (beaten_by_ones, beating_zeros) if some.size > 1)
    spread = _Z * math.sqrt(variance)
    return Estimate(value, max(0.0, value - spread), min(1.0, value + spread))


def _midranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def colors_of(card: Card) -> tuple[str, ...]:
    """The color group of a card: its letter, ``multicolor`` or ``colorless``; empty if unknown."""
    if card.colors is None:
        return ()
    if not card.colors:
        return ("colorless",)
    return card.colors if len(card.colors) == 1 else ("multicolor",)


@dataclass(frozen=True, slots=True)
class GroupBits:
    """Bits per character of one group of names, unconditional and given all attributes."""

    names: int
    bits: Estimate
    conditional: Estimate


UNTIL_2024, SINCE_2025 = "until 2024", "since 2025"


def years_of(card: Card) -> tuple[str, ...]:
    """When a card of the embedded table was first printed."""
    is_recent = is_since_2025(card.source_id)
    return () if is_recent is None else (SINCE_2025 if is_recent else UNTIL_2024,)


def bits_by_group(
    nats_N: npt.ArrayLike,
    conditional_nats_N: npt.ArrayLike,
    characters_N: npt.ArrayLike,
    cards: Sequence[Card],
    groups_of: Callable[[Card], tuple[str, ...]],
) -> dict[str, GroupBits]:
    """Bits per character of each group, the largest group first."""
    nats, characters = _same_length(nats_N, characters_N)
    conditional, _ = _same_length(conditional_nats_N, characters_N)
    assert len(cards) == nats.size
    members: dict[str, list[int]] = {}
    for index, card in enumerate(cards):
        for group in groups_of(card):
            members.setdefault(group, []).append(index)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        group: GroupBits(
            len(rows),
            bits_estimate(nats[rows], characters[rows]),
            bits_estimate(conditional[rows], characters[rows]),
        )
        for group, rows in ordered
    }


def _same_length(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 vectors; raises ValueError if they are empty."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size == 0:
        raise ValueError("no names to measure: give at least one")
    assert a.ndim == 1 and a.shape == b.shape
    return a, b
