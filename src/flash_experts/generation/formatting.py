"""Names as they stand on cards: capitals, small words, marks and spaces.

The model learned its capitals from real names, so they stay unless they are wrong. A name without any capital says
nothing of them: it gets all that cards would print.
"""

from __future__ import annotations

import re

from flash_experts.data.names import shown_form

# Written low within a name ("Wrath of the Reef"); high as first or last word and after a colon.
SMALL_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "but", "by", "for", "from", "in", "into", "of",
     "on", "or", "the", "to", "with")
)  # fmt: skip
# No name ends on one of these. ("Soldier On", "Barge In" and "Squeak By" are cards.)
DANGLING_WORDS = SMALL_WORDS - {"by", "in", "on"}
# Low as prepositions, high where they belong to a verb ("Journey On Foot"): the model's choice stays.
_EITHER = frozenset({"in", "on", "by", "as", "but"})
# Particles of names and languages that stay low where they are low ("Starke en-Vec", "Fearless l'Cie").
_PARTICLE = re.compile(r"(?:en|il|bin)-|(?:de|da|del|di|du|van|von|der|den|le|la|el|al|yn|upon|l|d)(?:'|$)")

# In names without capitals. After a dash: "Two-Headed", but "Will-o'-the-Wisp" (of real names 887 and 14).
_PART = re.compile(r"(?<=-)[^\W_]+|(?<=\b[do]')[^\W_]{2,}")
_LOW_PARTICLE = re.compile(r"(?:en|il|bin)-")
_ROMAN = re.compile(r"(?:i{2,3}|iv|vi{1,3}|ix)$")

_LOOSE_START = " ,:;-/.!?&"
_LOOSE_END = " ,:;-/&"


def format_name(text: str) -> str:
    """A name as it would stand on a card. Formatting twice changes nothing more.

        " wrath  Of the reef ,tide-caller "  ->  "Wrath of the Reef, Tide-caller"

    Args:
        text: a name as generated. Of "one // other" only the first face is kept.
    """
    text = shown_form(text)
    face = next((face for face in re.split(r"/{2,}", text) if face.strip(_LOOSE_START)), "")
    face = re.sub(r" +(?=[,:;])", "", face)
    face = re.sub(r"(?<=[,;])(?=[^\s\d,;:])", " ", face)
    face = face.lstrip(_LOOSE_START).rstrip(_LOOSE_END)
    if face.islower():
        face = " ".join(_without_capitals(word) for word in face.split())
    words = face.split()
    last = len(words) - 1
    formatted: list[str] = []
    for place, word in enumerate(words):
        if place == 0 or formatted[-1].endswith((":", "!", "?")):
            formatted.append(_capital(word))
        else:
            formatted.append(_word(word, is_last=place == last, after_comma=formatted[-1].endswith(",")))
    return " ".join(formatted)


def _word(word: str, is_last: bool, after_comma: bool) -> str:
    """A word that does not begin a name. After a comma both are printed: "Aang, the Last", "Aang, A Lot"."""
    low = word.lower()
    if low in SMALL_WORDS and not is_last:
        return word if after_comma or low in _EITHER else low
    return word if _PARTICLE.match(word) else _capital(word)


def _without_capitals(word: str) -> str:
    """The capitals of a word that has none, but for its first letter: "two-headed" -> "two-Headed"."""
    if _ROMAN.match(word):
        return word.upper()
    parts = _PART.sub(lambda part: part[0] if part[0] in SMALL_WORDS | {"o"} else _capital(part[0]), word)
    is_name = not _LOW_PARTICLE.match(word) and _PARTICLE.match(word)
    return _capital(parts) if is_name else parts


def _capital(word: str) -> str:
    """Its first letter high, the rest as it is ("lava-Axe" -> "Lava-Axe", "'em" -> "'Em")."""
    for place, character in enumerate(word):
        if character.isalnum():
            high = character.upper()
            return word[:place] + (high if len(high) == 1 else character) + word[place + 1 :]
    return word
