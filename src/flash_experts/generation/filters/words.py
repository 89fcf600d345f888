"""Filters on words: repeated and banned words, swear words, places of the real world, and alliteration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import cast

import torch

from flash_experts.data.names import normal_form
from flash_experts.generation.filters.base import NameFilter, NameVocabulary
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.text_rules import PARTIAL_BYTES, WORD, Check, alliterates, place_at_end, profanity_at_end

_SHORTEST_COUNTED_WORD = 4  # letters: "of the ... of the" and the "s" after apostrophes may repeat


@lru_cache(maxsize=1024)  # several filters need the words of the same rows
def _words(name: str) -> list[str]:
    return WORD.findall(name.casefold())


class WordFilter(NameFilter):
    """Refuses words: a refused last word cannot end, only become longer."""

    @abstractmethod
    def refuses(self, words: list[str]) -> bool:
        """Whether the last of ``words`` (lower case, perhaps unfinished) is refused."""

    def rule(self, name: str) -> Hashable | None:
        if not name or not name[-1].isalnum():
            return None
        words = _words(name)
        return "refused" if words and self.refuses(words) else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        ends_word = self.vocabulary.where(lambda text: not text[0].isalnum() and text[0] not in PARTIAL_BYTES)
        return ends_word | self._eos_only()


class NoRepeatedWords(WordFilter):
    """No word of four letters or more occurs twice in a name."""

    def refuses(self, words: list[str]) -> bool:
        return len(words[-1]) >= _SHORTEST_COUNTED_WORD and words[-1] in words[:-1]


class BannedWords(WordFilter):
    """No such words, whatever their case or accents. Longer words may include them."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, words: Iterable[str]) -> None:
        """Takes single words; raises a ValueError for any other entry."""
        super().__init__(vocabulary, prompt_length)
        self.words = frozenset(normal_form(_single(word)) for word in words)

    def refuses(self, words: list[str]) -> bool:
        return normal_form(words[-1]) in self.words


class UnwantedWords(WordFilter):
    """Base class of filters with a `Check`: a word that cannot become acceptable leaves no token."""

    check: Check

    def rule(self, name: str) -> Hashable | None:
        verdict = type(self).check(name)
        return "dropped" if verdict and not name[-1].isalnum() else verdict

    def refuses(self, words: list[str]) -> bool:
        return type(self).check(" ".join(words)) is not None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        if rule == "dropped":
            return torch.ones(self.vocabulary.size, dtype=torch.bool)
        return super().forbidden(rule)


class NoProfanity(UnwantedWords):
    """No swear words or slurs, nor words that contain one. Needs the package better-profanity."""

    check = staticmethod(profanity_at_end)


class NoRealPlaces(UnwantedWords):
    """No countries, nations or large cities of the real world. Needs the packages countryinfo and tzdata."""

    check = staticmethod(place_at_end)


UNWANTED: dict[Check, type[UnwantedWords]] = {profanity_at_end: NoProfanity, place_at_end: NoRealPlaces}


class Alliterates(WordFilter):
    """Names of two words or more with the same first letter; case, accents and small words do not count."""

    def rule(self, name: str) -> Hashable | None:
        words = name.split()
        begins_word = not name or name.endswith(" ")
        large = [word for word in words if word.lower() not in SMALL_WORDS]
        letter = normal_form(large[0])[:1] if large else ""
        unfinished = not begins_word and words[-1].islower() and self.refuses(words)
        return letter, begins_word, unfinished, alliterates(name)

    def refuses(self, words: list[str]) -> bool:
        return words[-1].lower() not in SMALL_WORDS and not alliterates(" ".join(words), least=1)

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        letter, begins_word, unfinished, whole = cast(tuple[str, bool, bool, bool], rule)
        forbidden = self.vocabulary.where(lambda text: not self._fits(text, letter, begins_word))
        if unfinished:  # "o" may still become "of"
            forbidden |= super().forbidden(rule)
        forbidden[self.vocabulary.eos_id] = not whole
        return forbidden

    def _fits(self, text: str, letter: str, begins_word: bool) -> bool:
        """Whether all words that start in a token may be in a name whose first letter is ``letter``."""
        begun = text.split() if begins_word or text[0].isspace() else text.split()[1:]
        if not letter:
            return len({normal_form(word)[:1] for word in begun}) < 2
        starts = (normal_form(word)[:1] for word in begun)
        small = [word.islower() and any(one.startswith(word) for one in SMALL_WORDS) for word in begun]
        return all(start in (letter, "") or low for start, low in zip(starts, small, strict=True))


def _single(word: str) -> str:
    if not WORD.fullmatch(word.strip()):
        raise ValueError(f"banned word {word!r} is not a single word of letters: ban its words one by one")
    return word.strip()
