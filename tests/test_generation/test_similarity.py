"""Nearest real cards."""

from __future__ import annotations

import random
import time

import pytest

from flash_experts.data.names import normal_form
from flash_experts.generation import KnownNames


def _distance(one: str, other: str) -> int:
    """Levenshtein by the book, as the reference."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_nearest_is_the_one_of_least_edit_distance() -> None:
    known = ["Goblin Guide", "Goblin King", "Lightning Bolt", "Jötun Grunt"]
    queries = ["Goblin Ring", "jotun GRUNTS", "Lightning Dolt", "Qq"]
    found = KnownNames(tuple(known)).nearest(queries)
    for query, (card, similarity) in zip(queries, found, strict=True):
        one = normal_form(query)
        forms = [normal_form(name) for name in known]
        best = max(1 - _distance(one, form) / max(len(one), len(form)) for form in forms)
        assert similarity == pytest.approx(best, abs=1e-6)
        assert card in known
    assert [card for card, _ in found[:3]] == ["Goblin King", "Jötun Grunt", "Lightning Bolt"]


def test_a_known_name_is_wholly_similar_and_shown_as_on_its_card() -> None:
    assert KnownNames(("Lim-Dûl's Vault",)).nearest(["LIM-DUL'S VAULT"]) == [("Lim-Dûl's Vault", 1.0)]


def test_nothing_known() -> None:
    assert KnownNames(()).nearest(["Goblin"]) == [(None, 0.0)]
    assert KnownNames(("!!!",)).normal_forms == frozenset()


def test_twenty_names_against_35000_are_quick() -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    known = KnownNames(tuple("".join(rng.choices(letters, k=rng.randint(8, 24))) for _ in range(35_000)))
    names = ["".join(rng.choices(letters, k=17)) for _ in range(20)]
    known.nearest(names[:1])  # normal forms of the known names are made once
    start = time.thread_time()  # other processes take none of it
    known.nearest(names)
    assert time.thread_time() - start < 0.3
