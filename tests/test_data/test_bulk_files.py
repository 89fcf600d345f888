"""What the fields of Scryfall and MTGJSON become: names, faces, attributes, flags, and reasons to leave a card out."""

from __future__ import annotations

from typing import Any

import pytest

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.live import bulk_files
from flash_experts.data.prompts import Attributes
from tests.helpers.live_samples import atomic_card, scryfall_card


def one(row: Any, include: tuple[str, ...] = ()) -> Card:
    (card,) = clean([row], include).cards
    return card


def test_a_card_of_scryfall() -> None:
    row = bulk_files.scryfall_card(scryfall_card("Zzyrt Ambler", "Legendary Creature — Elf Scout", "{2}{G}{G}"))
    assert one(row).to_json() == {
        "name": "Zzyrt Ambler",
        "type_line": "Legendary Creature — Elf Scout",
        "types": ["Creature"],
        "subtypes": ["Elf", "Scout"],
        "supertypes": ["Legendary"],
        "colors": ["G"],
        "mana_value": 4,
        "source_id": "scryfall:oracle-Zzyrt Ambler",
        "rarity": "uncommon",
        "set_code": "ABC",
        "released": "2026-02-06",
    }
    assert Attributes.of(one(row)).prompt() == "legendary creature elf scout, green, 4, uncommon, ABC, 2026:"


def face(name: str, type_line: str, cost: str = "", **fields: Any) -> dict[str, Any]:
    return {"object": "card_face", "name": name, "type_line": type_line, "mana_cost": cost, **fields}


@pytest.mark.parametrize(
    ("layout", "top", "faces", "expected"),
    [
        (  # a split card: the cost gives the colors; the top level has those of both
            "split",
            {"colors": ["R", "U"]},
            [face("Zfire", "Instant", "{1}{R}"), face("Zice", "Instant", "{1}{U}")],
            [("Zfire", ("R",), 2), ("Zice", ("U",), 2)],
        ),
        (  # two sides: colors on each; the back has no cost
            "transform",
            {"colors": None, "mana_cost": None},
            [
                face("Zdelver", "Creature — Human", "{U}", colors=["U"]),
                face("Zmoth", "Creature — Insect", "", colors=["U"], color_indicator=["U"]),
            ],
            [("Zdelver", ("U",), 1), ("Zmoth", ("U",), None)],
        ),
        (  # flipped, it is still blue
            "flip",
            {"colors": ["U"]},
            [face("Zascendant", "Creature — Moonfolk", "{1}{U}"), face("Zessence", "Legendary Enchantment")],
            [("Zascendant", ("U",), 2), ("Zessence", ("U",), None)],
        ),
        (
            "adventure",
            {"colors": ["W"]},
            [face("Zgiant", "Creature — Giant", "{5}{W}{W}"), face("Zcast", "Sorcery — Adventure", "{3}{W}{W}")],
            [("Zgiant", ("W",), 7), ("Zcast", ("W",), 5)],
        ),
        (  # the same card twice, with nothing on top but the name
            "reversible_card",
            {"colors": None, "mana_cost": None, "type_line": None, "oracle_id": None},
            [face("Zbird", "Creature — Bird", "{G}", colors=["G"], oracle_id="o")] * 2,
            [("Zbird", ("G",), 1)],
        ),
        ("normal", {"colors": [], "mana_cost": "{3}{R}"}, None, [("Zdevoid", (), 4)]),
        ("normal", {"mana_cost": "", "type_line": "Sorcery", "cmc": 0.0}, None, [("Zdevoid", ("G",), None)]),
    ],
)
def test_faces_of_scryfall(
    layout: str, top: dict[str, Any], faces: list[dict[str, Any]] | None, expected: list[tuple[Any, ...]]
) -> None:
    name = " // ".join(part["name"] for part in faces) if faces else "Zdevoid"
    cards = clean([bulk_files.scryfall_card(scryfall_card(name, layout=layout, card_faces=faces, **top))]).cards
    assert [(card.name, card.colors, card.mana_value) for card in cards] == expected
    assert all(card.type_line and not card.source_id.endswith("None") for card in cards)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"set_type": "funny"}, "jokes"),
        ({"security_stamp": "acorn"}, "jokes"),
        ({"promo_types": ["playtest"]}, "jokes"),
        ({"promo_types": ["universesbeyond"]}, "franchises"),
        ({"security_stamp": "triangle"}, "franchises"),
        ({"set": "trk"}, "franchises"),
        ({"set_type": "memorabilia"}, "memorabilia"),
        ({"set_type": "minigame"}, "minigame"),
        ({"oversized": True}, "oversized"),
        ({"layout": "token", "type_line": "Token Creature — Elf", "set_type": "token"}, "token"),
        ({"layout": "double_faced_token"}, "token"),
        ({"layout": "emblem", "type_line": "Emblem — Ajani"}, "token"),
        ({"layout": "art_series", "type_line": "Card"}, "art_card"),
        ({"layout": "front_card", "type_line": "Card"}, "front_card"),
        ({"layout": "planar", "type_line": "Plane — Z"}, "plane"),
        ({"layout": "scheme", "type_line": "Scheme"}, "scheme"),
        ({"layout": "vanguard", "type_line": "Vanguard"}, "vanguard"),
        ({"layout": "augment"}, "augment"),
        ({"layout": "host"}, "host"),
        ({"digital": True, "set_type": "alchemy"}, None),
        ({"security_stamp": "oval", "promo_types": ["boosterfun"]}, None),
    ],
)
def test_what_scryfall_has_besides_cards_is_dropped_with_its_reason(fields: dict[str, Any], reason: str | None) -> None:
    cleaned = clean([bulk_files.scryfall_card(scryfall_card("Zzyrt Ambler", **fields))])
    assert cleaned.dropped == ({reason: 1} if reason else {})


