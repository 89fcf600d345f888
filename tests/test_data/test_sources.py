"""Users' files: separators, encodings, headings, spellings of values, and deck lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_experts.commands.prepare import summary
from flash_experts.data.card_table import read_embedded
from flash_experts.data.cards import Card, CardSource
from flash_experts.data.cleaning import clean
from flash_experts.data.prepare import prepare
from flash_experts.data.sources import read_file


def source_of(folder: Path, name: str, text: str | bytes) -> CardSource:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return read_file(path)


def cards_of(folder: Path, name: str, text: str | bytes) -> list[Card]:
    return list(clean(source_of(folder, name, text).rows).cards)


def names_of(folder: Path, name: str, text: str | bytes) -> list[str]:
    return [card.name for card in cards_of(folder, name, text)]


def only(folder: Path, columns: str, values: str) -> Card:
    """The card of a csv with one row."""
    (card,) = cards_of(folder, "a.csv", f"{columns}\n{values}\n")
    return card


# -------------------------------------------------------------------------------------- what programs export


@pytest.mark.parametrize(
    "text",
    [
        # Urza Gatherer, Delver Lens, TCGplayer, Dragon Shield, MTGO, MTGGoldfish, TopDecked, Moxfield, Archidekt
        "Name;Type;Color;Rarity;Mana cost;Count;Set;Set code\nMire Song;Sorcery;Black;Rare;(1)(B);2;Magic;M10\n",
        "Name\tEdition\tQuantity\nMire Song\tM11\t1\n",
        "Quantity,Name,Simple Name,Set,Card Number,Set Code,Rarity\n1,Mire Song,Mire,Magic 2010,9,M10,Rare\n",
        '"sep=,"\r\nFolder Name,Quantity,Card Name,Set Code,LOW\r\nBinder,1,Mire Song,M10,\r\n',
        "sep=;\nList Name;Card Name;Set Code\nBinder;Mire Song;M10\n",
        'Card Name,Quantity,ID #,Rarity,Set,Premium\n"Mire Song",2,83561,Common,ZNR,No\n',
        'Card,Set ID,Set Name,Quantity,Foil\n"Mire Song",DOM,"",1,""\n',
        "QUANTITY,NAME,SETCODE,SETNAME\n1,Mire Song,MID,Innistrad\n",
        "Count,Name,Edition,Foil\n2,Mire Song,M11,\n\n,,,\n",
        "Quantity,Name,Types,Sub-types,Super-types,Mana cost\n1,Mire Song,Sorcery,,,{1}{B}\n",
        "Karte|Typ|Farbe\nMire Song|Sorcery|Schwarz\n",
        "Nom de la carte;Rareté\nMire Song;Peu commune\n",
        "Nombre,Coste de maná\nMire Song,1B\n",
        "\ufeffNome;Cor\nMire Song;Preto\n",
        'id,"Purchase\nPrice",Name\n1,2,Mire Song\n',
        ",Name,,Name of set\n0,Mire Song,,Magic\n",
        "My cards,,\nName,Type,Color\nMire Song,Instant,Blue\n",
    ],
)
def test_tables_of_other_programs_are_read(tmp_path: Path, text: str) -> None:
    assert names_of(tmp_path, "a.csv", text) == ["Mire Song"]
    if '"Purchase' not in text and "My cards" not in text:  # headings of two lines, or below another one
        assert names_of(tmp_path, "a.txt", text) == ["Mire Song"]
    assert names_of(tmp_path, "b.csv", text.encode("utf-16")) == ["Mire Song"]
    assert names_of(tmp_path, "c.csv", text.replace("\r\n", "\n").replace("\n", "\r")) == ["Mire Song"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Krenko, Mob Boss\nMire Song\n", ["Krenko, Mob Boss", "Mire Song"]),
        ("Krenko, Mob Boss\nOna, Mire Queen\n", ["Krenko, Mob Boss", "Ona, Mire Queen"]),
        ("TL;DR\nMire Song\n", ["TL;DR", "Mire Song"]),
        ('"Krenko, Mob Boss"\nMire Song\n', ["Krenko, Mob Boss", "Mire Song"]),
        ("Name\nKrenko, Mob Boss\n", ["Krenko, Mob Boss"]),
        ("Mire Song\nA Toll of 100,000 Eyes\n", ["Mire Song", "A Toll of 100,000 Eyes"]),
        ("Card Name,\nKrenko, Mob Boss,\n", ["Krenko, Mob Boss"]),
        ("4 Mire Song\n2x Krenko, Mob Boss\n", ["Mire Song", "Krenko, Mob Boss"]),
        ('name,text\nMire Song,"Draw a card.\nThen, draw another."\nTide,\n', ["Mire Song", "Tide"]),
    ],
)
def test_commas_and_line_breaks_in_cells(tmp_path: Path, text: str, names: list[str]) -> None:
    assert names_of(tmp_path, "a.csv", text) == names


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ('"Brims" Barone, Midway Mobster', '"Brims" Barone, Midway Mobster'),  # as Google Sheets writes it
        ('"""Brims"" Barone, Midway Mobster"', '"Brims" Barone, Midway Mobster'),  # as Excel writes it
        ('"Ach! Hans, Run!"', '"Ach! Hans, Run!"'),
        ('"""Ach! Hans, Run!"""', '"Ach! Hans, Run!"'),
        ('Henzie "Toolbox" Torre', 'Henzie "Toolbox" Torre'),
        ('"Krenko, Mob Boss"', "Krenko, Mob Boss"),
        ("Krenko, Mob Boss", "Krenko, Mob Boss"),
    ],
)
def test_quotes_of_a_name_between_tabs_are_kept(tmp_path: Path, cell: str, name: str) -> None:
    for table in (f"Name\tSet\n{cell}\tUST\n", f'Set\tName\tText\r\nUST\t{cell}\t"Draw.\r\nDraw."\r\n'):
        assert names_of(tmp_path, "a.tsv", table) == names_of(tmp_path, "a.csv", table) == [name]
    assert names_of(tmp_path, "a.tsv", f"Name\n{cell}\nMire Song\n") == [name, "Mire Song"]
    assert names_of(tmp_path, "a.tsv", f"Mire Song\n{cell}\n") == ["Mire Song", name]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (
            "a.csv",
            "idProduct;price\n743311;1\n",
            r"a\.csv:1: no column 'name' .*idProduct, price\): product numbers",
        ),
        ("a.csv", "Mire Song,Sorcery,{B}\nTide,Instant,{U}\n", r"a\.csv:1: no column 'name'"),
        ("a.csv", "Mire Song;Sorcery\nTide;Instant\n", r"a\.csv:1: no column .name. in the heading \(Mire Song, Sorc"),
        ("a.csv", "Name\nMire Song\tSorcery\n", r"a\.csv:2: 2 cells, but the heading has 1"),
        ("a.csv", "Name,name\nMire Song,Tide\n", r"a\.csv:1: two columns are called 'name'"),
        ("a.csv", "name,type\nKrenko, Mob Boss,Creature\n", r"a\.csv:2: 3 cells, .* has 2 columns: put .* in quotes"),
        (
            "a.csv",
            "name\n" + "Lim-Dûl\n",
            r"a\.csv:2: not UTF-8 text: perhaps Windows-1252: save .* \(in Excel: CSV UTF-8\)",
        ),
        ("a.txt", "Name:Mire Song\nManaCost:1 B\n", r"a\.txt:1: this is a card script of Forge"),
        ("a.txt", "mse version: 2.1\n", r"a\.txt:1: this is a set of Magic Set Editor"),
        ("a.json", '{"name": "A"}\n{"name": "B"}\n', r"a\.json:2: not JSON: .*rename it to \.jsonl"),
        ("a.csv", "<?xml version='1.0'?>\n", r"a\.csv:1: this is XML"),
        ("cards.xml", "<cockatrice_carddatabase/>\n", r"cards\.xml is XML .*Cockatrice.*export"),
        ("a.mse-set", "PK", r"Magic Set Editor"),
        ("a.xlsx", "PK", r"a\.xlsx is .*spreadsheet: save the sheet as CSV"),
        ("a.csv", "name,type\n,Sorcery\n", r"a\.csv:2: a card needs a name"),
    ],
)
def test_unreadable_files_are_reported(tmp_path: Path, name: str, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        source_of(tmp_path, name, text.encode("cp1252"))
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ deck lists


def test_a_deck_list_is_names_and_sets(tmp_path: Path) -> None:
    text = """About
Name Mire Deck

Deck
4 Gloam Sentry (M10) 146
2x Mire Song
1 Krenko, Mob Boss (RVR) 119 *F* #goblin #token maker
1 Toll of the Deep / Tide of Ash (LCI) 135
3 Ash Fen [ZNR] (F)
1 [m11:9] Gray Cog
// a comment
2 Hazmat Suit (Used)
1 Sol Ring (PLST) DDC-49 [Ramp{noDeck},Mana] ^Have,#37d67a^

Sideboard:
SB: 1 Duskwalk
Silt Elk x3
Tokens (1)
1 Treasure
"""
    cleaned = clean(source_of(tmp_path, "deck.txt", text).rows, include=["jokes"])
    assert [(card.name, card.set_code) for card in cleaned.cards] == [
        ("Gloam Sentry", "M10"),
        ("Mire Song", None),
        ("Krenko, Mob Boss", "RVR"),
        ("Toll of the Deep", "LCI"),
        ("Tide of Ash", "LCI"),
        ("Ash Fen", "ZNR"),
        ("Gray Cog", "M11"),
        ("Hazmat Suit (Used)", None),
        ("Sol Ring", "PLST"),
        ("Duskwalk", None),
        ("Silt Elk", None),
    ]
    assert cleaned.dropped == {"token": 1}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Commander\nOna, Mire Queen\n\nSideboard\nTide\n", ["Ona, Mire Queen", "Tide"]),
        ("1996 World Champion\n17-Year Cicadas\nMire Song\n", ["1996 World Champion", "17-Year Cicadas", "Mire Song"]),
        ("50 Feet of Rope\nMire Song\n", ["50 Feet of Rope", "Mire Song"]),
        ("7 Steps Down\nMire Song\nTide\nAsh\n", ["7 Steps Down", "Mire Song", "Tide", "Ash"]),
        ("Card Name\nMire Song\n", ["Mire Song"]),
        ("// my names\nMire Song\n", ["Mire Song"]),
        ("1. Mire Song\n2. Tide 10) Deep\n", ["Mire Song", "Tide 10) Deep"]),
        ("- Mire Song\n- Tide\n", ["Mire Song", "Tide"]),
        ('"Krenko, Mob Boss",\n"Tide"\n', ["Krenko, Mob Boss", "Tide"]),
        ('"Ach! Hans, Run!"\nTide\n', ['"Ach! Hans, Run!"', "Tide"]),
        ("4 Mire Song|M10\n2 Tide|M10|1\n", ["Mire Song", "Tide"]),
    ],
)
def test_lists_of_names_stay_as_they_are(tmp_path: Path, text: str, names: list[str]) -> None:
    assert names_of(tmp_path, "a.txt", text) == names


