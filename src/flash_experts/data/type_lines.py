"""Type lines as users and their files write them: any case, German types, tokens, several kinds of dashes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from string import capwords

from flash_experts.data.cards import SUPERTYPES, TYPES, split_type_line
from flash_experts.data.names import faces_of, normal_form, with_face_separator
from flash_experts.terminal import nearest

TOKEN = "Token"
_DASH = re.compile(r"—|–|--|(?:^|\s)-(?=\s|$)")
_WORDS = {word.casefold(): word for word in (*TYPES, *SUPERTYPES, TOKEN)} | {
    "kreatur": "Creature", "spontanzauber": "Instant", "hexerei": "Sorcery", "artefakt": "Artifact",
    "verzauberung": "Enchantment", "artefaktkreatur": "Artifact Creature",
    "verzauberungskreatur": "Enchantment Creature", "standardland": "Basic Land",
    **dict.fromkeys(("legendär", "legendäre", "legendärer", "legendäres"), "Legendary"),
    **dict.fromkeys(("verschneit", "verschneite", "verschneiter", "verschneites"), "Snow"),
}  # fmt: skip
_HYPHEN = re.compile(rf"\b({'|'.join(TYPES)})(?:-\s*|\s+-)(?=\w)")  # "Creature-Elf"


def in_english(line: str) -> str:
    """A type line with the types in English and as cards print them, and a dash where a hyphen stood for one."""
    if line.isupper() or line.islower():
        line = capwords(line)
    line = re.sub(r"\w+", lambda match: _WORDS.get(match[0].casefold(), match[0]), line)
    return with_face_separator(_HYPHEN.sub(r"\1 — ", line))


def parse_type_line(text: str | None) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None]:
    """Parses a user's type line into supertypes, types and subtypes; three None for an empty text.

    Case, order and dash are free: ``"warrior goblin creature"`` is a Creature — Goblin Warrior, in the order of real
    cards. Only subtypes after a dash keep theirs. Types may be German; of two faces the first one counts; "Token" is
    left out, as no model has a word for it. Raises a ValueError for an unknown type (with a suggestion).
    """
    text = faces_of(in_english(text or ""))[0]
    words = [word for word in _DASH.sub(" ", text).split() if word != TOKEN]
    if not words:
        return None, None, None
    vocabulary = _type_vocabulary()
    found = []
    while words:
        length = 2 if normal_form("".join(words[:2])) in vocabulary.pairs else 1
        found.append(_known_type(" ".join(words[:length]), vocabulary))
        del words[:length]
    subtypes = [name for name in found if name not in SUPERTYPES and name not in TYPES]
    if not _DASH.search(text):
        subtypes.sort(key=lambda name: vocabulary.place[name])
    return (
        tuple(name for name in SUPERTYPES if name in found),
        tuple(name for name in TYPES if name in found),
        tuple(dict.fromkeys(subtypes)),
    )


def known_subtypes() -> tuple[str, ...]:
    """All subtypes that `parse_type_line` knows, sorted."""
    return tuple(sorted(set(_type_vocabulary().names.values()) - {*SUPERTYPES, *TYPES}))


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Known words of type lines."""

    names: dict[str, str]  # by normal form
    pairs: frozenset[str]  # subtypes of two words
    place: dict[str, float]  # mean position among a card's subtypes, 0 (first) to 1 (last)


@cache
def _type_vocabulary() -> _Vocabulary:
    from flash_experts.data.card_table import read_embedded

    places: dict[str, list[float]] = {}
    for row in read_embedded().rows:
        for line in (row.type_line or "").split(" // "):
            _, types, subtypes = split_type_line(line)
            if types and set(types) <= set(TYPES):
                for place, name in enumerate(subtypes):
                    places.setdefault(name, []).append(place / max(1, len(subtypes) - 1))
    # The more common of two spellings wins: jokes have a "Human?".
    names = {normal_form(name): name for name in sorted(places, key=lambda name: len(places[name]))}
    names |= {normal_form(name): name for name in (*SUPERTYPES, *TYPES)} | {"tribal": "Kindred"}
    pairs = frozenset(normal_form(name) for name in places if " " in name)
    return _Vocabulary(names, pairs, {name: sum(seen) / len(seen) for name, seen in places.items()})


def _known_type(word: str, vocabulary: _Vocabulary) -> str:
    known = vocabulary.names.get(normal_form(word))
    if known is None:
        near = nearest(normal_form(word), vocabulary.names)
        others = 'a type line is like "Legendary Creature — Goblin"'
        hint = f"did you mean {vocabulary.names[near]!r}?" if near else others
        raise ValueError(f"unknown type {word!r}: {hint}")
    return known
