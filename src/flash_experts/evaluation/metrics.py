"""What is measured of names, as pure functions on numbers and strings.

Letters in the shapes: N names, R resamples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import Card

FloatArray = npt.NDArray[np.float64]
NATS_PER_BIT = math.log(2.0)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
NEAR = 0.2  # edits per letter: at most this far apart, two names are near-duplicates
_COMPARED_AT_ONCE = 64  # names against all known ones: 9 MB of distances
_RESAMPLED_AT_ONCE = 2**22  # numbers drawn at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure of a sample, and the interval in which that of the population lies with 95% confidence."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the figure differs from zero significantly (at the 5% level, two-sided)."""
        return self.low > 0.0 or self.high < 0.0

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bits_per_character(nats_N: npt.ArrayLike, characters_N: npt.ArrayLike) -> float:
    """Bits that a model needs per character of names: sum of nats / ln 2 / sum of characters.

    It does not depend on the tokenizer, so models with different vocabularies compare. Summed over the one
    tokenization that a tokenizer gives, it is an upper bound of the true figure.

    Args:
        nats_N: (N,) negative log-likelihood of each name and its end symbol, in nats.
        characters_N: (N,) letters of each name, plus one for the end symbol.

    Raises:
        ValueError: there is no name.
    """
    nats, characters = _same_length(nats_N, characters_N)
    return float(nats.sum() / NATS_PER_BIT / characters.sum())


def ratio_of_sums(
    numerators_N: npt.ArrayLike, denominators_N: npt.ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), with a 95% percentile bootstrap interval over names.

    Names are taken as independent draws. Those of one family are not quite, so on a split by family the
    interval is somewhat narrow.

    Args:
        numerators_N: (N,) what is summed: bits, or 0 and 1.
        denominators_N: (N,) what it is divided by: characters, or ones.
        resamples: bootstrap samples (Efron 1979).
        seed: of the resampling. The same seed and N resample the same names.

    Raises:
        ValueError: there is no name.
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


def paired_bits_difference(
    nats_a_N: npt.ArrayLike, nats_b_N: npt.ArrayLike, characters_N: npt.ArrayLike, *, seed: int = 0
) -> Estimate:
    """Bits per character of ``a`` less those of ``b`` on the same names, by a paired bootstrap over names.

    Both models find the same names hard, so their difference is known far better than either figure. The
    ratio is linear in its numerator: the bootstrap of the difference is that of the names' own differences.
    """
    nats_a, nats_b = _same_length(nats_a_N, nats_b_N)
    return bits_estimate(nats_a - nats_b, characters_N, seed=seed)


