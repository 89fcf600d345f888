"""Each metric on numbers worked by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_experts.evaluation import metrics
from flash_experts.evaluation.metrics import hit_ratio
from tests.helpers.evaluation import make_card


def test_bits_per_character_weighs_names_by_their_length() -> None:
    # 4 bits for 2 characters and 2 bits for 8: 0.6 in all, not the mean of 2 and 0.25.
    nats = [4 * math.log(2), 2 * math.log(2)]
    assert metrics.bits_per_character(nats, [2, 8]) == pytest.approx(0.6)


def test_word_association_is_the_information_of_the_first_word_on_the_second() -> None:
    """Of a model of pairs of words: its mean pointwise mutual information. First words' own costs cancel."""
    gains = [3.0, 0.0, -1.0]  # bits of each pair of names
    own = np.array([20.0, 31.0, 25.0])
    estimate = metrics.word_association(own * math.log(2), (own + gains) * math.log(2))
    assert estimate.value == pytest.approx(sum(gains) / 6)
    assert estimate.low > -0.51 and estimate.high < 1.51
    nothing = metrics.word_association([1.0] * 9, [1.0] * 9)
    assert nothing == metrics.Estimate(0.0, 0.0, 0.0) and not nothing.excludes_zero


@pytest.mark.parametrize(
    "measure",
    [
        lambda: metrics.bits_per_character([], []),
        lambda: metrics.bits_estimate([], []),
        lambda: metrics.share([]),
        lambda: metrics.jensen_shannon([], [1]),
        lambda: metrics.jensen_shannon([1], []),
        lambda: metrics.auc_estimate([1.0, 2.0], [1, 1]),
    ],
)
def test_no_names_is_an_error(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no names"):
        measure()


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(2.0, 0.5, size=2000)
    estimate = metrics.ratio_of_sums(values, np.ones(2000), resamples=4000)
    error = 1.96 * values.std() / math.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.value == pytest.approx(error, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(error, rel=0.1)


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        characters = rng.integers(5, 20, size=150)
        nats = characters * math.log(2) * 2.0 + rng.normal(0, 3, size=150)  # two bits per character
        estimate = metrics.bits_estimate(nats, characters)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 180 <= covered <= 199


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.arange(50.0)
    for measure in (metrics.ratio_of_sums, metrics.bits_estimate, metrics.word_association):
        first, again, other = (measure(values, np.ones(50), seed=seed) for seed in (3, 3, 4))
        assert first == again
        assert first != other


def test_resamples_that_do_not_fit_into_memory_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    together = metrics.ratio_of_sums(values, np.ones(50), resamples=7)
    for at_once in (150, 1):
        monkeypatch.setattr(metrics, "_RESAMPLED_AT_ONCE", at_once)
        assert metrics.ratio_of_sums(values, np.ones(50), resamples=7) == together


def test_paired_bootstrap_detects_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(5)
    hard = rng.normal(30, 10, size=300)  # names differ far more than the models do
    characters = np.full(300, 15.0)
    first, second = hard, hard + 0.5 + rng.normal(0, 1, size=300)
    apart = [metrics.bits_estimate(nats, characters) for nats in (first, second)]
    assert apart[0].high > apart[1].low  # the intervals overlap
    difference = metrics.paired_bits_difference(first, second, characters)
    assert difference.excludes_zero
    assert difference.value == pytest.approx(apart[0].value - apart[1].value)


def test_paired_bootstrap_finds_nothing_between_equals() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(30, 10, size=300)
    noise = rng.normal(0, 1, size=300)
    difference = metrics.paired_bits_difference(hard, hard + noise - noise.mean(), np.full(300, 15.0))
    assert not difference.excludes_zero


def test_share_of_none_and_all_keeps_an_interval() -> None:
    none, every = metrics.share([False] * 10), metrics.share([True] * 10)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.2775, abs=1e-3)  # Wilson: 0 of 10
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(1 - none.high)


@pytest.mark.parametrize(("hits", "total"), [(1, 10), (5, 10), (9, 10), (300, 1000)])
def test_the_bounds_of_a_proportion_are_where_the_normal_test_just_rejects(hits: int, total: int) -> None:
    """The definition of Wilson's interval: the standard error is that of the bound, not of the estimate."""
    for bound in metrics.wilson(hits, total):
        assert abs(hits / total - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total))


