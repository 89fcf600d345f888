"""Cards of a file of one's own: txt, csv, json, jsonl. Read as a stream, with bounds, and named by line if bad."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flash_experts.data.cards import parse_colors, parse_date, parse_rarity, parse_set_code
from flash_experts.data.sources import FILE_KINDS, UNKNOWN, CardSource, RawCard

MAX_LINE_BYTES = 2**20  # a card with all its rulings has some thousand
MAX_JSON_BYTES = 64 * 2**20  # a json file is parsed whole, in several times its size of memory
MAX_CARDS = 1_000_000
MAX_NAME = 300  # characters; the longest real name has 141
_NO_RARITY = ("special", "bonus")  # what Scryfall and MTGJSON call cards outside of the four
# What a column may be called: our name, MTGJSON's and Scryfall's, in lower case without "_" and spaces.
_COLUMNS = {
    "name": ("name", "cardname"),
    "type_line": ("typeline", "type"),
    "mana_cost": ("manacost",),
    "mana_value": ("manavalue", "cmc", "convertedmanacost"),
    "colors": ("colors", "color"),
    "layout": ("layout",),
    "flag": ("flag",),
    "source_id": ("sourceid", "oracleid", "uuid", "id"),
    "rarity": ("rarity",),
    "set_code": ("setcode", "set"),
    "released": ("released", "releasedat", "releasedate"),
}


def read_file(path: Path) -> CardSource:
    """Cards of a csv, json, jsonl or txt file; the suffix says which.

    A list of names is enough: one a line in txt, an array of texts in json, a column ``name`` in csv (or a
    single column without a heading). Other columns become attributes where they are called as here, in
    MTGJSON or in Scryfall: type_line, mana_cost, colors, mana_value, rarity, set, released (type, manaCost, cmc, ...).
    A set is its code, released a date or a year.

    Raises:
        ValueError: the file is empty, not UTF-8, of another kind or too large, or a line is malformed
            (``file:line``).
    """
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cards are read from {FILE_KINDS} files, not {path.suffix or 'this'}")
    lines = _Lines(path)
    rows = _bounded(path, reader(lines))
    if not rows:
        raise ValueError(f"{path}: no card names in it: the file is empty")
    digest = lines.digest.hexdigest()
    return CardSource(path.name, f"sha256:{digest[:12]}", digest, tuple(rows))


def read_text(path: Path) -> list[RawCard]:
    """Cards of a file of any suffix that has one name a line; there may be none.

    Raises:
        ValueError: as `read_file`.
    """
    return _bounded(path, _txt_rows(_Lines(path)))


def _bounded(path: Path, cards: Iterator[RawCard]) -> list[RawCard]:
    rows: list[RawCard] = []
    for row in cards:
        rows.append(row)
        if len(rows) > MAX_CARDS:
            raise ValueError(f"{path}: more than {MAX_CARDS:,} cards: give a smaller file")
    return rows


class _Lines:
    """Lines of a text file, one at a time; at the end, ``digest`` is that of the whole file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{self.path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes is no card")
                self.digest.update(line)
                yield _decoded(line, f"{self.path}:{number}", "utf-8-sig" if number == 1 else "utf-8")


def _decoded(data: bytes, where: str, encoding: str) -> str:
    try:
        if b"\0" in data:  # valid UTF-8, but in no text: an archive, a spreadsheet, UTF-16
            raise ValueError
        return data.decode(encoding)
    except ValueError as error:
        raise ValueError(f"{where}: not UTF-8 text: save the file as UTF-8") from error


def _txt_rows(lines: _Lines) -> Iterator[RawCard]:
    for number, line in enumerate(lines, start=1):
        for name in filter(None, map(str.strip, line.split("\r"))):
            where = f"{lines.path}:{number}"
            yield RawCard(_name(name, where), source_id=Path(where).name)


def _csv_rows(lines: _Lines) -> Iterator[RawCard]:
    table = csv.reader(iter(lines), strict=True)
    header: list[str] = []
    try:
        for cells in table:
            where = f"{lines.path}:{table.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(cells, where)
                if header is cells:
                    continue
            if len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} cells, but the heading has {len(header)} columns")
            yield _raw_card(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise ValueError(f"{lines.path}:{table.line_num}: {error}") from error


def _header(cells: list[str], where: str) -> list[str]:
    """The heading that a first line is; ``["name"]`` if it is itself a name, in a file of one column."""
    known = _fields(dict.fromkeys(cells, ""))
    if "name" in known:
        return cells
    if known or len(cells) > 1:
        raise ValueError(f"{where}: no column 'name' in the heading ({', '.join(cells)[:MAX_NAME]})")
    return ["name"]


def _jsonl_rows(lines: _Lines) -> Iterator[RawCard]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{lines.path}:{number}"
            yield _raw_card(_parsed(line, where), where)


def _json_rows(lines: _Lines) -> Iterator[RawCard]:
    path = lines.path
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        most = MAX_JSON_BYTES // 2**20
        raise ValueError(f"{path}: {size // 2**20:,} MB: json is read up to {most} MB, jsonl (a card a line) beyond")
    data = path.read_bytes()
    lines.digest.update(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{1 + data[: error.start].count(10)}: not UTF-8 text: save the file as UTF-8"
        ) from error
    if not text.strip():
        return
    document = _parsed(text, str(path), whole_file=True)
    if not isinstance(document, list):
        raise ValueError(f"{path}:1: expected an array of names or of cards, not {type(document).__name__}")
    for index, item in enumerate(document):
        yield _raw_card(item, f"{path}[{index}]")


def _parsed(text: str, where: str, whole_file: bool = False) -> Any:
    """A JSON document. ``where`` is ``file:line``, or the file if the text is all of it."""
    try:
        record = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair can be written in JSON, but not in UTF-8
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        return record
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if whole_file else where
        raise ValueError(f"{place}: not JSON: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a character (a lone \\ud... escape)") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets in brackets
        raise ValueError(f"{where}: not JSON of a card: {str(error).split(';')[0]}") from error


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    """The columns that we know, under our names; the first spelling that is there wins."""
    folded = {str(key).lower().replace("_", "").replace(" ", ""): value for key, value in record.items()}
    return {
        column: folded[spelling]
        for column, spellings in _COLUMNS.items()
        for spelling in reversed(spellings)
        if spelling in folded
    }


def _raw_card(record: Any, where: str) -> RawCard:
    """A card of a parsed line: a name or an object. ``where`` is ``file:line``, or ``file[index]``."""
    if isinstance(record, str):
        record = {"name": record}
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a name or a card, not {type(record).__name__}")
    fields = _fields(record)
    if type(fields.get("released")) is int:
        fields["released"] = str(fields["released"])
    for column in ("type_line", "mana_cost", "layout", "flag", "rarity", "set_code", "released"):
        if not isinstance(fields.get(column) or "", str):
            raise ValueError(f"{where}: {column} must be text, not {fields[column]!r}")
    type_line = (fields.get("type_line") or "").strip() or None
    return RawCard(
        name=_name(fields.get("name"), where),
        type_line=type_line,
        mana_cost=(fields.get("mana_cost") or "").strip() or None,
        colors=_colors(fields, type_line, where),
        mana_value=_mana_value(fields.get("mana_value"), where),
        layout=fields.get("layout") or "",
        flag=fields.get("flag") or "",
        source_id=str(fields.get("source_id") or Path(where).name),
        rarity=_told(_parse_rarity, fields.get("rarity"), where),
        set_code=_told(parse_set_code, fields.get("set_code"), where),
        released=_told(parse_date, fields.get("released"), where),
    )


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: a card needs a name")
    if len(value) > MAX_NAME:
        raise ValueError(f"{where}: {len(value):,} characters are no card name: give one name a line")
    return value


def _colors(fields: dict[str, Any], type_line: str | None, where: str) -> str | None:
    """Colors as letters. An empty cell means colorless only for a card that has a type line."""
    if "colors" not in fields:
        return None
    value = fields["colors"]
    if value is None or (not value and type_line is None):
        return UNKNOWN
    letters: Iterable[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(letter, str) for letter in letters):
        raise ValueError(f"{where}: colors must be letters of WUBRG, not {value!r}")
    try:
        return "".join(parse_colors(" ".join(letters)) or ())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse_rarity(value: str | None) -> str | None:
    return None if (value or "").strip().casefold() in _NO_RARITY else parse_rarity(value)


def _told(parse: Callable[[str | None], str | None], value: str | None, where: str) -> str | None:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mana_value(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
        if not 0 <= number < 10**7 or isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: mana_value must be a number, not {str(value)[:50]!r}") from None
    return int(number)