# --------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("columns", "values", "colors", "mana_value"),
    [
        ("name,type,manaCost,cmc", "Mire,Sorcery,4W,5", "W", 5),
        ("name,type,manaCost", "Mire,Sorcery,1WWBBRR", "WBR", 7),
        ("name,type,manaCost,cmc", "Mire,Sorcery,2WU,3", "WU", 3),
        ("name,type,manaCost,cmc", "Mire,Sorcery,two white,3", None, 3),
        ("name,type,manaCost", "Mire,Sorcery,two white", None, None),
        ("name,type,manaCost,color", "Mire,Sorcery,two white,White", "W", None),
        ("name,type", "Mire,Sorcery", None, None),
        ("name,type,manaCost", "Mire,Land,", "", None),
        ("name,type,manaCost", "Mire,Artifact Land,", "", None),
        ("name,type,manaCost", "Mire,sorcery,no cost", None, None),
        ("name,type,cost", "Mire,Sorcery,{1}{B}", "B", 2),
        ("name,cost", "Mire,3", None, None),
        ("name,type,colors", "Mire,Sorcery,\"['R', 'W']\"", "WR", None),
        ("name,type,colors", "Mire,Sorcery,[]", "", None),
        ("name,type,colors", "Mire,Sorcery,nan", None, None),
        ("name,type,color", "Mire,Sorcery,Red/White", "WR", None),
        ("name,type,color", "Mire,Sorcery,RW", "WR", None),
        ("name,type,color", 'Mire,Sorcery,"R, W"', "WR", None),
        ("name,type,color", "Mire,Sorcery,Red-White", "WR", None),
        ("name,type,color", "Mire,Sorcery,Azorius", "WU", None),
        ("name,type,color", "Mire,Sorcery,Multicolor", None, None),
        ("name,type,color,manaCost", "Mire,Sorcery,Gold,1WU", "WU", 3),
        ("name,type,color,manaCost", "Mire,Sorcery,,1WU", "WU", 3),
        ("name,type,color", "Mire,Sorcery,purple", None, None),
        ("Name;Typ;Farbe;Manawert", "Mire;Sorcery;Weiß;2,0", "W", 2),
        ("name,type,cmc", "Mire,Sorcery,two", None, None),
        ("name,type,cmc", "Mire,Sorcery,<NA>", None, None),
    ],
)
def test_costs_and_colors(
    tmp_path: Path, columns: str, values: str, colors: str | None, mana_value: int | None
) -> None:
    card = only(tmp_path, columns, values)
    assert (None if card.colors is None else "".join(card.colors), card.mana_value) == (colors, mana_value)


