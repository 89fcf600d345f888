"""The names of one session: the table, the kept names, the history of its requests, and files of names.

The browser stores the kept names, and the page's address the settings; what comes back from there is untrusted
(`restored`, `read_link`).
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_plus, urlencode

from flash_experts.app.service import Row
from flash_experts.app.settings import PREFIX, Settings
from flash_experts.data.prompts import Attributes
from flash_experts.generation import GeneratedName, name_files
from flash_experts.generation.card_sets import NamedRow, cards_of, write_set
from flash_experts.generation.generator import completed_attributes

MOST_KEPT = 50
MOST_IN_HISTORY = 400  # names of all requests in the history
_LINK = "v=1"  # the version of a link, its first parameter; other queries are not ours
_OTHERS = ("__", "view=")  # parameters of Gradio
_LONGEST_NAME = 100  # characters of a stored name
_LONGEST_STORED = 500  # characters of a kept name's settings string; longer ones are not stored
_MOST_STORED = 60_000  # characters of the browser's storage that are read
# Formats on the page, by label, and their suffixes.
FORMATS: dict[str, str] = {
    "Text": "txt", "CSV": "csv", "JSON": "json", "Markdown": "md", "Magic Set Editor": "mse-set", "Cockatrice": "xml",
}  # fmt: skip
Rows = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the history."""

    number: int  # of a session's requests, from 0
    asked: Settings  # without the seed if it was drawn
    rows: Rows  # with the seed


