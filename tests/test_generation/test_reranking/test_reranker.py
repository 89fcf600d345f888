"""The reranker: each part of the score alone, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from flash_experts.data.prompts import Attributes
from flash_experts.generation.reranking import reranker as module
from flash_experts.generation.reranking.name_classifier import real_card_classifier
from flash_experts.generation.reranking.reranker import START_NATS, Reranker, Weights

RED = Attributes.parse("Creature — Goblin", "R", None)


@dataclass(frozen=True)
class Name:
    text: str
    log_prob: float


def test_the_likelihood_part_by_worked_numbers() -> None:
    alone: Reranker[Name] = Reranker(RED, Weights(match=0, fault=0))
    scores_N = alone.scores([Name("Abcde", -9.0), Name("Abcdefghijk", -21.0), Name("Ab", -3.0)])
    np.testing.assert_allclose(scores_N, [-6 / 6, -18 / 12, 0])
    assert START_NATS == 3


def test_the_match_part_is_the_classifiers_log_odds_per_character() -> None:
    names = [Name("Goblin Firebrand", -20.0), Name("Serene Dawn", -20.0)]
    with_match, without = (Reranker[Name](RED, Weights(match=w, fault=0)).scores(names) for w in (0.5, 0))
    odds_N = real_card_classifier().scorer(RED)([name.text for name in names])
    np.testing.assert_allclose(with_match - without, 0.5 * odds_N / [17, 12])
    assert odds_N[0] > 0 > odds_N[1]
    unconditional = Reranker[Name](Attributes(mana_value=3)).scores(names)
    np.testing.assert_allclose(unconditional, [-17 / 17, -17 / 12])


def test_flaws_and_borrowed_characters_count_against_a_name() -> None:
    rerank: Reranker[Name] = Reranker(Attributes(), Weights(match=0, fault=0.25))
    names = ["Wurm Wurmguard", "Wurm Riderguard", "Krenko, the Blade", "Zrenko, the Blade"]
    flawed, sound, borrowed, own = rerank.scores([Name(text, START_NATS * -1) for text in names])
    assert (flawed, sound, borrowed, own) == (-0.25, 0, -0.25, 0)


def test_the_best_is_chosen_and_repeated_words_wait() -> None:
    rerank: Reranker[Name] = Reranker(Attributes(), Weights(match=0, fault=0.25))
    best, again, other = Name("Quartz Tower", -16.0), Name("Quartz Rower", -16.1), Name("Silent Mower", -18.0)
    assert rerank.choose() is None
    rerank.add([other, again, best])
    assert [rerank.choose() for _ in range(4)] == [best, other, again, None]
    # Without the penalty, the second name would have been the one with the same rare word.
    careless: Reranker[Name] = Reranker(Attributes(), Weights(match=0, fault=0))
    careless.add([other, again, best])
    assert [careless.choose() for _ in range(3)] == [best, again, other]


def test_only_so_many_candidates_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    rerank: Reranker[Name] = Reranker(Attributes(), Weights(match=0, fault=0))
    names = [Name(f"Name{letter}", -value) for letter, value in zip("abcde", (9.0, 5.0, 8.0, 6.0, 7.0), strict=True)]
    rerank.add(names[:2])
    rerank.add(names[2:])
    assert [rerank.choose() for _ in range(4)] == [names[1], names[3], names[4], None]
