"""What the page does when something is pressed: plain functions from values to pieces of HTML.

What a person did wrong becomes a line on the page. State that the page keeps is in `Row`s, which the server made
itself: of what a browser sends, only numbers of rows, blocks and heads are looked at.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flash_experts.app import form, rendering
from flash_experts.app.comparing import Side, compare
from flash_experts.app.inspecting import inspect_name
from flash_experts.app.service import Playground, Row
from flash_experts.app.settings import Settings
from flash_experts.generation.tables import write_csv

MOST_KEPT = 50
EMPTY = (
    '<p class="fe-empty">Press <strong>Make names</strong>: nothing need be chosen. '
    "None of the names will be a real card's.</p>"
)
Rows = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows of names.

    Attributes:
        table: HTML.
        status: HTML.
        rows: behind the table.
        settings: string to share, "" where there is none yet.
    """

    table: str
    status: str
    rows: Rows
    settings: str


class Handlers:
    """The answers of one playground's page."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    def make(self, values: Mapping[str, Any], rows: Rows) -> Iterator[Shown]:
        """New names below those that are kept."""
        yield from self._make(values, rows, ())

    def more_like(self, values: Mapping[str, Any], rows: Rows) -> Iterator[Shown]:
        """Names that resemble those that are kept."""
        kept = tuple(row.name.text for row in rows if row.locked)
        if not kept:
            yield self._failed("keep a name first (☆ beside it): the next ones will be like those that are kept", rows)
            return
        yield from self._make({**values, "seed": None}, rows, kept[-20:])

    def _make(self, values: Mapping[str, Any], rows: Rows, like: Sequence[str]) -> Iterator[Shown]:
        kept = tuple(row for row in rows if row.locked)
        try:
            settings = form.settings_of(values)
            settings = replace(settings, like=tuple(like)) if like else settings
            for progress in self.playground.names(settings, values["model"], [row.name.text for row in kept]):
                shown = (*kept, *progress.rows)
                told = progress.settings.to_string()
                yield Shown(rendering.names_table(shown, "New names"), rendering.status(progress), shown, told)
        except ValueError as error:
            yield self._failed(str(error), kept)

    def _failed(self, message: str, rows: Rows) -> Shown:
        return Shown(rendering.names_table(rows, "Names") or EMPTY, rendering.failure(message), rows, "")

    def lock(self, rows: Rows, number: Any) -> Rows:
        """Keeps a row, or lets it go."""
        place = _index(number, len(rows))
        if place is None or (not rows[place].locked and sum(row.locked for row in rows) >= MOST_KEPT):
            return rows
        return (*rows[:place], replace(rows[place], locked=not rows[place].locked), *rows[place + 1 :])

    def look(self, row: Row | None, block: Any = 0, head: Any = -1) -> str:
        """The panel of one name; ``head`` -1 is the mean of all."""
        if row is None:
            return ""
        block, head = _integer(block), _integer(head)
        if block is None or head is None:
            return rendering.failure("no such block or head")
        loaded = self.playground.model(row.model)
        try:
            found = inspect_name(loaded, row.name.text, row.settings)
            return rendering.inspection_panel(found, row.model, block, None if head == -1 else head)
        except ValueError as error:
            return rendering.failure(str(error))

    def compare(self, values: Mapping[str, Any], sides: Sequence[Side]) -> Iterator[list[Shown]]:
        """The same request to all sides."""
        try:
            for progress in compare(self.playground, form.settings_of(values), sides):
                yield [
                    Shown("", "", (), "")
                    if one is None
                    else Shown(
                        rendering.names_table(one.rows, "Names of one side", lockable=False),
                        rendering.status(one),
                        one.rows,
                        one.settings.to_string(),
                    )
                    for one in progress
                ]
        except ValueError as error:
            yield [Shown("", rendering.failure(str(error)), (), "") for _ in sides]


def picked(rows: Rows, number: Any) -> Row | None:
    """A row by the number that a browser sent; None if there is none."""
    place = _index(number, len(rows))
    return None if place is None else rows[place]


def csv_of(rows: Rows) -> str:
    """The table as a file's text."""
    file = io.StringIO()
    write_csv((row.name for row in rows), file)
    return file.getvalue()


def read_settings(text: str | None) -> dict[str, Any]:
    """Values of the controls for a settings string.

    Raises:
        ValueError: it is no such string.
    """
    return form.values_of(Settings.from_string(text or ""))


def _integer(value: Any) -> int | None:
    text = str(value)[:6]
    return int(text) if text.lstrip("-").isdecimal() and text.count("-") <= 1 else None


def _index(value: Any, length: int) -> int | None:
    number = _integer(value)
    return number if number is not None and 0 <= number < length else None
