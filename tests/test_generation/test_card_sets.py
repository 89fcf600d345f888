"""Names for a whole set: `generate --cards`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import NameGenerator
from flash_experts.cli import main
from flash_experts.generation.card_sets import name_rows, read_card_rows
from flash_experts.generation.reranker import content_words

SET = """Name;Type line;Colors;Mana value;Rarity;Starts with
;Creature — Goblin;Red;2;common;
;Creature — Goblin;R;2;rare;Serra
Old Name;Instant;U;1;common;
;Land;;;;
"""


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "my set.csv"
    path.write_text(SET, "utf-8-sig")
    return path


@pytest.fixture
def model_folder(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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
    assert all(list(row.cells) == list(rows[0].cells) for row in rows), "the same columns"


def test_no_name_and_no_last_word_twice(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows_file: Path
) -> None:
    generator = NameGenerator(model, tokenizer, known_names=["Goblin Guide"])
    rows = read_card_rows(rows_file) * 3
    named = list(name_rows(generator, rows, 2, seed=4, quality="fast"))
    assert [one.row for one in named] == rows
    new = [one for one in named if not one.row.name]
    texts = [one.text for one in new]
    assert all(texts) and len(set(texts)) == len(texts) and all(1 <= len(one.names) <= 2 for one in new)
    last = [word for text in [*texts, "Old Name"] for word in content_words(text)[-1:]]
    assert len(set(last)) == len(last)
    assert all(one.text.startswith("Serra") for one in named[1::4])
    assert [one.text for one in named[2::4]] == ["Old Name"] * 3
    again = list(name_rows(generator, rows, 1, seed=4, quality="fast"))
    assert [one.text for one in again] == [one.text for one in named], "more candidates only add alternatives"


def test_a_row_without_a_possible_name_is_reported(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "set.csv"
    path.write_text("type_line,starts_with\nInstant,\nInstant,Goblin Guide\n")
    generator = NameGenerator(model, tokenizer, known_names=["Goblin Guide"])
    first, second = name_rows(generator, read_card_rows(path), 1, seed=1, quality="fast", max_length=12)
    assert first.text and not first.problem
    assert not second.text and "no name can be made" in second.problem


def test_the_command_writes_every_row(
    rows_file: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", str(model_folder), "--device", "cpu", "--cards", str(rows_file), "--seed", "1"]
    command += ["--count", "2", "--quality", "fast"]
    assert main([*command, "--out", str(tmp_path / "names.csv")]) == 0
    assert "3 new names for 4 cards" in capsys.readouterr().err
    table = list(csv.DictReader((tmp_path / "names.csv").open(encoding="utf-8")))
    assert list(table[0]) == ["name", "Type line", "Colors", "Mana value", "Rarity", "Starts with", "alternatives"]
    assert [row["Type line"] for row in table] == ["Creature — Goblin", "Creature — Goblin", "Instant", "Land"]
    assert table[2]["name"] == "Old Name" and all(row["name"] for row in table)
    assert main([*command, "--out", str(tmp_path / "names.json")]) == 0
    assert json.loads((tmp_path / "names.json").read_text("utf-8")) == table
    for suffix in ("mse-set", "xml", "md", "txt"):
        assert main([*command, "--out", str(tmp_path / f"names.{suffix}")]) == 0
    assert (tmp_path / "names.txt").read_text("utf-8").splitlines() == [row["name"] for row in table]
    assert main([*command, "--out", str(tmp_path / "names.csv")]) == 1, "it is not replaced"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: no column type_line"),
        ("name,price\nA,1\n", ":1: no column type_line"),
        ("name,name,type_line\n", "set.csv:1: two columns are called 'name'"),
        ("type_line,Notes,Notes\nInstant,a,b\n", ":1: two columns are called 'Notes'"),
        ("type_line,colors\n", "no cards under the heading"),
        ("type_line,colors\nInstant,U,x\n", ":2: another number of cells"),
        ("type_line,colors\nInstant\n", ":2: another number of cells"),
        ("type_line,colors\nInstant,purple\n", ":2: colors 'purple' is not understood"),
        ("type_line,mana_value\nInstant,two\n", ":2: mana_value 'two' is not understood"),
        ("type_line,colors\nInstannt,U\n", ":2: .*Instant"),
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
    with pytest.raises(ValueError, match=r"set.csv:2: mana_cost 'soon' is not understood"):
        read_card_rows(path)


def test_words_of_a_row_that_no_name_has_are_its_problem_alone(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "set.csv"
    path.write_text("type_line,starts_with\nInstant,Fire // Ice\nInstant,\n")
    generator = NameGenerator(model, tokenizer, known_names=[])
    first, second = name_rows(generator, read_card_rows(path), 1, seed=2**63 - 1, quality="fast")
    assert "as on cards" in first.problem and second.text, "the seeds of rows start again from 0"
    with pytest.raises(ValueError, match="unknown preset"):
        list(name_rows(generator, read_card_rows(path)[1:], 1, seed=1, preset="nowhere"))


def test_a_missing_file_and_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_card_rows(tmp_path / "nowhere.csv")
    (tmp_path / "set.csv").write_bytes("type_line\nCréature\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_card_rows(tmp_path / "set.csv")
