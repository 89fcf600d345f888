"""Flaws within a name, and the repetition of words in a list."""

from __future__ import annotations

import pytest

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.generation.reranking.name_classifier import real_card_classifier
from flash_experts.generation.reranking.reranker import (
    WordRepetition,
    cards_of_kind,
    character_of,
    content_words,
    flaws,
)


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


def card(name: str, types: tuple[str, ...], subtypes: tuple[str, ...] = (), color: str = "R") -> Card:
    return Card(name, " ".join(types), (), types, subtypes, (color,), 1, "test")


def test_attributes_are_left_out_while_few_cards_have_them() -> None:
    goblins = [card(f"Goblin {n}", ("Creature",), ("Goblin",), "RG"[n % 2]) for n in range(50)]
    others = [card(f"Elf {n}", ("Creature",), ("Elf",)) for n in range(60)] + [card("Bolt", ("Instant",))]
    cards = goblins + others
    assert cards_of_kind(cards, Attributes(types=("Creature",), subtypes=("Goblin",))) == goblins
    red = Attributes(types=("Creature",), subtypes=("Goblin",), colors=("R",))
    assert cards_of_kind(cards, red) == goblins, "25 are red: too few"
    assert cards_of_kind(cards, Attributes(types=("Instant",))) == cards
    assert cards_of_kind(cards, Attributes()) == cards
