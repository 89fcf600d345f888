"""Text output: escaping for terminals and spreadsheets, spelling suggestions, a progress bar.

All printing goes through `say`.
"""

from __future__ import annotations

import codecs
import difflib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from types import TracebackType
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
_ESCAPE = "flash_experts.escape"
# First characters of a formula in spreadsheets (OWASP, "CSV Injection"), full-width forms included.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def printable(text: str, keep: str = "\n\t") -> str:
    """Writes control characters but ``keep`` (escape codes, changes of direction) as ``\\u001b``, as JSON does."""
    if text.isprintable():
        return text
    return "".join(character if _is_plain(character, keep) else _escaped(character) for character in text)


def _is_plain(character: str, keep: str) -> bool:
    return character.isprintable() or character in keep or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


codecs.register_error(_ESCAPE, lambda error: (_escaped(error.object[error.start : error.end]), error.end))  # type: ignore[attr-defined]


def escape_unencodable(stream: TextIO | None) -> None:
    """Writes characters that the encoding of a stream lacks as ``\\u2500``: cp1252 has no lines for tables."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors=_ESCAPE)


def one_line(text: str) -> str:
    """`printable` text without line breaks and tabs."""
    return printable(text, keep="")


def say(text: str, file: TextIO | None = None) -> None:
    """Prints text, to stdout by default, with its control characters escaped."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most similar to a word; None if no similarity reaches ``cutoff`` (0 to 1, see `difflib`)."""
    return next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=cutoff)), None)


def did_you_mean(
    word: str, choices: Iterable[str], otherwise: str = "", *, prefix: str = "", cutoff: float = 0.6
) -> str:
    """``prefix`` and ``did you mean 'X'?`` for a misspelled word; ``otherwise`` if no choice is similar."""
    near = nearest(word, choices, cutoff)
    return otherwise if near is None else f"{prefix}did you mean {near!r}?"


def to_cell(text: str) -> str:
    """A CSV cell that no spreadsheet reads as a formula: an apostrophe precedes what would start one."""
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA) else text


def from_cell(cell: str) -> str:
    """The inverse of `to_cell`."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA) else cell


# ------------------------------------------------------------------------------------------------------------- progress


class ProgressBar:
    """Progress of a download or list, in bytes or items (``total`` is None if unknown), if stderr is a terminal."""

    def __init__(self, label: str, completed: int, total: int | None, *, in_bytes: bool = False):
        self._label, self._in_bytes = label, in_bytes
        self._completed = completed
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            amounts = (DownloadColumn(), TransferSpeedColumn()) if self._in_bytes else (MofNCompleteColumn(),)
            columns = ("{task.description}", BarColumn(), *amounts, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(one_line(self._label), completed=self._completed, total=self._total)
            self._bar.start()
        return self

    def advance(self, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """Passes items on and counts them."""
        for item in items:
            self.advance()
            yield item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
