"""New card names: token filters, sampling, decoding, formatting, and how near they are to real cards."""

from flash_experts.generation.constraints import Constraints
from flash_experts.generation.filters import (
    CARD_ALPHABET,
    AllOf,
    AllowedCharacters,
    KnownNameFilter,
    NameFilter,
    NoTokenLeftError,
    WellFormed,
)
from flash_experts.generation.formatting import format_name
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.limit_filters import MaxLength, MaxWords, MinLength, MinWords
from flash_experts.generation.presets import PRESETS, Sampling, load_presets
from flash_experts.generation.regex_filter import MatchesRegex
from flash_experts.generation.search import GeneratedName
from flash_experts.generation.similarity import KnownNames
from flash_experts.generation.text_filters import Contains, EndsWith, StartsWith
from flash_experts.generation.type_fit import TypeFit, TypeJudge
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.generation.word_filters import (
    Alliterates,
    BannedWords,
    NoProfanity,
    NoRealPlaces,
    NoRepeatedWords,
    WordFilter,
)

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
    "NameVocabulary",
    "NoProfanity",
    "NoRealPlaces",
    "NoRepeatedWords",
    "NoTokenLeftError",
    "Sampling",
    "StartsWith",
    "TypeFit",
    "TypeJudge",
    "WellFormed",
    "WordFilter",
    "format_name",
    "load_presets",
]
