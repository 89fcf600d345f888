"""Files of names: text, CSV, JSON, JSON lines, Markdown, and sets of Magic Set Editor and Cockatrice.

Formats: docs/file/format.rst in the editor's repository, doc/carddatabase_v4/cards.xsd in Cockatrice's.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TextIO
from xml.etree import ElementTree as Xml

from flash_experts.data.cards import join_type_line
from flash_experts.data.prompts import Attributes
from flash_experts.terminal import one_line, say, to_cell

if TYPE_CHECKING:
    from flash_experts.generation.generator import GeneratedName

COLUMNS = ("text", "log_prob", "score", "nearest_card", "similarity")
Format = Literal["text", "csv", "json", "jsonl", "markdown", "mse", "cockatrice"]
BY_SUFFIX: dict[str, Format] = {
    ".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".md": "markdown", ".mse-set": "mse",
    ".xml": "cockatrice",
}  # fmt: skip
_SET = "NEW"  # code of the set that Cockatrice lists the cards in
_RARITIES = {"mythic": "mythic rare"}  # Magic Set Editor's words
TABLES = ("csv", "json", "jsonl")
# Magic Set Editor's lists of subtypes and Cockatrice's rows of the table, by the first of these types of a card.
_KINDS = {"Creature": "race", "Instant": "spell", "Sorcery": "spell", "Artifact": "artifact",
          "Enchantment": "enchantment", "Land": "land", "Planeswalker": "planeswalker"}  # fmt: skip
_TABLE_ROWS = {"Land": "0", "Creature": "2", "Instant": "3", "Sorcery": "3"}


@dataclass(frozen=True, slots=True)
class NamedCard:
    """A name and what is known of the card that it is for."""

    text: str
    card: Attributes


def write_names(
    names: Iterable[GeneratedName], card: Attributes, file: TextIO, format: Format, raw_cells: bool = False
) -> int:
    """Writes names for one card as text, so not "mse" (see `write_mse`); returns their number."""
    if format in TABLES:
        rows: Iterable[dict[str, Any]] = map(row_of, names)
        if format == "csv":  # may be printed; JSON is escaped
            rows = ({column: _one_line(value) for column, value in row.items()} for row in rows)
        return write_table(rows, COLUMNS, file, format, raw_cells)
    return write_cards((NamedCard(name.text, card) for name in names), file, format)


def write_table(
    rows: Iterable[dict[str, Any]],
    columns: Sequence[str],
    file: TextIO,
    format: Format,
    raw_cells: bool = False,
    separator: str = ",",
) -> int:
    """Writes rows in one of `TABLES`; returns their number. Unless ``raw_cells``, CSV has no formulas (`to_cell`)."""
    if format == "jsonl":
        return _write_lines((json.dumps(row, ensure_ascii=False) for row in rows), file)
    if format == "json":
        listed = list(rows)
        say(json.dumps(listed, indent=2, ensure_ascii=False), file)
        return len(listed)
    table = csv.DictWriter(file, columns, delimiter=separator, lineterminator="\n")
    table.writerow({column: column if column.strip() else "" for column in columns})
    written = 0
    for row in rows:
        table.writerow({column: value if raw_cells else _safe(value) for column, value in row.items()})
        written += 1
    return written


def _safe(value: Any) -> Any:
    return to_cell(value) if isinstance(value, str) else value


def _one_line(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) else value


def write_cards(cards: Iterable[NamedCard], file: TextIO, format: Format) -> int:
    """Writes names as text, Markdown or a set of Cockatrice; returns their number."""
    if format == "text":
        return _write_lines((one_line(one.text) for one in cards), file)
    if format == "markdown":
        return _write_lines((f"- {_escaped(one.text)}" for one in cards), file)
    if format != "cockatrice":
        raise ValueError(f"{format} is not a format of cards as text: choose text, markdown or cockatrice")
    found = list(cards)
    say(cockatrice_set(found), file)
    return len(found)


def _write_lines(lines: Iterable[str], file: TextIO) -> int:
    written = 0
    for line in lines:
        say(line, file)
        written += 1
    return written


def row_of(name: GeneratedName) -> dict[str, Any]:
    """The name as a dictionary of `COLUMNS`, for JSON and CSV."""
    return {
        "text": name.text,
        "log_prob": round(name.log_prob, 4),
        "score": round(name.score, 4),
        "nearest_card": name.nearest_card,
        "similarity": round(name.similarity, 4),
    }


def _escaped(text: str) -> str:
    return "".join("\\" + character if character in "\\`*_[]<>" else character for character in one_line(text))


def write_mse(cards: Iterable[NamedCard], file: BinaryIO) -> int:
    """Writes a set of Magic Set Editor, a zip archive with a text file; returns the number of cards."""
    lines = ["mse version: 2.0.2", "game: magic", "stylesheet: m15", "set info:", "\ttitle: New names"]
    count = 0
    for one in cards:
        lines += ["card:", *(f"\t{key}: {value}" for key, value in _mse_fields(one).items())]
        count += 1
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        # A fixed date: the same names give the same file.
        archive.writestr(zipfile.ZipInfo("set", (2000, 1, 1, 0, 0, 0)), "\n".join(lines) + "\n")
    return count


def _mse_fields(one: NamedCard) -> dict[str, str]:
    card = one.card
    fields = {"has styling": "false", "name": one_line(one.text).replace("<", "&lt;"), "casting cost": mana_cost(card)}
    if card.types or card.supertypes:
        words = [*(card.supertypes or ()), *(card.types or ())]
        fields["super type"] = " ".join(f"<word-list-type>{word}</word-list-type>" for word in words)
        kind = next((kind for word, kind in _KINDS.items() if word in (card.types or ())), "race")
        subtypes = (f"<word-list-{kind}>{word}</word-list-{kind}>" for word in card.subtypes or ())
        fields["sub type"] = " ".join(subtypes)
    if card.rarity:
        fields["rarity"] = _RARITIES.get(card.rarity, card.rarity)
    return fields


def mana_cost(card: Attributes) -> str:
    """A mana cost such as ``2R``; "" for a land, or where mana value or colors are unknown."""
    if card.mana_value is None or card.colors is None or "Land" in (card.types or ()):
        return ""
    colors = "".join(card.colors)
    if len(colors) > max(card.mana_value, 0):
        return "/".join(card.colors) if card.mana_value == 1 and len(colors) == 2 else colors
    generic = card.mana_value - len(colors)
    return (str(generic) if generic or not colors else "") + colors


def cockatrice_set(cards: Iterable[NamedCard]) -> str:
    """The XML of a card database, version 4."""
    root = Xml.Element("cockatrice_carddatabase", version="4")
    one_set = Xml.SubElement(Xml.SubElement(root, "sets"), "set")
    Xml.SubElement(one_set, "name").text = _SET
    Xml.SubElement(one_set, "longname").text = "New names"
    Xml.SubElement(one_set, "settype").text = "Custom"
    listed = Xml.SubElement(root, "cards")
    for one in cards:
        _add_cockatrice_card(listed, one)
    Xml.indent(root, "  ")
    file = io.StringIO()
    Xml.ElementTree(root).write(file, encoding="unicode", xml_declaration=False)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + file.getvalue()


def _add_cockatrice_card(listed: Xml.Element, one: NamedCard) -> None:
    card = one.card
    element = Xml.SubElement(listed, "card")
    Xml.SubElement(element, "name").text = one_line(one.text)
    properties = {
        "layout": "normal",
        "side": "front",
        "type": type_line_of(card),
        "maintype": (card.types or ("",))[-1],
        "manacost": mana_cost(card),
        "cmc": "" if card.mana_value is None else str(card.mana_value),
        "colors": "".join(card.colors or ()),
    }
    prop = Xml.SubElement(element, "prop")
    for name, value in properties.items():
        if value:
            Xml.SubElement(prop, name).text = value
    Xml.SubElement(element, "set", {"rarity": card.rarity} if card.rarity else {}).text = _SET
    row = next((row for word, row in _TABLE_ROWS.items() if word in (card.types or ())), "1")
    Xml.SubElement(element, "tablerow").text = row


def type_line_of(card: Attributes) -> str:
    """The type line, such as ``Legendary Creature — Goblin``; "" where it is unknown."""
    line = join_type_line(card.supertypes or (), card.types or (), card.subtypes or ())
    return line.removeprefix(" — ")  # subtypes alone
