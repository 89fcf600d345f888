"""New card names: token filters, sampling, decoding, formatting, and how near they are to real cards."""

from flash_experts.generation.filters import (
    CARD_ALPHABET,
    AllowedCharacters,
    KnownNameFilter,
    NameFilter,
    NoTokenLeftError,
    StartsWith,
    WellFormed,
)
from flash_experts.generation.formatting import format_name
from flash_experts.generation.generator import GeneratedName, NameGenerator
from flash_experts.generation.presets import PRESETS, Sampling
from flash_experts.generation.similarity import KnownNames
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.generation.word_filters import (
    BannedWords,
    MaxLength,
    MaxWords,
    NoRepeatedWords,
    WordFilter,
)

__all__ = [
    "CARD_ALPHABET",
    "PRESETS",
    "AllowedCharacters",
    "BannedWords",
    "GeneratedName",
    "KnownNameFilter",
    "KnownNames",
    "MaxLength",
    "MaxWords",
    "NameFilter",
    "NameGenerator",
    "NameVocabulary",
    "NoRepeatedWords",
    "NoTokenLeftError",
    "Sampling",
    "StartsWith",
    "WellFormed",
    "WordFilter",
    "format_name",
]
