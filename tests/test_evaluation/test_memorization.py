"""The hit ratio on worked numbers."""

from __future__ import annotations

import math
import random

import pytest

from flash_experts.evaluation.novelty import hit_ratio

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
