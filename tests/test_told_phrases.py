"""The script that says what card a phrase could be: choice of phrases, the classifier, words that tell subtypes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from flash_experts.data.cards import Card

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tell_phrases
from tell_phrases import name_likeness, pair_of, tell, telling_words


def creature(name: str, *subtypes: str, color: str = "G") -> Card:
    line = " ".join(["Creature", *(["—", *subtypes] if subtypes else [])])
    return Card(name, line, (), ("Creature",), subtypes, (color,), 1, "test")


def instant(name: str, color: str = "R") -> Card:
    return Card(name, "Instant", (), ("Instant",), (), (color,), 1, "test")


CARDS = [
    *(creature(f"Elvish {kind}", "Elf", kind) for kind in ("Archer", "Scout", "Druid", "Warrior")),
    *(instant(f"{kind} Bolt") for kind in ("Fire", "Lightning", "Shock", "Flame")),
]


def test_phrases_that_are_like_names_come_first() -> None:
    names = [f"{first} {last}" for first in ("Elvish", "Goblin", "Storm") for last in ("Archer", "Bolt", "Guide")]
    phrases = ["Tax Return", "Goblin Archer", "Bus Ticket", "Storm Guide", "Tax Ticket", "Bus Return"] * 4
    likeness = name_likeness(phrases, names)
    assert {phrases[place] for place in np.argsort(-likeness)[:8]} == {"Goblin Archer", "Storm Guide"}


def test_a_pair_is_one_type_and_at_most_one_color() -> None:
    assert pair_of(creature("Elvish Archer", "Elf")) == ("Creature", ("G",))
    golem = Card("Golem", "Artifact Creature — Golem", (), ("Artifact", "Creature"), ("Golem",), (), 3, "test")
    assert pair_of(golem) == ("Creature", ())
    assert pair_of(Card("Both", "Instant", (), ("Instant",), (), ("R", "G"), 1, "test")) is None
    assert pair_of(Card("Phrase", "", (), (), (), None, None, "wordnet")) is None


def test_a_word_tells_the_subtypes_that_most_creatures_with_it_share() -> None:
    told = telling_words([*CARDS, creature("Elvish Cat", "Cat")])
    assert told["elvish"] == ("Elf",)  # four of five are Elves; each has another second subtype
    assert "archer" not in told  # seen once


def test_phrases_are_told_what_the_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tell_phrases, "FEWEST", 4)
    phrases = [Card(name, "", (), (), (), None, None, "gcide") for name in ("Elvish Archer Scout", "Fire Bolt Shock")]
    told = tell(phrases * 20, CARDS * 2, np.random.default_rng(0))
    elves, bolts = told[::2], told[1::2]
    assert sum(card.types == ("Creature",) and card.colors == ("G",) for card in elves) > 12
    assert sum(card.types == ("Instant",) and card.colors == ("R",) for card in bolts) > 12
    of_creatures = [card for card in elves if card.types == ("Creature",)]
    assert {card.type_line for card in of_creatures} == {"Creature — Elf"}
    assert [card.name for card in told[:2]] == ["Elvish Archer Scout", "Fire Bolt Shock"]
