"""Real or generated: distinguishable names are detected, others are not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flash_experts.data.cleaning import clean
from flash_experts.data.sources import load_source
from flash_experts.evaluation.classifiers import Detector
from flash_experts.generation.reranking.ngram import KneserNey, NGramMixture, sample_mixture

pytest.importorskip("sklearn")


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
    model = NGramMixture(real_names[:4000])
    found = detector.detect(model.sample(300, seed=0))
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