def test_the_embedded_table_decides_for_the_cards_it_has() -> None:
    marks = {"promo_types": ["universesbeyond"], "set": "msc", "set_type": "memorabilia", "reprint": True}
    assert one(bulk_files.scryfall_card(scryfall_card("Meteor Golem", **marks))).name == "Meteor Golem", (
        "a reprint for a franchise"
    )
    assert clean([bulk_files.scryfall_card(scryfall_card("The One Ring"))]).dropped == {"franchises": 1}
    assert clean(bulk_files.mtgjson_cards([atomic_card("Chicken à la King")], {}, {})).dropped == {"jokes": 1}


@pytest.mark.parametrize("rarity", ["special", "bonus", None])
def test_a_rarity_that_is_none_of_the_four_is_unknown(rarity: str | None) -> None:
    card = one(bulk_files.scryfall_card(scryfall_card("Zzyrt Ambler", rarity=rarity)))
    assert card.rarity is None and "rarity" not in card.to_json()


def test_cards_of_mtgjson() -> None:
    sets = {"ABC": {"releaseDate": "2026-02-06", "type": "expansion"}, "MEM": {"type": "memorabilia"}}
    card = one(
        *bulk_files.mtgjson_cards([atomic_card("Zzyrt Ambler", "Legendary Creature — Elf", "{2}{G}{G}")], sets, {})
    )
    assert (card.name, card.colors, card.mana_value, card.rarity) == ("Zzyrt Ambler", ("G",), 4, None)
    assert (card.set_code, card.released) == ("ABC", "2026-02-06")
    assert card.source_id == "mtgjson:oracle-Zzyrt Ambler"
    sides = [
        atomic_card("Zd // Zm", "Creature — Insect", None, colors=["U"], side="b", faceName="Zm", layout="transform"),
        atomic_card("Zd // Zm", "Creature — Human", "{U}", colors=["U"], side="a", faceName="Zd", layout="transform"),
    ]
    found = clean(bulk_files.mtgjson_cards(sides, sets, {})).cards
    assert [(card.name, card.type_line, card.mana_value) for card in found] == [
        ("Zd", "Creature — Human", 1),
        ("Zm", "Creature — Insect", None),
    ]
    for fields, reason in (
        ({"isFunny": True}, "jokes"),
        ({"firstPrinting": "TRK"}, "franchises"),
        ({"firstPrinting": "MEM"}, "memorabilia"),
    ):
        assert clean(bulk_files.mtgjson_cards([atomic_card("Zzyrt Ambler", **fields)], sets, {})).dropped == {reason: 1}
    land = one(*bulk_files.mtgjson_cards([atomic_card("Zford", "Land", None, colors=[], manaValue=0.0)], sets, {}))
    assert (land.colors, land.mana_value) == ((), None)
