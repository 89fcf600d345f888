"""Normalization of names, data cleaning, and the embedded card table."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.card_table import SINCE_2025, embedded_table, is_since_2025, known_names, read_embedded
from flash_experts.data.cards import Card, RawCard, join_type_line, split_type_line
from flash_experts.data.cleaning import Cleaned, clean, colors_of_cost, mana_value, read_cost
from flash_experts.data.names import faces_of, normal_form, shown_form
from flash_experts.data.prepare import load_known_names, load_split, prepare
from flash_experts.data.splits import SPLITS


@pytest.fixture(scope="module")
def embedded() -> Cleaned:
    """The embedded table, cleaned."""
    return clean(read_embedded().rows)


def only(**fields: object) -> Card:
    """The card that cleaning makes of one raw card."""
    (card,) = clean([RawCard(**fields)]).cards  # type: ignore[arg-type]
    return card


# ----------------------------------------------------------------------------------------------------- names


def test_shown_form_normalizes_look_alikes_and_keeps_accents() -> None:
    assert shown_form("Ratonhnhaké꞉ton") == "Ratonhnhaké:ton"
    assert shown_form("  Lim-Du\u0302l’s\u00a0  Vault\u200b ") == "Lim-Dûl's Vault"
    assert shown_form("Jo\u0308tun Grunt") == "Jötun Grunt"


def test_normal_form_is_equal_for_equivalent_names() -> None:
    assert normal_form("Lim-Dûl's Vault") == normal_form("LIM DULS VAULT") == "limdulsvault"
    assert normal_form("Æther Vial") == normal_form("Aether  Vial!")
    assert normal_form("Fire Ball") == normal_form("Fireball") != normal_form("Fireballs")
    assert normal_form("ℌaunt") == "haunt", "a letter that is a capital only when decomposed"
    assert normal_form("_____ !") == ""


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_forms_are_idempotent_and_agree(name: str) -> None:
    assert shown_form(shown_form(name)) == shown_form(name)
    assert normal_form(normal_form(name)) == normal_form(name)
    assert shown_form(name) == " ".join(shown_form(name).split())


@settings(deadline=None, max_examples=60)
@given(st.text("aeiouLmdrst'- ûöéÉæ", max_size=20))
def test_the_shown_form_of_a_name_has_its_normal_form(name: str) -> None:
    assert normal_form(shown_form(name)) == normal_form(name)


# -------------------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("cost", "value", "colors"),
    [
        ("{2}{W}{W}", 4, "W"),
        ("{X}{R}", 1, "R"),
        ("{G/W}{G/W}", 2, "WG"),
        ("{2/R}{2/R}", 4, "R"),
        ("{1}{U/P}", 2, "U"),
        ("{G/U/P}", 1, "UG"),
        ("{C}{S}", 2, ""),
        ("{0}", 0, ""),
        ("{HW}", 0, "W"),
        ("{HW}{HW}{B}", 2, "WB"),
        ("{1000000}", 1_000_000, ""),
        ("{C/W}", 1, "W"),
        ("{H/W}", 1, "W"),
    ],
)
def test_mana_costs(cost: str, value: int, colors: str) -> None:
    assert mana_value(cost) == value
    assert colors_of_cost(cost) == tuple(colors)


@pytest.mark.parametrize(
    ("cost", "symbols"),
    [
        *(("4W", "4 W"), ("(4)(W)", "4 W"), ("2 W W", "2 W W"), ("4WU", "4 W U"), ("xrr", "X R R"), ("10gg", "10 G G")),
        *(("{2/W}{W/P}", "2/W W/P"), ("2/W2/W", "2/W 2/W"), ("{2w}{wu}", "2/W W/U"), ("(w/u)3", "W/U 3")),
        *(("wp", "W/P"), ("1 BP BP", "1 B/P B/P"), ("1 GW GW", "1 G/W G/W"), ("W2 W2", "W/2 W/2"), ("1H/W", "1 H/W")),
        *(("WU(B/P)RG", "W U B/P R G"), ("{WW}", "W W"), ("1 WW GU", "1 W W G/U")),
        *(("-3", "3"), ("3.0", "3"), ("{4W}", "4 W"), ("2{W}{W}", "2 W W"), ("{1}, {R}", "1 R"), ("", "")),
    ],
)
def test_mana_costs_in_other_spellings(cost: str, symbols: str) -> None:
    assert read_cost(cost) == tuple(symbols.split())


@pytest.mark.parametrize("cost", ["two red", "$0.25", "{}", "{4}{?}", "P", "Free", "W" * 200, "9" * 50, "٣", "{W"])
def test_a_cost_that_cannot_be_read_is_unknown(cost: str) -> None:
    assert read_cost(cost) is mana_value(cost) is colors_of_cost(cost) is None
    cleaned = clean([RawCard("Mire", "Sorcery", cost, mana_value=3, source_id="a.csv:2")])
    (card,) = cleaned.cards
    assert (card.colors, card.mana_value) == (None, 3)
    assert cleaned.unread["mana_cost"]["count"] == 1


def test_a_card_is_read_from_its_row() -> None:
    card = only(name="Krenko, Mob Boss", type_line="Legendary Creature — Goblin Warrior", mana_cost="{2}{R}{R}")
    assert (card.supertypes, card.types, card.subtypes) == (
        ("Legendary",),
        ("Creature",),
        ("Goblin", "Warrior"),
    )
    assert (card.colors, card.mana_value) == (("R",), 4)


def test_faces_are_names_of_their_own() -> None:
    row = RawCard("Fire // Ice", "Instant // Instant", "{1}{R} // {1}{U}", layout="split")
    fire, ice = clean([row]).cards
    assert (fire.name, fire.colors, fire.mana_value) == ("Fire", ("R",), 2)
    assert (ice.name, ice.colors, ice.mana_value) == ("Ice", ("U",), 2)


def test_missing_values_of_a_second_face_are_unknown() -> None:
    front, back = clean([RawCard("Realm-Cloaked Giant // Cast Off", "Creature — Giant", "{5}{W}{W}")]).cards
    assert (front.types, front.colors, front.mana_value) == (("Creature",), ("W",), 7)
    assert (back.type_line, back.types, back.colors, back.mana_value) == ("", (), None, None)


def test_a_land_is_colorless_but_a_creature_may_have_colors_without_a_cost() -> None:
    assert only(name="Mountain Pass", type_line="Land").colors == ()
    assert only(name="Dryad Arbor", type_line="Land Creature — Forest Dryad").colors is None


def test_the_mana_value_of_a_row_is_that_of_its_first_face() -> None:
    """The back of a card that transforms has no mana cost, and its mana value is not on the row."""
    (row,) = [RawCard("Village Mayor // Howlpack", "Creature // Creature", mana_value=2)]
    assert [card.mana_value for card in clean([row]).cards] == [2, None]


@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_faces_a_type_counts_more_than_all_else(is_first: bool) -> None:
    typed, other = RawCard("Stormcaller", "Creature"), RawCard("Stormcaller", mana_cost="{1}{R}")
    (kept,) = clean([typed, other] if is_first else [other, typed]).cards
    assert (kept.types, kept.mana_value) == (("Creature",), None)


def test_a_face_with_a_row_of_its_own_takes_its_attributes_from_it() -> None:
    rows = [
        RawCard("Delver of Secrets // Insectile Aberration", "Creature — Human Wizard", "{U}", layout="transform"),
        RawCard("Insectile Aberration", "Creature — Human Insect", None, "U", layout="transform"),
    ]
    cleaned = clean(rows)
    assert [(card.name, card.subtypes, card.colors) for card in cleaned.cards] == [
        ("Delver of Secrets", ("Human", "Wizard"), ("U",)),
        ("Insectile Aberration", ("Human", "Insect"), ("U",)),
    ]
    assert cleaned.dropped == {"repeated": 1}


def test_a_land_has_no_mana_value_and_is_colorless() -> None:
    land = only(name="Wasteland", type_line="Land", mana_value=0)
    assert (land.mana_value, land.colors) == (None, ())


def test_a_plain_name_has_only_a_name() -> None:
    card = only(name="Sunlit Idol")
    assert (card.type_line, card.types, card.colors, card.mana_value) == ("", (), None, None)


def test_every_dropped_face_is_counted_by_its_reason() -> None:
    rows = [
        RawCard("Goblin Guide", "Creature — Goblin Scout", "{R}"),
        RawCard("A-Goblin Guide", "Creature — Goblin Scout", "{R}"),
        RawCard("A-Frame", "Artifact", "{1}"),  # no card "Frame": a name like others
        RawCard("Goblin  Guide!", "Creature — Goblin Scout", "{R}"),
        RawCard("Tazeem", "Plane — Zendikar", layout="planar"),
        RawCard("Mutual Epiphany", "Phenomenon"),
        RawCard("Your Inescapable Doom", "Ongoing Scheme", layout="scheme"),
        RawCard("Serra Angel Avatar", "Vanguard", layout="vanguard"),
        RawCard("Ancestral Hot Dog Minotaur", "Stickers"),
        RawCard("Bumper Cars", "Artifact — Attraction"),
        RawCard("Rocket-Powered Turbo Slug", "Artifact — Contraption"),
        RawCard("Adorable Kitten", "Host Creature — Cat", "{W}", layout="host"),
        RawCard("Bat-", "Creature — Bat", layout="augment"),
        RawCard("Throat Wolf", "Summon Wolf", "{R}{R}"),
        RawCard("_____ Goblin", "Creature — Goblin", "{R}"),
        RawCard("!", "Instant", "{R}"),
        RawCard("Chicken à la King", "Creature — Bird Noble", "{1}{U}{U}", flag="jokes"),
        RawCard("The One Ring", "Legendary Artifact", "{4}", flag="franchises"),
        RawCard("Soldier", "Token Creature — Soldier"),
    ]
    cleaned = clean(rows)
    assert [card.name for card in cleaned.cards] == ["Goblin Guide", "A-Frame"]
    assert cleaned.dropped == dict.fromkeys(
        (
            *(
                "rebalanced",
                "repeated",
                "plane",
                "phenomenon",
                "scheme",
                "vanguard",
                "stickers",
                "attraction",
            ),
            *(
                "contraption",
                "host",
                "augment",
                "odd_type",
                "blank",
                "no_letters",
                "jokes",
                "franchises",
                "token",
            ),
        ),
        1,
    )
    with_flagged = clean(rows, include=["jokes", "franchises"])
    assert [card.name for card in with_flagged.cards[2:]] == ["Chicken à la King", "The One Ring"]


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot include 'joke': use jokes or franchises"):
        clean([], include=["joke"])


ROWS = st.builds(
    RawCard,
    name=st.lists(st.text("AbcDé'- ", min_size=1, max_size=8), min_size=1, max_size=2).map(" // ".join),
    type_line=st.sampled_from([None, "Creature — Elf", "Land", "Instant // Sorcery", "Plane — X", "Tribal Instant"]),
    mana_cost=st.sampled_from([None, "{1}{G}", "{W/U} // {R}"]),
    flag=st.sampled_from(["", "", "jokes"]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(ROWS, max_size=12))
def test_cleaning_accounts_for_every_face_and_is_idempotent(rows: list[RawCard]) -> None:
    cleaned = clean(rows)
    assert cleaned.faces == sum(len(faces_of(row.name)) for row in rows)
    assert cleaned.faces == len(cleaned.cards) + sum(cleaned.dropped.values())
    assert len({normal_form(card.name) for card in cleaned.cards}) == len(cleaned.cards)
    again = clean(
        RawCard(
            card.name,
            card.type_line or None,
            colors="?" if card.colors is None else "".join(card.colors),
            mana_value=card.mana_value,
        )
        for card in cleaned.cards
    )
    assert [replace(card, source_id="") for card in cleaned.cards] == list(again.cards)
    assert again.dropped == {}


# -------------------------------------------------------------------------------------------- embedded table


def test_the_embedded_table_is_whole() -> None:
    source = read_embedded()
    assert len(source.rows) == 35_033
    assert len({row.name for row in source.rows}) == 35_033
    assert Counter(row.flag for row in source.rows)["franchises"] > 3_000
    assert source.sha256 == hashlib.sha256(embedded_table().read_bytes()).hexdigest()


def test_what_remains_of_the_embedded_table(embedded: Cleaned) -> None:
    cleaned = embedded
    assert 29_900 < len(cleaned.cards) < 30_200
    assert cleaned.dropped["franchises"] == pytest.approx(3_176, abs=20)
    assert cleaned.dropped["plane"] == 207
    names = {card.name: card for card in cleaned.cards}
    for name in (
        "Lim-Dûl's Vault",
        "Jötun Grunt",
        "Snapcaster Mage",
        "Command Tower",
        "Dawn",
        "Drizzt Do'Urden",
    ):
        assert name in names
    for name in ("The One Ring", "Captain Kirk, Boldly Going", "Spider-Man 2099", "Blacker Lotus", "Tazeem"):
        assert name not in names
    assert names["Ancestral Vision"].colors == ("U",)  # no mana cost, a color indicator
    assert names["Mox Emerald"].colors == ()
    assert names["Insectile Aberration"].colors == ("U",)
    assert names["Ice"].colors == ("U",)
    assert names["Crimson Kobolds"].colors == ("R",)
    assert names["Bitterblossom"].type_line == "Kindred Enchantment — Faerie"


def test_type_lines_and_costs_of_the_embedded_table_are_understood(embedded: Cleaned) -> None:
    for card in embedded.cards:
        assert card.name == shown_form(card.name)
        assert join_type_line(*split_type_line(card.type_line)) == card.type_line
        assert card.mana_value is None or 0 <= card.mana_value <= 16


def test_cards_printed_since_2025_are_known_by_their_rows(embedded: Cleaned) -> None:
    years = {card.name: is_since_2025(card.source_id) for card in embedded.cards}
    for name in (
        "Aatchik, Emerald Radian",
        "Bloomvine Regent",
        "Sothera, the Supervoid",
        "Oko, Lorwyn Liege",
        "Mathemagics",
    ):
        assert years[name] is True, name
    for name in (
        "Lightning Bolt",
        "Bloodghast",
        "Nameless Inversion",
        "Annul",
        "Valgavoth, Terror Eater",
        "Boros Mastiff",
    ):
        assert years[name] is False, name
    assert is_since_2025("scryfall:1") is None
    assert is_since_2025("embedded:99999") is None and is_since_2025("embedded:" + "9" * 5000) is None, "no such row"
    assert is_since_2025("embedded:31135") is None, "Avatar: a franchise, not classified"
    ends = [end for first, last, _ in SINCE_2025 for end in (first, last)]
    assert ends == sorted(ends) and len(set(ends)) == len(ends)


def test_known_names_hold_every_face_flagged_or_not(embedded: Cleaned) -> None:
    known = set(known_names())
    for name in (
        "Fire",
        "Ice",
        "The One Ring",
        "Blacker Lotus",
        "Tazeem",
        "Ratonhnhaké:ton",
        "Insectile Aberration",
    ):
        assert name in known
    assert not any(" // " in name for name in known)
    assert "A-Vivi Ornitier" not in known
    assert {card.name for card in embedded.cards} <= known


def test_a_damaged_table_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "cards.csv.xz"
    damaged.write_bytes(embedded_table().read_bytes()[:1000])
    monkeypatch.setattr("flash_experts.data.card_table.embedded_table", lambda: damaged)
    with pytest.raises(ValueError, match=r"cards\.csv\.xz is damaged .*build_card_table"):
        read_embedded.__wrapped__()


def test_an_installed_package_finds_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "flash_experts" / "data"
    (package / "embedded").mkdir(parents=True)
    shutil.copy(embedded_table(), package / "embedded" / "cards.csv.xz")
    monkeypatch.setattr("flash_experts.data.card_table.__file__", os.fspath(package / "card_table.py"))
    assert embedded_table() == (package / "embedded" / "cards.csv.xz").resolve()
    (package / "embedded" / "cards.csv.xz").unlink()
    with pytest.raises(ValueError, match=r"the embedded card table cards.csv.xz is missing"):
        embedded_table()


def test_flagged_cards_can_be_prepared_alone(tmp_path: Path) -> None:
    meta = prepare("embedded", tmp_path / "franchises", only="franchises")
    assert meta["only"] == "franchises" and 3_000 < meta["names"] < 3_300
    names = {card.name for split in SPLITS for card in load_split(tmp_path / "franchises", split)}
    assert "The One Ring" in names and "Lightning Bolt" not in names
    assert normal_form("Lightning Bolt") in load_known_names(tmp_path / "franchises"), (
        "known names include all real cards"
    )
    with pytest.raises(ValueError, match="only the jokes are taken: leave out --include nonsense, or --only"):
        prepare("embedded", tmp_path / "jokes", only="jokes", include=["nonsense"])
    with pytest.raises(ValueError, match="no cards have the flag 'planes': use jokes or franchises"):
        prepare("embedded", tmp_path / "planes", only="planes")