class Session:
    """The names of one session; a lock protects them, as requests add rows while other threads keep some."""

    def __init__(self, rows: Rows = ()) -> None:
        self.rows = rows
        self.history: tuple[Request, ...] = ()
        self.shown: Request | None = None  # whose names are on the table
        self.query: str | None = None  # of the page's address while nothing is shown; None: as the browser has it
        self.named: tuple[NamedRow, ...] = ()  # the last set, with its names so far
        self._run = 0  # number of the request that may add rows
        self._sent = 0  # number of the last message to the browser
        self._lock = threading.Lock()

    def __deepcopy__(self, _: dict[int, Any]) -> Session:
        """Gradio copies the initial state for each session."""
        copied = Session(self.rows)
        copied.history, copied.shown, copied.query = self.history, self.shown, self.query
        return copied

    @property
    def kept(self) -> Rows:
        return tuple(row for row in self.rows if row.locked)

    def begin(self) -> int:
        """Starts a request and ends the one before; returns its number, for `put`."""
        with self._lock:
            self._run += 1
            return self._run

    def runs(self, run: int) -> bool:
        """Whether the request of this number has not ended: by another, Stop, Reset, or the history."""
        return run == self._run

    def stop(self) -> None:
        """Ends the request that runs: names that its thread still finds are left out by `put`."""
        self.begin()

    def put(
        self, run: int, found: Rows, asked: Settings, before: Rows = (), named: tuple[NamedRow, ...] = ()
    ) -> Rows | None:
        """Replaces all rows but the kept ones by what request ``run`` has found so far, below rows ``before``.

        Returns all rows; None if the request has ended, so that nothing changed.
        """
        with self._lock:
            if not self.runs(run):
                return None
            if found:
                self._remember(asked, found)
            self.named = named or self.named
            return self._put((*before, *found))

    def _put(self, found: Rows) -> Rows:
        kept = {row.name.text: row for row in self.kept}
        below = tuple(kept.pop(row.name.text, row) for row in found)
        self.rows = (*kept.values(), *below)
        return self.rows

    def _remember(self, asked: Settings, found: Rows) -> None:
        number = 0
        if self.history:
            last = self.history[-1]
            is_last = (last.rows[0].settings, last.rows[0].model) == (found[0].settings, found[0].model)
            number = last.number + (not is_last)
        others = [each for each in self.history if each.number != number]
        while others and sum(len(each.rows) for each in others) + len(found) > MOST_IN_HISTORY:
            del others[0]
        self.shown = Request(number, asked, found)
        self.history = (*others, self.shown)

    def add_kept(self, row: Row) -> None:
        """Adds a kept name that is not there yet."""
        with self._lock:
            if picked(self.rows, row.name.text) is None and len(self.kept) < MOST_KEPT:
                self.rows = (*self.rows, row)

    def press(self, name: Any) -> Rows:
        """Toggles whether the row of a name is kept; returns all rows."""
        with self._lock:
            row = picked(self.rows, name)
            if row is not None and (row.locked or len(self.kept) < MOST_KEPT):
                pressed = replace(row, locked=not row.locked)
                self.rows = tuple(pressed if each is row else each for each in self.rows)
            return self.rows

    def release(self) -> Rows:
        """Keeps no name; returns all rows, which stay until others replace them."""
        with self._lock:
            self.rows = tuple(replace(row, locked=False) for row in self.rows)
            return self.rows

    def reset(self, query: str | None = None) -> None:
        """Ends the request that runs, and forgets whose names are on the table; ``query`` is that of the address then.

        Each later message repeats it: of two messages in quick succession the page sees the last one alone.
        """
        with self._lock:
            self._run += 1
            self.shown, self.query = None, query

    def next_message(self) -> int:
        """A number that grows with each message to the browser, which ignores those that arrive late.

        In microseconds, so that it also grows when a page that stays open gets a new session.
        """
        with self._lock:
            self._sent = max(self._sent + 1, time.time_ns() // 1000)
            return self._sent

    def open(self, number: Any) -> Request | None:
        """Shows the names of an earlier request below the kept ones, and ends the one that runs; None if unknown."""
        with self._lock:
            request = next((each for each in self.history if str(each.number) == str(number)[:10]), None)
            if request is not None:
                self._run += 1
                self.shown = request
                self._put(request.rows)
            return request


def picked(rows: Rows, name: Any) -> Row | None:
    """The row of a name that a browser sent; None if no row has it."""
    return next((row for row in rows if row.name.text == name), None)


def link_of(settings: Settings, model: str = "") -> str:
    """The query of a link to the page with these settings, and a model if given."""
    parts = [_LINK, settings.to_string().removeprefix(PREFIX), urlencode({"model": model}) if model else ""]
    return "&".join(filter(None, parts))


def read_link(query: Any) -> tuple[Settings, str] | None:
    """The settings and model ("" for none) of a page's query; None without settings, a ValueError for wrong ones."""
    text = query if isinstance(query, str) else ""
    first, *others = text.removeprefix("?").split("&")
    if first != _LINK:
        return None
    models = [unquote_plus(part.removeprefix("model=")) for part in others if part.startswith("model=")]
    parts = [part for part in others if part and not part.startswith((*_OTHERS, "model="))]
    return Settings.from_string(PREFIX + "&".join(parts)), models[0] if models else ""


def stored(rows: Rows) -> list[dict[str, Any]]:
    """The kept names as the browser stores them."""
    strings = [row.settings.to_string() for row in rows]
    return [
        name_files.row_of(row.name) | {"model": row.model, "settings": text if len(text) <= _LONGEST_STORED else PREFIX}
        for row, text in zip(rows, strings, strict=True)
    ]


def restored(text: Any) -> Rows:
    """The kept names that a browser stored. What cannot be read is left out."""
    if not isinstance(text, str) or len(text) > _MOST_STORED:
        return ()
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    rows = [_row(entry) for entry in entries[:MOST_KEPT]] if isinstance(entries, list) else []
    return tuple({row.name.text: row for row in rows if row is not None}.values())


def _row(entry: Any) -> Row | None:
    if not isinstance(entry, Mapping):
        return None
    texts = [entry.get(name) or "" for name in ("text", "model", "nearest_card", "settings")]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        return None
    name, model, nearest, settings = texts
    if not name.strip() or max(map(len, (name, model, nearest))) > _LONGEST_NAME:
        return None
    try:
        known = Settings.from_string(settings)
    except ValueError:  # of another version: the name stays
        known = Settings()
    log_prob, similarity = (_number(entry.get(name)) for name in ("log_prob", "similarity"))
    similarity = min(max(similarity, 0.0), 1.0)
    return Row(GeneratedName(name, log_prob, nearest or None, similarity), known, model, locked=True)


def _number(value: Any) -> float:
    """The number in JSON within a million; 0 for anything else."""
    is_number = isinstance(value, int | float) and abs(value) < 1e6  # which NaN is not
    return float(value) if is_number else 0.0


# ----------------------------------------------------------------------------------------------------------- files


def exported(rows: Sequence[Row], suffix: str) -> str:
    """A file of names as JSON for the page's script: its name, and its content as text or as base64.

    Raises a ValueError if no format has this suffix.
    """
    return _as_json("names", suffix, lambda: _named_cards(rows), lambda format: _text_of(rows, format))


def exported_set(named: Sequence[NamedRow], kept: Sequence[Row], suffix: str) -> str:
    """The file of a set with all its cards, as `exported`. Of a card's names, a kept one comes first."""
    first = {row.name.text for row in kept}
    chosen = [replace(one, names=sorted(one.names, key=lambda name: name.text not in first)) for one in named]

    def text(format: name_files.Format) -> str:
        file = io.StringIO()
        write_set(chosen, file, format)
        return file.getvalue()

    return _as_json("named-set", suffix, lambda: cards_of(chosen), text)


def _as_json(
    stem: str,
    suffix: str,
    cards: Callable[[], Sequence[name_files.NamedCard]],
    text: Callable[[name_files.Format], str],
) -> str:
    if suffix not in FORMATS.values():
        raise ValueError(f"no format {str(suffix)[:20]!r}: use one of {', '.join(FORMATS.values())}")
    name, format = f"{stem}.{suffix}", name_files.BY_SUFFIX[f".{suffix}"]
    if format == "mse":
        binary = io.BytesIO()
        name_files.write_mse(cards(), binary)
        return json.dumps({"name": name, "base64": base64.b64encode(binary.getvalue()).decode("ascii")})
    return json.dumps({"name": name, "text": text(format)})


def _text_of(rows: Sequence[Row], format: name_files.Format) -> str:
    file = io.StringIO()
    if format == "cockatrice":  # its names may be of different cards
        name_files.write_cards(_named_cards(rows), file, format)
    else:
        name_files.write_names([row.name for row in rows], Attributes(), file, format)
    return file.getvalue()


def _named_cards(rows: Sequence[Row]) -> list[name_files.NamedCard]:
    return [name_files.NamedCard(row.name.text, completed_attributes(row.settings)) for row in rows]
