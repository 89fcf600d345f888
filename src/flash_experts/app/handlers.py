"""What the page does when something is pressed: plain functions from values to pieces of HTML.

What a person did wrong becomes a line on the page. State that the page keeps is in `Row`s, which the server made
itself: what a browser sends is only compared with their names, or is the number of a block or a head.
"""

from __future__ import annotations

import io
import threading
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


class Table:
    """The names that one session sees: a request adds to them while their stars are pressed, each in its own thread."""

    def __init__(self, rows: Rows = ()) -> None:
        self.rows = rows
        self._turn = threading.Lock()

    def __deepcopy__(self, _: dict[int, Any]) -> Table:
        """As Gradio makes one for each session."""
        return Table(self.rows)

    @property
    def kept(self) -> Rows:
        return tuple(row for row in self.rows if row.locked)

    def put(self, found: Rows) -> Rows:
        """Puts what a request has found so far below the rows that are kept by now, and returns all of them."""
        with self._turn:
            kept = {row.name.text: row for row in self.kept}
            below = tuple(kept.pop(row.name.text, row) for row in found)
            self.rows = (*kept.values(), *below)
            return self.rows

    def press(self, name: Any) -> Rows:
        """Keeps the row of a name, or lets it go, and returns all of them."""
        with self._turn:
            row = picked(self.rows, name)
            if row is not None and (row.locked or len(self.kept) < MOST_KEPT):
                pressed = replace(row, locked=not row.locked)
                self.rows = tuple(pressed if each is row else each for each in self.rows)
            return self.rows


class Handlers:
    """The answers of one playground's page."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    def make(self, values: Mapping[str, Any], table: Table) -> Iterator[Shown]:
        """New names below those that are kept."""
        yield from self._make(values, table, ())

    def more_like(self, values: Mapping[str, Any], table: Table) -> Iterator[Shown]:
        """Names that resemble those that are kept."""
        kept = tuple(row.name.text for row in table.kept)
        if not kept:
            message = "keep a name first: press the ☆ next to it, and the new names will resemble it"
            yield self._failed(message, table.rows)
            return
        yield from self._make({**values, "seed": None}, table, kept[-20:])

    def _make(self, values: Mapping[str, Any], table: Table, like: Sequence[str]) -> Iterator[Shown]:
        try:
            settings = form.settings_of(values)
            settings = replace(settings, like=tuple(like)) if like else settings
            had = [row.name.text for row in table.kept]
            for progress in self.playground.names(settings, values["model"], had):
                rows = table.put(progress.rows)
                told = progress.settings.to_string()
                yield Shown(rendering.names_table(rows, "New names"), rendering.status(progress), rows, told)
        except ValueError as error:
            yield self._failed(form.in_words(str(error)), table.rows)

    def _failed(self, message: str, rows: Rows) -> Shown:
        return Shown(table_of(rows), rendering.failure(message), rows, "")

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
            return rendering.failure(form.in_words(str(error)))

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
            yield [Shown("", rendering.failure(form.in_words(str(error))), (), "") for _ in sides]


def picked(rows: Rows, name: Any) -> Row | None:
    """The row of a name that a browser sent; None if there is none."""
    return next((row for row in rows if row.name.text == name), None)


def table_of(rows: Rows) -> str:
    """The table as HTML."""
    return rendering.names_table(rows, "Names") or EMPTY


def csv_of(table: Table) -> str:
    """The table as a file's text."""
    file = io.StringIO()
    write_csv((row.name for row in table.rows), file)
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
