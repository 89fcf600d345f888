"""Reads the cards of a set from CSV, JSON or JSON lines, to name those that have no name yet."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from flash_experts.data.card_formats import column_of, known_columns, raw_card
from flash_experts.data.cards import COLORS, RARITIES, UNKNOWN, Unread
from flash_experts.data.cleaning import face_cards
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.sources import (
    MAX_JSON_BYTES,
    OTHER_KINDS,
    Lines,
    cells_of,
    csv_heading_of,
    separated,
    split_lines,
)

MOST_ROWS = 2_000
_MOST_COLUMNS = 1_000
RULE_COLUMNS = ("starts_with", "contains", "ends_with")  # a row's own words
_UNNAMED = "unnamed"
_OF_CARDS = {"type_line", "types", "colors", "mana_value", "mana_cost", "rarity"}  # a file has one of these columns
_KINDS = ".csv, .json and .jsonl"
_NOTE = re.compile(r"\s*\([^()]*\)\s*$")  # at the end of a heading: "Colors (W, U, B, R, G, C)"
_FRACTION = re.compile(r"\d*[.,]\d*[1-9]\d*")
_EXAMPLE = '[{"type_line": "Instant", "colors": "U"}]'
_VALUES = {
    "mana_value": "give a whole number such as 3",
    "colors": f"give letters of {COLORS}, or C: colorless",
    "rarity": f"give {', '.join(RARITIES)}",
    "mana_cost": "give one such as 2R",
}


@dataclass(frozen=True, slots=True)
class CsvStyle:
    """How a CSV file is written."""

    separator: str = ","
    has_bom: bool = False  # byte order mark


@dataclass(frozen=True, slots=True)
class CardRow:
    """A row of a card file.

    Attributes:
        where: ``file:line``, or ``file[index]`` for JSON.
        cells: as they are in the file: texts, or any JSON.
        name: that the card has already, or "".
        rules: options of `NameRequest`.
        style: of the file, if it is CSV.
        problem: why the row is not understood, or "".
    """

    where: str
    cells: Mapping[str, Any]
    name: str
    card: Attributes
    rules: Mapping[str, str] = field(default_factory=dict)
    style: CsvStyle = CsvStyle()
    problem: str = ""


def read_card_rows(path: str | Path) -> list[CardRow]:
    """Reads the cards of a set from CSV, JSON with a list of objects, or JSON lines.

    Columns are those of `flash_experts.data.card_formats`, ``name`` for cards that have one, and ``starts_with``,
    ``contains`` and ``ends_with`` for words that a name must have. Of two faces the first one is named. A row that is
    not understood has a `CardRow.problem`.

    Raises:
        ValueError: the file is of another kind, or not a table of cards (with ``file:line``).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: cards are read from {_KINDS} files")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if suffix in OTHER_KINDS:
        raise ValueError(f"{path} is {OTHER_KINDS[suffix]}; cards are read from {_KINDS}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: more than {MOST_ROWS:,} cards: give a smaller file")
    lines = Lines(path)
    return card_rows_of(lines.whole(), str(path), lines.has_bom)


def card_rows_of(text: str, where: str, has_bom: bool = False) -> list[CardRow]:
    """As `read_card_rows`; ``where`` names the file in messages."""
    rows: list[CardRow] = []
    columns: list[str] = []
    style = CsvStyle(has_bom=has_bom)
    is_json = _is_json(text)
    if is_json:
        records: Iterable[tuple[str, Any]] = _json_records(text, where)
    else:
        separator, columns, records = _table(text, where)
        style = CsvStyle(separator, has_bom)
    for place, found in records:
        if isinstance(found, list):
            cells, problem = _record(columns, found, style.separator)
        else:
            cells, problem = found, ""
        rows.append(_row_of(cells, place, style, problem))
        if len(rows) > MOST_ROWS:
            raise ValueError(f"{where}: more than {MOST_ROWS:,} cards: give a smaller file")
    if not rows:
        raise ValueError(f"{where}: no cards {'in the list' if is_json else 'under the heading'}")
    return rows


def is_card_table(text: str) -> bool:
    """Whether a text is JSON, or CSV whose heading has a column of cards."""
    if _is_json(text):
        return True
    _, heading, separator = csv_heading_of(split_lines(text))
    return _has_cards(separated(heading, "the heading", separator)[1])


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "{")


def _has_cards(columns: Iterable[str]) -> bool:
    return bool(known_columns(plain_headings(columns).values()) & _OF_CARDS)


def plain_headings(columns: Iterable[str]) -> dict[str, str]:
    """Each heading without the note in brackets that set makers add, unless another column has that heading."""
    columns = list(columns)
    taken = {column_of(column) for column in columns} | {None}
    plain = {}
    for column in columns:
        short = _NOTE.sub("", column)
        plain[column] = column if column_of(short) in taken else short
        taken.add(column_of(short))
    return plain


