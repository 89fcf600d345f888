"""Reads MTGJSON files as streams: atomic cards, the list of sets (for dates) and all printings (for rarities).

``AtomicCards.json`` has one entry per card, with the set of its first printing but without a rarity or a mark of
franchises (see `flash_experts.data.card_table.FRANCHISE_SETS`). Fields:
https://mtgjson.com/data-models/card/card-atomic/ and card-set/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flash_experts.data.card_table import FRANCHISE_SETS, FRANCHISES, JOKES, embedded_flags
from flash_experts.data.cards import RARITIES, RawCard, in_color_order, parse_date, parse_set_code
from flash_experts.data.live.download import Downloader, DownloadError
from flash_experts.data.live.unpack import DamagedError, unpacked
from flash_experts.data.names import FACE_SEPARATOR, normal_form

CARDS, SETS, PRINTINGS = "AtomicCards.json.gz", "SetList.json.gz", "AllPrintings.json.gz"
_EXCLUDED_SET_TYPES = ("memorabilia", "minigame", "token")
Set = dict[str, Any]


def checksum(downloader: Downloader, url: str) -> str:
    """The SHA-256 of the file at ``url``, from its ``.sha256`` file; raises a `DownloadError` if there is none."""
    text = downloader.text(f"{url}.sha256")
    found = re.match(r"\s*([0-9a-fA-F]{64})\b", text)
    if found is None:
        raise DownloadError(f"{url}.sha256: not a checksum but {text.strip()[:40]!r}")
    return found[1].lower()


def read_version(path: Path) -> str:
    """The version of a downloaded file, e.g. ``"5.3.0+20261101"``. Raises `DamagedError` without one."""
    import ijson

    with unpacked(path) as file:
        meta = next(ijson.items(file, "meta"), None)
    if not isinstance(meta, dict) or not isinstance(meta.get("version"), str):
        raise DamagedError("it has no version")
    return str(meta["version"])


def read_sets(path: Path) -> dict[str, Set]:
    """Dates and types of sets, by set code. Raises `DamagedError` for another file."""
    import ijson

    with unpacked(path) as file:
        sets = {entry["code"]: entry for entry in ijson.items(file, "data.item") if "code" in entry}
    return {code: {key: entry.get(key) for key in ("releaseDate", "type")} for code, entry in sets.items()}


def read_rarities(path: Path) -> dict[str, str]:
    """Scryfall's oracle id -> rarity of the card's first printing; raises `DamagedError` for another file.

    Of several printings on the first day (a set and its promos) the most common one counts. Other rarities
    (``special``, ``bonus``) and sets that are not playable are ignored.
    """
    import ijson

    first: dict[str, tuple[str, int]] = {}
    with unpacked(path) as file:
        for code, of_set in ijson.kvitems(file, "data", use_float=True):
            try:
                for oracle_id, rank in _printings(of_set):
                    printing = (of_set["releaseDate"], rank)
                    first[oracle_id] = min(first.get(oracle_id, printing), printing)
            except (KeyError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise DamagedError(f"its set {code!r} is not as expected ({problem})") from error
    return {oracle_id: RARITIES[rank] for oracle_id, (_, rank) in first.items()}


def _printings(of_set: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Oracle id and index into `RARITIES` of each card of a set that has both."""
    if of_set.get("type") not in _EXCLUDED_SET_TYPES:
        for card in of_set["cards"]:
            oracle_id = (card.get("identifiers") or {}).get("scryfallOracleId")
            if card["rarity"] in RARITIES and oracle_id:
                yield oracle_id, RARITIES.index(card["rarity"])


def read_cards(path: Path, sets: dict[str, Set], rarities: Mapping[str, str]) -> Iterator[RawCard]:
    """The cards of a downloaded ``AtomicCards.json``, with `read_sets` and, if any, `read_rarities`.

    Raises `DamagedError` for another file.
    """
    import ijson

    with unpacked(path) as file:
        for name, entries in ijson.kvitems(file, "data", use_float=True):
            try:
                yield from raw_cards(entries, sets, rarities)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise DamagedError(f"its card {name!r} is not as expected ({problem})") from error


def raw_cards(entries: list[dict[str, Any]], sets: dict[str, Set], rarities: Mapping[str, str]) -> Iterator[RawCard]:
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
