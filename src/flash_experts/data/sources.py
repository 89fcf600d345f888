"""Loads raw cards: from the embedded table, a live source, or a user's file, read as a stream with size limits."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flash_experts.data.card_formats import MAX_NAME, DeckList, known_columns, raw_card, with_escaped_quotes
from flash_experts.data.card_table import EMBEDDED, read_embedded
from flash_experts.data.cards import FILE_KINDS, FILE_SUFFIXES, CardSource, RawCard, Unread
from flash_experts.data.live.sites import read_live
from flash_experts.terminal import did_you_mean, from_cell

LIVE = ("scryfall", "mtgjson", "mtgjson-printings")
MAX_LINE_BYTES = 2**20  # a card with all its rulings has a few thousand
MAX_JSON_BYTES = 64 * 2**20  # a json file is parsed at once, in several times its size of memory
MAX_CARDS = 1_000_000
_SAMPLE = 200  # lines for detecting deck lists and csv files of names alone
_MAX_TITLES = 4  # lines above a heading
_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|:^~ ]|\\t)"?[,;\t ]*', re.IGNORECASE)  # Excel's and Dragon Shield's
_SAVE_AS = "save the file as UTF-8 (in Excel: CSV UTF-8)"
_BETWEEN_CELLS = re.compile(r"^,|(?<![0-9]),(?=\S)|,(?=[^\s0-9])|[\t|]")  # not in "Krenko, Mob Boss", "1,000 Eyes"
_LINE_ENDS = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")  # those of classic Mac OS, too
_BINARY = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save the sheet as CSV",
    b"\x1f\x8b": "compressed: unpack it first",
    b"\xfd7zXZ": "compressed: unpack it first",
    b"SQLite": "a database: export its table of cards as CSV",
}
_FOREIGN = {
    r"<": "XML or HTML (Cockatrice and MTGO write XML): export the cards as CSV or plain text",
    r"(Name|ManaCost|Types|Oracle):\S": "a card script of Forge, one card per file: write the names into one txt file",
    r"mse[ _]version:": "a set of Magic Set Editor: export it there as CSV or plain text",
}
OTHER_KINDS = {
    ".xml": _FOREIGN["<"],
    ".cod": "a deck of Cockatrice: save it there as plain text (.txt)",
    ".dek": "a deck of MTGO in XML: export it as text (.txt) or CSV",
    ".dec": "a deck list: rename it to .txt",
    ".mwdeck": "a deck list: rename it to .txt",
    ".mse-set": _FOREIGN["mse[ _]version:"],
    ".ndjson": "JSON lines: rename it to .jsonl",
    ".md": "Markdown: save the names as plain text (.txt)",
    ".xlsx": _BINARY[b"PK\x03\x04"],
    ".xls": _BINARY[b"\xd0\xcf\x11\xe0"],
    ".ods": _BINARY[b"PK\x03\x04"],
}


def load_source(source: str | Path) -> CardSource:
    """Loads the raw cards of ``"embedded"``, one of `LIVE`, or a csv, tsv, json, jsonl or txt file.

    Raises:
        ValueError: the source is unknown, malformed (``file:line``), or available neither from the network nor from
            the cache.
    """
    if source == EMBEDDED:
        return read_embedded()
    if source in LIVE:
        return read_live(str(source))
    path = Path(source)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file ({FILE_KINDS}) or the source {EMBEDDED!r}")
    if path.suffix.lower() in FILE_SUFFIXES or path.parent != Path("."):
        raise ValueError(f"no file {path}: name an existing file, or the source {EMBEDDED!r}")
    choices = f"use {', '.join(map(repr, (EMBEDDED, *LIVE)))} or a file ({FILE_KINDS})"
    nearby = [file.name for file in path.parent.iterdir() if file.suffix.lower() in FILE_SUFFIXES]
    hint = did_you_mean(str(source), [EMBEDDED, *LIVE, *nearby], choices)
    raise ValueError(f"unknown source {str(source)!r}: {hint}")


def read_file(path: Path) -> CardSource:
    """Reads cards from a csv, tsv, json, jsonl or txt file, chosen by its suffix.

    Names are enough: one per line in txt (which may be a deck list), an array of texts in json, a column ``name`` (or a
    single column without a heading) in csv, or the columns of ``generate --out``. Other columns become attributes
    (`flash_experts.data.card_formats`). Unreadable values are unknown, and counted in ``unread``.

    Raises:
        ValueError: the file is empty, not UTF-8 or UTF-16, of another kind or too large, or a line is malformed
            (``file:line``).
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows}
    suffix = path.suffix.lower()
    if suffix in OTHER_KINDS:
        raise ValueError(f"{path} is {OTHER_KINDS[suffix]}; cards are read from {FILE_KINDS} files")
    if suffix not in readers:
        raise ValueError(f"{path}: cards are read from {FILE_KINDS} files, not {path.suffix or 'this'}")
    lines, unread = Lines(path), Unread()
    rows = _bounded(path, readers[suffix](lines, unread))
    if not rows and "name" in unread.counts:
        raise ValueError(f"{unread.counts['name']['first'].rpartition(': ')[0]}: a card needs a name")
    if not rows:
        raise ValueError(f"{path}: no card names in it: the file is empty")
    digest = lines.digest.hexdigest()
    return CardSource(path.name, f"sha256:{digest[:12]}", digest, tuple(rows), unread.counts)


