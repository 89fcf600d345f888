"""Control and real-or-generated: attributes are recognized, distinguishable names are detected, others are not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.sources import load_source
from flash_experts.evaluation.classifiers import ControlClassifiers, Detector, recognition
from flash_experts.evaluation.ngram import KneserNey, sample_mixture

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def cards() -> list[Card]:
    found = clean(load_source("embedded").rows).cards
    return random.Random(0).sample(list(found), 9000)


@pytest.fixture(scope="module")
def classifiers(cards: list[Card]) -> ControlClassifiers:
    return ControlClassifiers(cards[:7000], cards[7000:8000])


class Archive:
    """A model that returns names of real cards with the given attributes, or ignores the attributes."""

    def __init__(self, cards: Sequence[Card], unconditional: bool = False) -> None:
        self._cards, self._unconditional = cards, unconditional

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        matching = [card.name for card in self._cards if self._unconditional or self._matches(card, attributes)]
        return random.Random(seed).choices(matching or [self._cards[0].name], k=count)

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        given = [Attributes(one.supertypes, one.types, None, one.colors) for one in attributes]
        return [self.sample(1, seed + index, one)[0] for index, one in enumerate(given)]

    @staticmethod
    def _matches(card: Card, attributes: Attributes) -> bool:
        pairs = ((attributes.supertypes, card.supertypes), (attributes.types, card.types))
        return all(given is None or set(given) <= set(has) for given, has in pairs) and (
            attributes.colors is None or attributes.colors == card.colors
        )


def test_real_names_are_recognized_about_as_often_as_measured_before(
    cards: list[Card], classifiers: ControlClassifiers
) -> None:
    """On 22,000 training names: type 66% (balanced 56%), color 62%, legendary 97%; here on 7,000."""
    figures = {one.task: one for one in classifiers.measure(Archive(cards[8000:]), 400, seed=0)}
    type_, color, legendary = (figures[task].real for task in ("type", "color", "legendary creature"))
    assert 0.58 < type_.plain.value < 0.75 and 0.40 < type_.balanced.value < 0.65
    assert 0.45 < color.plain.value < 0.70
    assert 0.93 < legendary.plain.value <= 1.0
    for one in figures.values():
        assert one.real.plain.low < one.real.plain.value < one.real.plain.high
        assert one.majority < one.real.plain.value


def test_conditional_and_unconditional_models_differ(cards: list[Card], classifiers: ControlClassifiers) -> None:
    conditional, unconditional = (
        classifiers.measure(Archive(cards[8000:], unconditional), 900, seed=0) for unconditional in (False, True)
    )
    for good, bad in zip(conditional, unconditional, strict=True):
        assert good.alone.balanced.low > bad.alone.balanced.value
        # At random, a class is recognized as often as it is predicted.
        assert bad.alone.balanced.value == pytest.approx(1 / len(bad.alone.by_class), abs=0.12)
    color = next(one for one in conditional if one.task == "color")
    assert color.model.plain.high > color.real.plain.low  # as often as real names


def test_recognition_by_hand() -> None:
    hits = {"a": np.array([True, True, True, False]), "b": np.array([True, False])}
    found = recognition(hits, {"a": 0.8, "b": 0.2})
    assert found.names == 6
    assert found.by_class == {"a": 0.75, "b": 0.5}
    assert found.balanced.value == pytest.approx(0.625)
    assert found.plain.value == pytest.approx(0.7)
    assert found.plain.low < 0.7 < found.plain.high


def test_recognition_of_none_and_all_keeps_an_interval() -> None:
    found = recognition({"a": np.array([True] * 10)}, {"a": 1.0})
    assert (found.plain.value, found.plain.high) == (1.0, 1.0)
    assert found.plain.low == pytest.approx(1 - 0.2775, abs=1e-3), "Wilson: 10 of 10"
    found = recognition({"a": np.array([True] * 10), "b": np.array([False] * 10)}, {"a": 0.8, "b": 0.2})
    assert found.balanced.low == pytest.approx(0.5 - 0.2775 / 2, abs=1e-3)
    assert found.balanced.high == pytest.approx(0.5 + 0.2775 / 2, abs=1e-3)


def test_one_class_is_no_task(cards: list[Card]) -> None:
    creatures = [card for card in cards if card.types == ("Creature",) and card.colors == ("R",)][:60]
    classifiers = ControlClassifiers(creatures, creatures)
    assert {one.task for one in classifiers.measure(Archive(creatures), 20, 0)} <= {"legendary creature"}


@pytest.fixture(scope="module")
def real_names() -> list[str]:
    """Names of real cards, in random order."""
    names = [card.name for card in clean(load_source("embedded").rows).cards]
    random.Random(0).shuffle(names)
    return names


@pytest.fixture(scope="module")
def detector(real_names: list[str]) -> Detector:
    return Detector(real_names[:4000], real_names[4000:4300])


def test_real_names_are_not_distinguished_from_real_names(real_names: list[str], detector: Detector) -> None:
    found = detector.detect(real_names[4400:4700])
    assert found is not None
    for separation in (found.generated, found.real):
        for auc in (separation.weak, separation.strong):
            assert 0.4 < auc.value < 0.6
            assert auc.low < 0.52 and auc.high > 0.48


def test_a_model_that_cannot_spell_is_detected(real_names: list[str], detector: Detector) -> None:
    """Characters of real names in random order: correct lengths and characters, no words."""
    rng = random.Random(1)
    scrambled = ["".join(rng.sample(name, len(name))) for name in real_names[5000:5300]]
    found = detector.detect(scrambled)
    assert found is not None
    assert found.generated.strong.low > 0.95
    assert found.generated.weak.low > 0.9


def test_ngram_samples_pass_the_weak_classifier_only(real_names: list[str], detector: Detector) -> None:
    models = [KneserNey(real_names[:4000], order) for order in (5, 6, 7)]
    found = detector.detect(sample_mixture(models, 300, np.random.default_rng(0)))
    assert found is not None
    assert found.generated.strong.low > 0.8
    assert found.generated.weak.value < found.generated.strong.value - 0.1


def test_a_copy_of_the_training_names_passes_the_weak_classifier_only(
    real_names: list[str], detector: Detector
) -> None:
    found = detector.detect(real_names[:300])
    assert found is not None
    assert found.generated.weak.value < 0.6
    assert found.generated.strong.low > 0.7


def test_detection_is_reproducible(real_names: list[str]) -> None:
    first, again = (
        Detector(real_names[:500], real_names[500:580], seed=3).detect(real_names[600:680]) for _ in range(2)
    )
    assert first == again and first is not None
    assert first.generated.names == 80 and first.real.names == 40


def test_too_few_names_give_none(real_names: list[str], detector: Detector) -> None:
    assert detector.detect(real_names[:39]) is None
    assert Detector(real_names[:100], real_names[100:179]).detect(real_names[200:400]) is None


def test_odd_names_do_no_harm(real_names: list[str], detector: Detector) -> None:
    odd = ["", "…", "Æ", "a" * 200, "x y"] * 10
    found = detector.detect(odd)
    assert found is not None and found.generated.strong.value > 0.9
    assert KneserNey(real_names[:50]).nats([""]).shape == (1,)
    assert sample_mixture([KneserNey(["ab"], 3)], 0, np.random.default_rng(0)) == []


def test_names_of_a_large_alphabet_are_detected_too(real_names: list[str]) -> None:
    """Chinese names: n-grams of six among 1,500 characters do not fit into 62 bits."""
    rng, alphabet = random.Random(0), [chr(0x4E00 + index) for index in range(1500)]
    chinese = ["".join(rng.sample(alphabet, 4)) for _ in range(1080)]
    assert Detector(chinese[:1000], []).separate(chinese[1000:], real_names[:80]).weak.value > 0.9


def test_a_task_without_a_sampled_card_is_left_out(cards: list[Card]) -> None:
    """With few samples, only the first held-out cards are asked for: here, no creatures."""
    held_out = sorted(cards[7000:8000], key=lambda card: "Creature" in card.types)
    found = ControlClassifiers(cards[:3000], held_out).measure(Archive(cards[8000:]), 1, seed=0)
    assert [one.task for one in found] == ["type", "color"]
