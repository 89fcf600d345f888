"""The n-gram baseline: probabilities by hand, and conditional on attributes."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.cards import Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.ngram import ConditionalNGrams, KneserNey, _smooth, mixture_nats, sample_mixture
from tests.helpers.evaluation import FIRST, SECOND

LETTERS = st.text("abc ", min_size=1, max_size=8)


def following(model: KneserNey, prefix: str) -> dict[str, float]:
    """The probability of each character after a prefix, "" for the end, and "Ω", which no name has."""
    characters = [*model.alphabet, "Ω"]
    names = [prefix + character for character in characters]
    probabilities = [of_name[len(prefix)] for of_name in model.symbol_probabilities(names)]
    return dict(zip(characters, probabilities, strict=True)) | {"": model.symbol_probabilities([prefix])[0][-1]}


def mixture(names: list[str], *orders: int) -> list[KneserNey]:
    return [KneserNey(names, order) for order in orders]


@settings(deadline=None, max_examples=60)
@given(st.lists(LETTERS, min_size=1, max_size=12), st.integers(2, 6), st.text("abcz", max_size=7))
def test_probabilities_sum_to_one_after_any_prefix(names: list[str], order: int, prefix: str) -> None:
    model = KneserNey(names, order)
    for text in (prefix, ""):
        after = following(model, text)
        assert min(after.values()) > 0
        after["Ω"] *= 0x110000 - len(model.alphabet)  # it stands for all unknown characters
        assert sum(after.values()) == pytest.approx(1.0, abs=1e-12)


def test_order_two_by_hand() -> None:
    """Counts too small for estimated discounts, so the fallback: 0.5 off a count of one, 1 off two."""
    model = KneserNey(["aa", "ab"], order=2)
    # Symbols: end, unknown, a, b. Distinct bigrams: (begin a) x 2, (a a), (a b), (a end), (b end).
    # Unigrams count the distinct symbols before: a has BOS and a, b has a, the end has a and b; 5 in all.
    left_over = (1.0 + 0.5 + 1.0) / 5
    unigram = {"a": (2 - 1.0) / 5 + left_over / 4, "b": (1 - 0.5) / 5 + left_over / 4}
    # After begin: a twice of two, discount 1.
    first = following(model, "")
    assert first["a"] == pytest.approx((2 - 1.0) / 2 + (1.0 / 2) * unigram["a"])
    assert first["b"] == pytest.approx((1.0 / 2) * unigram["b"])
    # After a: a, b and the end once each, discount 0.5 of each.
    second = following(model, "a")
    assert second["b"] == pytest.approx((1 - 0.5) / 3 + (1.5 / 3) * unigram["b"])


@pytest.mark.parametrize(
    ("times", "discounts"),
    [
        # y = 10 / (10 + 2 * 5) = 1/2; 1 - 2 y 5/10, 2 - 3 y 3/5, 3 - 4 y 2/3
        ((10, 5, 3, 2), (1 / 2, 11 / 10, 5 / 3)),
        # y = 1/3, and 2 - 3 y 10/1 would be negative: the fallback
        ((1, 1, 10, 1), (0.5, 1.0, 1.5)),
    ],
)
def test_discounts_by_hand(times: tuple[int, ...], discounts: tuple[float, ...]) -> None:
    """So many n-grams occur once, twice, three and four times, all after one context."""
    counts = np.repeat([1, 2, 3, 4], times)
    order = _smooth(np.arange(counts.size), counts, base=100)
    off = np.repeat([discounts[0], discounts[1], discounts[2], discounts[2]], times)
    np.testing.assert_allclose(order.shares, (counts - off) / counts.sum())
    np.testing.assert_allclose(order.left_over, [off.sum() / counts.sum()])


def test_nats_are_the_product_of_the_symbols() -> None:
    model = KneserNey(["Goblin King", "Goblin Guide"], order=4)
    steps = [("", "G"), ("G", "o"), ("Go", "b"), ("Gob", "")]
    expected = -sum(math.log(following(model, prefix)[symbol]) for prefix, symbol in steps)
    assert model.nats(["Gob"])[0] == pytest.approx(expected)


def test_scores_do_not_depend_on_the_batch_composition() -> None:
    models = mixture(["Goblin King", "Elvish Guide"], 3, 4)
    together = mixture_nats(models, ["Goblin Guide", "Elf", "Ω"])
    alone = [mixture_nats(models, [name])[0] for name in ("Goblin Guide", "Elf", "Ω")]
    np.testing.assert_allclose(together, alone)


def test_a_higher_order_and_the_mixture_beat_a_lower_one() -> None:
    every = [f"{first} {second}" for first in FIRST for second in SECOND]
    random.Random(1).shuffle(every)
    train, held_out = every[:150], every[150:]
    bigram, fourgram = (KneserNey(train, order).nats(held_out).sum() for order in (2, 4))
    mixed = mixture_nats(mixture(train, 3, 4, 5), held_out).sum()
    assert fourgram < 0.7 * bigram
    assert mixed < bigram


def test_an_unknown_character_is_uniform_over_all_unknown_ones() -> None:
    model = KneserNey(["abc"], order=3)
    known, unknown = model.nats(["b", "Ω"])
    assert math.isfinite(unknown)
    assert unknown - known > math.log(100_000)


def test_samples_follow_the_model() -> None:
    """Each of the likeliest names is drawn as often as the mixture's own probability of it says."""
    models = mixture(["ab"] * 40 + ["ba"] * 30 + ["bab"] * 20 + ["c"] * 10, 2, 3, 4)
    drawn, again, other = (sample_mixture(models, 4000, np.random.default_rng(seed)) for seed in (0, 0, 1))
    for name in ("ab", "ba", "bab", "c", "abab"):
        expected = math.exp(-mixture_nats(models, [name])[0])
        error = math.sqrt(expected * (1 - expected) / 4000)
        assert drawn.count(name) / 4000 == pytest.approx(expected, abs=4 * error)
    assert drawn == again and drawn != other


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no names"):
        KneserNey([])
    with pytest.raises(ValueError, match=r"order 1 is not in 2\.\.8"):
        KneserNey(["a"], order=1)


