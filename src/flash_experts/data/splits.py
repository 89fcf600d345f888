"""Splits by family, so that the test measures invention and not recall.

Names that look like relatives stay on one side: those that share a rare word, a legend's name before the
comma, or are within a few edits of each other. A split by name alone has relatives on both sides and flatters
every model by about 0.3 bits per character. Where a family goes is a hash of its first name, so it does not
depend on the order of the cards, and a card that is added moves no family but its own.
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
RARE_WORD = range(2, 6)  # a word in so many names makes them a family
LETTERS_PER_EDIT = 5  # so does one edit in so many letters of the longer: a normalized distance of 0.2
VALIDATION_FROM, TEST_FROM = 0.8, 0.9  # of the hash of a family's first name, 0 to 1
IID_SHARE = 0.06  # of the training side
LARGEST_HELD_OUT = 0.05  # a family with more of the names than this would be half a test by itself: it trains
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Split:
    """Cards by split.

    Attributes:
        parts: the four splits, each in the order of the cards.
        families: how many.
        largest_family: names in the largest.
        oversized: families kept in training for their size (`LARGEST_HELD_OUT`); their hash was not asked.
    """

    parts: dict[str, tuple[Card, ...]]
    families: int
    largest_family: int
    oversized: int


def split_by_family(cards: Sequence[Card]) -> Split:
    """80/10/10 of the families to train, validation and test; 6% of the training side, by name, to test_iid.

    Args:
        cards: with distinct names.

    Raises:
        ValueError: there are so few names that a split stays empty.
    """
    groups = families([card.name for card in cards])
    limit = max(1, LARGEST_HELD_OUT * len(cards))
    oversized = {place for place, group in enumerate(groups) if len(group) > limit}
    split_of = [""] * len(cards)
    for place, group in enumerate(groups):
        names = sorted((cards[index].name for index in group), key=lambda name: (normal_form(name), name))
        side = "train" if place in oversized else _side(names[0])
        for index in group:
            iid = side == "train" and _hash("iid", cards[index].name) < IID_SHARE
            split_of[index] = "test_iid" if iid else side
    parts: dict[str, list[Card]] = {name: [] for name in SPLITS}
    for card, name in zip(cards, split_of, strict=True):
        parts[name].append(card)
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        raise ValueError(
            f"{len(cards)} names in {len(groups)} families are too few, none falls to {' and '.join(empty)}: "
            "give 200 names or more"
        )
    largest = max(map(len, groups))
    return Split({name: tuple(part) for name, part in parts.items()}, len(groups), largest, len(oversized))


def _side(first_name: str) -> str:
    share = _hash("family", first_name)
    return "train" if share < VALIDATION_FROM else "validation" if share < TEST_FROM else "test"


def _hash(purpose: str, name: str) -> float:
    """A number from 0 to under 1 that is always the same for a name. Another purpose gives another number."""
    digest = hashlib.sha256(f"{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def families(names: Sequence[str]) -> list[list[int]]:
    """Groups of the indices of related names; a name without relatives is a group of its own.

    Relation is passed on: if A is near B and B shares a rare word with C, then all three are one family.

    Args:
        names: distinct.

    Returns:
        Ascending indices, groups in the order of their first one.
    """
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
    """Pairs of related names, enough of them to connect every family."""
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
    """Pairs of texts whose edit distance is at most a fifth of the longer one's length.

    Only texts of like length are compared, with the distance cut off: 30,000 names take about 5 s on one
    core.

    Args:
        keys: names in `normal_form`.

    Raises:
        ValueError: rapidfuzz is not installed.
    """
    try:
        import numpy as np
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise ValueError("the split by family needs rapidfuzz: pip install rapidfuzz") from error
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        by_length[len(key)].append(index)
    for length, longer in sorted(by_length.items()):
        edits = length // LETTERS_PER_EDIT
        if not edits:
            continue
        shorter = [index for near in range(length - edits, length + 1) for index in by_length.get(near, ())]
        texts = [keys[index] for index in shorter]
        for start in range(0, len(longer), _ROWS_AT_ONCE):
            rows = longer[start : start + _ROWS_AT_ONCE]
            # uint16: a cut-off distance comes back as edits + 1.
            distances = cdist(
                [keys[row] for row in rows],
                texts,
                scorer=Levenshtein.distance,
                score_cutoff=edits,
                dtype=np.uint16,
            )
            for row, column in np.argwhere(distances <= edits).tolist():
                if rows[row] != shorter[column]:
                    yield rows[row], shorter[column]
