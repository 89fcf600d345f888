"""Reads the files of Scryfall and MTGJSON into raw cards, as bounded streams; any damage is a `DamagedError`.

https://scryfall.com/docs/api/cards: an object is one card with the rarity, set and date of the printing that Scryfall
considers the most recognizable, not always the first.

https://mtgjson.com/data-models/card/card-atomic/ and card-set/: atomic cards have the set of their first printing, but
neither rarity nor a mark of franchises. The list of sets has dates, all printings have rarities.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flash_experts.data.card_table import FRANCHISE_SETS, FRANCHISES, JOKES, embedded_flags
from flash_experts.data.cards import RARITIES, UNKNOWN, RawCard, in_color_order, parse_date, parse_set_code
from flash_experts.data.names import FACE_SEPARATOR, normal_form

MAX_UNPACKED_BYTES = 2**30  # six times the size of the sources; guards against decompression bombs
MAX_LINE_BYTES = 4 * 2**20  # limit for a line of JSON
_GZIP = b"\x1f\x8b"
_EXCLUDED_SET_TYPES = ("memorabilia", "minigame", "token")  # not playable cards
_JOKE_STAMPS = ("acorn", "heart")
Set = dict[str, Any]


class DamagedError(ValueError):
    """A file is truncated, altered, or of another kind."""


class _Bounded(io.RawIOBase):
    """Reads from another file and raises after `MAX_UNPACKED_BYTES`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._total += len(data)
        if self._total > MAX_UNPACKED_BYTES:
            raise DamagedError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed if it is gzip; after the ``with`` block reads the rest to verify the checksum.

    Raises a `DamagedError` also for invalid JSON that the block finds.
    """
    from ijson import JSONError

    with open(path, "rb") as file:
        magic = file.read(2)
        file.seek(0)
        try:
            content = gzip.GzipFile(fileobj=file) if magic == _GZIP else file
            stream = io.BufferedReader(_Bounded(content), 2**16)  # type: ignore[arg-type]
            yield stream
            while stream.read(2**20):  # gzip verifies its CRC at the end
                pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedError(f"its gzip is damaged: {error}") from error
        except (JSONError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            what = "a web page" if _is_page(path) else "not JSON"
            raise DamagedError(f"it is {what}: {' '.join(str(error).split())[:100]}") from error


@contextmanager
def _expected(what: str) -> Iterator[None]:
    """Turns errors on data of another shape into a `DamagedError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"its {what} is not as expected ({type(error).__name__}: {error})") from error


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(200).lstrip().startswith(b"<")


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Numbers (from 1) and values of non-empty JSON lines, or of a JSON array with one item per line."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DamagedError(f"its line {number} has more than {MAX_LINE_BYTES:,} bytes")
        text = line.strip().removesuffix(b",")
        if text not in (b"", b"[", b"]"):
            yield number, json.loads(text)


# -------------------------------------------------------------------------------------------------------- Scryfall


def read_scryfall(path: Path) -> Iterator[RawCard]:
    with unpacked(path) as file:
        for number, record in json_lines(file):
            with _expected(f"line {number}"):
                card = scryfall_card(record)
            yield card


def scryfall_card(card: dict[str, Any]) -> RawCard:
    faces = card.get("card_faces") or [card]
    name = FACE_SEPARATOR.join(face["name"] for face in faces)
    known = embedded_flags().get(normal_form(faces[0]["name"]))
    rarity = card.get("rarity")
    return RawCard(
        name=name,
        type_line=FACE_SEPARATOR.join(face.get("type_line") or "" for face in faces) or None,
        mana_cost=FACE_SEPARATOR.join(face.get("mana_cost") or "" for face in faces) or None,
        colors=FACE_SEPARATOR.join(_colors(face, card) for face in faces),
        layout=card["layout"],
        flag=_flag(card) if known is None else known,
        source_id=f"scryfall:{card.get('oracle_id') or faces[0].get('oracle_id') or card['id']}",
        rarity=rarity if rarity in RARITIES else None,  # not "special" or "bonus"
        set_code=parse_set_code(card.get("set")),
        released=parse_date(card.get("released_at")),
        excluded=_exclusion(card) if known is None else "",
    )


def _colors(face: dict[str, Any], card: dict[str, Any]) -> str:
    """Colors of a face: its own, else unknown (taken from its cost), else (a flipped half) those of the card."""
    if face.get("colors") is not None:
        return "".join(in_color_order(face["colors"]))
    if face.get("mana_cost") or card.get("colors") is None:
        return UNKNOWN
    return "".join(in_color_order(card["colors"]))


def _flag(card: dict[str, Any]) -> str:
    """Flag by the marks of the printing, for a card that is not in the embedded table."""
    promo_types, stamp = card.get("promo_types") or (), card.get("security_stamp")
    if card.get("set_type") == "funny" or stamp in _JOKE_STAMPS or "playtest" in promo_types:
        return JOKES
    if "universesbeyond" in promo_types or stamp == "triangle" or str(card.get("set", "")).upper() in FRANCHISE_SETS:
        return FRANCHISES
    return ""


def _exclusion(card: dict[str, Any]) -> str:
    """Reason to exclude a card that is not in the embedded table, or ``""``. Digital cards stay."""
    set_type = card.get("set_type")
    if set_type in _EXCLUDED_SET_TYPES:
        return str(set_type)
    return "oversized" if card.get("oversized") else ""


# --------------------------------------------------------------------------------------------------------- MTGJSON


def read_version(path: Path) -> str:
    """The version of a file of MTGJSON, such as ``"5.3.0+20261101"``."""
    import ijson

    with unpacked(path) as file:
        meta = next(ijson.items(file, "meta"), None)
    if not isinstance(meta, dict) or not isinstance(meta.get("version"), str):
        raise DamagedError("it has no version")
    return str(meta["version"])


def read_sets(path: Path) -> dict[str, Set]:
    """Dates and types of sets, by set code."""
    import ijson

    with unpacked(path) as file:
        sets = {entry["code"]: entry for entry in ijson.items(file, "data.item") if "code" in entry}
    return {code: {key: entry.get(key) for key in ("releaseDate", "type")} for code, entry in sets.items()}


def read_rarities(path: Path) -> dict[str, str]:
    """Scryfall's oracle id -> rarity of the card's first printing, the most common one of that day (a set and its
    promos). Other rarities (``special``, ``bonus``) and sets that are not playable are ignored."""
    import ijson

    first: dict[str, tuple[str, int]] = {}
    with unpacked(path) as file:
        for code, of_set in ijson.kvitems(file, "data", use_float=True):
            with _expected(f"set {code!r}"):
                for oracle_id, rank in _printings(of_set):
                    printing = (of_set["releaseDate"], rank)
                    first[oracle_id] = min(first.get(oracle_id, printing), printing)
    return {oracle_id: RARITIES[rank] for oracle_id, (_, rank) in first.items()}


def _printings(of_set: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Oracle id and index into `RARITIES` of each card of a set that has both."""
    if of_set.get("type") not in _EXCLUDED_SET_TYPES:
        for card in of_set["cards"]:
            oracle_id = (card.get("identifiers") or {}).get("scryfallOracleId")
            if card["rarity"] in RARITIES and oracle_id:
                yield oracle_id, RARITIES.index(card["rarity"])


def read_mtgjson(path: Path, sets: dict[str, Set], rarities: Mapping[str, str]) -> Iterator[RawCard]:
    """The cards of an ``AtomicCards.json``, with `read_sets` and, if any, `read_rarities`."""
    import ijson

    with unpacked(path) as file:
        for name, entries in ijson.kvitems(file, "data", use_float=True):
            with _expected(f"card {name!r}"):
                cards = list(mtgjson_cards(entries, sets, rarities))
            yield from cards


def mtgjson_cards(
    entries: list[dict[str, Any]], sets: dict[str, Set], rarities: Mapping[str, str]
) -> Iterator[RawCard]:
    """Raw cards of the entries of one name: faces of one card, or several cards."""
    by_side = {entry["side"]: entry for entry in reversed(entries) if entry.get("side")}  # the first of each
    if by_side:
        yield _raw_card([by_side[side] for side in sorted(by_side)], sets, rarities)
    for entry in entries:
        if not entry.get("side"):
            yield _raw_card([entry], sets, rarities)


def _raw_card(faces: list[dict[str, Any]], sets: dict[str, Set], rarities: Mapping[str, str]) -> RawCard:
    names = [face.get("faceName") or face["name"] for face in faces]
    front = faces[0]
    known = embedded_flags().get(normal_form(names[0]))
    oracle_id = (front.get("identifiers") or {}).get("scryfallOracleId")
    first_set = front.get("firstPrinting")
    of_set = sets.get(first_set or "", {})
    flag = JOKES if front.get("isFunny") else FRANCHISES if first_set in FRANCHISE_SETS else ""
    excluded = str(of_set["type"]) if of_set.get("type") in _EXCLUDED_SET_TYPES else ""
    return RawCard(
        name=FACE_SEPARATOR.join(names),
        type_line=FACE_SEPARATOR.join(face["type"] for face in faces),
        mana_cost=FACE_SEPARATOR.join(face.get("manaCost") or "" for face in faces) or None,
        colors=FACE_SEPARATOR.join("".join(in_color_order(face["colors"])) for face in faces),
        layout=front["layout"],
        flag=flag if known is None else known,
        source_id=f"mtgjson:{oracle_id or names[0]}",
        rarity=rarities.get(oracle_id or ""),
        set_code=parse_set_code(first_set),
        released=parse_date(of_set.get("releaseDate")),
        excluded=excluded if known is None else "",
    )
