"""Specialized experts are distinguished from chance, and noise is not significant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flash_experts.evaluation.routing.specialization import LabelSet, mutual_information, specializations


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[8, 0], [0, 8]], 1.0),
        ([[5, 5], [2, 2]], 0.0),
        ([[3, 1], [1, 3]], 0.1887218755),  # 1 - H(1/4)
        ([[2, 0, 0], [0, 1, 1]], 1.0),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_mutual_information_on_worked_numbers(counts: list[list[int]], bits: float) -> None:
    assert mutual_information(counts) == pytest.approx(bits)


def synthetic(seed: int, names: int = 60, length: int = 5, experts: int = 4) -> tuple[np.random.Generator, Any, Any]:
    """(rng, (T,) name of each token, (N,) type of each name at random)."""
    rng = np.random.default_rng(seed)
    return rng, np.repeat(np.arange(names), length), rng.integers(0, 2, names)


def chosen(expert_T: Any, experts: int = 4) -> Any:
    return np.eye(experts, dtype=bool)[expert_T]


def test_a_specialized_router_is_significant_and_a_random_one_is_not() -> None:
    rng, name_T, type_N = synthetic(0)
    label = LabelSet("card type", ("Creature", "Instant"), type_N[name_T], "names")
    parted = np.where(type_N[name_T] == 0, 1, rng.choice([0, 2, 3], len(name_T)))
    random = rng.integers(0, 4, len(name_T))
    shows, shows_not = specializations([label], [chosen(parted), chosen(random)], [1, 3], name_T)
    entropy = -sum(share * np.log2(share) for share in np.bincount(type_N[name_T]) / len(name_T))
    assert shows.block == 1 and shows.is_specialized and shows.p_value == pytest.approx(1 / 200)
    assert shows.information == pytest.approx(entropy), "expert 1 determines the type"
    assert shows.share[0] == (0.0, 1.0, 0.0, 0.0) and shows.marks[0][1] == 1 and shows.marks[1][1] == -1
    assert not shows_not.is_specialized and shows_not.information < 0.03
    assert 0 < shows_not.shuffled <= shows_not.shuffled_high, "estimates from counts are biased upwards"
    assert not np.any(shows_not.marks)


def test_a_page_of_noise_seldom_calls_anything_specialized() -> None:
    """Three labels and four layers of a random router: at most 5% of pages are significant, so 3 of 20 are rare."""
    pages = 0
    for seed in range(20):
        rng, name_T, type_N = synthetic(seed)
        labels = [
            LabelSet("card type", ("Creature", "Instant"), type_N[name_T], "names"),
            LabelSet("place", tuple("12345"), np.tile(np.arange(5), 60), "within names"),
            LabelSet("token", tuple("abc"), rng.integers(0, 3, len(name_T)), "tokens"),
        ]
        layers = [chosen(rng.integers(0, 4, len(name_T))) for _ in range(4)]
        found = specializations(labels, layers, [0, 1, 2, 3], name_T, shuffles=99, seed=seed)
        assert len(found) == 12
        pages += any(each.is_specialized for each in found)
    assert pages <= 3


def test_dependent_tokens_of_a_name_are_not_taken_for_specialization() -> None:
    """Every name goes to an expert of its own choice. Shuffling its tokens apart would call that a preference."""
    calls = {"names": 0, "tokens": 0}
    for seed in range(10):
        rng, name_T, type_N = synthetic(seed, names=40, length=12)
        layer = chosen(rng.integers(0, 4, 40)[name_T])
        for unit in ("names", "tokens"):
            label = LabelSet("card type", ("Creature", "Instant"), type_N[name_T], unit)  # type: ignore[arg-type]
            (found,) = specializations([label], [layer], [0], name_T, shuffles=99, seed=seed)
            calls[unit] += found.is_specialized
    assert calls["names"] <= 2 < 5 <= calls["tokens"]


def test_small_groups_are_left_out() -> None:
    _, name_T, type_N = synthetic(0, names=30)
    type_N[:] = np.r_[np.zeros(20, int), np.ones(9, int), [2]]  # 9 names of 45 tokens, and one of 5
    layer = chosen(np.zeros(len(name_T), int))
    label = LabelSet("card type", ("Creature", "Instant", "Land"), type_N[name_T], "names")
    assert specializations([label], [layer], [0], name_T) == [], "one group is not enough"
    (found,) = specializations(
        [LabelSet("card type", ("Creature", "Instant", "Land"), type_N[name_T], "tokens")], [layer], [0], name_T
    )
    assert found.groups == ("Creature", "Instant") and found.tokens == (100, 45)
    assert found.information == 0.0 and not found.is_specialized, "one expert takes all: no information"


def test_marks_are_of_shares_whatever_the_lengths_of_names() -> None:
    """Long names are of one type, and routing is random: that type has more tokens everywhere, and no mark."""
    rng = np.random.default_rng(0)
    type_N = np.repeat([0, 1], 30)
    name_T = np.repeat(np.arange(60), np.where(type_N == 0, 12, 3))
    label = LabelSet("card type", ("Creature", "Instant"), type_N[name_T], "names")
    parted = np.where(rng.random(len(name_T)) < 0.5, type_N[name_T], rng.integers(0, 4, len(name_T)))
    shows, shows_not = specializations(
        [label], [chosen(parted), chosen(rng.integers(0, 4, len(name_T)))], [0, 1], name_T
    )
    assert shows.marks[0][0] == 1 == shows.marks[1][1] and shows.marks[0][1] == -1 == shows.marks[1][0]
    assert not np.any(shows_not.marks) and shows_not.tokens == (360, 90)
