"""Another word in a name: the request for names with one word replaced."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flash_experts.app.settings import DEFAULTS, Settings

_WORD = re.compile(r"(?<!\S)[^\s,:!?]+?(?='s(?!\w)|[\s,:!?]|$)")  # without 's and punctuation after it
_GAP = "___"
# Rules that the other words replace.
_REPLACED = ("regex", "starts_with", "contains", "ends_with", "min_length")


def words_of(name: str) -> list[str]:
    """The words that can be replaced; none where a name has only one."""
    words = _WORD.findall(name)
    return words if len(words) > 1 else []


def with_gap(settings: Settings, name: str, number: Any) -> Settings:
    """The settings of names that differ from ``name`` in the word of this index, as a browser sends it; raises a
    ValueError if there is no such word, or the name is too long for a pattern."""
    places = {str(index): match for index, match in enumerate(_WORD.finditer(name))}
    word = places.get(str(number)[:6])
    if word is None or len(places) < 2:
        raise ValueError(f"{name!r:.60} has no such word")
    pattern = name[: word.start()] + _GAP + name[word.end() :]
    num_words = len(name.split())
    own: dict[str, Any] = {rule: DEFAULTS[rule] for rule in _REPLACED}
    own |= {"pattern": pattern, "min_words": num_words, "max_words": num_words, "words": None}
    return replace(settings, **own, seed=None, count=DEFAULTS["count"])