def test_each_of_many_names_is_compared() -> None:
    names = [f"{index:03}goblin" for index in range(200)]
    assert metrics.near_duplicates(names, names[::2]).all(), "one digit in nine characters"
    assert not metrics.near_duplicates(names, ["serraangel"]).any()


def test_near_duplicates_differ_in_at_most_a_fifth_of_the_characters() -> None:
    known = ["goblinguide", "abcde"]
    near = metrics.near_duplicates(["goblinguide", "goblinguild", "abcdx", "abcxx", "goblinking"], known)
    # one edit in eleven, one in five (exactly 0.2), two in five, four in eleven
    assert near.tolist() == [True, True, True, False, False]


def test_a_name_that_is_known_itself_needs_another_one_near() -> None:
    near = metrics.near_duplicates(["goblinguide", "serraangel"], ["goblinguide", "goblinguild", "serraangel"], 2)
    assert near.tolist() == [True, False]


def test_words_keep_apostrophes_accents_and_hyphens() -> None:
    assert metrics.words("Lim-Dûl’s Vault, the 2nd") == ["lim-dûl's", "vault", "the", "2nd"]


def test_word_metrics() -> None:
    figures = metrics.word_metrics(["Goblin King", "Goblin Zorp"], {"goblin", "king"})
    assert figures == metrics.WordMetrics(total=4, distinct=3, unseen_share=0.25)


def test_jensen_shannon_on_worked_histograms() -> None:
    assert metrics.jensen_shannon([1, 2, 2, 1], [1, 2] * 5) == pytest.approx(0.0)
    assert metrics.jensen_shannon([1] * 3, [2] * 9) == pytest.approx(1.0)
    # P = (1, 0), Q = (1/2, 1/2): H(3/4, 1/4) - H(Q) / 2
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert metrics.jensen_shannon([1], [1, 2]) == pytest.approx(entropy - 0.5)


@given(*[st.lists(st.integers(0, 9), min_size=1) for _ in range(2)])
def test_jensen_shannon_is_symmetric_and_between_0_and_1(first: list[int], second: list[int]) -> None:
    divergence = metrics.jensen_shannon(first, second)
    assert divergence == pytest.approx(metrics.jensen_shannon(second, first))
    assert -1e-12 <= divergence <= 1 + 1e-12


def test_bits_by_group_puts_a_card_in_each_of_its_types() -> None:
    cards = [make_card("a", 0), make_card("b", 1), make_card("c", 2)]  # creature, instant, artifact creature
    nats = np.array([1.0, 2.0, 4.0]) * math.log(2)
    groups = metrics.bits_by_group(nats, nats / 2, [1, 1, 2], cards, lambda card: card.types)
    assert groups["Creature"].conditional.value == pytest.approx(5 / 6)
    assert {name: (group.names, group.bits.value) for name, group in groups.items()} == {
        "Creature": (2, pytest.approx(5 / 3)),
        "Artifact": (1, pytest.approx(2.0)),
        "Instant": (1, pytest.approx(2.0)),
    }
    assert next(iter(groups)) == "Creature"
    assert set(metrics.bits_by_group(nats, nats, [1, 1, 2], cards, metrics.colors_of)) == {
        "colorless",
        "R",
        "multicolor",
    }


def test_auc_on_worked_numbers() -> None:
    # Pairs (1, 0): 3 > 1, 3 > 2, 2 > 1, 2 = 2 (half): 3.5 of 4.
    assert metrics.auc_estimate([3, 2, 1, 2], [1, 1, 0, 0]).value == pytest.approx(3.5 / 4)
    assert metrics.auc_estimate([5, 6, 1, 2], [1, 1, 0, 0]).value == 1.0
    assert metrics.auc_estimate([1, 2, 5, 6], [1, 1, 0, 0]).value == 0.0
    assert metrics.auc_estimate([4, 4, 4, 4], [1, 1, 0, 0]).value == 0.5


