"""The ways in which users' files write cards: names of columns, spellings of values, and lines of deck lists."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from flash_experts.data import cards
from flash_experts.data.card_table import known_names
from flash_experts.data.names import FACE_SEPARATOR, normal_form, with_face_separator
from flash_experts.data.type_lines import in_english

MAX_NAME = 300  # characters; the longest real name has 141

# Names of columns, in lower case, letters and digits alone; the first one with a value counts. They come from this
# project, MTGJSON and Scryfall, from collection managers (Archidekt, Moxfield, Deckbox, ManaBox, Dragon
# Shield, TCGplayer, Delver Lens, Urza Gatherer, Cube Cobra, MTGGoldfish, MTGO), and German, French, Spanish, Italian
# and Portuguese words.
_COLUMNS = {
    column: spellings.split()
    for column, spellings in {
        "name": "name cardname englishname nameen productname card simplename names cardnames cards kartenname karte "
        "nom nomdelacarte nomcarte carte nombre nombredelacarta carta nomedellacarta nomecarta nomedacarta nome "
        "cardtitle title titel titre titulo",
        "face_name": "facename",
        "type_line": "typeline type cardtype typ kartentyp typedecarte tipo tipodecarta tipodicarta tipocarta "
        "tipodacarta",
        "supertypes": "supertypes",
        "types": "types",
        "subtypes": "subtypes",
        "mana_cost": "manacost castingcost manakosten coutdemana coutenmana costedemana costemana costodimana "
        "costomana custodemana",
        "mana_value": "manavalue cmc convertedmanacost convertedcost mv manawert valeurdemana ccm valordemana "
        "costedemanaconvertido valoredimana umgewandeltemanakosten",
        "face_mana_value": "facemanavalue faceconvertedmanacost",
        "colors": "colors color colours colour cardcolors cardcolor farben farbe couleurs couleur colores colori "
        "colore cores cor",
        "layout": "layout",
        "flag": "flag",
        "source_id": "sourceid oracleid scryfalloracleid uuid scryfallid id",
        "rarity": "rarity seltenheit rarete rareza rarita raridade",
        "set_code": "setcode editioncode expansioncode setid editionid set edition expansion exp codigodelaedicion "
        "codeedition codicedelset codigodacolecao",
        "released": "released releasedat releasedate",
    }.items()
}
_COLUMN_OF = {
    spelling: (column, place) for column, spellings in _COLUMNS.items() for place, spelling in enumerate(spellings)
}
_TEXT_COLUMNS = ("type_line", "layout", "flag", "rarity", "set_code", "released")
# Headings of files with product numbers instead of names, or with another name for the column of names.
_OTHER_COLUMNS = ("idproduct", "multiverseid", "quantity", "qty", "collectornumber", "tcgplayerid", "productid", "sku")
_GENERATED = {"text", "log_prob"}  # headings of names that `generate` wrote: elsewhere "text" is a card's rules
_MISSING = frozenset(("", "nan", "none", "<na>", "nat", "null", "n/a", "\\n", "no cost", "-", "\u2014"))
_MISSING_NAMES = frozenset(("nan", "NaN", "<NA>", "None", "null", "NULL"))
_FACES_OF_COST = re.compile(r"\s*//+\s*|\s+/\s+")
_NOT_OF_COLORS = re.compile(r"[\s,;|/&+{}()\[\]'\"-]+")
_COLOR_WORDS = {
    letter: words.split()
    for letter, words in {
        "W": "white weiss blanc blanche blanco blanca bianco bianca branco branca",
        "U": "blue blau bleu bleue azul blu",
        "B": "black schwarz noir noire negro negra nero nera preto preta",
        "R": "red rot rouge rojo roja rosso rossa vermelho vermelha",
        "G": "green grun vert verte verde",
        "C": "colorless colourless c farblos incolore incoloro incolor artifact art artefakt land lands lnd",
        "": "and und et y e color colour colored coloured",
        "?": "multicolor multicolored multicolour multicoloured multi gold gld mehrfarbig multicolore multicolorido m"
        " hybrid",
    }.items()
}
_GUILDS = "azorius WU dimir UB rakdos BR gruul RG selesnya GW orzhov WB izzet UR golgari BG boros RW simic GU"
_SHARDS = "bant GWU esper WUB grixis UBR jund BRG naya RGW abzan WBG jeskai URW sultai BGU mardu RWB temur GUR"
_COLOR_OF = {word: letter for letter, words in _COLOR_WORDS.items() for word in words}
_COLOR_OF |= dict(zip(*[iter(f"{_GUILDS} {_SHARDS}".split())] * 2, strict=True))
_RARITIES = {
    word: rarity
    for rarity, words in {
        "common": "c common gewohnlich haufig commune comun comune comum",
        "uncommon": "u uncommon ungewohnlich nichtsohaufig peucommune pococomun infrecuente noncomune incomum",
        "rare": "r rare selten rara raro",
        "mythic": "m mythic mythicrare raremythic mr mythisch mythischselten sagenhaftselten mythique raremythique"
        " mitica raramitica rarorammitico miticorara",
    }.items()
    for word in words.split()
}


@lru_cache(maxsize=10_000)
def _folded(text: str) -> str:
    """Lower case letters and digits without accents: ``"Coût de mana"`` becomes ``"coutdemana"``."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(filter(str.isalnum, plain))


