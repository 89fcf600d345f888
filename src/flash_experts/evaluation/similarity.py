"""Which names are all but a known one: edit distance against tens of thousands of names, quickly, in numpy.

Two names that are d edits apart differ by at most d in length and by at most d letters either way, so counting
letters rules out nearly all known names. The rest go through Myers' (1999) bit-parallel edit distance in Hyyrö's
(2003) form: one column of the distance matrix is one 64-bit word, and all candidates advance together.

Letters in the shapes: K known names, C candidates, A buckets of letters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NEAR = 0.2  # edits per letter of the longer name, at or under which two names are near-duplicates
_BUCKETS = 32  # lower-case a to z each have one of their own
_MACHINE_WORD = 64  # bits


def edit_distances(name: str, others: Sequence[str]) -> npt.NDArray[np.int64]:
    """Levenshtein distance of one name to each of others: insertions, deletions and substitutions cost one.

    Args:
        name: any string. Up to 64 letters it fits in a machine word; beyond, Python's integers are the words.
        others: strings of any length.

    Returns:
        (C,) int64.
    """
    lengths_C = np.array([len(other) for other in others], dtype=np.int64)
    if not name or not others:
        return lengths_C
    width = int(lengths_C.max())
    word = np.dtype(np.uint64 if len(name) <= _MACHINE_WORD else object)
    full, top = (1 << len(name)) - 1, len(name) - 1
    occurs = {letter: sum(1 << i for i, own in enumerate(name) if own == letter) for letter in set(name)}
    match_CW = np.zeros((len(others), width), dtype=word)
    for row, other in zip(match_CW, others, strict=True):
        row[: len(other)] = [occurs.get(letter, 0) for letter in other]
    plus = np.full(len(others), full, dtype=word)  # bit i: this column's row i + 1 is one more than its row i
    minus = np.zeros(len(others), dtype=word)
    distance = np.full(len(others), len(name), dtype=np.int64)
    for column in range(width):
        match = match_CW[:, column]
        vertical = match | minus
        horizontal = (((match & plus) + plus) ^ plus) | match
        grows = (minus | ~(horizontal | plus)) & full
        shrinks = plus & horizontal & full
        step = ((grows >> top) & 1).astype(np.int64) - ((shrinks >> top) & 1).astype(np.int64)
        distance += np.where(column < lengths_C, step, 0)
        grows = ((grows << 1) | 1) & full
        plus = ((shrinks << 1) | ~(vertical | grows)) & full
        minus = grows & vertical
    return distance


class NearDuplicates:
    """Finds known names within `NEAR` of a name."""

    def __init__(self, known: Sequence[str]) -> None:
        """Indexes known names, in whatever form the names asked about come (`normal_form`, for names of cards)."""
        self._known = sorted(dict.fromkeys(known), key=len)
        self._lengths_K = np.array([len(name) for name in self._known], dtype=np.int64)
        self._counts_KA = np.array([_letters(name) for name in self._known], dtype=np.int8).reshape(-1, _BUCKETS)

    def nearest(self, name: str) -> tuple[str, float] | None:
        """The nearest known name, if it is near, and their edit distance / letters of the longer of the two."""
        # Known names are sorted by length, so those of a length that can be near are one slice.
        shortest, longest = len(name) * (1 - NEAR), len(name) / (1 - NEAR)
        first, last = np.searchsorted(self._lengths_K, [shortest - 1e-9, longest + 1e-9])
        lengths_C = self._lengths_K[first:last]
        longer_C = np.maximum(lengths_C, len(name))
        allowed_C = np.floor(NEAR * longer_C + 1e-9)
        differing_C = np.abs(self._counts_KA[first:last] - np.array(_letters(name), dtype=np.int8)).sum(
            axis=1, dtype=np.int16
        )
        # Letters that only one has, and letters that only the other has: each edit mends at most one of both.
        candidates = np.flatnonzero((differing_C + np.abs(lengths_C - len(name))) / 2 <= allowed_C)
        if not candidates.size:
            return None
        known = [self._known[first + index] for index in candidates]
        distances = edit_distances(name, known)
        shares = distances / np.maximum(longer_C[candidates], 1)
        best = int(shares.argmin())
        if distances[best] > allowed_C[candidates[best]]:
            return None
        return known[best], float(shares[best])

    def near(self, names: Sequence[str]) -> list[bool]:
        """Of each name, whether a known name (itself included) is near."""
        found = {name: self.nearest(name) is not None for name in set(names)}
        return [found[name] for name in names]


def _letters(name: str) -> list[int]:
    """How often letters occur, in buckets: two letters that share one can only hide a difference, never make one."""
    counts = [0] * _BUCKETS
    for letter in name:
        counts[ord(letter) % _BUCKETS] += 1
    return counts
