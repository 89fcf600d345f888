"""Filters on how long a name is, in characters and words. See `flash_experts.generation.filters` for the idea.

A hard limit bends names: where a model wants the end and must not have it, it goes on with the word instead
("Raiderirefur"); where it wants more letters or words than there is room for, it stops short ("Goblin Gui",
"Lord of"). So these filters ask the model, at the limit, which of three things it wants: to go on with the word, to
begin another, or to end the name.

Letters in the shapes: B rows, N of them near a limit, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import cast

import torch

from flash_experts.generation.filters import PARTIAL_BYTES, NameFilter, at_least, room
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.vocabulary import NameVocabulary

_SHORTEST_NEW_WORD = 2  # letters that must fit, or no new word is begun
_NEAR = 16  # characters before the limit from which on a word may not fit any more
_KEPT = math.log(0.5)  # log of the share of the model's probability that a limit must leave


class _Limit(NameFilter):
    """Base: knows the tokens that go on with a word."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int) -> None:
        super().__init__(vocabulary, prompt_length)
        self._goes_on = vocabulary.where(lambda text: text[0].isalnum() or text[0] in "-'" + PARTIAL_BYTES)


class UpperLimit(_Limit):
    """Base of upper limits: drops the names that would be cut.

    A name is cut where more than half of the model's probability is on tokens that the limit forbids. `mask`
    leaves such a row no token, so that `NameGenerator` drops it and tries another; ``model.generate`` cannot drop
    a row, so there the name ends where it is.
    """

    @abstractmethod
    def is_near(self, name: str) -> bool:
        """Whether the limit may cut the name now."""

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(names, scores)
        near = [row for row, name in enumerate(names) if self.is_near(name)]
        if masked is scores or not near:
            return masked
        near_N = torch.tensor(near, device=scores.device)
        kept_N = masked[near_N].logsumexp(dim=-1) - scores[near_N].logsumexp(dim=-1)
        return masked.index_fill_(0, near_N[kept_N < _KEPT], -torch.inf)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(self.vocabulary.names(input_ids, self.prompt_length), scores)
        return self._checked(input_ids, scores, masked)


class MaxLength(UpperLimit):
    """At most so many characters, and no word cut short to keep to it.

    At the limit only the end is left, and no new word is begun where fewer than two letters of it would fit.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int, drops: bool = True) -> None:
        """Stores the limit.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            limit: characters at most.
            drops: whether names that would be cut are dropped; if not, they end where they are.

        Raises:
            ValueError: the limit is under 1.
        """
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
    """At most so many words, counted by spaces ("Lava-Axe" is one), and no name cut short to keep to it.

    At the limit only tokens that go on with the last word are left, and the end. A small word ("of") may not
    be the last one allowed, since a name must not end on it.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, limit: int) -> None:
        """Stores the limit.

        Raises:
            ValueError: the limit is under 1.
        """
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
            if left == 1 and begun == 1 and text.strip() in SMALL_WORDS:  # low: " An" may become "Angel"
                return True
            return begun > left or (left == begun and text[-1].isspace())

        return self.vocabulary.where(too_many)

    def is_near(self, name: str) -> bool:
        return len(name.split()) == self.limit and name[-1].isalnum()


class LowerLimit(_Limit):
    """Base of lower limits: until then a name cannot end.

    Where the end is what the model finds likeliest, the word is whole: another has to be begun.
    """

    @abstractmethod
    def is_short(self, name: str) -> bool:
        """Whether the name must not end yet."""

    def rule(self, name: str) -> Hashable | None:
        return "too short" if self.is_short(name) else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return self._end()

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(names, scores)
        short = [name[-1:].isalnum() and self.is_short(name) for name in names]
        if any(short):
            is_whole_B = torch.tensor(short, device=scores.device)
            is_whole_B &= scores[:, self.vocabulary.end_id] == scores.amax(dim=-1)
            rows = is_whole_B.nonzero()[:, 0]
            if len(rows):
                ended = masked[rows].masked_fill(self._goes_on.to(scores.device), -torch.inf)
                is_possible = (ended > -torch.inf).any(dim=-1)  # no room for another word: the word goes on after all
                masked[rows[is_possible]] = ended[is_possible]
        return masked


class MinLength(LowerLimit):
    """At least so many characters."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, least: int) -> None:
        """Stores the limit.

        Raises:
            ValueError: it is under 1.
        """
        super().__init__(vocabulary, prompt_length)
        self.least = at_least("min_length", least, 1, "leave it out for none")

    def is_short(self, name: str) -> bool:
        return len(name.strip()) < self.least


class MinWords(LowerLimit):
    """At least so many words, counted by spaces."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, least: int) -> None:
        """Stores the limit.

        Raises:
            ValueError: it is under 1.
        """
        super().__init__(vocabulary, prompt_length)
        self.least = at_least("min_words", least, 1, "a name has one word or more")

    def is_short(self, name: str) -> bool:
        return len(name.split()) < self.least