def _table(text: str, where: str) -> tuple[str, list[str], Iterator[tuple[str, list[str]]]]:
    """The separator, the headings, and the place and cells of each row."""
    lines = split_lines(text)
    before, heading, separator = csv_heading_of(lines)
    first = f"{where}:{before + 1}"
    separator, columns = separated(heading, first, separator)
    if not _has_cards(columns):
        named = " ".join(heading.split())[:100]
        raise ValueError(f"{first}: no column type_line, colors or mana_value in the heading ({named})")
    for column, count in Counter(filter(None, map(str.strip, columns))).items():
        if count > 1:
            raise ValueError(f"{first}: two columns are called {column!r}: keep one")
    if len(columns) > _MOST_COLUMNS:
        raise ValueError(f"{first}: {len(columns):,} columns: the most is {_MOST_COLUMNS:,}")
    before += len(list(split_lines(heading))) - 1
    rows = cells_of(chain([heading], lines), where, before, separator, skipinitialspace=True)
    next(rows)
    return separator, _unique(columns), rows


def _unique(columns: Sequence[str]) -> list[str]:
    """The columns, of which those without a heading, " " and "  ", differ."""
    found: dict[str, None] = {}
    for column in columns:
        while column in found:
            column += " "
        found[column] = None
    return list(found)


def _record(columns: Sequence[str], cells: Sequence[str], separator: str) -> tuple[dict[str, str], str]:
    """A row by column, and its problem or "". Spreadsheets leave out empty cells at the end of a row, or add some."""
    problem, surplus = "", cells[len(columns) :]
    if any(cell.strip() for cell in surplus):
        problem = (
            f"{len(cells)} cells, but the heading has {len(columns)} columns: put cells that hold {separator!r} in "
            "quotes, or add a heading"
        )
        cells = [*cells[: len(columns) - 1], separator.join(cells[len(columns) - 1 :])]  # nothing is lost
    missing = [""] * (len(columns) - len(cells))
    return dict(zip(columns, [*cells[: len(columns)], *missing], strict=True)), problem


def _json_records(text: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    records = _json_objects(text, where)
    columns = dict.fromkeys(column for _, record in records for column in record)
    if records and not _has_cards(columns):
        raise ValueError(f"{where}: no card has a type_line, colors or a mana_value: write them as {_EXAMPLE}")
    return records


def _json_objects(text: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, or of JSON lines, with their places."""
    lines = [(f"{where}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip().startswith("{") and lines[0][1].strip().endswith("}"):
        found = [(place, _parsed(line, place)) for place, line in lines]
    else:
        records = _parsed(text, where)
        if not isinstance(records, list):
            raise ValueError(f"{where}: not a list of cards: write them as {_EXAMPLE}")
        found = [(f"{where}[{index}]", record) for index, record in enumerate(records)]
    if not all(isinstance(record, dict) for _, record in found):
        raise ValueError(f"{where}: not a list of cards: write them as {_EXAMPLE}")
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not a list of cards: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _row_of(cells: dict[str, Any], where: str, style: CsvStyle, problem: str) -> CardRow:
    texts = {column.strip(): cell_text(value).strip() for column, value in cells.items()}
    plain = plain_headings(texts)
    _, name = _own_cell(texts, plain, "name")
    card = UNCONDITIONAL
    try:
        given = {column.strip() for column, value in cells.items() if value is not None}
        card = card if problem else _card_of(texts, plain, given, name, where)
    except ValueError as error:
        problem = str(error).removeprefix(f"{where}: ")
    # A space before the letters means that they start a word.
    lower = {column.strip().lower().replace(" ", "_"): cell_text(value).rstrip() for column, value in cells.items()}
    rules = {rule: lower[rule] for rule in RULE_COLUMNS if lower.get(rule)}
    return CardRow(where, cells, name, card, rules, style, problem)


def _card_of(
    texts: Mapping[str, str], plain: Mapping[str, str], given: Container[str], name: str, where: str
) -> Attributes:
    """The card of a row's cells, of which ``given`` are in the file; a ValueError if one is not understood."""
    known = {plain[column]: text for column, text in texts.items() if column in given}
    known = {column: text for column, text in known.items() if column_of(column) != "name"}
    unread = Unread()
    found = raw_card({**known, "name": name or _UNNAMED}, where, unread)
    front = None if found is None else next(face_cards(found, unread))
    if _FRACTION.fullmatch(_own_cell(texts, plain, "mana_value")[1]):
        unread.add("mana_value", where, "")
    wrong = [column for column in unread.counts if column in _OF_CARDS]
    if found is None or front is None or wrong:
        column = next(iter(wrong), "name")
        heading, cell = _own_cell(texts, plain, column)
        hint = f": {_VALUES[column]}" if column in _VALUES else ""
        raise ValueError(f"{heading} {cell!r:.60} is not understood{hint}")
    is_colored = front.colors is not None and (found.mana_cost or found.colors not in (None, UNKNOWN))
    colors = ("".join(front.colors or ()) or "C") if is_colored else None
    return Attributes.parse(front.type_line or None, colors, front.mana_value, front.rarity)


def _own_cell(texts: Mapping[str, str], plain: Mapping[str, str], column: str) -> tuple[str, str]:
    """The file's own heading of a column, and the cell under it."""
    named = ((heading, text) for heading, text in texts.items() if text and column_of(plain[heading]) == column)
    return next(named, (column, ""))


def cell_text(value: Any) -> str:
    """A cell as text, for CSV: lists of texts are separated by spaces."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)