def read_text(path: Path) -> list[RawCard]:
    """Reads cards from a file of any suffix with one name per line; there may be none. Errors as `read_file`."""
    return _bounded(path, _txt_rows(Lines(path), Unread()))


def _bounded(path: Path, cards: Iterator[RawCard]) -> list[RawCard]:
    rows: list[RawCard] = []
    for row in cards:
        rows.append(row)
        if len(rows) > MAX_CARDS:
            raise ValueError(f"{path}: more than {MAX_CARDS:,} cards: give a smaller file")
    return rows


class Lines:
    """Iterates over lines of a text file with their ends; ``digest`` is complete after the last one.

    Attributes:
        has_bom: whether the text of `whole` followed a byte order mark.
    """

    def __init__(self, path: Path):
        self.path = path
        self.has_bom = False
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                yield from split_lines(self.whole())
                return
            file.seek(0)
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"{self.path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes is not a card"
                    )
                self.digest.update(line)
                yield from split_lines(_decoded(line, f"{self.path}:{number}", number == 1))

    def whole(self) -> str:
        """The text of the file, as UTF-8 or UTF-16 with a byte order mark."""
        size = self.path.stat().st_size
        if size > MAX_JSON_BYTES:
            is_json = self.path.suffix.lower() == ".json"
            kind, other = ("json", "jsonl (one card per line)") if is_json else ("UTF-16 text", "UTF-8 text")
            sizes = f"{size // 2**20:,} MB: {kind} is read up to {MAX_JSON_BYTES // 2**20} MB"
            raise ValueError(f"{self.path}: {sizes}, {other} beyond")
        data = self.path.read_bytes()
        self.digest.update(data)
        self.has_bom = data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = data.decode("utf-16", errors="replace")
            if "\0" not in text and "\ufffd" not in text:
                return text
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = 1 + data[: error.start].count(10)
            raise ValueError(f"{self.path}:{line}: not UTF-8 text: {_SAVE_AS}") from error


