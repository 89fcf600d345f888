"""New card names: token filters, sampling, decoding, formatting. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.generation.constraints import Constraints
    from flash_experts.generation.filters import (
        Alliterates,
        AllOf,
        AllowedCharacters,
        BannedWords,
        Contains,
        EndsWith,
        KnownNameFilter,
        MatchesRegex,
        MaxLength,
        MaxWords,
        MinLength,
        MinWords,
        NameFilter,
        NameVocabulary,
        NoProfanity,
        NoRealPlaces,
        NoRepeatedWords,
        NoTokenLeftError,
        StartsWith,
        WellFormed,
        WordFilter,
    )
    from flash_experts.generation.formatting import format_name
    from flash_experts.generation.generator import NameGenerator
    from flash_experts.generation.request import PRESETS, NameRequest, Sampling, load_presets
    from flash_experts.generation.search import GeneratedName
    from flash_experts.generation.similarity import KnownNames
    from flash_experts.generation.text_rules import CARD_ALPHABET

__all__ = [
    "CARD_ALPHABET",
    "PRESETS",
    "AllOf",
    "Alliterates",
    "AllowedCharacters",
    "BannedWords",
    "Constraints",
    "Contains",
    "EndsWith",
    "GeneratedName",
    "KnownNameFilter",
    "KnownNames",
    "MatchesRegex",
    "MaxLength",
    "MaxWords",
    "MinLength",
    "MinWords",
    "NameFilter",
    "NameGenerator",
    "NameRequest",
    "NameVocabulary",
    "NoProfanity",
    "NoRealPlaces",
    "NoRepeatedWords",
    "NoTokenLeftError",
    "Sampling",
    "StartsWith",
    "WellFormed",
    "WordFilter",
    "format_name",
    "load_presets",
]
_HOMES = dict.fromkeys(__all__, "filters") | {
    "CARD_ALPHABET": "text_rules",
    "PRESETS": "request",
    "Constraints": "constraints",
    "GeneratedName": "search",
    "KnownNames": "similarity",
    "NameGenerator": "generator",
    "NameRequest": "request",
    "Sampling": "request",
    "format_name": "formatting",
    "load_presets": "request",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
