"""Finds and reads Scryfall's bulk file of oracle cards (https://scryfall.com/docs/api/cards).

The index (``/bulk-data``) lists a gzip file of JSON lines, ``jsonl_download_uri``, or (until July 2026) a JSON array,
``download_uri``. An object is one card with the rarity, set and date of the printing that Scryfall considers the most
recognizable, not always the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_experts.data.card_table import FRANCHISE_SETS, FRANCHISES, JOKES, embedded_flags
from flash_experts.data.cards import RARITIES, UNKNOWN, RawCard, in_color_order, parse_date, parse_set_code
from flash_experts.data.live.download import Downloader, DownloadError, checked_url
from flash_experts.data.live.unpack import DamagedError, json_lines, unpacked
from flash_experts.data.names import FACE_SEPARATOR, normal_form

BULK_TYPE = "oracle_cards"
_JOKE_STAMPS = ("acorn", "heart")
_EXCLUDED_SET_TYPES = ("memorabilia", "minigame", "token")  # not playable cards


@dataclass(frozen=True, slots=True)
class BulkFile:
    """An entry of the index. ``updated`` is the time of the export, ``size`` in bytes."""

    url: str
    updated: str
    size: int | None


def bulk_file(downloader: Downloader, base: str) -> BulkFile:
    """The newest file in the index of ``base``; raises a `DownloadError` if it is not listed."""
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
        page = " (a web page: does the network require a login?)" if text.lstrip().startswith("<") else ""
        raise DownloadError(f"{address}: the response lists no file of {BULK_TYPE}{page}") from error


def read_cards(path: Path) -> Iterator[RawCard]:
    """The cards of a file of JSON lines, or of a JSON array with one card per line. Raises `DamagedError`."""
    with unpacked(path) as file:
        for number, record in json_lines(file):
            try:
                yield raw_card(record)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DamagedError(f"its line {number} is not as expected ({type(error).__name__}: {error})") from error


def raw_card(card: dict[str, Any]) -> RawCard:
    """Converts Scryfall's card object."""
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
    """Flag of a card that is not in the embedded table, by the marks of its printing."""
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
