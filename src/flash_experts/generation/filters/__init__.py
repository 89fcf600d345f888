"""Token filters: which tokens may come next in a name. `base` defines a filter; the other modules are by topic."""

from flash_experts.generation.filters.base import (
    AllOf,
    AllowedCharacters,
    KnownNameFilter,
    NameFilter,
    NameVocabulary,
    NoTokenLeftError,
    WellFormed,
)
from flash_experts.generation.filters.limits import MaxLength, MaxWords, MinLength, MinWords
from flash_experts.generation.filters.regex import MatchesRegex
from flash_experts.generation.filters.text import (
    UNWANTED,
    Alliterates,
    BannedWords,
    Contains,
    EndsWith,
    LeadsTo,
    NoProfanity,
    NoRealPlaces,
    NoRepeatedWords,
    StartsWith,
    WordFilter,
)

__all__ = [
    "UNWANTED",
    "AllOf",
    "Alliterates",
    "AllowedCharacters",
    "BannedWords",
    "Contains",
    "EndsWith",
    "KnownNameFilter",
    "LeadsTo",
    "MatchesRegex",
    "MaxLength",
    "MaxWords",
    "MinLength",
    "MinWords",
    "NameFilter",
    "NameVocabulary",
    "NoProfanity",
    "NoRealPlaces",
    "NoRepeatedWords",
    "NoTokenLeftError",
    "StartsWith",
    "WellFormed",
    "WordFilter",
]
