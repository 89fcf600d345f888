"""Names for a whole set of cards, such as the rows of a file: no name or last word twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

from flash_experts.data.card_formats import column_of
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Conditions, drop_unknown, read_conditions
from flash_experts.generation.card_files import CardRow, cell_text, plain_headings
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import GeneratedName, NameGenerator
from flash_experts.generation.name_files import TABLES, Format, NamedCard, type_line_of, write_cards, write_table
from flash_experts.generation.reranker import content_words

EXTRA = 8  # names drawn beyond the candidates where some repeat a word of the set
_SEEDS = 2**63
_NAME, _ALTERNATIVES = "name", "alternatives"  # columns of the result


@dataclass(frozen=True, slots=True)
class NamedRow:
    """A row and its names, the best first; ``problem`` says why there is none."""

    row: CardRow
    names: Sequence[GeneratedName]
    problem: str = ""

    @property
    def text(self) -> str:
        return self.names[0].text if self.names else self.row.name


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

    ``options`` are fields of `NameRequest` for all rows; a wrong one raises a ValueError. A row that is not understood,
    or whose own words make no name, has the reason as its ``problem``.
    """
    conditions = read_conditions(generator.model.config.to_dict())
    taken = TakenNames(row.name for row in rows)
    for place, row in enumerate(rows):
        if row.name or row.problem:
            yield NamedRow(row, (), row.problem)
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
            yield without_names(row, error)
            continue
        yield taken.named(row, found)


def without_names(row: CardRow, error: ValueError) -> NamedRow:
    """The row with an error as its problem; raises the error if it is not of this row's own words."""
    if not (row.rules or isinstance(error, NoTokenLeftError)):
        raise error
    return NamedRow(row, (), str(error))


def asked_for(row: CardRow, conditions: Conditions) -> dict[str, Any]:
    """The options of `NameRequest` that a row sets and a model has learned."""
    card = drop_unknown(row.card, conditions)
    colors = None if card.colors is None else "".join(card.colors) or "C"
    attributes = {"type_line": type_line_of(card) or None, "colors": colors, "mana_value": card.mana_value,
                  "rarity": card.rarity}  # fmt: skip
    return attributes | dict(row.rules)


def table_of(named: Sequence[NamedRow]) -> list[dict[str, Any]]:
    """The rows with the columns of the file, in their order, names in its own column of names and ``alternatives``;
    where the file has no such columns they come first and last. All other cells are as they were."""
    return _table_of(named)[1]


def _table_of(named: Sequence[NamedRow]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and `table_of`. Objects of JSON may lack some of the columns."""
    columns = list(dict.fromkeys(column for one in named for column in one.row.cells))
    own = next((column for column, plain in plain_headings(columns).items() if column_of(plain) == _NAME), None)
    others = next((column for column in columns if column.strip().lower() == _ALTERNATIVES), None)
    order = [*([_NAME] if own is None else []), *columns, *([_ALTERNATIVES] if others is None else [])]
    rows = []
    for one in named:
        row = dict(one.row.cells)
        if one.names or own is None:
            row[own or _NAME] = one.text
        if one.names or others is None:
            row[others or _ALTERNATIVES] = "; ".join(name.text for name in one.names[1:])
        rows.append({column: row[column] for column in order if column in row})
    return order, rows


def write_set(named: Sequence[NamedRow], file: TextIO, format: Format, raw_cells: bool = False) -> int:
    """Writes all rows as text, so not "mse" (see `write_mse`); returns their number. CSV is separated as the file of
    the rows is, and has a byte order mark if that has one."""
    if format not in TABLES:
        return write_cards(cards_of(named), file, format)
    (columns, rows), style = _table_of(named), named[0].row.style
    if format == "csv":
        file.write("\ufeff" if style.has_bom else "")
        rows = [{column: cell_text(value) for column, value in row.items()} for row in rows]
    return write_table(rows, columns, file, format, raw_cells, style.separator)


def cards_of(named: Sequence[NamedRow]) -> list[NamedCard]:
    return [NamedCard(one.text, one.row.card) for one in named if one.text]
