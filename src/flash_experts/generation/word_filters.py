"""Filters on words. See `flash_experts.generation.filters` for what a filter is."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import cast

import torch

from flash_experts.data.names import normal_form
from flash_experts.generation.filters import PARTIAL_BYTES, NameFilter
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.unwanted_words import Judge, place_at_end, profanity_at_end
from flash_experts.generation.vocabulary import NameVocabulary

_WORD = re.compile(r"[^\W_]+")
_SHORTEST_COUNTED_WORD = 4  # "of the ... of the" and the "s" after apostrophes may come twice


@lru_cache(maxsize=1024)  # several filters ask for the words of the same rows
def _words(name: str) -> list[str]:
    return _WORD.findall(name.casefold())


class WordFilter(NameFilter):
    """Base of filters that refuse words: while the last word is refused, it cannot end, only go on."""

    @abstractmethod
    def refuses(self, words: list[str]) -> bool:
        """Whether the last of ``words`` (lower case, the last perhaps unfinished) must not stand."""

    def rule(self, name: str) -> Hashable | None:
        if not name or not name[-1].isalnum():
            return None
        words = _words(name)
        return "refused" if words and self.refuses(words) else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        ends_word = self.vocabulary.where(lambda text: not text[0].isalnum() and text[0] not in PARTIAL_BYTES)
        return ends_word | self._end()


class NoRepeatedWords(WordFilter):
    """No word of four letters or more twice in a name."""

    def refuses(self, words: list[str]) -> bool:
        return len(words[-1]) >= _SHORTEST_COUNTED_WORD and words[-1] in words[:-1]


class BannedWords(WordFilter):
    """Words that must not be in a name, whatever their case or accents; longer words around them may be."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, words: Iterable[str]) -> None:
        """Stores the words.

        Raises:
            ValueError: one of them is not a single word.
        """
        super().__init__(vocabulary, prompt_length)
        self.words = frozenset(normal_form(_single(word)) for word in words)

    def refuses(self, words: list[str]) -> bool:
        return normal_form(words[-1]) in self.words


class UnwantedWords(WordFilter):
    """Base of filters whose judge looks at the end of a name: a word that cannot be accepted leaves no token at all."""

    judge: Judge

    def rule(self, name: str) -> Hashable | None:
        verdict = type(self).judge(name)
        return "dropped" if verdict and not name[-1].isalnum() else verdict

    def refuses(self, words: list[str]) -> bool:
        return type(self).judge(" ".join(words)) is not None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        if rule == "dropped":
            return torch.ones(self.vocabulary.size, dtype=torch.bool)
        return super().forbidden(rule)


class NoProfanity(UnwantedWords):
    """No swear words or slurs, nor words that have one inside; needs the package better-profanity."""

    judge = staticmethod(profanity_at_end)


class NoRealPlaces(UnwantedWords):
    """No countries, nations or large cities of the real world; needs the packages countryinfo and tzdata."""

    judge = staticmethod(place_at_end)


class Alliterates(WordFilter):
    """Names of two words or more that all begin with one letter, small words ("of", "the") left aside.

    Accents and case do not matter: "Elvish Éminence" alliterates.
    """

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
        forbidden[self.vocabulary.end_id] = not whole
        return forbidden

    def _fits(self, text: str, letter: str, begins_word: bool) -> bool:
        """Whether all words that begin in a token may stand in a name whose first letter is ``letter``."""
        begun = text.split() if begins_word or text[0].isspace() else text.split()[1:]
        if not letter:
            return len({normal_form(word)[:1] for word in begun}) < 2
        starts = (normal_form(word)[:1] for word in begun)
        small = [word.islower() and any(one.startswith(word) for one in SMALL_WORDS) for word in begun]
        return all(start in (letter, "") or low for start, low in zip(starts, small, strict=True))


def alliterates(text: str, least: int = 2) -> bool:
    """Whether the words of a text, small ones aside, begin with one letter, and are ``least`` or more."""
    forms = [normal_form(word) for word in text.split() if word.lower() not in SMALL_WORDS]
    return len(forms) >= least and len({form[:1] for form in forms}) == 1 and all(forms)


def words_of(text: str) -> list[str]:
    """The words of a text as `BannedWords` compares them: runs of letters and digits, in normal form."""
    return [normal_form(word) for word in _WORD.findall(text)]


def _single(word: str) -> str:
    if not _WORD.fullmatch(word.strip()):
        raise ValueError(f"banned word {word!r} is not a single word of letters: ban its words one by one")
    return word.strip()
