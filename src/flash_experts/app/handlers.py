"""Event handlers of the page, without Gradio: from values of controls to HTML.

The state stays on the server, in `Row`s; untrusted input from the browser is only compared with their names, or is the
number of a block or a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

from flash_experts.app import form, rendering, sets
from flash_experts.app.service import Playground, Row, Side, compare, inspect_name
from flash_experts.app.session import (
    Request,
    Rows,
    Session,
    exported,
    exported_set,
    link_of,
    read_link,
    restored,
    stored,
)
from flash_experts.app.settings import Settings, with_gap
from flash_experts.generation.generator import completed_attributes

EMPTY = (
    '<p class="fe-empty">Press <strong>Make names</strong>: all settings are optional. '
    "No name will be that of a real card.</p>"
)


@dataclass(frozen=True, slots=True)
class TableView:
    """A table of names."""

    table: str  # HTML
    status: str  # HTML
    rows: Rows
    settings: str  # settings string; "" if there is none yet


@dataclass(frozen=True, slots=True)
class Opened:
    """What is shown when settings are opened."""

    values: Mapping[str, Any]  # by control; others stay
    status: str  # HTML
    settings: str = ""


def _with_failures(handler: Callable[..., Iterator[TableView]]) -> Callable[..., Iterator[TableView]]:
    """The handler, whose last argument is the session, with a ValueError shown above the names so far."""

    @wraps(handler)
    def shown(*args: Any) -> Iterator[TableView]:
        try:
            yield from handler(*args)
        except ValueError as error:
            rows = args[-1].rows
            yield TableView(table_of(rows), _failure(error), rows, "")

    return shown


class Handlers:
    """The event handlers of one playground's page."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    @_with_failures
    def make(self, values: Mapping[str, Any], session: Session) -> Iterator[TableView]:
        """Makes new names below the kept ones."""
        yield from self._make(form.settings_of(values), values["model"], session)

    @_with_failures
    def more_like(self, values: Mapping[str, Any], session: Session) -> Iterator[TableView]:
        """Makes names that resemble the kept ones."""
        kept = tuple(row.name.text for row in session.kept)
        if not kept:
            raise ValueError("keep a name first: press the ☆ next to it, and the new names will resemble it")
        settings = replace(form.settings_of({**values, "seed": None}), like=kept[-20:])
        yield from self._make(settings, values["model"], session)

    @_with_failures
    def make_several(self, values: Mapping[str, Any], cards: str, count: Any, session: Session) -> Iterator[TableView]:
        """Makes a few names for each of several cards: a line for each, or a set as CSV or JSON."""
        rows, number = sets.cards_of(cards), sets.number_for_each(count)
        settings = replace(form.settings_of(values), count=number)
        run = session.begin()
        without, wanted = _not_made_again(settings, session), partial(session.runs, run)
        for progress in sets.name_set(self.playground, settings, values["model"], rows, without, wanted):
            shown = session.put(run, progress.new, progress.settings, progress.before, progress.named)
            if shown is None:
                return
            table, last = rendering.names_table(shown, "New names"), (progress.new or progress.before)[-1:]
            shared = last[0].settings.to_string() if last else ""
            yield TableView(table, rendering.set_status(progress), shown, shared)

    @_with_failures
    def another_word(self, row: Row | None, number: Any, session: Session) -> Iterator[TableView]:
        """Makes names that differ from that of an opened card in one word."""
        if row is not None:
            settings = with_gap(row.settings, row.name.text, number)
            yield from self._make(settings, row.model, session, [row.name.text])

    def _make(
        self, settings: Settings, model: str, session: Session, without: Sequence[str] = ()
    ) -> Iterator[TableView]:
        run = session.begin()
        without = [*without, *_not_made_again(settings, session)]
        for progress in self.playground.names(settings, model, without, is_wanted=partial(session.runs, run)):
            rows = session.put(run, progress.rows, settings)
            if rows is None:
                return
            shared = progress.settings.to_string()
            yield TableView(rendering.names_table(rows, "New names"), rendering.status(progress), rows, shared)

    def open_page(self, kept: Any, query: Any, session: Session) -> Opened:
        """Restores the kept names that a browser stored, and reads the settings of the page's address."""
        for row in restored(kept):
            session.add_kept(row)
        return self._open_link(query) or Opened({}, "")

    def revisit(self, query: Any, link: Any, session: Session) -> Opened:
        """Shows what an entry of the browser's history has: the request of its ``link`` with its names, or else the
        settings of its address.
        """
        for request in reversed(session.history):
            if link == self._link_of(request.rows[0].settings, request.rows[0].model):
                return self.open_request(request.number, session)
        session.reset()
        return self._open_link(query) or self.defaults()

    def _open_link(self, query: Any) -> Opened | None:
        """The settings of a page's query; None if it has none."""
        try:
            found = read_link(query)
            if found is None:
                return None
            settings, model = found
            values = form.values_of(settings) | {"model": self.playground.model(model).name}
        except ValueError as error:
            return Opened({}, rendering.failure(f"the settings of the link: {error}"))
        return Opened(values, rendering.note("Settings of the link: press Make names."))

    def open_request(self, number: Any, session: Session) -> Opened:
        """Shows an earlier request: its names, and its settings in the controls."""
        request = session.open(number)
        if request is None:
            return Opened({}, rendering.failure("this request is no longer in the history"))
        values = form.values_of(request.asked) | {"model": request.rows[0].model}
        made = request.rows[0].settings
        status = rendering.note(f"{len(request.rows)} names of an earlier request · seed {made.seed}")
        return Opened(values, status, made.to_string())

    def load(self, text: str | None) -> Opened:
        try:
            values = form.values_of(Settings.from_string(text or ""))
        except ValueError as error:
            return Opened({}, rendering.failure(str(error)))
        return Opened(values, rendering.note("Settings loaded: press Make names."))

    def defaults(self) -> Opened:
        values = form.values_of(Settings()) | {"model": self.playground.model().name}
        return Opened(values, rendering.note("All settings are at their defaults. Kept names stay."))

    def history(self, session: Session) -> str:
        """The requests of the session as HTML, the newest first."""
        return rendering.history([(each, self._title(each)) for each in reversed(session.history)])

    def _title(self, request: Request) -> str:
        parts = [rendering.title_of(request.asked)]
        for name, value in request.asked.changed().items():
            if name not in ("type_line", "colors", *form.CHOICES, "count", "seed"):
                text = ", ".join(value) if isinstance(value, tuple) else "" if value is True else str(value)
                parts.append(f"{form.LABELS[name]} {text}".strip())
        return " · ".join(parts)[:160]

    def finished(self, session: Session) -> tuple[str, str, str]:
        """What a request leaves on the page: table, history, and what the page's script remembers."""
        number = session.next_message()  # before the session is read
        address = link = session.query
        if (shown := session.shown) is not None:
            row = shown.rows[0]
            address, link = self._link_of(shown.asked, row.model), self._link_of(row.settings, row.model)
        return table_of(session.rows), self.history(session), for_browser(session, address, link, number)

    def _link_of(self, settings: Settings, model: str) -> str:
        return link_of(settings, model if len(self.playground.models) > 1 else "")

    def stopped(self, session: Session) -> tuple[str, str, str]:
        """Ends the request that runs; what it leaves on the page."""
        session.stop()
        return self.finished(session)

    def export_set(self, session: Session, suffix: str) -> str:
        """The file of the last set that was named, for the page's script; "" if there is none."""
        return exported_set(session.named, session.kept, suffix) if session.named else ""

    def export(self, session: Session, suffix: str, is_kept: bool) -> str:
        """The file of all names or of the kept ones, for the page's script."""
        rows = session.kept if is_kept else session.rows
        return exported(rows, suffix)

    def inspect(self, row: Row | None, block: Any = 0, head: Any = -1) -> str:
        """The panel of a name: its card, and how the model reads it; ``head`` -1 is the mean of all heads."""
        if row is None:
            return ""
        block, head = _integer(block), _integer(head)
        if block is None or head is None:
            return rendering.failure("block and head must be whole numbers")
        try:
            found = inspect_name(self.playground.model(row.model), row.name.text, row.settings)
            inspection = rendering.inspection(found, row.model, block, None if head == -1 else head)
        except ValueError as error:
            inspection = _failure(error)
        card = completed_attributes(row.settings)
        return rendering.panel(row, card, inspection)

    def compare(self, values: Mapping[str, Any], sides: Sequence[Side], session: Session) -> Iterator[list[TableView]]:
        """Makes names for all sides from the same settings."""
        wanted = partial(session.runs, session.begin())
        try:
            for progress in compare(self.playground, form.settings_of(values), sides, wanted):
                yield [
                    TableView("", "", (), "")
                    if one is None
                    else TableView(
                        rendering.names_table(one.rows, "Names of one side", lockable=False),
                        rendering.status(one),
                        one.rows,
                        one.settings.to_string(),
                    )
                    for one in progress
                ]
        except ValueError as error:
            yield [TableView("", _failure(error), (), "") for _ in sides]


def _not_made_again(settings: Settings, session: Session) -> list[str]:
    """The kept names; none of them if there is a seed, which makes the same names whether or not they are kept."""
    return [row.name.text for row in session.kept] if settings.seed is None else []


def for_browser(
    session: Session, address: str | None = None, link: str | None = None, number: int | None = None
) -> str:
    """What the page's script remembers: the kept names, and unless None the queries of the page's ``address`` and of a
    ``link`` that makes the names on the table again. ``number`` is of `Session.next_message`."""
    number = session.next_message() if number is None else number
    return json.dumps({"number": number, "address": address, "link": link, "kept": stored(session.kept)})


def table_of(rows: Rows) -> str:
    return rendering.names_table(rows, "Names") or EMPTY


def _failure(error: ValueError) -> str:
    return rendering.failure(form.with_labels(str(error)))


def _integer(value: Any) -> int | None:
    text = str(value)[:6]
    return int(text) if text.lstrip("-").isdecimal() and text.count("-") <= 1 else None
