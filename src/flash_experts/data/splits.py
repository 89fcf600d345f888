"""Train, validation and test splits by family, so that the test does not reward memorized relatives.

A family are names that share a rare word or a legend's name before the comma, or are within a small edit distance. A
hash of its first name picks the split, so the order of cards does not matter, and a new card moves only its own family.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flash_experts.data.cards import Card
from flash_experts.data.names import family_words, normal_form, shown_form

SPLITS = ("train", "validation", "test", "test_iid")
RARE_WORD = range(2, 6)  # number of names with a word that makes them a family
CHARACTERS_PER_EDIT = 5  # one edit per this many also does: a normalized distance of 0.2
VALIDATION_FROM, TEST_FROM = 0.8, 0.9  # bounds for the hash of a family's first name, 0 to 1
IID_SHARE = 0.06  # share of the training side
LARGEST_HELD_OUT = 0.05  # a larger share of the names in one family would dominate a test split: it trains
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Split:
    """Cards by split, each in the order of the cards."""

    parts: dict[str, tuple[Card, ...]]
    families: int
    largest_family: int
    oversized: int  # families that were kept in training for their size (`LARGEST_HELD_OUT`)


def split_by_family(cards: Sequence[Card]) -> Split:
    """Splits cards of distinct names 80/10/10 by family; 6% of the training names, by name, become test_iid.

    Raises:
        ValueError: there are too few names to fill a split.
    """
    groups = families([card.name for card in cards])
    limit = max(1, LARGEST_HELD_OUT * len(cards))
    oversized = {place for place, group in enumerate(groups) if len(group) > limit}
    split_of = [""] * len(cards)
    for place, group in enumerate(groups):
        names = sorted((cards[index].name for index in group), key=lambda name: (normal_form(name), name))
        share = _hash("family", names[0])
        side = "test" if share >= TEST_FROM else "validation" if share >= VALIDATION_FROM else "train"
        side = "train" if place in oversized else side
        for index in group:
            iid = side == "train" and _hash("iid", cards[index].name) < IID_SHARE
            split_of[index] = "test_iid" if iid else side
    parts: dict[str, list[Card]] = {name: [] for name in SPLITS}
    for card, name in zip(cards, split_of, strict=True):
        parts[name].append(card)
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        raise ValueError(
            f"{len(cards)} names in {len(groups)} families are too few to fill {' and '.join(empty)}: "
            "give 200 names or more"
        )
    largest = max(map(len, groups))
    return Split({name: tuple(part) for name, part in parts.items()}, len(groups), largest, len(oversized))


def _hash(purpose: str, name: str) -> float:
    """A reproducible number in [0, 1) for a name, independent for each purpose."""
    digest = hashlib.sha256(f"{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def families(names: Sequence[str]) -> list[list[int]]:
    """Groups indices of related names (connected components), ascending; a name without relatives is its own group."""
    parents = list(range(len(names)))

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = item = parents[parents[item]]
        return item

    for first, second in _relations(names):
        older, younger = sorted((root(first), root(second)))
        parents[younger] = older
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(names)):
        groups[root(index)].append(index)
    return list(groups.values())


def _relations(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of related names, enough to connect every family."""
    by_word: dict[str, list[int]] = defaultdict(list)
    by_legend: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        for word in family_words(name):
            by_word[word].append(index)
        before, comma, _ = shown_form(name).partition(", ")
        if comma:
            by_legend[normal_form(before)].append(index)
    for related in by_word.values():
        if len(related) in RARE_WORD:
            yield from pairwise(related)
    for related in by_legend.values():
        yield from pairwise(related)
    yield from near_pairs([normal_form(name) for name in names])


def near_pairs(keys: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of normal forms whose Levenshtein distance is at most a fifth of the longer one's length."""
    import numpy as np
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    by_length: dict[int, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        by_length[len(key)].append(index)
    for length, longer in sorted(by_length.items()):
        edits = length // CHARACTERS_PER_EDIT
        if not edits:
            continue
        shorter = [index for near in range(length - edits, length + 1) for index in by_length.get(near, ())]
        texts = [keys[index] for index in shorter]
        for start in range(0, len(longer), _ROWS_AT_ONCE):
            rows = longer[start : start + _ROWS_AT_ONCE]
            queries = [keys[row] for row in rows]
            # uint16: a cut-off distance comes back as edits + 1.
            distances = cdist(queries, texts, scorer=Levenshtein.distance, score_cutoff=edits, dtype=np.uint16)
            for row, column in np.argwhere(distances <= edits).tolist():
                if rows[row] != shorter[column]:
                    yield rows[row], shorter[column]