def known_columns(headings: Iterable[str]) -> set[str]:
    """The known columns in a heading, ``"other"`` for `_OTHER_COLUMNS`; a ValueError if two are called "name"."""
    headings = list(headings)
    folded = [_folded(heading) for heading in headings]
    known = {column for column, spellings in _COLUMNS.items() if not set(spellings).isdisjoint(folded)}
    name = next((spelling for spelling in _COLUMNS["name"] if spelling in folded), None)
    if name is not None and folded.count(name) > 1:
        raise ValueError(f"two columns are called {name!r}: keep one")
    known |= {"name"} if _GENERATED.issubset(headings) else set()
    return known | ({"other"} if not set(_OTHER_COLUMNS).isdisjoint(folded) else set())


def column_of(heading: str) -> str | None:
    """The column that a heading stands for, such as ``"name"`` for "Kartenname"; None for another one."""
    return _COLUMN_OF.get(_folded(heading), (None, 0))[0]


# A tab-separated cell that starts with a quotation, and what follows the quotation in it.
_QUOTATION = re.compile(r'(?:^|(?<=\t))"(?:[^"\t]|"")+"(?!")([^\t\r\n]*)')


def with_escaped_quotes(line: str) -> str:
    """A tab-separated line with the quotes of names escaped: ``"Brims" Barone``, and real cards all in quotes.

    Excel and pandas quote and escape cells as in CSV, Google Sheets and most other programs do neither.
    """
    return _QUOTATION.sub(lambda cell: _escaped(cell[0]) if cell[1] or cell[0] in _quoted_names() else cell[0], line)


