"""Text of files, models and labels, made safe for terminals and spreadsheets. Everything printed goes through `say`."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

# What makes a spreadsheet take a cell for a formula (OWASP, "CSV Injection"), full-width forms included.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def printable(text: str, keep: str = "\n\t") -> str:
    """Text without control characters: escape codes, changes of direction and the like are written as ``\\u001b``.

    Args:
        text: of any source. JSON stays JSON of the same value.
        keep: control characters that are left as they are; none for what must be one line.
    """
    if text.isprintable():
        return text
    return "".join(character if _is_plain(character, keep) else _escaped(character) for character in text)


def _is_plain(character: str, keep: str) -> bool:
    return character.isprintable() or character in keep or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


def one_line(text: str) -> str:
    """As `printable`, in one line."""
    return printable(text, keep="")


def say(text: str, file: TextIO | None = None) -> None:
    """Prints text with its control characters escaped; to stdout where no file is given."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def to_cell(text: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe before what would begin one."""
    return f"'{text}" if text.lstrip("'").startswith(_FORMULA) else text


def from_cell(cell: str) -> str:
    """The text that `to_cell` made a cell of."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA) else cell
