"""The attribute classifier: which of several names matches the card best."""

from __future__ import annotations

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.generation.reranking.name_classifier import AttributeClassifier, has_questions, real_card_classifier


def card(name: str, *types: str, color: str = "G", supertypes: tuple[str, ...] = ()) -> Card:
    return Card(name, " ".join(types), supertypes, types, (), (color,), 1, "test")


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
    assert not has_questions(Attributes(mana_value=3, rarity="rare"))
    assert all(map(has_questions, (Attributes(colors=()), Attributes(supertypes=()), Attributes(types=("Land",)))))