@pytest.mark.parametrize(
    ("written", "rarity"),
    [
        *(("Mythic Rare", "mythic"), ("MythicRare", "mythic"), ("mythic-rare", "mythic"), ("M", "mythic")),
        *(("COMMON", "common"), ("C1", "common"), ("Peu commune", "uncommon"), ("Selten", "rare"), ("rare", "rare")),
        *((other, None) for other in ("Land", "Basic Land", "basic", "L", "S", "P", "Promo", "Token", "Timeshifted")),
        *((other, None) for other in ("special", "Bonus", "T", "nan", "")),
    ],
)
def test_rarities(tmp_path: Path, written: str, rarity: str | None) -> None:
    assert only(tmp_path, "name,rarity", f"Mire,{written}").rarity == rarity


def test_types_in_any_case_and_in_parts(tmp_path: Path) -> None:
    assert only(tmp_path, "name,type", "Mire,LEGENDARY CREATURE - ELF").type_line == "Legendary Creature — Elf"
    parts = only(tmp_path, "Name,Types,Sub-types,Super-types", 'Mire,Creature,"Elf, Druid",Legendary')
    assert parts.type_line == "Legendary Creature — Elf Druid"
    assert only(tmp_path, "name,types,subtypes", "Mire,['Creature'],['Elf']").type_line == "Creature — Elf"


