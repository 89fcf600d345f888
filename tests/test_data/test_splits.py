"""The split by family: no relatives in two splits, and no dependence on order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from flash_experts.data.card_table import read_embedded
from flash_experts.data.cards import Card, RawCard
from flash_experts.data.cleaning import clean
from flash_experts.data.names import family_words, normal_form
from flash_experts.data.splits import families, near_pairs, split_by_family


@pytest.fixture(scope="module")
def cards() -> tuple[Card, ...]:
    """Every tenth card of the embedded table: about 3,000."""
    return clean(read_embedded().rows).cards[::10]


def groups_of(*names: str) -> list[set[str]]:
    return [{names[index] for index in group} for group in families(names)]


def test_family_words() -> None:
    assert family_words("Lim-Dûl's Vault") == {"limdul", "vault"}
    assert family_words("Yawgmoth, Thran Physician") == {"yawgmoth", "thran", "physician"}
    assert family_words("Wizards' School") == {"wizards", "school"}


def test_a_rare_word_makes_a_family_and_a_common_one_does_not() -> None:
    goblins = [f"Goblin {word}" for word in ("Archer", "Flotsam", "Juggernaut", "Weaver", "Scholar")]
    assert groups_of(*goblins) == [set(goblins)]
    goblins.append("Goblin Quicksmith")
    assert len(groups_of(*goblins)) == 6


def test_possessives_count_as_their_word() -> None:
    assert len(groups_of("Yawgmoth's Bargain", "Yawgmoth, Thran Physician")) == 1


def test_a_legend_is_one_family_however_often_its_name_is_there() -> None:
    legends = [f"Jace, {words}" for words in ("Wielder of Mysteries", "Vryn's Prodigy", "Arcane Strategist")]
    legends += [f"Jace, {word}" for word in ("Cunning Castaway", "Ingenious Mind-Mage", "Memory Adept", "Unraveler")]
    assert groups_of(*legends) == [set(legends)]
    arrows = [f"Take 1,000 {word}" for word in ("Arrows", "Bolts", "Coins", "Drums", "Eels", "Forks")]
    assert len(groups_of(*arrows)) == 6, "a comma within a number is no legend's"


def test_near_names_are_a_family() -> None:
    assert len(groups_of("Stormcaller", "Stormcallen")) == 1
    assert len(groups_of("Stormcaller", "Wormcrawler")) == 2


def test_relations_are_transitive() -> None:
    assert len(groups_of("Ashen Moth", "Moth Queen", "Queen Thorn", "Bleak River")) == 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("abcd", max_size=12), max_size=25, unique=True))
def test_near_pairs_are_those_of_the_definition(keys: list[str]) -> None:
    expected = {
        frozenset((first, second))
        for first in range(len(keys))
        for second in range(first)
        if Levenshtein.distance(keys[first], keys[second]) * 5 <= max(len(keys[first]), len(keys[second]))
    }
    assert {frozenset(pair) for pair in near_pairs(keys)} == expected


def test_no_relatives_in_two_splits(cards: tuple[Card, ...]) -> None:
    split = split_by_family(cards)
    side = {card.name: name for name, part in split.parts.items() for card in part}
    side |= {card.name: "train" for card in split.parts["test_iid"]}
    names = list(side)
    keys = [normal_form(name) for name in names]
    for first, second in near_pairs(keys):
        assert side[names[first]] == side[names[second]]
    by_word: dict[str, list[str]] = {}
    for name in names:
        for word in family_words(name):
            by_word.setdefault(word, []).append(name)
    for related in by_word.values():
        if 2 <= len(related) <= 5:
            assert len({side[name] for name in related}) == 1, related
    by_legend: dict[str, set[str]] = {}
    for name in names:
        if ", " in name:
            by_legend.setdefault(normal_form(name.split(", ")[0]), set()).add(side[name])
    assert all(len(sides) == 1 for sides in by_legend.values())


def test_every_card_has_one_place_in_the_right_share(cards: tuple[Card, ...]) -> None:
    split = split_by_family(cards)
    placed = [card.name for part in split.parts.values() for card in part]
    assert sorted(placed) == sorted(card.name for card in cards)
    count = len(cards)
    assert len(split.parts["validation"]) / count == pytest.approx(0.1, abs=0.03)
    assert len(split.parts["test"]) / count == pytest.approx(0.1, abs=0.03)
    training_side = len(split.parts["train"]) + len(split.parts["test_iid"])
    assert len(split.parts["test_iid"]) / training_side == pytest.approx(0.06, abs=0.02)
    assert split.oversized == 0


def test_the_split_does_not_depend_on_the_order(cards: tuple[Card, ...]) -> None:
    shuffled = list(cards)
    random.Random(0).shuffle(shuffled)
    one, other = split_by_family(cards), split_by_family(shuffled)
    for name in one.parts:
        assert {card.name for card in one.parts[name]} == {card.name for card in other.parts[name]}
    assert one.families == other.families


def test_an_added_unrelated_card_moves_no_other(cards: tuple[Card, ...]) -> None:
    unrelated = clean([RawCard("Qqxyz Vvvwk")]).cards
    before, after = split_by_family(cards), split_by_family((*unrelated, *cards))
    moved = sum(
        len({card.name for card in before.parts[name]} - {card.name for card in after.parts[name]})
        for name in before.parts
    )
    assert moved == 0


def test_a_family_too_large_to_hold_out_trains() -> None:
    """By the hash of its first name this family would be in the test; one name of it in 17 is in test_iid."""
    rows = [RawCard(f"Chandra, the {first}{second}") for first in "abcdefghij" for second in "klmnopqrst"]
    rows += [RawCard(f"{first}{second}{first * 3}") for first in "bcdfghjklmnpqrstvwxz" for second in "aeiouyæøåœ"]
    split = split_by_family(clean(rows).cards)
    assert split.oversized >= 1
    assert split.largest_family >= 100
    trained, iid = ({card.name for card in split.parts[name]} for name in ("train", "test_iid"))
    family = {row.name for row in rows if row.name.startswith("Chandra")}
    assert family <= trained | iid
    assert len(family & iid) == pytest.approx(6, abs=5), "each name by its own hash"
