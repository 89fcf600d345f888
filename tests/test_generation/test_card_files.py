"""Reading of set files: `generate --cards`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash_experts.generation.card_files import card_rows_of, is_card_table, read_card_rows


def test_rows_are_read_in_the_spellings_of_card_files(rows_file: Path) -> None:
    first, second, third, land = read_card_rows(rows_file)
    assert first.card.types == ("Creature",) and first.card.subtypes == ("Goblin",) and first.card.colors == ("R",)
    assert (first.card.mana_value, first.card.rarity, first.name) == (2, "common", "")
    assert second.rules == {"starts_with": "Serra"} and third.name == "Old Name"
    assert land.card.colors == () and land.card.mana_value is None and land.where.endswith("my set.csv:5")


def test_a_json_list_is_read_as_the_table_is(rows_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    records = [
        {"Type line": "Creature — Goblin", "Colors": ["R"], "Mana value": 2, "Rarity": "common"},
        {"name": "", "Type line": "Creature — Goblin", "Colors": "R", "Mana value": 2.0, "Starts with": "Serra"},
        {"name": "Old Name", "Type line": "Instant", "Colors": ["U"], "Mana value": "1", "Rarity": "common"},
        {"Type line": "Land", "Colors": []},
        {"Type line": "Land", "Colors": None},
    ]
    path.write_text(json.dumps(records), "utf-8")
    *rows, unknown = read_card_rows(path)
    of_table = read_card_rows(rows_file)
    assert [row.card for row in (rows[0], *rows[2:])] == [row.card for row in (of_table[0], *of_table[2:])]
    assert rows[1].rules == {"starts_with": "Serra"} and rows[2].name == "Old Name"
    assert unknown.card.colors is None and unknown.where.endswith("set.json[4]")
    assert [row.cells for row in (*rows, unknown)] == records, "as they were"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: no column type_line"),
        ("name,price\nA,1\n", ":1: no column type_line"),
        ("name,name,type_line\n", "set.csv:1: two columns are called 'name'"),
        ("type_line,Notes,Notes\nInstant,a,b\n", ":1: two columns are called 'Notes'"),
        ("type_line,colors\n", "set.csv: no cards under the heading"),
        ("[]", "set.csv: no cards in the list"),
        ("type_line" + 1000 * ",", ":1: 1,001 columns: the most is 1,000"),
    ],
)
def test_a_bad_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_card_rows(path)


@pytest.mark.parametrize(
    "content",
    [
        '\r\n\r\nname,type_line,notes\r\n,Instant,"a\r\nb"\r\n'.encode("utf-8-sig"),
        b'sep=;\nname;type_line;notes\n;Instant;"a\r\nb"\n',
        'name,type_line,notes\n,Instant,"a\r\nb"\n,,\n , ,\n'.encode("utf-16"),
        b'name|type_line|notes\n|Instant|"a\r\nb"\n',
    ],
)
def test_tables_as_spreadsheets_write_them(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes(content)
    [row] = read_card_rows(path)
    assert row.cells == {"name": "", "type_line": "Instant", "notes": "a\r\nb"}, "rows of empty cells are no cards"


def test_a_line_separator_within_a_cell_ends_no_row(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("type_line,notes\nInstant,a\u2028b\x0bc\nLand,d\n", "utf-8")
    assert [row.cells["notes"] for row in read_card_rows(tmp_path / "set.csv")] == ["a\u2028b\x0bc", "d"]


def test_a_line_break_in_quotes_may_be_in_the_heading(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text('Name,"Notes\n(mine)",Type\n,a,Instant\n,"b\nc",Instannt\n', "utf-8")
    first, second = read_card_rows(path)
    assert first.cells == {"Name": "", "Notes\n(mine)": "a", "Type": "Instant"} and first.where == f"{path}:3"
    assert second.where == f"{path}:5" and second.problem.startswith("unknown type 'Instannt'")
    assert is_card_table(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        'type_line,contains,Ends with\n Instant ," Axe "," Axe"\n',
        '[{"type_line": " Instant ", "contains": " Axe ", "Ends with": " Axe", "starts_with": " "}]',
    ],
)
def test_a_space_before_the_letters_of_a_rule_is_kept(text: str) -> None:
    [row] = card_rows_of(text, "the cards")
    assert row.rules == {"contains": " Axe", "ends_with": " Axe"} and row.card.types == ("Instant",)


def test_names_are_found_under_each_heading_of_card_files(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("Kartenname;Typ\nAlter Name;Instant\n;Land\n")
    assert [row.name for row in read_card_rows(tmp_path / "set.csv")] == ["Alter Name", ""], "it keeps its name"


def test_a_mana_cost_gives_colors_and_mana_value_and_the_first_face_counts(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("type_line,mana_cost\nInstant,{1}{U}\nCreature // Land,2GG // \nLand,\n")
    cards = [row.card for row in read_card_rows(path)]
    assert [(card.types, card.colors, card.mana_value) for card in cards] == [
        (("Instant",), ("U",), 2),
        (("Creature",), ("G",), 4),
        (("Land",), None, None),
    ]
    path.write_text("type_line,mana_cost\nInstant,soon\n")
    [row] = read_card_rows(path)
    assert row.problem == "mana_cost 'soon' is not understood: give one such as 2R"


def test_a_missing_file_and_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_card_rows(tmp_path / "nowhere.csv")
    (tmp_path / "set.csv").write_bytes("type_line\nCréature\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_card_rows(tmp_path / "set.csv")


@pytest.mark.parametrize("row", ["Instant", "Instant;", "Instant;;;", "Instant; ;;"])
def test_rows_have_fewer_or_more_empty_cells_than_the_heading(row: str, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(f"Type;Colors;Notes\n{row}\n")
    [found] = read_card_rows(tmp_path / "set.csv")
    assert found.cells == {"Type": "Instant", "Colors": "", "Notes": ""}


def test_a_bad_row_has_its_problem_and_keeps_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text("Type,Colors,CMC\nInstant,U,1\nInstannt,U,1\nInstant,purple,1\nInstant,U,1,more\nInstant,U,two\n")
    good, *bad = read_card_rows(path)
    assert not good.problem and good.card.colors == ("U",)
    assert [row.problem.partition(": put")[0] for row in bad] == [
        "unknown type 'Instannt': did you mean 'Instant'?",
        "Colors 'purple' is not understood: give letters of WUBRG, or C: colorless",
        "4 cells, but the heading has 3 columns",
        "CMC 'two' is not understood: give a whole number such as 3",
    ]
    assert [row.where for row in bad] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    assert [row.cells["CMC"] for row in bad] == ["1", "1", "1,more", "two"]


@pytest.mark.parametrize("cell", ["X", "-3", "2,5", "3.5", "0.5"])
def test_a_mana_value_that_is_no_whole_number_is_shown_with_its_own_heading(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f'Type,CMC\nInstant,"{cell}"\n')
    [row] = read_card_rows(path)
    assert row.problem.startswith(f"CMC '{cell}' is not understood: give a whole number")


def test_a_note_in_a_heading_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text('Name (new);Type;"Farben (W,U,B,R,G, C)"\nA;Instant;U\n')
    [row] = read_card_rows(tmp_path / "set.csv")
    assert row.card.colors == ("U",) and row.name == "A"
    assert list(row.cells) == ["Name (new)", "Type", "Farben (W,U,B,R,G, C)"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("Token Creature — Elf", ((), ("Creature",), ("Elf",))),
        ("Token Legendary Creature - Elf", (("Legendary",), ("Creature",), ("Elf",))),
        ("Creature-Elf", ((), ("Creature",), ("Elf",))),
        ("creature- elf warrior", ((), ("Creature",), ("Elf", "Warrior"))),
        ("Land — Urza’s Power-Plant", ((), ("Land",), ("Urza's", "Power-Plant"))),
        ("Kreatur — Elf", ((), ("Creature",), ("Elf",))),
        ("Legendäre Kreatur — Elf", (("Legendary",), ("Creature",), ("Elf",))),
        ("Legendäre Artefaktkreatur — Golem", (("Legendary",), ("Artifact", "Creature"), ("Golem",))),
        ("SPONTANZAUBER", ((), ("Instant",), ())),
        ("Hexerei", ((), ("Sorcery",), ())),
        ("Verzauberung", ((), ("Enchantment",), ())),
        ("Artefakt", ((), ("Artifact",), ())),
        ("Legendärer Planeswalker", (("Legendary",), ("Planeswalker",), ())),
        ("Standardland — Forest", (("Basic",), ("Land",), ("Forest",))),
    ],
)
def test_type_lines_as_set_makers_write_them(line: str, parts: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(f"Typ\n{line}\n", "utf-8")
    [row] = read_card_rows(tmp_path / "set.csv")
    assert (row.card.supertypes, row.card.types, row.card.subtypes) == parts and row.cells == {"Typ": line}


def test_columns_that_are_not_used_may_have_any_value(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("Type,Set,Released\nInstant,My own set,soon\n")
    [row] = read_card_rows(tmp_path / "set.csv")
    assert row.cells["Set"] == "My own set"


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"name": "A", "type_line": "Instant"}\n\n{"type_line": "Land", "colors": "C"}\n')
    first, second = read_card_rows(path)
    assert first.name == "A" and second.card.types == ("Land",) and second.where == f"{path}:3"
    path.write_text('{"name": "A", "type_line": "Instant"}\n')
    assert [row.name for row in read_card_rows(path)] == ["A"], "one line alone"
    path.write_text('{"type_line": "Instant"}\n{"type_line": \n')
    with pytest.raises(ValueError, match=r"set.jsonl:2: not JSON"):
        read_card_rows(path)
    path.write_text('{\n"cards": []\n}')
    with pytest.raises(ValueError, match=r"not a list of cards"):
        read_card_rows(path)


@pytest.mark.parametrize("name", ["set.mse-set", "set.xml", "set.md", "set.xlsx"])
def test_files_of_other_kinds_are_refused_by_their_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("type_line\nInstant\n")
    with pytest.raises(ValueError, match=r"cards are read from \.csv, \.json and \.jsonl"):
        read_card_rows(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder: cards are read from"):
        read_card_rows(tmp_path)
