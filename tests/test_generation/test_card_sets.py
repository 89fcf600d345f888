"""Names for a whole set: `generate --cards`."""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import NameGenerator
from flash_experts.cli import main
from flash_experts.generation.card_files import card_rows_of, read_card_rows
from flash_experts.generation.card_sets import NamedRow, name_rows, write_set
from flash_experts.generation.generator import GeneratedName
from flash_experts.generation.name_files import Format
from flash_experts.generation.reranker import content_words


@pytest.fixture
def model_folder(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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
    assert (tmp_path / "names.csv").read_bytes().startswith(b"\xef\xbb\xbfName;Type line;"), "as the file was"
    table = list(csv.DictReader((tmp_path / "names.csv").open(encoding="utf-8-sig"), delimiter=";"))
    assert list(table[0]) == ["Name", "Type line", "Colors", "Mana value", "Rarity", "Starts with", "alternatives"]
    assert [row["Type line"] for row in table] == ["Creature — Goblin", "Creature — Goblin", "Instant", "Land"]
    assert table[2]["Name"] == "Old Name" and all(row["Name"] for row in table)
    assert main([*command, "--out", str(tmp_path / "names.json")]) == 0
    assert json.loads((tmp_path / "names.json").read_text("utf-8")) == table
    for suffix in ("mse-set", "xml", "md", "txt"):
        assert main([*command, "--out", str(tmp_path / f"names.{suffix}")]) == 0
    assert (tmp_path / "names.txt").read_text("utf-8").splitlines() == [row["Name"] for row in table]
    assert main([*command, "--out", str(tmp_path / "names.csv")]) == 1, "it is not replaced"


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Typ;Karte;Notes\nInstant;Old;a\n", "Typ;Karte;Notes;alternatives\nInstant;Old;a;\n"),
        ("Notes|Type\na|Instant\n", "name|Notes|Type|alternatives\nNew|a|Instant|Other\n"),
        ("Type,Alternatives,Name\nInstant,x; y,Old\nLand,,\n",
         "Type,Alternatives,Name\nInstant,x; y,Old\nLand,Other,New\n"),
        ('Type,text\nInstant,"one\ntwo\r\nthree\rfour"\n',
         'name,Type,text,alternatives\nNew,Instant,"one\ntwo\r\nthree\rfour",Other\n'),
        ("Type,note \nInstant,a\tb \u200d\xad\u2028\x0b\n",
         "name,Type,note ,alternatives\nNew,Instant,a\tb \u200d\xad\u2028\x0b,Other\n"),
        ("name,Type,,\n,Land,a,b\n,Land\n", "name,Type,,,alternatives\nNew,Land,a,b,Other\nNew,Land,,,Other\n"),
        ('Name,"Notes\n(mine)",Type\n,a,Land\n', 'Name,"Notes\n(mine)",Type,alternatives\nNew,a,Land,Other\n'),
    ],
)  # fmt: skip
def test_a_table_comes_back_as_it_was(before: str, after: str) -> None:
    assert written(before, "csv") == after


def written(before: str, format: Format) -> str:
    names = [GeneratedName(text, -1.0, None, 0.0) for text in ("New", "Other")]
    named = [NamedRow(row, () if row.name else names) for row in card_rows_of(before, "the cards")]
    file = StringIO(newline="")
    assert write_set(named, file, format) == len(named)
    return file.getvalue()


def test_json_comes_back_as_it_was() -> None:
    card = {"type_line": "Instant", "colors": ["U", "R"], "mana_value": 3, "mine": {"a": 1}, "ok": True, "x": None}
    other = {"name": "Old", "text": " one\ntwo", "note": "a", "note ": [[1], 2.5], "\ud83d": "\ud83d"}
    before = json.dumps([card, other, {"Karte": 5, "title": ""}])
    named, *rest = json.loads(written(before, "json"))
    assert named == card | {"name": "New", "alternatives": "Other"}
    assert rest == [other | {"alternatives": ""}, {"Karte": 5, "title": "", "alternatives": ""}]
    table = list(csv.DictReader(StringIO(written(before, "csv"), newline="")))
    assert table[0] | {"name": "New", "alternatives": "Other"} == table[0]
    assert [table[0][key] for key in ("colors", "mana_value", "mine", "ok", "x", "note")] == [
        "U R", "3", '{"a": 1}', "true", "", "",
    ]  # fmt: skip
    assert (table[1]["text"], table[1]["note "]) == (" one\ntwo", "[[1], 2.5]")


def test_half_a_character_is_written_as_an_escape(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text('[{"type_line": "Land", "note": "\\ud83d"}]', "utf-8")
    command = ["generate", "--model", str(model_folder), "--device", "cpu", "--cards", str(tmp_path / "set.json")]
    for suffix in ("csv", "json"):
        out = tmp_path / f"names.{suffix}"
        assert main([*command, "--count", "1", "--quality", "fast", "--out", str(out)]) == 0
        assert "\\ud83d" in out.read_text("utf-8")


def test_bad_rows_are_listed_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.csv"
    path.write_text("Type\n" + "Instannt\n" * 12)
    command = ["generate", "--model", "nowhere", "--cards", str(path), "--out", str(tmp_path / "names.csv")]
    assert main(command) == 1
    *rows, rest, last = capsys.readouterr().err.splitlines()
    assert len(rows) == 10 and rows[0].startswith(f"{path}:2: unknown type 'Instannt'") and rest == "and 2 more"
    assert last == f"flash-experts generate: {path}: 12 rows are not understood"


def test_good_rows_get_names_and_bad_ones_are_reported(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "set.csv", tmp_path / "names.csv"
    path.write_text("Type,Colors\nInstannt,U\nLand,\nInstant,purple\nInstant,U\n")
    command = ["generate", "--model", str(model_folder), "--device", "cpu", "--cards", str(path), "--seed", "1"]
    assert main([*command, "--count", "1", "--quality", "fast", "--out", str(out)]) == 1
    first, second, *_, written, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{path}:2: unknown type 'Instannt'") and second.startswith(f"{path}:4: Colors 'purple'")
    assert written.endswith(f"2 new names for 4 cards, written to {out}")
    assert last.endswith(f"{path}: 2 rows are not understood: correct them in {out} and name that file")
    table = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [bool(row["name"]) for row in table] == [False, True, False, True], "in their order"
    assert [row["Type"] for row in table] == ["Instannt", "Land", "Instant", "Instant"]


def test_a_character_that_no_card_has_is_the_problem_of_its_row_alone(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = card_rows_of("type_line,starts_with\nInstant,Дра\nInstant,\n", "set.csv")
    generator = NameGenerator(model, tokenizer, known_names=[])
    first, second = name_rows(generator, rows, 1, seed=1, quality="fast")
    assert first.problem == "starts_with 'Дра': no card's name has 'Д' in it" and second.text