def split_lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends, ``\\n``, ``\\r\\n`` or ``\\r``."""
    return filter(None, _LINE_ENDS.split(text))


def _decoded(data: bytes, where: str, is_first: bool) -> str:
    try:
        if b"\0" in data:  # valid UTF-8, but not text: an archive, a spreadsheet, UTF-16
            raise ValueError
        return data.decode("utf-8-sig" if is_first else "utf-8")
    except ValueError as error:
        guess = "null characters, as UTF-16 has, " if b"\0" in data else "perhaps Windows-1252: "
        kinds = [f"it is {kind}" for start, kind in _BINARY.items() if is_first and data.startswith(start)]
        raise ValueError(f"{where}: not UTF-8 text: {kinds[0] if kinds else guess + _SAVE_AS}") from error


def _refuse_foreign(line: str, where: str) -> None:
    for start, kind in _FOREIGN.items():
        if re.match(start, line, re.IGNORECASE):
            raise ValueError(f"{where}: this is {kind}")


def _txt_rows(lines: Lines, unread: Unread) -> Iterator[RawCard]:
    stream = iter(lines)
    before, first, separator = heading_of(stream)
    where = f"{lines.path}:{before + 1}"
    _refuse_foreign(first, where)
    found, cells = separated(first, where, separator)
    known = known_columns(cells)
    is_table = len(cells) > 1 and "name" in known and (len(known) > 1 or found != "," or not _is_one_name(first))
    stream = chain([first], stream)
    if separator or is_table:  # a csv saved as txt
        yield from _table_rows(stream, lines.path, unread, before, separator)
        return
    numbered = ((f"{lines.path}:{number}", line) for number, line in enumerate(stream, start=before + 1))
    yield from _name_rows(numbered, unread)


def _name_rows(numbered: Iterable[tuple[str, str]], unread: Unread) -> Iterator[RawCard]:
    """Cards of a list of names or a deck list, without the heading."""
    stream = ((where, line.strip()) for where, line in numbered if line.strip())
    sample = list(islice(stream, _SAMPLE))
    if sample and len(sample[0][1]) < MAX_NAME and "name" in known_columns([sample[0][1]]):
        sample = sample[1:]
    quoted = bool(sample) and all(re.fullmatch(r'"[^"]*",?', line) for _, line in sample)
    deck = DeckList.of([line for _, line in sample])
    for where, line in chain(sample, stream):
        record: Any = line.rstrip(",; ").strip('"' if quoted else "")
        if deck is not None:
            record = deck.read(line)
        if record and not line.startswith("//") and (card := raw_card(record, where, unread)):
            yield card


def _csv_rows(lines: Lines, unread: Unread) -> Iterator[RawCard]:
    before, heading, separator = csv_heading_of(stream := iter(lines))
    yield from _table_rows(chain([heading], stream), lines.path, unread, before, separator)


def csv_heading_of(lines: Iterator[str]) -> tuple[int, str, str]:
    """As `heading_of`; the heading may have line breaks in quotes."""
    before, heading, separator = heading_of(lines)
    while heading.count('"') % 2 and len(heading) < MAX_LINE_BYTES and (more := next(lines, "")):
        heading += more
    return before, heading, separator


def heading_of(lines: Iterator[str]) -> tuple[int, str, str]:
    """Number of lines before the heading, the heading, and the separator that a ``sep=`` line names."""
    before, separator = 0, ""
    for line in lines:
        if named := _SEPARATOR_LINE.fullmatch(line.strip("\r\n")):
            separator = named[1].replace("\\t", "\t")
        elif line.strip():
            return before, line, separator
        before += 1
    return before, "", separator


def separated(heading: str, where: str, given: str = "") -> tuple[str, list[str]]:
    """The separator that gives a heading the most known columns, and its cells; ``given`` is preferred."""
    found = []
    for separator in dict.fromkeys(given + _SEPARATORS):
        try:
            cells = next(csv.reader([heading], delimiter=separator, strict=True, skipinitialspace=True), [])
            known = known_columns(cells)
        except csv.Error:
            continue
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        found.append((("name" in known, separator == given, len(known), len(cells)), separator, cells))
    return max(found, key=lambda one: one[0])[1:] if found else (",", [heading.strip()])


def _table_rows(lines: Iterator[str], path: Path, unread: Unread, before: int, separator: str) -> Iterator[RawCard]:
    """Cards of a table. The first of ``lines`` is its heading, ``before`` lines precede it."""
    sample = list(islice(lines, _SAMPLE))
    if not sample[0]:
        return
    where = f"{path}:{before + 1}"
    _refuse_foreign(sample[0], where)
    separator, header = separated(sample[0], where, separator)
    titles = 0
    while "name" not in known_columns(header) and titles < min(_MAX_TITLES, len(sample) - 1):
        titles += 1
        found, cells = separated(sample[titles], where)
        if {"name"} < known_columns(cells):  # a title stands above the heading
            separator, header, sample, before = found, cells, sample[titles:], before + titles
    header = header if any(cell.strip() for cell in header[1:]) else header[:1]
    known = known_columns(header)
    stream = chain(sample, lines)
    before += max(sample[0].count("\n") - 1, 0)
    is_list = len(header) == 1 or (
        all(map(_is_one_name, sample)) and (separator == "," or not all(separator in line for line in sample))
    )
    if "name" not in known and (known or not is_list):
        hint = ": product numbers are not names, export the names as well" if "other" in known else ""
        raise ValueError(f"{where}: no column 'name' in the heading ({', '.join(header)[:MAX_NAME]}){hint}")
    if len(header) == 1 or "name" not in known:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        yield from _name_rows(_single_cells(cells_of(stream, path, before, separator)), unread)
        return
    rows = cells_of(stream, path, before, separator, skipinitialspace=True)
    next(rows)
    for place, cells in rows:
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(header):
            quotes = f": put cells that hold {separator!r} in quotes" if len(cells) > len(header) else ""
            raise ValueError(f"{place}: {len(cells)} cells, but the heading has {len(header)} columns{quotes}")
        record: dict[str, str] = {}
        for column, cell in zip(header, cells, strict=True):
            record[column] = record.get(column) or cell
        if card := raw_card(record, place, unread):
            yield card


def cells_of(
    lines: Iterable[str], path: str | Path, before: int, separator: str, **options: Any
) -> Iterator[tuple[str, list[str]]]:
    """The place (``file:line``) and cells of each row that has any; ``before`` lines precede the first."""
    lines = map(with_escaped_quotes, lines) if separator == "\t" else lines
    table = csv.reader(lines, delimiter=separator, strict=True, **options)
    try:
        for cells in table:
            if any(cell.strip() for cell in cells):
                yield f"{path}:{before + table.line_num}", [from_cell(cell) for cell in cells]
    except csv.Error as error:
        raise ValueError(f"{path}:{before + table.line_num}: {error}") from error


def _is_one_name(line: str) -> bool:
    """Whether a line can be a single name: "Krenko, Mob Boss" has a space after its comma."""
    text = line.strip().rstrip(",")
    return (text[:1] == text[-1:] == '"') or not _BETWEEN_CELLS.search(text)


def _single_cells(rows: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, str]]:
    """Names of a single-column file, whose commas need no quotes."""
    for place, cells in rows:
        while not cells[-1].strip():
            cells.pop()
        name = ",".join(cells)
        if "\t" in name or (len(cells) > 1 and _BETWEEN_CELLS.search(name)):
            raise ValueError(f"{place}: {max(len(cells), 2)} cells, but the heading has 1 columns")
        yield place, name


def _jsonl_rows(lines: Lines, unread: Unread) -> Iterator[RawCard]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{lines.path}:{number}"
            if card := raw_card(parsed_json(line, where), where, unread):
                yield card


def _json_rows(lines: Lines, unread: Unread) -> Iterator[RawCard]:
    path = lines.path
    text = lines.whole()
    if not text.strip():
        return
    document = parsed_json(text, str(path), whole_file=True)
    records = _records(document)
    if records is None:
        raise ValueError(f"{path}:1: expected an array of names or of cards, not {type(document).__name__}")
    for index, item in enumerate(records):
        if card := raw_card(item, f"{path}[{index}]", unread):
            yield card


def _records(document: Any) -> list[Any] | None:
    """The names or cards of an array, a Scryfall search result, MTGJSON's sets (``data.cards``) or atomic cards (by
    name), or columns as pandas writes them; None for another document."""
    for key in ("data", "cards"):
        if isinstance(document, dict):
            document = document.get(key, document)
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or not document:
        return None
    if "name" in known_columns(document) and all(isinstance(column, dict) for column in document.values()):
        places = next(iter(document.values()))
        return [{name: column.get(place) for name, column in document.items()} for place in places]
    found = []
    for name, value in document.items():
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, dict) for item in items):
            return None
        found += [{"name": name, **item} for item in items]
    return found


def parsed_json(text: str, where: str, whole_file: bool = False) -> Any:
    """The value of a JSON text; a ValueError with ``where`` for another text, and for values that nothing can store."""
    try:
        record = json.loads(text)
        if "\\ud" in text.lower():  # JSON allows a lone surrogate, UTF-8 does not
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        return record
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if whole_file else where
        hint = ": if these are JSON lines, rename it to .jsonl" if whole_file and error.msg == "Extra data" else ""
        raise ValueError(f"{place}: not JSON: {error.msg}{hint}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a character (a lone \\ud... escape)") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; deep nesting
        raise ValueError(f"{where}: not the JSON of a card: {str(error).split(';')[0]}") from error
