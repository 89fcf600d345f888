"""The names of a session as a file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from flash_experts.app.service import Row
from flash_experts.data.prompts import Attributes
from flash_experts.generation.card_sets import NamedRow, cards_of, write_set
from flash_experts.generation.generator import completed_attributes
from flash_experts.generation.name_files import BY_SUFFIX, Format, NamedCard, write_cards, write_mse, write_names

# Formats on the page, by label, and their suffixes.
FORMATS: dict[str, str] = {
    "Text": "txt", "CSV": "csv", "JSON": "json", "Markdown": "md", "Magic Set Editor": "mse-set", "Cockatrice": "xml",
}  # fmt: skip


def exported(rows: Sequence[Row], suffix: str) -> str:
    """A file of names as JSON for the page's script: its name, and its content as text or as base64.

    Raises:
        ValueError: no format has this suffix.
    """
    return _as_json("names", suffix, lambda: _cards(rows), lambda format: _text(rows, format))


def exported_set(named: Sequence[NamedRow], kept: Sequence[Row], suffix: str) -> str:
    """The file of a set with all its cards, as `exported`. Of a card's names, a kept one comes first."""
    first = {row.name.text for row in kept}
    chosen = [replace(one, names=sorted(one.names, key=lambda name: name.text not in first)) for one in named]

    def text(format: Format) -> str:
        file = io.StringIO()
        write_set(chosen, file, format)
        return file.getvalue()

    return _as_json("named-set", suffix, lambda: cards_of(chosen), text)


def _as_json(stem: str, suffix: str, cards: Callable[[], Sequence[NamedCard]], text: Callable[[Format], str]) -> str:
    if suffix not in FORMATS.values():
        raise ValueError(f"no format {str(suffix)[:20]!r}: use one of {', '.join(FORMATS.values())}")
    name, format = f"{stem}.{suffix}", BY_SUFFIX[f".{suffix}"]
    if format == "mse":
        binary = io.BytesIO()
        write_mse(cards(), binary)
        return json.dumps({"name": name, "base64": base64.b64encode(binary.getvalue()).decode("ascii")})
    return json.dumps({"name": name, "text": text(format)})


def _text(rows: Sequence[Row], format: Format) -> str:
    file = io.StringIO()
    if format == "cockatrice":  # its names may be of different cards
        write_cards(_cards(rows), file, format)
    else:
        write_names([row.name for row in rows], Attributes(), file, format)
    return file.getvalue()


def _cards(rows: Sequence[Row]) -> list[NamedCard]:
    return [NamedCard(row.name.text, completed_attributes(row.settings)) for row in rows]
