"""Filters on the length of names, in characters and words.

A plain mask distorts names ("Raiderirefur", "Goblin Gui"), so at a limit these filters look at what the model prefers.

Shape suffixes: B batch rows, N of them near a limit, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import cast

import torch

from flash_experts.generation.filters.base import NameFilter, NameVocabulary, room
from flash_experts.generation.text_rules import PARTIAL_BYTES, SMALL_WORDS
from flash_experts.options import at_least

_SHORTEST_NEW_WORD = 2  # letters: a new word needs room for this many
_NEAR = 16  # characters before the limit within which a word may no longer fit
_MIN_LOG_SHARE = math.log(0.5)  # log of the probability mass that a limit must leave to the model


class UpperLimit(NameFilter):
    """Leaves a name no token if more than half of the model's probability is on forbidden ones: it would be cut.

    ``model.generate`` cannot drop names, so there it ends.
    """

    @abstractmethod
    def is_near(self, name: str) -> bool:
        """Whether the limit may cut the name here."""

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(names, scores)
        near = [row for row, name in enumerate(names) if self.is_near(name)]
        if masked is scores or not near:
            return masked
        near_N = torch.tensor(near, device=scores.device)
        kept_N = masked[near_N].logsumexp(dim=-1) - scores[near_N].logsumexp(dim=-1)
        return masked.index_fill_(0, near_N[kept_N < _MIN_LOG_SHARE], -torch.inf)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(self.vocabulary.names(input_ids, self.prompt_length), scores)
        return self._checked(input_ids, scores, masked)


class MaxLength(UpperLimit):
    """At most ``limit`` characters; no word is cut, or starts where only one letter has room."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int, drops: bool = True) -> None:
        """``drops``: whether names that would be cut are dropped instead of ended."""
        super().__init__(vocabulary, prompt_length)
        self.drops = drops
        self.limit = at_least("max_length", limit, 1, "a name has one character or more")
        self._longest_token = int(vocabulary.lengths.max())
        self._begins_word = vocabulary.where(lambda text: text[0] == " ")

    def rule(self, name: str) -> Hashable | None:
        left = room(self.limit, name)
        return None if left >= self._longest_token + _SHORTEST_NEW_WORD else (left, name == "")

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        left, is_first = cast(tuple[int, bool], rule)
        too_long = self.vocabulary.lengths > left
        return too_long if is_first or left >= 1 + _SHORTEST_NEW_WORD else too_long | self._begins_word

    def is_near(self, name: str) -> bool:
        return self.drops and room(self.limit, name) < _NEAR and name[-1:].isalnum()


class MaxWords(UpperLimit):
    """At most ``limit`` words; the last one allowed cannot be a small word ("of")."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int) -> None:
        super().__init__(vocabulary, prompt_length)
        self.limit = at_least("max_words", limit, 1, "a name has one word or more")
        self._most_words_of_token = max(len(text.split()) for text in vocabulary.texts)

    def rule(self, name: str) -> Hashable | None:
        left = self.limit - len(name.split())
        return None if left > self._most_words_of_token else (left, not name or name.endswith(" "))

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        left, at_word_start = cast(tuple[int, bool], rule)

        def too_many(text: str) -> bool:
            begun = len(text.split()) - (not at_word_start and not text[0].isspace())
            if left == 1 and begun == 1 and text.strip() in SMALL_WORDS:  # lower case only: " An" may become "Angel"
                return True
            return begun > left or (left == begun and text[-1].isspace())

        return self.vocabulary.where(too_many)

    def is_near(self, name: str) -> bool:
        return len(name.split()) == self.limit and name[-1].isalnum()


class LowerLimit(NameFilter):
    """A name cannot end yet; where the model would end it, a new word starts."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int) -> None:
        super().__init__(vocabulary, prompt_length)
        self._continues_word = vocabulary.where(lambda text: text[0].isalnum() or text[0] in "-'" + PARTIAL_BYTES)

    @abstractmethod
    def is_short(self, name: str) -> bool:
        """Whether the name must not end yet."""

    def rule(self, name: str) -> Hashable | None:
        return "too short" if self.is_short(name) else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return self._eos_only()

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(names, scores)
        short = [name[-1:].isalnum() and self.is_short(name) for name in names]
        if any(short):
            is_whole_B = torch.tensor(short, device=scores.device)
            is_whole_B &= scores[:, self.vocabulary.eos_id] == scores.amax(dim=-1)
            rows = is_whole_B.nonzero()[:, 0]
            if len(rows):
                ended = masked[rows].masked_fill(self._continues_word.to(scores.device), -torch.inf)
                is_possible = (ended > -torch.inf).any(dim=-1)  # without room for another word, this one continues
                masked[rows[is_possible]] = ended[is_possible]
        return masked


class MinLength(LowerLimit):
    """At least ``least`` characters."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, least: int) -> None:
        super().__init__(vocabulary, prompt_length)
        self.least = at_least("min_length", least, 1, "leave it out for none")

    def is_short(self, name: str) -> bool:
        return len(name.strip()) < self.least


class MinWords(LowerLimit):
    """At least ``least`` words."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, least: int) -> None:
        super().__init__(vocabulary, prompt_length)
        self.least = at_least("min_words", least, 1, "a name has one word or more")

    def is_short(self, name: str) -> bool:
        return len(name.split()) < self.least
