"""Names for a whole set of cards: a CSV or JSON file with a row for each, no name or last word twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from flash_experts.data.card_formats import column_of, known_columns, raw_card
from flash_experts.data.cards import UNKNOWN, Unread
from flash_experts.data.cleaning import face_cards
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes, Conditions, drop_unknown, read_conditions
from flash_experts.data.sources import MAX_JSON_BYTES, Lines, cells_of, heading_of, separated, split_lines
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import GeneratedName, NameGenerator
from flash_experts.generation.name_files import TABLES, Format, NamedCard, type_line_of, write_cards, write_table
from flash_experts.generation.reranker import content_words

MOST_ROWS = 2_000
RULE_COLUMNS = ("starts_with", "contains", "ends_with")  # a row's own words
EXTRA = 8  # names drawn beyond the candidates where some repeat a word of the set
_SEEDS = 2**63
_UNNAMED = "unnamed"
_OWN = ("name", "alternatives")  # columns that the result has of its own
_OF_CARDS = {"type_line", "types", "colors", "mana_value", "mana_cost", "rarity"}  # a file has one of these columns


@dataclass(frozen=True, slots=True)
class CardRow:
    """A row of a card file.

    Attributes:
        where: ``file:line``, or ``file[index]`` for JSON.
        name: that the card has already, or "".
        rules: options of `NameRequest`.
    """

    where: str
    cells: Mapping[str, str]
    name: str
    card: Attributes
    rules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NamedRow:
    """A row and its names, the best first; ``problem`` says why there is none."""

    row: CardRow
    names: Sequence[GeneratedName]
    problem: str = ""

    @property
    def text(self) -> str:
        return self.names[0].text if self.names else self.row.name


def read_card_rows(path: str | Path) -> list[CardRow]:
    """Reads the cards of a set from CSV, or JSON with a list of objects, or raises a ValueError with ``file:line``.

    Columns are those of `flash_experts.data.card_formats`, ``name`` for cards that have one, and ``starts_with``,
    ``contains`` and ``ends_with`` for words that a name must have. Of two faces the first one is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: more than {MOST_ROWS:,} cards: give a smaller file")
    return card_rows_of(Lines(path).whole(), str(path))


def card_rows_of(text: str, where: str) -> list[CardRow]:
    """As `read_card_rows`; ``where`` names the file in messages."""
    records = _json_records if _is_json(text) else _csv_records
    rows = []
    for place, cells in records(text, where):
        rows.append(_row_of(cells, place))
        if len(rows) > MOST_ROWS:
            raise ValueError(f"{where}: more than {MOST_ROWS:,} cards: give a smaller file")
    if not rows:
        raise ValueError(f"{where}: no cards under the heading")
    return rows


def is_card_table(text: str) -> bool:
    """Whether a text is JSON, or CSV whose heading has a column of cards."""
    if _is_json(text):
        return True
    _, heading, separator = heading_of(split_lines(text))
    return bool(known_columns(separated(heading, "the heading", separator)[1]) & _OF_CARDS)


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "{")


def _csv_records(text: str, where: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    lines = split_lines(text)
    before, heading, separator = heading_of(lines)
    first = f"{where}:{before + 1}"
    separator, columns = separated(heading, first, separator)
    if not known_columns(columns) & _OF_CARDS:
        named = heading.strip("\r\n")[:100]
        raise ValueError(f"{first}: no column type_line, colors or mana_value in the heading ({named})")
    for column, count in Counter(filter(None, map(str.strip, columns))).items():
        if count > 1:
            raise ValueError(f"{first}: two columns are called {column!r}: keep one")
    rows = cells_of(chain([heading], lines), where, before, separator, skipinitialspace=True)
    next(rows)
    for place, cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"{place}: another number of cells than the heading has: put cells with commas in quotes")
        yield place, dict(zip(columns, cells, strict=True))


