"""The script that makes the base's reading matter: what a phrase is, and that nothing held out is read."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from flash_experts.data.cards import Card

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from build_pretraining_text import Lexicon, lemmas, rules

INDEX = {
    "noun": ["depth", "color", "flag", "fire", "fly", "tree", "rain_dance"],
    "adj": ["dark", "tall"],
    "verb": ["rise", "burn"],
}


@pytest.fixture
def lexicon(tmp_path: Path) -> Lexicon:
    for kind, words in INDEX.items():
        lines = ["  1 the licence", *(f"{word} n 1 0 1 0 0001" for word in words)]
        (tmp_path / f"index.{kind}").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "noun.exc").write_text("oxen ox\n", encoding="utf-8")
    return Lexicon(tmp_path)


def test_phrases_are_written_as_names(lexicon: Lexicon) -> None:
    rng = random.Random(1)  # draws 0.13, so the first tail stays, then 0.85, so the second does not
    assert list(lexicon.phrases("the depth of the color, which is", rng)) == ["Depth of the Color"]
    assert list(lexicon.phrases("he saw a tall dark tree; rising flies and burned oxen", rng)) == [
        "Tall Dark Tree",
        "Rising Flies",
        "Burned Oxen",
    ]
    assert list(lexicon.phrases("it is very tall", rng)) == []


def test_a_phrase_has_four_words_at_most(lexicon: Lexicon) -> None:
    assert list(lexicon.phrases("fire fire fire fire fire", random.Random(0))) == ["Fire Fire Fire Fire", "Fire"]


def test_lemmas(lexicon: Lexicon) -> None:
    assert "Rain Dance" in set(lemmas(lexicon)) and "Dark" in set(lemmas(lexicon))


def test_rules_text_tells_no_name() -> None:
    def card(name: str) -> Card:
        return Card(name, "Creature — Goblin", (), ("Creature",), ("Goblin",), ("R",), 1, "embedded:1")

    corpus = [
        {"name": "Krenko, Mob Boss", "text": "Whenever Krenko attacks, draw a card."},
        {"name": "Goblin Bomb", "text": "Search for a card named Secret Thing."},
        {"name": "Unread Goblin", "text": "Destroy target land."},
        {"name": "Plain Goblin", "text": None},
    ]
    told = list(
        rules(
            corpus, map(card, ["Krenko, Mob Boss", "Goblin Bomb", "Plain Goblin"]), ["Secret Thing"], random.Random(0)
        )
    )
    assert [one.name for one in told] == ["Whenever ~ attacks, draw a card."]
    assert told[0].subtypes == ("Goblin",)
