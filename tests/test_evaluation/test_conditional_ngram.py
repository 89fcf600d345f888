"""The baseline that takes attributes."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from flash_experts.data.cards import Card
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation.conditional_ngram import ConditionalNGrams
from flash_experts.evaluation.ngram import NGramMixture

RED, BLUE = Attributes(colors=("R",)), Attributes(colors=("U",))


def card(name: str, color: str) -> Card:
    return Card(name, "Instant", (), ("Instant",), (), (color,), 1, name)


CARDS = [card(name, "R") for name in ("bolt", "burn", "bolts", "burst", "blaze") * 8] + [
    card(name, "U") for name in ("cancel", "calm", "cover", "calms", "cloud") * 8
]


@pytest.fixture(scope="module")
def model() -> ConditionalNGrams:
    return ConditionalNGrams(CARDS)


def test_nothing_told_is_the_mixture_itself(model: ConditionalNGrams) -> None:
    plain = NGramMixture([card.name for card in CARDS])
    names = ["bolt", "calm", "zap"]
    np.testing.assert_allclose(model.nats(names, [NONE] * 3), plain.nats(names))
    assert model.sample(20, 0, NONE) == plain.sample(20, 0)


def test_told_the_color_its_own_names_are_likelier_and_others_not(model: ConditionalNGrams) -> None:
    names = ["bolt", "calm"]
    none, red, blue = (model.nats(names, [told] * 2) for told in (NONE, RED, BLUE))
    assert red[0] < none[0] < blue[0]
    assert blue[1] < none[1] < red[1]
    assert np.isfinite([none, red, blue]).all()


@pytest.mark.parametrize("told", [NONE, RED, Attributes(types=("Instant",), colors=("U",))])
def test_a_name_and_all_that_go_on_otherwise_add_up_to_one(model: ConditionalNGrams, told: Attributes) -> None:
    """The end symbol and every letter after "bo": what samples that begin so do next, they do as often as it says."""
    drawn = [name for name in model.sample(3000, 1, told) if name]
    for name in ("bolt", "calm"):
        expected = math.exp(-model.nats([name], [told])[0])
        error = math.sqrt(expected * (1 - expected) / 3000) + 1e-3
        assert drawn.count(name) / 3000 == pytest.approx(expected, abs=4 * error)


def test_samples_follow_what_is_told(model: ConditionalNGrams) -> None:
    first = {told: Counter(name[:1] for name in model.sample(200, 0, told)) for told in (RED, BLUE)}
    assert first[RED]["b"] > 150 and first[BLUE]["c"] > 150
    each = model.sample_each([RED, BLUE] * 50, seed=0)
    assert each == model.sample_each([RED, BLUE] * 50, seed=0)
    assert sum(name.startswith("b") for name in each[::2]) > 38
    assert sum(name.startswith("c") for name in each[1::2]) > 38


def test_a_kind_never_seen_changes_nothing(model: ConditionalNGrams) -> None:
    strange = Attributes(subtypes=("Goblin",), mana_value=9)
    np.testing.assert_allclose(model.nats(["bolt"], [strange]), model.nats(["bolt"], [NONE]))
