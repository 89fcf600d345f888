"""Swear words and places of the real world: which names have them, and the filters against them."""

from __future__ import annotations

import pytest

from flash_experts.data.card_table import known_names
from flash_experts.data.cleaning import clean
from flash_experts.data.sources import load_source
from flash_experts.generation import Constraints, NameFilter, NameVocabulary, NoProfanity, NoRealPlaces
from flash_experts.generation.text_rules import (
    PRINTED_ON_CARDS,
    Check,
    found_in,
    place_at_end,
    profane_words,
    profanity_at_end,
    real_places,
    words_of,
)
from tests.test_generation.test_filters import admits, byte_ids


def test_no_serious_card_counts_as_profane() -> None:
    """The exceptions are the words of `PRINTED_ON_CARDS`, each on the list and on a serious card."""
    names = [card.name for card in clean(load_source("embedded").rows).cards]
    printed = {word for name in names for word in words_of(name)}
    assert len(names) > 30_000 and len(profane_words()) > 800
    assert not printed & profane_words()
    assert printed >= PRINTED_ON_CARDS
    assert [name for name in names if found_in(profanity_at_end, name)] == []


def test_hardly_any_real_name_is_refused() -> None:
    """Jokes and other franchises count, too: "Captain America", "Bad Ass"."""
    names = known_names()
    refused = [name for name in names if found_in(profanity_at_end, name) or found_in(place_at_end, name)]
    assert len(names) > 35_000 and len(real_places()) > 800
    assert 10 < len(refused) < 0.002 * len(names), refused


@pytest.mark.parametrize(
    ("check", "refused", "allowed"),
    [
        (
            profanity_at_end,
            ["Uterine Death", "Killer Tidecrapping", "Bitcher the Heroes", "Dickslinger", "Shi't Elf", "Fu-ck Ogre"],
            ["Scunthorpe Ogre", "Scrap Assassin", "Kashi-Tribe Elf", "Salvaging Grape", "Peacock Canal", "Hero in Rain",
             "Congenital Snigger", "Essex Therapist", "Montenegroan"],
        ),
        (
            place_at_end,
            ["Furnace of England", "Boneholder of Norway", "Norwaybound Elf", "Norwegian Wood", "Egypt's Wrath",
             "New York Elf", "Witch of Buenos Aires", "Texas Ranger", "Wolves of Tokyo"],
            ["Turkey of War", "Phoenix of the North", "Polish the Blade", "Waxmane Baku", "Parishioner", "Easter Troll",
             "Germane Reply", "Harbinger", "New Yoke", "Male Easterling"],
        ),
    ],
)  # fmt: skip
def test_unwanted_words(check: Check, refused: list[str], allowed: list[str]) -> None:
    assert [name for name in refused if not found_in(check, name)] == []
    assert [name for name in allowed if found_in(check, name)] == []


@pytest.mark.parametrize(
    ("make", "text", "passes"),
    [
        (NoProfanity, " Ass", False),
        (NoProfanity, " Assassin", True),
        (NoProfanity, " Tidecrapping Elf", False),
        (NoProfanity, " Scrap Elf", True),
        (NoRealPlaces, " Elf of Peru", False),
        (NoRealPlaces, " Elf of Perusal", True),
        (NoRealPlaces, " New York", False),
        (NoRealPlaces, " Englander", False),
    ],
)
def test_unwanted_words_in_any_tokenization(
    vocabulary: NameVocabulary, make: type[NameFilter], text: str, passes: bool
) -> None:
    for ids in (vocabulary.encode(text), byte_ids(vocabulary, text)):
        assert admits(make(vocabulary, 0), "", ids) == passes


def test_texts_that_names_must_have_are_not_among_the_unwanted() -> None:
    for name, text in (
        ("starts_with", "England "),
        ("contains", "of norway"),
        ("ends_with", "Peru"),
        ("contains", "crap"),
    ):
        with pytest.raises(ValueError, match=f"{name} .* set allow_"):
            Constraints(**{name: text})
        Constraints(**{name: text}, allow_profanity=True, allow_real_places=True)
    Constraints(starts_with="Ass", contains="Peru")  # "Assassin" and "Perusal" have them
