"""Normalization of card names: display form, key for duplicate detection, faces and words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container

FACE_SEPARATOR = " // "

# Look-alike characters, mapped to the intended one. Letters with accents stay.
_LOOK_ALIKES = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4\u0060\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u2033\uff02", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\uff0d", "-")
    | dict.fromkeys("\ua789\u02d0\uff1a\ufe55", ":")  # modifier letter colon, length mark, full-width, small
    | {"\u2026": "...", "\uff0c": ",", "\u00ae": "", "\u2122": ""}
)
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))  # control, format (zero width), surrogate, private, unassigned
# Letters that NFKD leaves whole although readers take them for plain ones.
_WHOLE_LETTERS = str.maketrans(
    {"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ł": "l", "þ": "th", "ı": "i", "ħ": "h"}
)
_FACES = re.compile(r"\s+/{1,3}\s+|(?<=[a-z])//(?=[A-Z])")  # " / " is Moxfield's, " /// " Arena's
_POSSESSIVE = re.compile(r"'s$|'$")
# For ASCII names, as bytes: five times as fast as character by character.
_LOWER = bytes(range(256)).lower()
_NO_LETTERS_OR_DIGITS = bytes(code for code in range(128) if not chr(code).isalnum())


def shown_form(name: str) -> str:
    """The form for display and training: NFC, one kind of apostrophe, quote, dash and space; accents stay."""
    if name.isascii() and name.isprintable() and "  " not in name and "`" not in name:
        return name.strip()
    spaced = "".join(" " if character.isspace() else character for character in name)
    seen = "".join(character for character in spaced if unicodedata.category(character) not in _INVISIBLE)
    # Compose before looking up look-alikes, since a base and a mark may form one letter; and again afterwards, since a
    # removed sign can bring a letter and a mark together.
    composed = unicodedata.normalize("NFC", seen)
    folded = unicodedata.normalize("NFC", composed.translate(_LOOK_ALIKES))
    return " ".join(folded.split())


def normal_form(name: str) -> str:
    """The key for comparing names: lower case letters and digits without accents, ``"limdulsvault"`` for ``"Lim-Dûl's
    Vault"``; may be ``""``. Idempotent."""
    if name.isascii():
        return name.encode().translate(_LOWER, _NO_LETTERS_OR_DIGITS).decode()
    # Compatibility caseless matching, The Unicode Standard, definition D146: folding can undo a composition and
    # decomposing can bring capitals back, hence twice.
    text = unicodedata.normalize("NFD", name).casefold()
    text = unicodedata.normalize("NFKD", text).casefold()
    text = unicodedata.normalize("NFKD", text).translate(_WHOLE_LETTERS)
    return "".join(filter(str.isalnum, text))


def faces_of(name: str) -> list[str]:
    """The face names of a card: ``"Fire // Ice"`` has two, ``"SP//dr"`` one."""
    if FACE_SEPARATOR not in name:
        return [name.strip()]
    return [face.strip() for face in name.split(FACE_SEPARATOR) if face.strip()] or [name.strip()]


def with_face_separator(text: str) -> str:
    """A name or type line of several faces, however a collection manager separates them, with `FACE_SEPARATOR`."""
    return _FACES.sub(FACE_SEPARATOR, text)


def is_rebalanced(name: str, names: Container[str]) -> bool:
    """Whether a name is "A-" before another one of ``names``: a card rebalanced for digital play."""
    return name.startswith("A-") and name.removeprefix("A-") in names


def family_words(name: str) -> frozenset[str]:
    """The words of a name in normal form, without possessive endings: ``limdul``, ``vault``."""
    words = (word.strip(',.!?:"()') for word in shown_form(name).split())
    forms = (normal_form(_POSSESSIVE.sub("", word)) for word in words)
    return frozenset(form for form in forms if form)
