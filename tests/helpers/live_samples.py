"""Sample cards in the formats of Scryfall and MTGJSON."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any


def scryfall_card(name: str, type_line: str = "Creature — Elf", cost: str = "{1}{G}", **fields: Any) -> dict[str, Any]:
    """A card object of Scryfall's bulk file, without the fields that are not read."""
    card = {
        "object": "card",
        "id": f"id-{name}",
        "oracle_id": f"oracle-{name}",
        "name": name,
        "lang": "en",
        "released_at": "2026-02-06",
        "layout": "normal",
        "mana_cost": cost,
        "cmc": 2.0,
        "type_line": type_line,
        "colors": ["G"],
        "set": "abc",
        "set_type": "expansion",
        "rarity": "uncommon",
        "digital": False,
        "oversized": False,
        "reprint": False,
    }
    return {key: value for key, value in (card | fields).items() if value is not None}


def atomic_card(name: str, type_line: str = "Creature — Elf", cost: str = "{1}{G}", **fields: Any) -> dict[str, Any]:
    """An entry of MTGJSON's AtomicCards, without the fields that are not read."""
    card = {
        "name": name,
        "type": type_line,
        "manaCost": cost,
        "manaValue": 2.0,
        "colors": ["G"],
        "layout": "normal",
        "firstPrinting": "ABC",
        "identifiers": {"scryfallOracleId": f"oracle-{name}"},
    }
    return {key: value for key, value in (card | fields).items() if value is not None}


def printed(code: str, date: str, kind: str, rarities: dict[str, str]) -> dict[str, Any]:
    """A set of MTGJSON's AllPrintings; ``rarities`` by card name."""
    cards = [
        {"name": name, "rarity": rarity, "setCode": code, "number": str(number), "foreignData": [],
         "identifiers": {"scryfallOracleId": f"oracle-{name}"}, "uuid": f"{code}-{number}"}
        for number, (name, rarity) in enumerate(rarities.items())
    ]  # fmt: skip
    return {"code": code, "releaseDate": date, "type": kind, "baseSetSize": len(cards), "cards": cards, "tokens": []}


def new_names(count: int, seed: int = 0) -> list[str]:
    """Invented names that are not cards."""
    rng = random.Random(seed)
    parts = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4)) for _ in range(2 * count)]
    return [f"{first.title()} {second.title()}" for first, second in zip(parts[::2], parts[1::2], strict=True)]


def jsonl(cards: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(card, ensure_ascii=False) + "\n" for card in cards).encode(), mtime=0)
