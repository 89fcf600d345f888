"""Escaping of untrusted text for terminals and spreadsheets, and spelling suggestions."""

from __future__ import annotations

import ast
import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import read_file
from flash_experts.evaluation.tables import Table
from flash_experts.generation import name_files as tables
from flash_experts.generation.generator import GeneratedName
from flash_experts.terminal import (
    did_you_mean,
    escape_unencodable,
    from_cell,
    nearest,
    one_line,
    printable,
    say,
    to_cell,
)
from tests.helpers.command_line import run
from tests.helpers.spoiled import set_config

SOURCES = Path(__file__).parents[1] / "src/flash_experts"
EVIL = "\x1b]0;mine\x07\x9b31m\u202eevil\u2066\u200b\U000e0041\x7f\udc80"


def test_control_characters_are_written_out() -> None:
    assert printable("Jötun Grunt,\n\t雪 🐉\xa0\u2019") == "Jötun Grunt,\n\t雪 🐉\xa0\u2019"
    assert printable("a\x1b[2J\u202e\u2028\r") == "a\\u001b[2J\\u202e\\u2028\\u000d"
    assert one_line("a\nb\tc") == "a\\u000ab\\u0009c"
    assert printable(EVIL).isprintable()
    text = json.dumps({"text": EVIL[:-1]}, ensure_ascii=False)
    assert printable(text).isprintable() and json.loads(printable(text)) == json.loads(text)


def test_suggestions_for_misspelled_words() -> None:
    colors = ("red", "green", "blue")
    assert nearest("gren", colors) == "green" and nearest("xyz", colors) is None
    assert nearest("xyz", colors, cutoff=0.0) in colors
    assert did_you_mean("gren", colors) == "did you mean 'green'?"
    assert did_you_mean("gren", colors, "use a color", prefix=": ") == ": did you mean 'green'?"
    assert (
        did_you_mean("xyz", colors, "use a color", prefix=": ") == "use a color" and did_you_mean("xyz", colors) == ""
    )


def test_errors_warnings_tables_and_labels(workplace: Path, tmp_path: Path) -> None:
    done = run("evaluate", f"no\nwhere{EVIL[:-1]}", "--names", "names.txt", cwd=workplace)
    assert done.status == 1 and len(done.err.splitlines()) == 1 and done.err.rstrip("\n").isprintable()
    done = run("evaluate", "models/base", f"--nam\x1b[2J{EVIL[:5]}", cwd=workplace)
    assert done.status == 2 and done.err.rstrip("\n").isprintable()
    labelled = tmp_path / "label\x1b[31m\u202e"
    shutil.copytree(workplace / "models/base", labelled)
    set_config(**{"odd\x1b[2J": 1})(labelled)
    done = run("evaluate", labelled, "--names", "names.txt", cwd=workplace)
    assert done.status == 0 and "odd\\u001b[2J" in done.err
    assert all(line.isprintable() for line in (done.out + done.err).splitlines())
    table = Table("title\x1b", ("model", "b\nits"), (("label\x1b[31m\n", "1"),))
    assert all(line.isprintable() for line in table.to_text().splitlines())


def test_json_stays_valid_where_the_encoding_lacks_a_character() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="cp1252")
    escape_unencodable(stream)
    names = ["Jötun", "Ōkami", "😀", "──"]
    say(json.dumps(names, ensure_ascii=False), stream)
    assert written.getvalue() == b'["J\xf6tun", "\\u014ckami", "\\ud83d\\ude00", "\\u2500\\u2500"]\n'
    assert json.loads(written.getvalue().decode("cp1252")) == names


def test_everything_is_printed_by_one_function() -> None:
    calls = {}
    for path in SOURCES.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        names = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        if count := names.count("print"):
            calls[path.name] = count
    assert calls == {"terminal.py": 1}, "use say"


def test_no_cell_is_a_formula_and_ours_are_read_back(tmp_path: Path) -> None:
    texts = ["=1+1", "+2 Mace", "-x", "@SUM(A1)", "＝x", "'=x", "''+x", "'Tis", "Plain", "\tx", "A-Team"]
    for text in texts:
        assert from_cell(to_cell(text)) == text
        assert not to_cell(text).startswith(tuple("=+-@\t＝"))
    assert [to_cell(text) for text in texts if to_cell(text) == text] == ["'Tis", "Plain", "A-Team"]
    own = tmp_path / "own.csv"
    own.write_text("name,type\n'+2 Mace,Artifact\n'Tis Noble,Instant\n", "utf-8")
    assert [card.name for card in read_file(own).rows] == ["+2 Mace", "'Tis Noble"]


def test_csv_of_generated_names(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"text": '=HYPERLINK("x")', "nearest_card": "+2 Mace", "log_prob": -3.25}
    monkeypatch.setattr(tables, "row_of", lambda name: row)
    name = GeneratedName.__new__(GeneratedName)
    safe, raw = io.StringIO(), io.StringIO()
    for file, raw_cells in ((safe, False), (raw, True)):
        assert tables.write_names([name], Attributes(), file, "csv", raw_cells) == 1
    [written], [as_it_is] = ([*csv.DictReader(io.StringIO(file.getvalue()))] for file in (safe, raw))
    assert (written["text"], written["nearest_card"], written["log_prob"]) == ('\'=HYPERLINK("x")', "'+2 Mace", "-3.25")
    assert (as_it_is["text"], as_it_is["nearest_card"]) == ('=HYPERLINK("x")', "+2 Mace")