def _json_records(text: str, where: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    try:
        records = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not a list of cards: its brackets are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    example = '[{"type_line": "Instant", "colors": "U"}]'
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{where}: not a list of cards: write them as {example}")
    columns = dict.fromkeys(column for record in records for column in record)
    if records and not known_columns(columns) & _OF_CARDS:
        raise ValueError(f"{where}: no card has a type_line, colors or a mana_value: write them as {example}")
    for index, record in enumerate(records):
        yield f"{where}[{index}]", {column: record.get(column) for column in columns}


def _row_of(cells: dict[Any, Any], where: str) -> CardRow:
    texts = {str(column).strip(): _cell_text(value) for column, value in cells.items()}
    given = {str(column).strip() for column, value in cells.items() if value is not None}
    lower = {column.lower().replace(" ", "_"): value for column, value in texts.items()}
    name = next((text for column, text in texts.items() if text and column_of(column) == "name"), "")
    known = {column: text for column, text in texts.items() if column in given and column_of(column) != "name"}
    unread = Unread()
    found = raw_card({**known, "name": name or _UNNAMED}, where, unread)
    front = None if found is None else next(face_cards(found, unread))
    if found is None or front is None or unread.counts:
        column = next(iter(unread.counts), "name")
        raise ValueError(f"{where}: {column} {lower.get(column, '')!r:.60} is not understood")
    is_colored = front.colors is not None and (found.mana_cost or found.colors not in (None, UNKNOWN))
    colors = ("".join(front.colors or ()) or "C") if is_colored else None
    try:
        card = Attributes.parse(front.type_line or None, colors, front.mana_value, front.rarity)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return CardRow(where, texts, name, card, {rule: lower[rule] for rule in RULE_COLUMNS if lower.get(rule)})


def _cell_text(value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "" if value is None else str(value).strip()


class TakenNames:
    """The names of a set so far."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._last_words: set[str] = set()
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        if name:
            self._names.add(normal_form(name))
            self._last_words.update(content_words(name)[-1:])

    def allows(self, name: str) -> bool:
        """Whether neither the name nor its last word is taken."""
        return normal_form(name) not in self._names and self._last_words.isdisjoint(content_words(name)[-1:])

    def named(self, row: CardRow, found: Sequence[GeneratedName]) -> NamedRow:
        """The row with these names, of which it takes the first."""
        self.add(found[0].text if found else "")
        return NamedRow(row, found, "" if found else "each name drawn ends in a word that the set has already")


def name_rows(
    generator: NameGenerator, rows: Sequence[CardRow], candidates: int, seed: int, **options: Any
) -> Iterator[NamedRow]:
    """Names for each row without one, in order, the best of ``candidates`` first; no name or last word comes twice.

    ``options`` are fields of `NameRequest` for all rows; a wrong one raises a ValueError. A row whose own words make
    no name has the reason as its ``problem``.
    """
    conditions = read_conditions(generator.model.config.to_dict())
    taken = TakenNames(row.name for row in rows)
    for place, row in enumerate(rows):
        if row.name:
            yield NamedRow(row, ())
            continue
        found: list[GeneratedName] = []
        try:
            asked = options | asked_for(row, conditions)
            for count in (candidates, candidates + EXTRA):  # the first are the same, so most rows need no extra ones
                drawn = generator.stream(count, seed=(seed + place) % _SEEDS, **asked)
                found = list(islice((name for name in drawn if taken.allows(name.text)), candidates))
                if len(found) == candidates:
                    break
        except ValueError as error:
            if not (row.rules or isinstance(error, NoTokenLeftError)):
                raise
            yield NamedRow(row, (), str(error))
            continue
        yield taken.named(row, found)


def asked_for(row: CardRow, conditions: Conditions) -> dict[str, Any]:
    """The options of `NameRequest` that a row sets and a model has learned."""
    card = drop_unknown(row.card, conditions)
    colors = None if card.colors is None else "".join(card.colors) or "C"
    attributes = {"type_line": type_line_of(card) or None, "colors": colors, "mana_value": card.mana_value,
                  "rarity": card.rarity}  # fmt: skip
    return attributes | dict(row.rules)


def table_of(named: Sequence[NamedRow]) -> list[dict[str, str]]:
    """The rows of the file with the columns ``name`` and ``alternatives``."""
    rows = []
    for one in named:
        others = {column: value for column, value in one.row.cells.items() if column.lower() not in _OWN}
        rows.append({"name": one.text, **others, "alternatives": "; ".join(name.text for name in one.names[1:])})
    return rows


def write_set(named: Sequence[NamedRow], file: TextIO, format: Format, raw_cells: bool = False) -> int:
    """Writes all rows as text, so not "mse" (see `write_mse`); returns their number."""
    if format not in TABLES:
        return write_cards(cards_of(named), file, format)
    rows = table_of(named)
    return write_table(rows, list(rows[0]), file, format, raw_cells)


def cards_of(named: Sequence[NamedRow]) -> list[NamedCard]:
    return [NamedCard(one.text, one.row.card) for one in named if one.text]
