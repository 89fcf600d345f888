"""Control: what was asked for, read from names alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from flash_experts.data.cards import Card, load_source
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation.control import ControlJudge, recognition

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def cards() -> list[Card]:
    found = clean(load_source("embedded").rows).cards
    return random.Random(0).sample(list(found), 9000)


@pytest.fixture(scope="module")
def judge(cards: list[Card]) -> ControlJudge:
    return ControlJudge(cards[:7000], cards[7000:8000])


class Archive:
    """A model that answers with the name of a real card of the attributes told, or deaf to them."""

    def __init__(self, cards: Sequence[Card], deaf: bool = False) -> None:
        self._cards, self._deaf = cards, deaf

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]:
        fitting = [card.name for card in self._cards if self._deaf or self._fits(card, attributes)]
        return random.Random(seed).choices(fitting or [self._cards[0].name], k=count)

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        told = [Attributes(one.supertypes, one.types, None, one.colors) for one in attributes]
        return [self.sample(1, seed + index, one)[0] for index, one in enumerate(told)]

    @staticmethod
    def _fits(card: Card, attributes: Attributes) -> bool:
        pairs = ((attributes.supertypes, card.supertypes), (attributes.types, card.types))
        return all(told is None or set(told) <= set(has) for told, has in pairs) and (
            attributes.colors is None or attributes.colors == card.colors
        )


def test_real_names_are_recognized_about_as_often_as_measured_before(cards: list[Card], judge: ControlJudge) -> None:
    """On 22,000 training names: type 66% (56% if classes count alike), color 62%, legendary 97%; here on 7,000."""
    figures = {one.task: one for one in judge.judge(Archive(cards[8000:]), 400, seed=0)}
    type_, color, legendary = (figures[task].real for task in ("type", "color", "legendary creature"))
    assert 0.58 < type_.plain.value < 0.75 and 0.40 < type_.balanced.value < 0.65
    assert 0.45 < color.plain.value < 0.70
    assert 0.93 < legendary.plain.value <= 1.0
    for one in figures.values():
        assert one.real.plain.low < one.real.plain.value < one.real.plain.high
        assert one.majority < one.real.plain.value


def test_a_model_that_listens_is_told_from_a_deaf_one(cards: list[Card], judge: ControlJudge) -> None:
    listens, deaf = (judge.judge(Archive(cards[8000:], deaf), 900, seed=0) for deaf in (False, True))
    for good, bad in zip(listens, deaf, strict=True):
        assert good.alone.balanced.low > bad.alone.balanced.value
        # A class recognized at random is recognized as often as it is said.
        assert bad.alone.balanced.value == pytest.approx(1 / len(bad.alone.by_class), abs=0.12)
    color = next(one for one in listens if one.task == "color")
    assert color.model.plain.high > color.real.plain.low  # as often as real names


def test_recognition_by_hand() -> None:
    hits = {"a": np.array([True, True, True, False]), "b": np.array([True, False])}
    found = recognition(hits, {"a": 0.8, "b": 0.2})
    assert found.names == 6
    assert found.by_class == {"a": 0.75, "b": 0.5}
    assert found.balanced.value == pytest.approx(0.625)
    assert found.plain.value == pytest.approx(0.7)
    assert found.plain.low < 0.7 < found.plain.high


def test_one_class_is_no_task(cards: list[Card]) -> None:
    creatures = [card for card in cards if card.types == ("Creature",) and card.colors == ("R",)][:60]
    judge = ControlJudge(creatures, creatures)
    assert {one.task for one in judge.judge(Archive(creatures), 20, 0)} <= {"legendary creature"}
