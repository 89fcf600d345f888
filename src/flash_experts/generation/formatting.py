"""Card-style formatting of names: capitals, small words, punctuation and spaces.

The model's capitals stay unless they are wrong. A name without any capital gets all that cards would print.
"""

from __future__ import annotations

import re

from flash_experts.data.names import shown_form

# Lower case within a name ("Wrath of the Reef"), capitalized as first or last word and after a colon.
SMALL_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "but", "by", "for", "from", "in", "into", "of",
     "on", "or", "the", "to", "with")
)  # fmt: skip
# No name ends on one of these. ("Soldier On", "Barge In" and "Squeak By" are cards.)
DANGLING_WORDS = SMALL_WORDS - {"by", "in", "on"}
# Lower case as prepositions, capitalized as part of a verb ("Journey On Foot"): the model's choice stays.
_EITHER = frozenset({"in", "on", "by", "as", "but"})
# Particles of names that stay lower case where they are ("Starke en-Vec", "Fearless l'Cie").
_PARTICLE = re.compile(r"(?:en|il|bin)-|(?:de|da|del|di|du|van|von|der|den|le|la|el|al|yn|upon|l|d)(?:'|$)")

# In names without capitals. After a dash: "Two-Headed", but "Will-o'-the-Wisp" (of real names 887 and 14).
_PART = re.compile(r"(?<=-)[^\W_]+|(?<=\b[do]')[^\W_]{2,}")
_LOW_PARTICLE = re.compile(r"(?:en|il|bin)-")
_ROMAN = re.compile(r"(?:i{2,3}|iv|vi{1,3}|ix)$")

_LOOSE_START = " ,:;-/.!?&"
_LOOSE_END = " ,:;-/&"


def format_name(text: str) -> str:
    """A name as printed on a card; of "one // other" only the first face. Idempotent.

    " wrath  Of the reef ,tide-caller "  ->  "Wrath of the Reef, Tide-caller"
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
    """A word after the first. After a comma, cards have both cases: "Aang, the Last", "Aang, A Lot"."""
    low = word.lower()
    if low in SMALL_WORDS and not is_last:
        return word if after_comma or low in _EITHER else low
    return word if _PARTICLE.match(word) else _capital(word)


def _without_capitals(word: str) -> str:
    """With capitals after the first letter: "two-headed" -> "two-Headed"."""
    if _ROMAN.match(word):
        return word.upper()
    parts = _PART.sub(lambda part: part[0] if part[0] in SMALL_WORDS | {"o"} else _capital(part[0]), word)
    is_name = not _LOW_PARTICLE.match(word) and _PARTICLE.match(word)
    return _capital(parts) if is_name else parts


def _capital(word: str) -> str:
    """Its first letter as a capital ("lava-Axe" -> "Lava-Axe", "'em" -> "'Em")."""
    for place, character in enumerate(word):
        if character.isalnum():
            high = character.upper()
            return word[:place] + (high if len(high) == 1 else character) + word[place + 1 :]
    return word
