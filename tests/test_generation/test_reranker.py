"""The reranker: the attribute classifier, flaws and repetition, each part of the score alone, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.generation import reranker as module
from flash_experts.generation.reranker import (
    START_NATS,
    AttributeClassifier,
    Reranker,
    WordRepetition,
    cards_of_kind,
    character_of,
    content_words,
    flaws,
    questions_of,
    real_card_classifier,
)


def card(name: str, *types: str, subtypes: tuple[str, ...] = (), color: str = "G") -> Card:
    return Card(name, " ".join(types), (), types, subtypes, (color,), 1, "test")


def test_an_ngram_that_only_red_cards_have_counts_for_red_by_worked_numbers() -> None:
    classifier = AttributeClassifier([card("a", "Instant", color="R"), card("b", "Instant")])
    # The n-grams of a name of one letter, ends included: "\na", "a\n", "\na\n". Each name has three, each is one of
    # six. The red card has three of them, and so have the others: an n-gram of neither counts for neither.
    only_red = np.log(1 / (1 / 6) + 40_000) - np.log(40_000)
    score_N = classifier.scorer(Attributes(colors=("R",)))(["a", "b", "c"])
    np.testing.assert_allclose(score_N * 14 / 3, [only_red, -only_red, 0], rtol=1e-9, atol=1e-12)


def test_scores_of_attributes_add_up_and_an_attribute_of_no_card_counts_zero() -> None:
    classifier = real_card_classifier()
    names = ["Goblin Firebrand", "Serene Dawn"]
    parts = [Attributes(subtypes=("Goblin",)), Attributes(colors=("R",)), Attributes(supertypes=())]
    whole = Attributes(subtypes=("Goblin",), colors=("R",), supertypes=())
    np.testing.assert_allclose(classifier.scorer(whole)(names), sum(classifier.scorer(part)(names) for part in parts))
    assert classifier.scorer(whole)(names)[0] > classifier.scorer(whole)(names)[1]
    assert classifier.scorer(Attributes(subtypes=("Nobody",)))(names).tolist() == [0, 0]


def test_a_classifier_without_cards_scores_zero() -> None:
    assert AttributeClassifier([]).scorer(RED)(["Goblin Firebrand", "a"]).tolist() == [0, 0]


def test_capitals_do_not_matter() -> None:
    """A word begins with one or not by its place in the name."""
    score_N = real_card_classifier().scorer(RED)(["Firebrand Goblin", "firebrand goblin", "FIREBRAND GOBLIN"])
    assert score_N[0] == score_N[1] == score_N[2] > 0


def test_it_recognizes_colors_of_unseen_names() -> None:
    """Real names of unseen cards, which of two colors: half would be chance."""
    from flash_experts.data.cleaning import clean
    from flash_experts.data.sources import load_source

    cards = [one for one in clean(load_source("embedded").rows).cards if one.colors in (("R",), ("U",))]
    classifier = AttributeClassifier(cards[::2])
    red, blue = (classifier.scorer(Attributes(colors=(color,)))([one.name for one in cards[1::2]]) for color in "RU")
    is_red = np.array([one.colors == ("R",) for one in cards[1::2]])
    assert ((red > blue) == is_red).mean() > 0.75


def test_mana_value_and_rarity_are_nothing_to_match() -> None:
    assert not questions_of(Attributes(mana_value=3, rarity="rare"))
    assert all(map(questions_of, (Attributes(colors=()), Attributes(supertypes=()), Attributes(types=("Land",)))))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Angelic Angel", 1),
        ("Wurm Wurmguard", 1),
        ("Sorcerer's Sorcererance", 1),
        ("Angel of the Angelic Inferno", 1),
        ("R Chandra, the Boggart", 1),
        ("GrabberFisher", 1),
        ("Goblin Goblin Goblin", 2),
        ("Wrath of God", 0),
        ("Lim-Dûl's Vault", 0),
        ("Fire and Ice", 0),
        ("X Marks the Spot", 0),
        ("Angel of Anguish", 0),
    ],
)
def test_flaws(name: str, count: int) -> None:
    assert flaws(name) == count


def test_fewer_than_one_in_a_thousand_real_names_has_a_flaw() -> None:
    names = [card.name for card in real_card_classifier().cards]
    assert 0 < sum(map(bool, map(flaws, names))) / len(names) < 0.001


def test_words_that_count_for_repetition() -> None:
    assert content_words("Knights of the Knight's Keep") == ("knight", "keep")
    assert content_words("A Song of Ice") == ("song", "ice")


def test_the_character_of_a_legend() -> None:
    assert character_of("Krenko, Mob Boss") == "krenko" and character_of("Goblin Guide") == ""


def test_a_word_may_repeat_as_often_as_on_real_cards() -> None:
    half_goblins = WordRepetition(["Goblin Guide", "Goblin King", "Mogg Fanatic", "Raging Kobold"])
    assert half_goblins.excess("Goblin Chief") == 0
    for name in ("Goblin Chief", "Old Chief", "Goblin Scout"):
        half_goblins.add(name)
    assert half_goblins.excess("Goblin Piker") == 3 - 0.5 * 4  # the third of four names; two would be usual
    assert half_goblins.excess("Chief Piker") == 3 - 1  # no real name has it: once is usual
    assert half_goblins.excess("Brave Piker") == 0


def test_attributes_are_left_out_while_few_cards_have_them() -> None:
    goblins = [card(f"Goblin {n}", "Creature", subtypes=("Goblin",), color="RG"[n % 2]) for n in range(50)]
    others = [card(f"Elf {n}", "Creature", subtypes=("Elf",)) for n in range(60)] + [card("Bolt", "Instant")]
    cards = goblins + others
    assert cards_of_kind(cards, Attributes(types=("Creature",), subtypes=("Goblin",))) == goblins
    red = Attributes(types=("Creature",), subtypes=("Goblin",), colors=("R",))
    assert cards_of_kind(cards, red) == goblins, "25 are red: too few"
    legendary = Attributes(supertypes=("Legendary",), types=("Creature",), subtypes=("Goblin",), colors=("R",))
    assert cards_of_kind(cards, legendary) == goblins, "none is legendary: the color and the supertype are left out"
    assert cards_of_kind(cards, Attributes(types=("Instant",))) == cards
    assert cards_of_kind(cards, Attributes()) == cards


RED = Attributes.parse("Creature — Goblin", "R", None)


@dataclass(frozen=True)
class Name:
    text: str
    log_prob: float


def test_the_likelihood_part_by_worked_numbers() -> None:
    alone: Reranker[Name] = Reranker(RED, match_weight=0, fault_weight=0)
    scores_N = alone.scores([Name("Abcde", -9.0), Name("Abcdefghijk", -21.0), Name("Ab", -3.0)])
    np.testing.assert_allclose(scores_N, [-6 / 6, -18 / 12, 0])
    assert START_NATS == 3


def test_the_match_part_is_the_classifiers_log_odds_per_character() -> None:
    names = [Name("Goblin Firebrand", -20.0), Name("Serene Dawn", -20.0)]
    with_match, without = (Reranker[Name](RED, match_weight=w, fault_weight=0).scores(names) for w in (0.5, 0))
    odds_N = real_card_classifier().scorer(RED)([name.text for name in names])
    np.testing.assert_allclose(with_match - without, 0.5 * odds_N / [17, 12])
    assert odds_N[0] > 0 > odds_N[1]
    unconditional = Reranker[Name](Attributes(mana_value=3)).scores(names)
    np.testing.assert_allclose(unconditional, [-17 / 17, -17 / 12])


def test_flaws_and_borrowed_characters_count_against_a_name() -> None:
    rerank: Reranker[Name] = Reranker(Attributes(), match_weight=0, fault_weight=0.25)
    names = ["Wurm Wurmguard", "Wurm Riderguard", "Krenko, the Blade", "Zrenko, the Blade"]
    flawed, sound, borrowed, own = rerank.scores([Name(text, START_NATS * -1) for text in names])
    assert (flawed, sound, borrowed, own) == (-0.25, 0, -0.25, 0)
    assert rerank.scores([Name("Wurm Wurmguard Wurmling", -START_NATS)]) == [-0.5], "each flaw counts"


def test_names_are_compared_with_the_cards_of_a_given_classifier() -> None:
    """Such as the training cards alone, where the others are held out."""
    goblins = [card(f"Goblin {n}", "Creature", subtypes=("Goblin",), color="R") for n in range(40)]
    given = AttributeClassifier([*goblins, card("Bolt", "Instant", color="R")])
    rerank: Reranker[Name] = Reranker(RED, match_weight=1, fault_weight=1, classifier=given)
    names = [Name("Goblin 7", -9.0), Name("Goblin 8", -9.1), Name("Quartz 9", -9.2)]
    odds_N = given.scorer(RED)([name.text for name in names])
    np.testing.assert_allclose(rerank.scores(names), (np.array([-9.0, -9.1, -9.2]) + START_NATS + odds_N) / 9)
    varied: Reranker[Name] = Reranker(RED, match_weight=0, fault_weight=1, classifier=given)
    varied.add(names)
    assert [varied.choose() for _ in names] == names, "all cards of the kind are Goblins, so the word may repeat"


def test_the_best_is_chosen_and_repeated_words_wait() -> None:
    rerank: Reranker[Name] = Reranker(Attributes(), match_weight=0, fault_weight=0.25)
    best, again, other = Name("Quartz Tower", -16.0), Name("Quartz Rower", -16.1), Name("Silent Mower", -18.0)
    assert rerank.choose() is None
    rerank.add([other, again, best])
    assert [rerank.choose() for _ in range(4)] == [best, other, again, None]
    # Without the penalty, the second name would have been the one with the same rare word.
    careless: Reranker[Name] = Reranker(Attributes(), match_weight=0, fault_weight=0)
    careless.add([other, again, best])
    assert [careless.choose() for _ in range(3)] == [best, again, other]


def test_only_so_many_candidates_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WAITING", 3)
    rerank: Reranker[Name] = Reranker(Attributes(), match_weight=0, fault_weight=0)
    names = [Name(f"Name{letter}", -value) for letter, value in zip("abcde", (9.0, 5.0, 8.0, 6.0, 7.0), strict=True)]
    rerank.add(names[:2])
    rerank.add(names[2:])
    assert [rerank.choose() for _ in range(4)] == [names[1], names[3], names[4], None]