@pytest.mark.parametrize(("characters", "orders"), [(460, [5, 6, 7]), (461, [5, 6]), (1287, [5, 6]), (1288, [5])])
def test_a_large_alphabet_lowers_the_order(characters: int, orders: list[int]) -> None:
    """Chinese names: an n-gram of more symbols would not fit into 62 bits. Each order is in the mixture once."""
    names = [
        "".join(map(chr, range(0x4E00 + start, 0x4E00 + min(start + 8, characters))))
        for start in range(0, characters, 8)
    ]
    assert KneserNey(names, 7).order == orders[-1]
    model = ConditionalNGrams([card(name, "R") for name in names])
    found, expected = model.nats(names[:3], [UNCONDITIONAL] * 3), mixture_nats(mixture(names, *orders), names[:3])
    assert found.tolist() == expected.tolist()
    assert model.num_active_parameters == 2 * sum(orders)
    assert model.nats(names[:3], [RED] * 3).max() < expected.max()
    assert len(model.sample(3, 0, RED)) == 3


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
    plain = mixture([card.name for card in CARDS], 5, 6, 7)
    names = ["bolt", "calm", "zap"]
    np.testing.assert_allclose(model.nats(names, [UNCONDITIONAL] * 3), mixture_nats(plain, names))
    assert model.sample(20, 0, UNCONDITIONAL) == sample_mixture(plain, 20, np.random.default_rng(0))


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


@pytest.mark.parametrize(("count", "has_layer"), [(4, False), (5, True)])
def test_an_attribute_of_few_names_changes_nothing(count: int, has_layer: bool) -> None:
    """Four names would be memorized."""
    few = ConditionalNGrams([*CARDS, *(card(name, "G") for name in ("elf", "grow", "oak", "vine", "bear")[:count])])
    green, none = (few.nats(["grow"], [given])[0] for given in (Attributes(colors=("G",)), UNCONDITIONAL))
    assert (green < none - 1) if has_layer else (green == none)
