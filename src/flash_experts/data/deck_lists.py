"""Parser for deck lists and numbered lists: ``4 Lightning Bolt (M10) 146 *F*`` becomes a name and a set code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flash_experts.data.card_table import known_names
from flash_experts.data.cards import parse_set_code
from flash_experts.data.names import normal_form

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
_TOKENS = "token"


@dataclass(frozen=True, slots=True)
class Entry:
    """One card of a deck list."""

    name: str
    set_code: str | None
    is_token: bool


class DeckList:
    """Reads a deck list line by line; a line that is a real name in ``known`` stays whole ("50 Feet of Rope")."""

    def __init__(self, known: frozenset[str]) -> None:
        self.known = known
        self.section = ""

    @classmethod
    def of(cls, lines: Sequence[str]) -> DeckList | None:
        """A reader, if these first non-empty lines of a file look like a deck list; None if they are names alone."""
        cards = [line for line in lines if not _COMMENT.match(line) and not _SECTION.fullmatch(line)]
        counted = [line for line in cards if _COUNT.match(line) or _MARK.match(line) or _COUNT_AFTER.search(line)]
        titled = bool(lines) and _TITLE.fullmatch(lines[0]) is not None
        if not titled and len(counted) <= _SHARE * len(cards):
            return None
        known = frozenset(map(normal_form, known_names()))
        counted = [line for line in counted if normal_form(line) not in known]
        return cls(known) if titled or len(counted) > _SHARE * len(cards) else None

    def read(self, line: str) -> Entry | None:
        """The card of a line; None for a heading or a comment."""
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
        return Entry(text.strip(), _code(set_code), self.section.startswith(_TOKENS))


def _code(text: str | None) -> str | None:
    try:
        return parse_set_code(text)
    except ValueError:
        return None
