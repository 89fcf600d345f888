"""Scryfall's bulk file of oracle cards: where it is, and what its fields are to us.

The index (``/bulk-data``) names a gzip file of JSON lines, ``jsonl_download_uri``; until July 2026 it named a JSON
array, ``download_uri``. One object is one card, told by the printing that Scryfall takes for its best known: rarity,
set and date are that printing's, not always the first one's.
Fields: https://scryfall.com/docs/api/cards
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_experts.data.cards import RARITIES, in_color_order, parse_date, parse_set_code
from flash_experts.data.download import Downloader, DownloadError, checked_url
from flash_experts.data.exclusions import FRANCHISE_SETS, FRANCHISES, JOKES
from flash_experts.data.names import FACE_SEPARATOR, normal_form
from flash_experts.data.sources import UNKNOWN, RawCard, embedded_flags
from flash_experts.data.unpack import DamagedError, json_lines, unpacked

BULK_TYPE = "oracle_cards"
_JOKE_STAMPS = ("acorn", "heart")
_SETS_OUT = ("memorabilia", "minigame", "token")  # of what is no card to play with


@dataclass(frozen=True, slots=True)
class BulkFile:
    """An entry of the index.

    Attributes:
        url: of the file.
        updated: when Scryfall made it.
        size: bytes to fetch, for the progress bar; None if the index does not say.
    """

    url: str
    updated: str
    size: int | None


def bulk_file(downloader: Downloader, base: str) -> BulkFile:
    """Asks the index at ``base`` for the newest file.

    Raises:
        DownloadError: there is no answer, or none that names the file.
    """
    address = f"{base}/bulk-data"
    text = downloader.text(address, accept="application/json")
    try:
        entries = json.loads(text)["data"]
        entry = next(entry for entry in entries if entry["type"] == BULK_TYPE)
        compressed = "jsonl_download_uri" in entry
        url, updated = entry["jsonl_download_uri" if compressed else "download_uri"], entry["updated_at"]
        size = entry.get("compressed_size") if compressed else None
        return BulkFile(checked_url(str(url), address), str(updated), size if isinstance(size, int) else None)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        if isinstance(error, DownloadError):
            raise
        page = " (a web page: does the network ask for a login?)" if text.lstrip().startswith("<") else ""
        raise DownloadError(f"{address}: the answer names no file of {BULK_TYPE}{page}") from error


def read_cards(path: Path) -> Iterator[RawCard]:
    """The cards of a downloaded file, of JSON lines or (as of old) a JSON array with a card a line.

    Raises:
        DamagedError: it is no such file.
    """
    with unpacked(path) as file:
        for number, record in json_lines(file):
            try:
                yield raw_card(record)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DamagedError(f"its line {number} is not as expected ({type(error).__name__}: {error})") from error


def raw_card(card: dict[str, Any]) -> RawCard:
    """Our row of Scryfall's card object.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is none.
    """
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
        rarity=rarity if rarity in RARITIES else None,  # "special" and "bonus" are none of the four
        set_code=parse_set_code(card.get("set")),
        released=parse_date(card.get("released_at")),
        out=_out(card) if known is None else "",
    )


def _colors(face: dict[str, Any], card: dict[str, Any]) -> str:
    """Colors of a face: its own, else those of its cost, else (a flipped half) those of the card."""
    if face.get("colors") is not None:
        return "".join(in_color_order(face["colors"]))
    if face.get("mana_cost") or card.get("colors") is None:
        return UNKNOWN
    return "".join(in_color_order(card["colors"]))


def _flag(card: dict[str, Any]) -> str:
    """What the marks of a printing say of a card that the embedded table does not have."""
    promo_types, stamp = card.get("promo_types") or (), card.get("security_stamp")
    if card.get("set_type") == "funny" or stamp in _JOKE_STAMPS or "playtest" in promo_types:
        return JOKES
    if "universesbeyond" in promo_types or stamp == "triangle" or str(card.get("set", "")).upper() in FRANCHISE_SETS:
        return FRANCHISES
    return ""


def _out(card: dict[str, Any]) -> str:
    """Why a card that the embedded table does not have is none to learn from. Digital cards have real names."""
    set_type = card.get("set_type")
    if set_type in _SETS_OUT:
        return str(set_type)
    return "oversized" if card.get("oversized") else ""
