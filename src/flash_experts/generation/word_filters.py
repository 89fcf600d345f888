"""Filters on words and lengths. See `flash_experts.generation.filters` for what a filter is."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Hashable, Iterable
from typing import cast

import torch

from flash_experts.data.names import normal_form
from flash_experts.generation.filters import PARTIAL_BYTES, NameFilter
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.vocabulary import NameVocabulary

_WORD = re.compile(r"[^\W_]+")
_SHORTEST_COUNTED_WORD = 4  # "of the ... of the" and the "s" after apostrophes may come twice
_SHORTEST_NEW_WORD = 2  # letters that must fit, or no new word is begun


class MaxWords(NameFilter):
    """At most so many words, counted by spaces ("Lava-Axe" is one).

    At the limit only tokens that go on with the last word are left, and the end. A small word ("of") may not
    be the last one allowed, since a name must not end on it.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int) -> None:
        """Stores the limit.

        Raises:
            ValueError: the limit is under 1.
        """
        super().__init__(vocabulary, prompt_length)
        if limit < 1:
            raise ValueError(f"max_words is {limit}: a name has one word or more")
        self.limit = limit
        self._most_words_of_token = max(len(text.split()) for text in vocabulary.texts)

    def rule(self, name: str) -> Hashable | None:
        left = self.limit - len(name.split())
        return None if left > self._most_words_of_token else (left, not name or name.endswith(" "))

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        left, at_word_start = cast(tuple[int, bool], rule)

        def too_many(text: str) -> bool:
            begun = len(text.split()) - (not at_word_start and not text[0].isspace())
            if left == 1 and begun == 1 and text.strip() in SMALL_WORDS:  # low: " An" may become "Angel"
                return True
            return begun > left or (left == begun and text[-1].isspace())

        return self.vocabulary.where(too_many)


class MaxLength(NameFilter):
    """At most so many characters; at the limit only the end is left.

    No new word is begun where fewer than two letters of it would fit.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int) -> None:
        """Stores the limit.

        Raises:
            ValueError: the limit is under 1.
        """
        super().__init__(vocabulary, prompt_length)
        if limit < 1:
            raise ValueError(f"max_length is {limit}: a name has one character or more")
        self.limit = limit
        self._longest_token = max(map(len, vocabulary.texts))

    def rule(self, name: str) -> Hashable | None:
        left = self.limit + 1 - len(name)  # the leading space does not count
        return None if left >= self._longest_token + _SHORTEST_NEW_WORD else (left, name == "")

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        left, is_first = cast(tuple[int, bool], rule)

        def too_long(text: str) -> bool:
            if len(text) > left:
                return True
            return not is_first and text[0] == " " and left < 1 + _SHORTEST_NEW_WORD

        return self.vocabulary.where(too_long)


class WordFilter(NameFilter):
    """Base of filters that refuse words: while the last word is refused, it cannot end, only go on."""

    @abstractmethod
    def refuses(self, words: list[str]) -> bool:
        """Whether the last of ``words`` (lower case, the last perhaps unfinished) must not stand."""

    def rule(self, name: str) -> Hashable | None:
        words = _WORD.findall(name.casefold())
        return "refused" if words and name[-1].isalnum() and self.refuses(words) else None

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


def _single(word: str) -> str:
    if not _WORD.fullmatch(word.strip()):
        raise ValueError(f"banned word {word!r} is not a single word of letters: ban its words one by one")
    return word.strip()
