"""The baseline that takes attributes."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from flash_experts.data.cards import Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.generation.reranking.conditional_ngram import ConditionalNGrams
from flash_experts.generation.reranking.ngram import NGramMixture

RED, BLUE = Attributes(colors=("R",)), Attributes(colors=("U",))


def card(name: str, color: str) -> Card:
    return Card(name, "Instant", (), ("Instant",), (), (color,), 1, name)


CARDS = [card(name, "R") for name in ("bolt", "burn", "bolts", "burst", "blaze") * 8] + [
    card(name, "U") for name in ("cancel", "calm", "cover", "calms", "cloud") * 8
]


@pytest.fixture(scope="module")
def model() -> ConditionalNGrams:
    return ConditionalNGrams(CARDS)


def test_without_attributes_it_is_the_unconditional_mixture(model: ConditionalNGrams) -> None:
    plain = NGramMixture([card.name for card in CARDS])
    names = ["bolt", "calm", "zap"]
    np.testing.assert_allclose(model.nats(names, [UNCONDITIONAL] * 3), plain.nats(names))
    assert model.sample(20, 0, UNCONDITIONAL) == plain.sample(20, 0)


def test_given_a_color_its_own_names_are_more_likely(model: ConditionalNGrams) -> None:
    names = ["bolt", "calm"]
    none, red, blue = (model.nats(names, [given] * 2) for given in (UNCONDITIONAL, RED, BLUE))
    assert red[0] < none[0] < blue[0]
    assert blue[1] < none[1] < red[1]
    assert np.isfinite([none, red, blue]).all()


@pytest.mark.parametrize("given", [UNCONDITIONAL, RED, Attributes(types=("Instant",), colors=("U",))])
def test_probabilities_of_names_match_sampled_frequencies(model: ConditionalNGrams, given: Attributes) -> None:
    """Sampled names are as frequent as their probability."""
    drawn = [name for name in model.sample(3000, 1, given) if name]
    for name in ("bolt", "calm"):
        expected = math.exp(-model.nats([name], [given])[0])
        error = math.sqrt(expected * (1 - expected) / 3000) + 1e-3
        assert drawn.count(name) / 3000 == pytest.approx(expected, abs=4 * error)


def test_samples_follow_the_attributes(model: ConditionalNGrams) -> None:
    first = {given: Counter(name[:1] for name in model.sample(200, 0, given)) for given in (RED, BLUE)}
    assert first[RED]["b"] > 150 and first[BLUE]["c"] > 150
    each = model.sample_each([RED, BLUE] * 50, seed=0)
    assert each == model.sample_each([RED, BLUE] * 50, seed=0)
    assert sum(name.startswith("b") for name in each[::2]) > 38
    assert sum(name.startswith("c") for name in each[1::2]) > 38


def test_an_unknown_attribute_changes_nothing(model: ConditionalNGrams) -> None:
    strange = Attributes(subtypes=("Goblin",), mana_value=9)
    np.testing.assert_allclose(model.nats(["bolt"], [strange]), model.nats(["bolt"], [UNCONDITIONAL]))
