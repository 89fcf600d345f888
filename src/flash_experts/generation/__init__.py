"""New card names: token filters, sampling, decoding, formatting. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.generation.constraints import Constraints as Constraints
    from flash_experts.generation.filters.base import AllOf as AllOf
    from flash_experts.generation.filters.base import AllowedCharacters as AllowedCharacters
    from flash_experts.generation.filters.base import KnownNameFilter as KnownNameFilter
    from flash_experts.generation.filters.base import NameFilter as NameFilter
    from flash_experts.generation.filters.base import NameVocabulary as NameVocabulary
    from flash_experts.generation.filters.base import NoTokenLeftError as NoTokenLeftError
    from flash_experts.generation.filters.base import WellFormed as WellFormed
    from flash_experts.generation.filters.limits import MaxLength as MaxLength
    from flash_experts.generation.filters.limits import MaxWords as MaxWords
    from flash_experts.generation.filters.limits import MinLength as MinLength
    from flash_experts.generation.filters.limits import MinWords as MinWords
    from flash_experts.generation.filters.regex import MatchesRegex as MatchesRegex
    from flash_experts.generation.filters.text import Alliterates as Alliterates
    from flash_experts.generation.filters.text import BannedWords as BannedWords
    from flash_experts.generation.filters.text import Contains as Contains
    from flash_experts.generation.filters.text import EndsWith as EndsWith
    from flash_experts.generation.filters.text import NoProfanity as NoProfanity
    from flash_experts.generation.filters.text import NoRealPlaces as NoRealPlaces
    from flash_experts.generation.filters.text import NoRepeatedWords as NoRepeatedWords
    from flash_experts.generation.filters.text import StartsWith as StartsWith
    from flash_experts.generation.filters.text import WordFilter as WordFilter
    from flash_experts.generation.generator import GeneratedName as GeneratedName
    from flash_experts.generation.generator import KnownNames as KnownNames
    from flash_experts.generation.generator import NameGenerator as NameGenerator
    from flash_experts.generation.request import PRESETS as PRESETS
    from flash_experts.generation.request import NameRequest as NameRequest
    from flash_experts.generation.request import Sampling as Sampling
    from flash_experts.generation.request import load_presets as load_presets
    from flash_experts.generation.text_rules import CARD_ALPHABET as CARD_ALPHABET
    from flash_experts.generation.text_rules import format_name as format_name

_NAMES = {
    "constraints": "Constraints",
    "filters.base": "AllOf AllowedCharacters KnownNameFilter NameFilter NameVocabulary NoTokenLeftError WellFormed",
    "filters.limits": "MaxLength MaxWords MinLength MinWords",
    "filters.regex": "MatchesRegex",
    "filters.text": "Alliterates BannedWords Contains EndsWith NoProfanity NoRealPlaces NoRepeatedWords StartsWith "
    "WordFilter",
    "generator": "GeneratedName KnownNames NameGenerator",
    "request": "PRESETS NameRequest Sampling load_presets",
    "text_rules": "CARD_ALPHABET format_name",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
