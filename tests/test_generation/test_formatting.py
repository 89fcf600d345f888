"""Formatting: correct names stay unchanged, others are corrected, and twice gives the same as once."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.card_table import known_names
from flash_experts.data.cleaning import clean
from flash_experts.data.sources import load_source
from flash_experts.generation import format_name

_NAMES = st.text(st.sampled_from("abAZzé û,:;-'/.!?&\"’— of the123\u0301İßǆﬁ"), max_size=30) | st.text(max_size=20)


@settings(max_examples=400, deadline=None)
@given(_NAMES)
def test_formatting_twice_changes_nothing_more(text: str) -> None:
    once = format_name(text)
    assert format_name(once) == once
    assert "//" not in once
    assert once == unicodedata.normalize("NFC", once)
    assert once == " ".join(once.split())


@pytest.mark.parametrize(
    ("generated", "on_a_card"),
    [
        (" wrath  Of the reef ,tide-caller ", "Wrath of the Reef, Tide-caller"),
        ("lim-Dûl’s Vault", "Lim-Dûl's Vault"),
        ("Jo\u0308tun grunt", "Jötun Grunt"),
        ("Fury Of THE north", "Fury of the North"),
        ("Soldier on", "Soldier On"),
        ("Starke en-Vec", "Starke en-Vec"),
        ("Vault 7: the descent", "Vault 7: The Descent"),
        ("aang, the last", "Aang, the Last"),
        ("light 'em Up", "Light 'Em Up"),
        ("Fire // Ice", "Fire"),
        ("// Ice", "Ice"),
        ("Goblin -", "Goblin"),
        ("Kill! kill!", "Kill! Kill!"),
        ("two-headed giant of the will-o'-the-wisp", "Two-Headed Giant of the Will-o'-the-Wisp"),
        ("mogg en-vec, the d'avenant ii", "Mogg en-Vec, the D'Avenant II"),
        ("", ""),
        (" , - ", ""),
    ],
)
def test_examples(generated: str, on_a_card: str) -> None:
    assert format_name(generated) == on_a_card


def test_real_names_are_left_as_they_are() -> None:
    """All but 33 of 35,176: jokes ("sAnS mERcY", "TL;DR"), halves ("Bat-"), "Command From the Shadows" and its like."""
    names = known_names()
    changed = [name for name in names if format_name(name) != name]
    assert len(names) > 35_000
    assert len(changed) <= 35, changed


def test_serious_names_come_back_from_lower_case() -> None:
    """All but 32 of 30,030: "Suq'Ata Firewalker", "Step In and Out", "Catti-brie of Mithral Hall" and their like."""
    names = [card.name for card in clean(load_source("embedded").rows).cards]
    lost = [name for name in names if format_name(name.lower()) != name]
    assert len(lost) / len(names) < 0.002, lost[:50]