def word_association(nats_own_P: npt.ArrayLike, nats_swapped_P: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Bits by which the second word of a two-word name is likelier after its own first word than after another's.

    Names come in pairs that swap their second words. What the first words cost is the same before and after, so it
    cancels within each pair, and what is left is what the first word says about the second. Zero means that the
    model's words do not know each other; a word that is common everywhere counts nothing.

    Args:
        nats_own_P: (P,) nats of both names of each pair together.
        nats_swapped_P: (P,) the same with their second words swapped.
        seed: of the bootstrap over pairs.

    Returns:
        Bits a name, with a 95% interval.
    """
    own, swapped = _same_length(nats_own_P, nats_swapped_P)
    return ratio_of_sums((swapped - own) / NATS_PER_BIT, np.full(own.size, 2.0), seed=seed)


def share(hits_N: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """The share of names of which something is true, with its interval.

    Where none or all are, resampling sees no variation; Wilson's (1927) interval is used, which does not
    collapse.
    """
    hits = np.asarray(hits_N, dtype=np.float64)
    total = hits.size
    if total and hits.min() == hits.max():
        square = 1.959964**2
        width = square / (total + square)
        return Estimate(0.0, 0.0, width) if hits[0] == 0.0 else Estimate(1.0, 1.0 - width, 1.0)
    return ratio_of_sums(hits, np.ones(total), seed=seed)


def words(name: str) -> list[str]:
    """Words of a name in lower case: ``"Lim-Dûl's Vault"`` has ``lim-dûl's`` and ``vault``."""
    return [word.casefold().replace("’", "'") for word in _WORD.findall(name)]


def exact_known_rate(keys: Sequence[str], known: frozenset[str] | set[str]) -> Estimate:
    """Share of names that are known.

    Args:
        keys: names in `flash_experts.data.names.normal_form`.
        known: known names in the same form.
    """
    return share([key in known for key in keys])


def near_duplicates(keys: Sequence[str], known: Sequence[str], at_least: int = 1) -> npt.NDArray[np.bool_] | None:
    """Of each name, whether a known one is within `NEAR` edits per letter of the longer (copies are).

    Args:
        keys: names in `flash_experts.data.names.normal_form`.
        known: known names in the same form, each once.
        at_least: how many must be: 2 for names that are known themselves.

    Returns:
        (N,), or None where rapidfuzz is not installed.
    """
    if find_spec("rapidfuzz") is None:
        return None
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    near = np.zeros(len(keys), dtype=np.bool_)
    if not known:
        return near
    for start in range(0, len(keys), _COMPARED_AT_ONCE):
        some = slice(start, start + _COMPARED_AT_ONCE)
        # Those over the cutoff come out as 1.
        distances = cdist(keys[some], known, scorer=Levenshtein.normalized_distance, score_cutoff=NEAR)
        near[some] = (distances <= NEAR).sum(axis=1) >= at_least
    return near


def distinct_share(keys: Sequence[Hashable]) -> float:
    """Distinct items / items. It falls with the number of items: compare equal numbers.

    Raises:
        ValueError: there is none.
    """
    if not keys:
        raise ValueError("no names to measure: give at least one")
    return len(set(keys)) / len(keys)


def distinct_in(items: Sequence[Hashable], count: int) -> float | None:
    """Distinct items to expect in a draw of ``count`` of them without replacement (rarefaction, Hurlbert 1971).

    It makes lists of different lengths comparable. None where there are fewer.
    """
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
class WordFigures:
    """Words of a list of names: how many, how many distinct, and the share that ``seen`` does not hold."""

    total: int
    distinct: int
    unseen_share: float


def word_figures(names: Iterable[str], seen: frozenset[str] | set[str]) -> WordFigures:
    """Counts words; ``seen`` holds the words of the training names as `words` gives them."""
    counts = Counter(word for name in names for word in words(name))
    total = sum(counts.values())
    unseen = sum(count for word, count in counts.items() if word not in seen)
    return WordFigures(total, len(counts), unseen / total if total else 0.0)


def jensen_shannon(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Jensen-Shannon divergence of two histograms (Lin 1991): 0 bits for one shape, 1 bit for disjoint ones.

    Args:
        first: a count for each value.
        second: the same. They need not add up to the same sum.

    Raises:
        ValueError: a histogram is empty.
    """
    total_first, total_second = sum(first.values()), sum(second.values())
    if not total_first or not total_second:
        raise ValueError("no names to measure: a histogram is empty")
    divergence = 0.0
    for value in first.keys() | second.keys():
        p, q = first.get(value, 0) / total_first, second.get(value, 0) / total_second
        middle = (p + q) / 2.0
        divergence += sum(0.5 * x * math.log2(x / middle) for x in (p, q) if x)
    return divergence


def length_divergence(names: Sequence[str], real: Sequence[str]) -> float:
    """`jensen_shannon` of the numbers of characters."""
    return jensen_shannon(Counter(map(len, names)), Counter(map(len, real)))


def word_count_divergence(names: Sequence[str], real: Sequence[str]) -> float:
    """`jensen_shannon` of the numbers of words."""
    counts, real_counts = (Counter(len(name.split()) for name in some) for some in (names, real))
    return jensen_shannon(counts, real_counts)


def auc_estimate(scores_N: npt.ArrayLike, labels_N: npt.ArrayLike) -> Estimate:
    """Area under the ROC curve: the chance that a name of label 1 scores higher than one of label 0, ties half.

    The interval is that of DeLong et al. (1988), by midranks (Sun and Xu 2014).

    Args:
        scores_N: (N,) higher for label 1.
        labels_N: (N,) 0 and 1, both there.

    Raises:
        ValueError: one of the labels is missing.
    """
    scores, labels = np.asarray(scores_N, dtype=np.float64), np.asarray(labels_N)
    ones, zeros = scores[labels == 1], scores[labels == 0]
    if not ones.size or not zeros.size:
        raise ValueError("no names to measure: an AUC needs names of both kinds")
    ranks = _midranks(np.concatenate([ones, zeros]))
    beaten_by_ones = (ranks[: ones.size] - _midranks(ones)) / zeros.size
    beating_zeros = 1.0 - (ranks[ones.size :] - _midranks(zeros)) / ones.size
    value = float(beaten_by_ones.mean())
    variance = sum(float(some.var(ddof=1)) / some.size for some in (beaten_by_ones, beating_zeros) if some.size > 1)
    spread = 1.959964 * math.sqrt(variance)
    return Estimate(value, max(0.0, value - spread), min(1.0, value + spread))


def _midranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def types_of(card: Card) -> tuple[str, ...]:
    """Groups of a card by type: each of its types (an artifact creature counts in both)."""
    return card.types


def colors_of(card: Card) -> tuple[str, ...]:
    """The group of a card by color: its letter, ``multicolor`` or ``colorless``; none where it is unknown."""
    if card.colors is None:
        return ()
    if not card.colors:
        return ("colorless",)
    return card.colors if len(card.colors) == 1 else ("multicolor",)


@dataclass(frozen=True, slots=True)
class GroupBits:
    """Bits per character of one group of names, nothing told and all attributes told."""

    names: int
    bits: Estimate
    conditional: Estimate


def bits_by_group(
    nats_N: npt.ArrayLike,
    conditional_nats_N: npt.ArrayLike,
    characters_N: npt.ArrayLike,
    cards: Sequence[Card],
    groups_of: Callable[[Card], tuple[str, ...]],
) -> dict[str, GroupBits]:
    """Bits per character of the names of each group, the largest group first."""
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
    """Both as float64 vectors of one length, not empty."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size == 0:
        raise ValueError("no names to measure: give at least one")
    assert a.ndim == 1 and a.shape == b.shape
    return a, b
