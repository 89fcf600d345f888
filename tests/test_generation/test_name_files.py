"""Files of names, read back by their documented formats."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from flash_experts.data.prompts import Attributes
from flash_experts.generation import GeneratedName
from flash_experts.generation.name_files import (
    NamedCard,
    cockatrice_set,
    mana_cost,
    type_line_of,
    write_cards,
    write_mse,
    write_names,
)

NAMES = [GeneratedName("Grub, the <Brave>", -20.0, "Grub & Co", 0.25), GeneratedName("=Fire*Ball_", -9.5, None, 0.0)]
GOBLIN = Attributes.parse("Legendary Creature — Goblin Rogue", "R", 3, "mythic")


def written(format: Any, card: Attributes = GOBLIN) -> str:
    file = io.StringIO()
    assert write_names(NAMES, card, file, format) == 2
    return file.getvalue()


def test_text_markdown_and_tables() -> None:
    assert written("text").splitlines() == ["Grub, the <Brave>", "=Fire*Ball_"]
    assert written("markdown").splitlines() == [r"- Grub, the \<Brave\>", r"- =Fire\*Ball\_"]
    rows = json.loads(written("json"))
    assert [json.loads(line) for line in written("jsonl").splitlines()] == rows
    assert rows[0] == {
        "text": "Grub, the <Brave>", "log_prob": -20.0, "score": round(-20 / 18, 4), "nearest_card": "Grub & Co",
        "similarity": 0.25,
    }  # fmt: skip
    table = list(csv.DictReader(io.StringIO(written("csv"))))
    assert [row["text"] for row in table] == ["Grub, the <Brave>", "'=Fire*Ball_"], "no spreadsheet runs it"


def hierarchical(text: str) -> list[tuple[str, Any]]:
    """Reads the hierarchical format of Magic Set Editor: keys, values, and blocks indented by one tab a level."""
    found: list[tuple[str, Any]] = []
    lines = text.splitlines()
    while lines:
        key, _, value = lines.pop(0).partition(":")
        block = []
        while lines and lines[0].startswith("\t"):
            block.append(lines.pop(0)[1:])
        found.append((key, hierarchical("\n".join(block)) if block else value.strip()))
    return found


def test_a_set_of_magic_set_editor() -> None:
    file = io.BytesIO()
    cards = [NamedCard("Grub, the <Brave>", GOBLIN), NamedCard("Silence", Attributes())]
    assert write_mse(cards, file) == 2
    again = io.BytesIO()
    write_mse(cards, again)
    assert file.getvalue() == again.getvalue(), "the same names give the same file"
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["set"]
        entries = hierarchical(archive.read("set").decode("utf-8"))
    assert entries[:3] == [("mse version", "2.0.2"), ("game", "magic"), ("stylesheet", "m15")]
    first, second = (dict(value) for key, value in entries if key == "card")
    assert first == {
        "has styling": "false",
        "name": "Grub, the &lt;Brave>",
        "casting cost": "2R",
        "super type": "<word-list-type>Legendary</word-list-type> <word-list-type>Creature</word-list-type>",
        "sub type": "<word-list-race>Goblin</word-list-race> <word-list-race>Rogue</word-list-race>",
        "rarity": "mythic rare",
    }
    assert second == {"has styling": "false", "name": "Silence", "casting cost": ""}
    aura = io.BytesIO()
    write_mse([NamedCard("Veil", Attributes.parse("Enchantment — Aura", "W", 2))], aura)
    assert "<word-list-enchantment>Aura" in zipfile.ZipFile(aura).read("set").decode("utf-8")


def test_a_card_database_of_cockatrice() -> None:
    cards = [NamedCard("Grub, the <Brave>", GOBLIN), NamedCard("Silence", Attributes())]
    root = Xml.fromstring(cockatrice_set(cards))
    assert root.tag == "cockatrice_carddatabase" and root.attrib == {"version": "4"}
    assert [child.tag for child in root] == ["sets", "cards"] and root.findtext("sets/set/name") == "NEW"
    first, second = root.findall("cards/card")
    assert [child.tag for child in first] == ["name", "prop", "set", "tablerow"], "the order of the schema"
    assert first.findtext("name") == "Grub, the <Brave>" and first.findtext("tablerow") == "2"
    assert {child.tag: child.text for child in first.find("prop") or ()} == {
        "layout": "normal", "side": "front", "type": "Legendary Creature — Goblin Rogue", "maintype": "Creature",
        "manacost": "2R", "cmc": "3", "colors": "R",
    }  # fmt: skip
    in_set = first.find("set")
    assert in_set is not None and in_set.attrib == {"rarity": "mythic"} and in_set.text == "NEW"
    assert second.findtext("name") == "Silence" and second.findtext("tablerow") == "1"
    file = io.StringIO()
    assert write_cards(cards, file, "cockatrice") == 2 and Xml.fromstring(file.getvalue()) is not None
    with pytest.raises(ValueError, match="choose text"):
        write_cards(cards, file, "csv")


@pytest.mark.parametrize(
    ("type_line", "colors", "mana_value", "cost"),
    [
        ("Creature", "R", 3, "2R"),
        ("Creature", "R", 1, "R"),
        ("Creature", "WU", 1, "W/U"),
        ("Creature", "WU", 2, "WU"),
        ("Creature", "WUB", 2, "WUB"),
        ("Artifact", "C", 4, "4"),
        ("Artifact", "C", 0, "0"),
        ("Land", "C", 0, ""),
        ("Creature", None, 3, ""),
        ("Creature", "R", None, ""),
    ],
)
def test_mana_costs(type_line: str, colors: str | None, mana_value: int | None, cost: str) -> None:
    assert mana_cost(Attributes.parse(type_line, colors, mana_value)) == cost


def test_type_lines() -> None:
    assert type_line_of(GOBLIN) == "Legendary Creature — Goblin Rogue" and type_line_of(Attributes()) == ""
    assert type_line_of(Attributes(subtypes=("Goblin",))) == "Goblin"