FRONT = {"name": "Pang // Woe", "faceName": "Pang", "side": "a", "type": "Instant", "manaCost": "{B}", "manaValue": 5.0}
BACK = FRONT | {"faceName": "Woe", "side": "b", "type": "Sorcery", "manaCost": "{3}{R}"}


ATOMIC = {"meta": {}, "data": {"Pang // Woe": [FRONT, BACK]}}
COLUMNS = {column: {"0": FRONT[column], "1": BACK[column]} for column in FRONT}  # as pandas writes them


@pytest.mark.parametrize(
    "rows", [[FRONT, BACK], [BACK, FRONT], {"data": {"cards": [FRONT, BACK]}}, ATOMIC, COLUMNS], ids=range(5)
)
def test_a_row_for_each_face(tmp_path: Path, rows: Any) -> None:
    cards = cards_of(tmp_path, "a.json", json.dumps(rows))
    assert sorted((card.name, card.type_line, card.colors, card.mana_value) for card in cards) == [
        ("Pang", "Instant", ("B",), 1),
        ("Woe", "Sorcery", ("R",), 4),
    ]


def test_faces_of_a_card_of_scryfall(tmp_path: Path) -> None:
    faces = [{"mana_cost": "{B}", "colors": ["B"]}, {"mana_cost": "", "colors": ["B", "R"]}]
    card = {"name": "Pang // Woe", "type_line": "Instant // Sorcery", "cmc": 1.0, "card_faces": faces}
    pang, woe = cards_of(tmp_path, "a.json", json.dumps({"object": "list", "data": [card]}))
    assert (pang.colors, pang.mana_value, woe.type_line, woe.colors) == (("B",), 1, "Sorcery", ("B", "R"))