def test_the_interval_of_an_auc_on_worked_numbers() -> None:
    """DeLong: on each side, the shares of the other side that a name is ahead of are 1 and 3 / 4, variance 1 / 32."""
    estimate = metrics.auc_estimate([3, 2, 1, 2], [1, 1, 0, 0])
    assert estimate.value - estimate.low == pytest.approx(1.959964 * math.sqrt((1 / 32) / 2 + (1 / 32) / 2))
    # Sides of two and three names: shares 1 and 2 / 3 of three, and 1, 1 and 1 / 2 of two.
    estimate = metrics.auc_estimate([5, 2, 1, 1, 3], [1, 1, 0, 0, 0])
    assert estimate.value - estimate.low == pytest.approx(1.959964 * math.sqrt((1 / 18) / 2 + (1 / 12) / 3))


def test_auc_of_separated_names_keeps_an_interval() -> None:
    every, none = (metrics.auc_estimate(scores, [1] * 10 + [0] * 20) for scores in (range(30, 0, -1), range(30)))
    assert (every.value, every.high, none.value, none.low) == (1.0, 1.0, 0.0, 0.0)
    assert none.high == 1 - every.low == pytest.approx(0.2775, abs=1e-3), "Wilson: 0 of 10"


def test_auc_interval_covers_one_half_for_equal_distributions_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1], 80)
    found = [metrics.auc_estimate(rng.normal(size=160), labels) for _ in range(300)]
    covered = sum(estimate.low <= 0.5 <= estimate.high for estimate in found)
    assert 270 <= covered <= 298
    assert np.mean([estimate.value for estimate in found]) == pytest.approx(0.5, abs=0.01)


def test_distinct_items_to_expect_in_a_smaller_draw() -> None:
    assert metrics.distinct_in(["a", "a", "b"], 4) is None
    assert metrics.distinct_in(["a", "a", "b"], 3) == pytest.approx(2.0)
    # Of the pairs aa, ab, ab: one, two and two distinct.
    assert metrics.distinct_in(["a", "a", "b"], 2) == pytest.approx(5 / 3)
    rng = np.random.default_rng(0)
    items = list("aaaaabbbccd")
    drawn = [len(set(rng.permutation(items)[:4])) for _ in range(4000)]
    assert metrics.distinct_in(items, 4) == pytest.approx(np.mean(drawn), abs=0.05)


TRAIN = {f"t{index}" for index in range(1000)}
HELD_OUT = {f"h{index}" for index in range(100)}


def test_equal_hit_rates_give_one() -> None:
    """One name in ten of either side: 100 of 1,000 and 10 of 100."""
    samples = {f"t{index}" for index in range(100)} | {f"h{index}" for index in range(10)} | {"new"}
    found = hit_ratio(samples, TRAIN, HELD_OUT)
    assert (found.train_hits, found.held_out_hits) == (100, 10)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx((100.5 / 1000) / (10.5 / 100))
    assert found.ratio.low < 1.0 < found.ratio.high
    spread = 1.959964 * math.sqrt(1 / 100.5 + 1 / 10.5)
    assert found.ratio.high == pytest.approx(found.ratio.value * math.exp(spread))


def test_a_copy_is_detected() -> None:
    found = hit_ratio(set(TRAIN), TRAIN, HELD_OUT)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx((1000.5 / 1000) / (0.5 / 100))
    assert found.ratio.low > 10


def test_no_hits_give_none() -> None:
    assert hit_ratio({"new"}, TRAIN, HELD_OUT).ratio is None
    assert hit_ratio(set(), TRAIN, HELD_OUT).ratio is None
    assert hit_ratio({"t1"}, TRAIN, set()).ratio is None


def test_a_held_out_name_that_is_in_train_too_counts_as_trained() -> None:
    found = hit_ratio({"t1"}, TRAIN, HELD_OUT | {"t1"})
    assert (found.train_hits, found.held_out_hits) == (1, 0)


def test_the_interval_covers_one_for_a_model_that_memorizes_nothing() -> None:
    rng = random.Random(0)
    every = sorted(TRAIN | HELD_OUT)
    found = [hit_ratio(set(rng.sample(every, 300)), TRAIN, HELD_OUT).ratio for _ in range(200)]
    assert 180 <= sum(ratio is not None and ratio.low <= 1.0 <= ratio.high for ratio in found) <= 200