def _escaped(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


@cache
def _quoted_names() -> frozenset[str]:
    return frozenset(name for name in known_names() if name[0] == name[-1] == '"')


def raw_card(record: Any, where: str, unread: cards.Unread) -> cards.RawCard | None:
    """Parses a name, or values by column, into a card; None if the name is empty. Counts unreadable values.

    Raises:
        ValueError: the record is neither, its name is too long, or a value has a wrong type.
    """
    if isinstance(record, str):
        record = {"name": record}
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a name or a card, not {type(record).__name__}")
    fields = _fields(record)
    if "name" not in fields:
        keys = ", ".join(map(repr, record))[:MAX_NAME]
        raise ValueError(f"{where}: a card needs a name, and has no key 'name'" + f", but {keys}" * bool(keys))
    name = _name(fields, where)
    if name is None:
        unread.add("name", where, fields.get("name") or "")
        return None
    for column in _TEXT_COLUMNS:
        value = fields.get(column)
        if column == "released" and type(value) is int:
            value = str(value)
        if not isinstance(value or "", str):
            raise ValueError(f"{where}: {column} must be text, not {value!r}")
        fields[column] = (value or "").strip()
    type_line = _type_line(fields)

    def read(column: str, parse: Callable[[Any], Any]) -> Any:
        value = fields.get(column)
        if _is_missing(value):
            return None
        try:
            return parse(value)
        except (ValueError, TypeError, OverflowError):
            unread.add(column, where, value)
            return None

    is_face = "face_name" in fields and FACE_SEPARATOR in name
    return cards.RawCard(
        name=fields["face_name"].strip() if is_face else name,
        type_line=type_line,
        mana_cost=_FACES_OF_COST.sub(FACE_SEPARATOR, str(fields.get("mana_cost") or "").strip()) or None,
        colors=_colors(fields, type_line, read),
        mana_value=read("face_mana_value" if is_face else "mana_value", _mana_value),
        layout=fields["layout"],
        flag=fields["flag"],
        source_id=str(fields.get("source_id") or Path(where).name),
        rarity=read("rarity", _rarity),
        set_code=read("set_code", cards.parse_set_code),
        released=read("released", lambda date: cards.parse_date(re.sub(r"(?<=^.{10})[T ].*", "", date))),
    )


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().casefold() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _fields(record: Mapping[Any, Any]) -> dict[str, Any]:
    """The known columns of a record; None where a value is missing."""
    found: dict[str, tuple[tuple[bool, int], Any]] = {}
    cost = None
    for key, value in record.items():
        spelling = _folded(str(key))
        if spelling == "cost":
            cost = value
        if spelling in _COLUMN_OF:
            column, place = _COLUMN_OF[spelling]
            rank = (_is_missing(value), place)
            if column not in found or rank < found[column][0]:
                found[column] = (rank, value)
    fields = {column: value for column, (_, value) in found.items()}
    if "name" not in fields and record.keys() >= _GENERATED:
        fields["name"] = record["text"]
    if "type_line" in fields and "mana_cost" not in fields:
        fields["mana_cost"] = cost  # without a type column, "cost" is as often a price
    fields |= _of_faces(record.get("card_faces"), fields)
    if not isinstance(fields.get("face_name"), str) or _is_missing(fields["face_name"]):
        fields.pop("face_name", None)
    kept = ("name", "colors")  # an empty text differs from a missing value
    return {column: None if column not in kept and _is_missing(value) else value for column, value in fields.items()}


def _of_faces(faces: Any, fields: Mapping[str, Any]) -> dict[str, str]:
    """Values that Scryfall's ``card_faces`` have and the card itself lacks."""
    found = {}
    if isinstance(faces, list) and all(isinstance(face, dict) for face in faces):
        for column in ("type_line", "mana_cost", "colors"):
            if _is_missing(fields.get(column)) and any(face.get(column) is not None for face in faces):
                values = (face.get(column) or "" for face in faces)
                texts = ("".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)
                found[column] = FACE_SEPARATOR.join(texts)
    return found


def _name(fields: Mapping[str, Any], where: str) -> str | None:
    value = fields.get("name")
    if not (value is None or isinstance(value, str) or _is_missing(value)):
        raise ValueError(f"{where}: a card needs a name")
    if not isinstance(value, str) or not value.strip() or value.strip() in _MISSING_NAMES:
        return None
    if len(value) > MAX_NAME:
        raise ValueError(f"{where}: {len(value):,} characters are not a card name: give one name per line")
    return with_face_separator(value)


def _items(value: Any) -> list[str]:
    """Parses a list, its text as pandas writes it, or ``"Elf, Druid"`` into ``["Elf", "Druid"]``."""
    if isinstance(value, str):
        return [word for word in re.split(r"[\s,;\[\]'\"(){}]+", value) if word]
    return [str(item) for item in value] if isinstance(value, list) else []


def _type_line(fields: Mapping[str, Any]) -> str | None:
    """The type line, joined from its parts if need be; known types may be in any case."""
    line = fields["type_line"]
    if not line:
        before = [*_items(fields.get("supertypes")), *_items(fields.get("types"))]
        after = _items(fields.get("subtypes"))
        line = " ".join(before) + (f" — {' '.join(after)}" if after and before else "")
    return in_english(line) or None


def _colors(fields: Mapping[str, Any], type_line: str | None, read: Callable[..., Any]) -> str | None:
    """Colors as letters. An empty cell means colorless only for a card with a type line and without a mana cost."""
    if "colors" not in fields:
        return None
    value = fields["colors"]
    if isinstance(value, str) and not value.strip():
        cost = fields.get("mana_cost")
        return cards.UNKNOWN if type_line is None or cost else ""
    found = "" if value == [] else read("colors", _color_letters)
    return cards.UNKNOWN if found is None else found


def _color_letters(value: Any) -> str:
    """``"WU"`` of ``["U", "W"]``, ``"['W', 'U']"``, ``"White/Blue"``; ``"?"`` for unnamed ones ("multicolor")."""
    if isinstance(value, list):
        value = ",".join(value)
    if not isinstance(value, str):
        raise ValueError
    return FACE_SEPARATOR.join(map(_colors_of_face, re.split(r"\s+//\s+", value)))


def _colors_of_face(text: str) -> str:
    words = [word for word in _NOT_OF_COLORS.split(text) if word]
    letters = [_COLOR_OF.get(_folded(word), word) for word in words]
    if "?" in letters and set(letters) <= {"?", ""}:
        return cards.UNKNOWN
    return "".join(cards.parse_colors(" ".join(letter for letter in letters if letter != "?")) or ())


def _rarity(value: str) -> str | None:
    word = _folded(value)
    numbered = re.fullmatch(r"([curm])\d+", word)  # C1, U2: numbering of old sets
    return _RARITIES.get(numbered[1] if numbered else word) or cards.parse_rarity(value)


def _mana_value(value: Any) -> int:
    number = float(value.replace(",", ".") if isinstance(value, str) else value)
    if not 0 <= number < 10**7 or isinstance(value, bool):
        raise ValueError
    return int(number)


# --------------------------------------------------------------------------------------------------------- deck lists


_COUNT = re.compile(r"^(?:SB:\s*)?(?:\d{1,3}\s*[x×]?|[x×]\d{1,3})\s+(?=\S)", re.IGNORECASE)
_MARK = re.compile(r"^(?:[-*•]|\d{1,4}[.)])\s+(?=\S)")
_COUNT_AFTER = re.compile(r"\s+[x×]\s?\d{1,3}$", re.IGNORECASE)
_SIDEBOARD = re.compile(r"SB:\s*", re.IGNORECASE)
_COMMENT = re.compile(r"//|#")
# Headings of Arena, MTGO, Moxfield, Archidekt, MTGGoldfish and Cockatrice, with or without a count: "Creatures (12)".
_SECTION = re.compile(
    r"[\[(]?(deck|decklist|main ?board|main ?deck|main|side ?board|maybe ?board|considering|commanders?|companions?|"
    r"oathbreakers?|attractions?|stickers?|tokens?(?: & extras)?|creatures?|spells?|lands?|"
    r"basic lands?|instants?|sorcer(?:y|ies)|artifacts?|enchantments?|planeswalkers?|battles?|other(?: spells)?|about|"
    r"mazo|mazzo|banquillo|réserve|reserva|metadata|general)[\])]?\s*(?:[:(\[]?\s*\d*\s*[)\]]?)?:?",
    re.IGNORECASE,
)
_TITLE = re.compile(r"(deck|decklist|main ?deck|main ?board|side ?board|commander|about)\s*:?", re.IGNORECASE)
# Suffixes of a name, removed from the right: foil marks, tags, categories, set and collector number.
_BEHIND = re.compile(
    r"\s+(?:\*\S{1,8}\*|#.*|\^[^^]*\^|`[^`]*`|<[^<>]*>|\((?:F|foil|etched)\)|\[[A-Z][^\[\]]*[a-z{][^\[\]]*\])$"
)
_SET = re.compile(
    r"\s+[(\[]([A-Z0-9_]{2,8}|[a-z0-9_]{2,6})(?:[:#]\S+)?[)\]](?:\s+[\w★†\-/]{1,12})?$|\|([A-Z0-9_]{2,8})(?:\|\S+)?$"
)  # | is Forge's
_SET_BEFORE = re.compile(r"[(\[]([A-Za-z0-9_]{2,8})(?:[:#]\S+)?[)\]]\s+")
_SHARE = 0.5  # a text with counts on more than this share of its lines is a deck list


class DeckList:
    """Reads a deck list line by line; a line that is a real name in ``known`` stays whole ("50 Feet of Rope")."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known
        self.section = ""

    @classmethod
    def of(cls, lines: Sequence[str]) -> DeckList | None:
        """A reader, if these first non-empty lines of a file look like a deck list; None if they are names alone."""
        entries = [line for line in lines if not _COMMENT.match(line) and not _SECTION.fullmatch(line)]
        counted = [line for line in entries if _COUNT.match(line) or _MARK.match(line) or _COUNT_AFTER.search(line)]
        titled = bool(lines) and _TITLE.fullmatch(lines[0]) is not None
        if not titled and len(counted) <= _SHARE * len(entries):
            return None
        known = frozenset(map(normal_form, known_names()))
        counted = [line for line in counted if normal_form(line) not in known]
        return cls(known) if titled or len(counted) > _SHARE * len(entries) else None

    def read(self, line: str) -> dict[str, str | None] | None:
        """The card of a line as `raw_card` takes it; None for a heading or a comment."""
        if section := _SECTION.fullmatch(line):
            self.section = section[1].casefold()
            return None
        if _COMMENT.match(line) or self.section in ("about", "metadata", "general"):
            if line.startswith("//") and (section := _SECTION.fullmatch(line.strip("/ "))):
                self.section = section[1].casefold()
            return None
        set_code = None
        text = _SIDEBOARD.sub("", line, count=1) if _SIDEBOARD.match(line) else line
        if normal_form(text) not in self.known:
            text = _COUNT_AFTER.sub("", _COUNT.sub("", _MARK.sub("", text, count=1), count=1))
            if before := _SET_BEFORE.match(text):
                set_code, text = before[1], text[before.end() :]
            while behind := _BEHIND.search(text) or _SET.search(text):
                set_code = behind[1] or behind[2] if behind.re is _SET else set_code
                text = text[: behind.start()]
        layout = "token" if self.section.startswith("token") else ""
        return {"name": text.strip(), "set": _code(set_code), "layout": layout}


def _code(text: str | None) -> str | None:
    with suppress(ValueError):
        return cards.parse_set_code(text)
    return None
