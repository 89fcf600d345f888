"""Names for a whole set of cards: a CSV file with a row for each, no name or last word twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from flash_experts.data.card_columns import known_columns, raw_card
from flash_experts.data.cards import UNKNOWN, Unread
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes, drop_unknown, read_conditions
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.name_files import Format, NamedCard, cell, type_line_of, write_cards
from flash_experts.generation.reranking.wording import content_words
from flash_experts.generation.search import GeneratedName
from flash_experts.plain_text import from_cell, say

MOST_ROWS = 2_000
RULE_COLUMNS = ("starts_with", "contains", "ends_with")  # a row's own words
_EXTRA = 8  # names drawn beyond the candidates, of which some repeat a word of the set
_UNNAMED = "unnamed"
_OWN = ("name", "alternatives")  # columns that the result has of its own


@dataclass(frozen=True, slots=True)
class CardRow:
    """A row of the file.

    Attributes:
        where: ``file:line``.
        cells: the row as it was, by column.
        name: the name that the card has already, or "".
        card: attributes of the card.
        rules: options of `NameRequest` for this row alone.
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
        """The card's name, "" if there is none."""
        return self.names[0].text if self.names else self.row.name


def read_card_rows(path: str | Path) -> list[CardRow]:
    """Reads the cards of a set: columns such as ``type_line``, ``colors``, ``mana_value``, ``rarity`` (in the spellings
    of `flash_experts.data.card_columns`), ``name`` for cards that have one, and ``starts_with``, ``contains`` and
    ``ends_with`` for words that a name must have.

    Raises:
        ValueError: the file is missing, not UTF-8 CSV, has no such column, or a value is unreadable (``file:line``).
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as CSV UTF-8") from None
    heading = text.partition("\n")[0]
    separator = max(",;\t", key=heading.count)
    table = csv.DictReader(text.splitlines(), delimiter=separator, strict=True, skipinitialspace=True)
    columns = [column.strip() for column in table.fieldnames or ()]
    if not known_columns(columns) & {"type_line", "types", "colors", "mana_value", "mana_cost", "rarity"}:
        raise ValueError(f"{path}:1: no column type_line, colors or mana_value in the heading ({heading[:100]})")
    rows = []
    try:
        for cells in table:
            rows.append(_row_of(cells, f"{path}:{table.line_num}"))
            if len(rows) > MOST_ROWS:
                raise ValueError(f"{path}: more than {MOST_ROWS:,} cards: give a smaller file")
    except csv.Error as error:
        raise ValueError(f"{path}:{table.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no cards under the heading")
    return rows


def _row_of(cells: dict[Any, Any], where: str) -> CardRow:
    if None in cells or None in cells.values():
        raise ValueError(f"{where}: another number of cells than the heading has: put cells with commas in quotes")
    texts = {str(column).strip(): from_cell(str(value)).strip() for column, value in cells.items()}
    lower = {column.lower().replace(" ", "_"): value for column, value in texts.items()}
    name = lower.get("name", "")
    unread = Unread()
    try:
        found = raw_card({**texts, "name": name or _UNNAMED}, where, unread)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    if found is None or unread.counts:
        column = next(iter(unread.counts), "name")
        raise ValueError(f"{where}: {column} {lower.get(column, '')!r} is not understood")
    colors = None if found.colors in (None, UNKNOWN) else found.colors or "C"
    try:
        card = Attributes.parse(found.type_line or None, colors, found.mana_value, found.rarity)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return CardRow(where, texts, name, card, {rule: lower[rule] for rule in RULE_COLUMNS if lower.get(rule)})


def name_rows(
    generator: NameGenerator, rows: Sequence[CardRow], candidates: int, seed: int, **options: Any
) -> Iterator[NamedRow]:
    """Names for each row without one, in order. No name and no last word is used twice in the set.

    Args:
        candidates: names per row, the best first.
        seed: random seed; each row has its own stream.
        **options: fields of `NameRequest` for all rows, such as ``preset`` and ``quality``.

    Raises:
        ValueError: an option is out of range or unknown.
    """
    conditions = read_conditions(generator.model.config.to_dict())
    used = {normal_form(row.name) for row in rows if row.name}
    last_words = {word for row in rows for word in content_words(row.name)[-1:]}
    for place, row in enumerate(rows):
        if row.name:
            yield NamedRow(row, ())
            continue
        try:
            asked = options | _asked(drop_unknown(row.card, conditions)) | dict(row.rules)
            drawn = generator.generate(candidates + _EXTRA, seed=seed + place, **asked)
        except NoTokenLeftError as error:
            yield NamedRow(row, (), str(error))
            continue
        found = [
            name
            for name in drawn
            if normal_form(name.text) not in used and last_words.isdisjoint(content_words(name.text)[-1:])
        ][:candidates]
        if found:
            used.add(normal_form(found[0].text))
            last_words.update(content_words(found[0].text)[-1:])
        yield NamedRow(row, found, "" if found else "each name drawn ends in a word that the set has already")


def _asked(card: Attributes) -> dict[str, Any]:
    colors = None if card.colors is None else "".join(card.colors) or "C"
    return {"type_line": type_line_of(card) or None, "colors": colors, "mana_value": card.mana_value,
            "rarity": card.rarity}  # fmt: skip


def table_of(named: Sequence[NamedRow]) -> list[dict[str, str]]:
    """The rows of the file with the columns ``name`` and ``alternatives`` (separated by ";")."""
    rows = []
    for one in named:
        others = {column: value for column, value in one.row.cells.items() if column.lower() not in _OWN}
        rows.append({"name": one.text, **others, "alternatives": "; ".join(name.text for name in one.names[1:])})
    return rows


def write_set(named: Sequence[NamedRow], file: TextIO, format: Format, raw_cells: bool = False) -> int:
    """Writes all rows in a format of text; returns their number.

    Raises:
        ValueError: the format is "mse", which is binary (see `write_mse`).
    """
    if format == "csv":
        rows = table_of(named)
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({column: cell(value, raw_cells) for column, value in row.items()} for row in rows)
        return len(rows)
    if format in ("json", "jsonl"):
        rows = table_of(named)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        say("\n".join(lines) if format == "jsonl" else json.dumps(rows, indent=2, ensure_ascii=False), file)
        return len(rows)
    return write_cards(cards_of(named), file, format)


def cards_of(named: Sequence[NamedRow]) -> list[NamedCard]:
    """The rows that have a name."""
    return [NamedCard(one.text, one.row.card) for one in named if one.text]