def test_nan_in_json_is_missing(tmp_path: Path) -> None:
    text = '{"name": "Mire", "type_line": NaN, "mana_cost": NaN, "cmc": 2.0, "colors": NaN, "rarity": NaN}\n'
    (card,) = cards_of(tmp_path, "a.jsonl", text + '{"name": NaN, "cmc": 3}\n')
    assert (card.type_line, card.colors, card.mana_value, card.rarity) == ("", None, 2, None)


# ------------------------------------------------------------------------------------------ what is counted


def test_unreadable_values_are_counted_and_printed(tmp_path: Path) -> None:
    """Every name of the file also counts as known, dropped or not."""
    names = [row.name for row in read_embedded().rows[5000:5600] if row.name.replace(" ", "").isalpha()]
    line = len(names) + 2
    rows = "".join(f"{name},Sorcery,4W,Rare,M10\n" for name in names)
    odd = "Zqa Song,Sorcery,many,Promo,Magic 2010\nZqb Song,Sorcery,{4}{?},Promo,M10\nnan,Sorcery,,,\n"
    dropped = "Zqtoken,Token Creature,,,\nZqplane,Plane,,,\n"
    (tmp_path / "mine.csv").write_text(f"name,type,cost,rarity,set\n{rows}{odd}{dropped}", "utf-8")
    meta = prepare(tmp_path / "mine.csv", tmp_path / "out")
    assert meta["names"] == len(names) + 2 and meta["dropped"] == {"plane": 1, "token": 1}
    assert meta["unread"] == {
        "rarity": {"count": 2, "first": f"mine.csv:{line}: 'Promo'"},
        "set_code": {"count": 1, "first": f"mine.csv:{line}: 'Magic 2010'"},
        "name": {"count": 1, "first": f"mine.csv:{line + 2}: 'nan'"},
        "mana_cost": {"count": 2, "first": f"mine.csv:{line}: 'many'"},
    }
    lines = summary(meta, "out").splitlines()
    assert "left out: 1 plane, 1 token" in lines
    assert f"2 unknown, because mana_cost could not be read (first: mine.csv:{line}: 'many')" in lines
    assert f"1 rows without a name (first: mine.csv:{line + 2}: 'nan')" in lines
    known = (tmp_path / "out" / "known_names.txt").read_text("utf-8").splitlines()
    assert {"Zqtoken", "Zqplane"} <= set(known)
