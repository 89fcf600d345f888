"""Filters on the letters of a name: what it begins with, contains, ends with.

See `flash_experts.generation.filters` for what a filter is. Letters in the shapes: B rows, V tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import cast

import torch

from flash_experts.data.names import shown_form
from flash_experts.generation.filters import NameFilter, room
from flash_experts.generation.formatting import SMALL_WORDS
from flash_experts.generation.limit_filters import LowerLimit
from flash_experts.generation.vocabulary import NameVocabulary

_FAVOR = 4.0  # nats: the wanted letters are in about one of e^4 = 55 places where a model could say them
_FAVOR_PER_CHARACTER = 0.5  # more of them after a name's usual length, or rare letters would come too late
_USUAL_LENGTH = 12
_FORCE = 50.0  # nats: nothing else comes
_MUCH = 3  # letters


class StartsWith(NameFilter):
    """Names that begin with a prefix, also where a token straddles its end (" Dragon" fits "Drag").

    Within the prefix only the tokens that the tokenizer itself would choose are allowed. Otherwise the mask
    would favor odd cuts: after " D" every name with a D contributes, though the model saw " Dragon" as one
    token and knows nothing of "ragon" after " D". The price: of the names that go on within the prefix's last
    word, those that are cut elsewhere inside the prefix are not reached. The last word is tried as given and
    capitalized.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, prefix: str) -> None:
        """Works out the ways through the prefix.

        Raises:
            ValueError: the prefix is blank.
        """
        super().__init__(vocabulary, prompt_length)
        if not prefix.strip():
            raise ValueError("starts_with is blank: leave it out, or give the letters that names begin with")
        # Text at a boundary of the tokenizer within the prefix -> tokens that it would put there.
        self._next: dict[str, set[int]] = {}
        self._forms = tuple(dict.fromkeys(_prefix_forms(prefix)))
        for form in self._forms:
            self._add_way(form)

    def rule(self, name: str) -> Hashable | None:
        return None if any(name.startswith(form) for form in self._forms) else name

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        name = cast(str, rule)
        allowed = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        if name in self._next:
            allowed[list(self._next[name])] = True
            rests = tuple(form[len(name) :] for form in self._forms if form.startswith(name))
            allowed |= self.vocabulary.where(lambda text: text.startswith(rests))
        return ~allowed

    def _add_way(self, form: str) -> None:
        ids = self.vocabulary.encode(form.rstrip())
        for place, token in enumerate(ids):
            self._next.setdefault(self.vocabulary.decode(ids[:place]), set()).add(token)
        if self.vocabulary.decode(ids) != form:  # a trailing space: the next token brings it with its word
            self._next.setdefault(self.vocabulary.decode(ids), set())


def _prefix_forms(prefix: str) -> list[str]:
    """The texts that a name may begin with: " " and the prefix, its last word as it is and capitalized."""
    words = shown_form(prefix).split()
    words = [
        word if place and word.lower() in SMALL_WORDS else word[0].upper() + word[1:]
        for place, word in enumerate(words[:-1])
    ] + words[-1:]
    space = " " if prefix[-1].isspace() else ""
    last = words[-1]
    capital = last[0].upper() + last[1:]
    lasts = [capital] if len(words) == 1 else [last, capital]
    return [" " + " ".join([*words[:-1], form]) + space for form in lasts]


class WantedText(LowerLimit):
    """Base of `Contains` and `EndsWith`: a name cannot end before it has the wanted letters.

    Two things keep that from spoiling names. Tokens that begin the letters, as the tokenizer itself cuts them,
    are *favored* by some nats: a model that is only kept from ending would ramble until it happens to say them.
    The weight is that of the exact posterior if the letters were equally likely to come later from everywhere
    (Lew et al. 2023, "Sequential Monte Carlo steering", call it a twist). A word so begun is finished with
    them. And near the length limit only tokens are left after which the rest of the letters still fits.

    Letters count whatever their case.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, text: str, max_length: int) -> None:
        """Works out how the tokenizer would say the text.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            text: the letters, with a space before them if they must begin a word.
            max_length: characters that a name has at most.

        Raises:
            ValueError: the text is blank, or longer than a name.
        """
        super().__init__(vocabulary, prompt_length)
        words = shown_form(text)
        if not words:
            raise ValueError(f"{type(self).__name__}: the text is blank: leave it out, or give letters")
        self.text = (" " if text[0].isspace() else "") + words.lower()
        if len(self.text) > max_length:
            raise ValueError(f"{words!r} has {len(self.text)} characters, more than max_length {max_length}")
        self.limit = max_length
        self._longest_token = int(vocabulary.lengths.max())
        self._states: dict[int, torch.Tensor] = {}
        # As a word of its own: what was said of it -> the next token. Within a word: a token to begin with, if
        # it says much of the text; single letters would be said again and again.
        start, *within = _forms_within(words, text[0].isspace())
        ids = vocabulary.encode(start)
        self._first = ids[0]
        self._next = {vocabulary.decode(ids[:place]): token for place, token in enumerate(ids) if place}
        self._within = [vocabulary.encode(form)[0] for form in within]
        self._within = [one for one in self._within if len(vocabulary.texts[one]) >= min(len(words), _MUCH)]
        self._goes_on[self._within] = False  # such a token may follow a whole word

    @abstractmethod
    def state(self, text: str) -> int:
        """Characters of the wanted text that stand at the end of ``text`` (lower case), or all if it is there."""

    def is_short(self, name: str) -> bool:
        return self.state(name.lower()) < len(self.text)

    def rule(self, name: str) -> Hashable | None:
        state = self.state(name.lower())
        left = room(self.limit, name)
        is_tight = left < len(self.text) + self._longest_token
        return None if state == len(self.text) and not is_tight else (state, left if is_tight else -1)

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        state, left = cast(tuple[int, int], rule)
        if left < 0:
            forbidden = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        else:
            forbidden = self.vocabulary.lengths + len(self.text) - self._states_after(state) > left
        forbidden[self.vocabulary.end_id] = state < len(self.text)
        return forbidden

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        masked = super().apply(names, scores)
        rows, tokens, weights = [], [], []
        for row, name in enumerate(names):
            for token, weight in self.favored(name):
                rows.append(row)
                tokens.append(token)
                weights.append(weight)
        if not rows:
            return masked
        places = torch.tensor([rows, tokens], device=scores.device)
        values = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
        masked = masked.clone() if masked is scores else masked
        return masked.index_put_((places[0], places[1]), values, accumulate=True)

    def favored(self, name: str) -> list[tuple[int, float]]:
        """Tokens that begin or go on with the wanted text after ``name``, each with its weight in nats."""
        if not self.is_short(name):
            return []
        begun = [(token, _FORCE) for said, token in self._next.items() if name.endswith(said)]
        if begun or not (name == "" or name[-1].isalpha()):
            return begun
        weight = _FAVOR + max(0, len(name) - _USUAL_LENGTH) * _FAVOR_PER_CHARACTER
        return [(token, weight) for token in [self._first, *(self._within if name else ())]]

    def _states_after(self, state: int) -> torch.Tensor:
        """(V,) int64: the state after each token, which the letters said so far decide (Knuth, Morris, Pratt)."""
        if state not in self._states:
            said = self.text[:state]
            self._states[state] = torch.tensor([self.state(said + text.lower()) for text in self.vocabulary.texts])
        return self._states[state]

    def _overlap(self, text: str) -> int:
        return next((size for size in range(len(self.text), 0, -1) if text.endswith(self.text[:size])), 0)


class Contains(WantedText):
    """Names that have the letters somewhere, at a word's start or within one."""

    def state(self, text: str) -> int:
        return len(self.text) if self.text in text else self._overlap(text)


class EndsWith(WantedText):
    """Names whose last letters are these, a word of their own or the end of one."""

    def state(self, text: str) -> int:
        return self._overlap(text)

    def favored(self, name: str) -> list[tuple[int, float]]:
        return super().favored(name) if self.is_short(name) else [(self.vocabulary.end_id, _FAVOR)]


def _forms_within(words: str, begins_word: bool) -> list[str]:
    """The wanted text as cards write it: as words of their own, and as the rest of a word."""
    cased = [word if word in SMALL_WORDS else word[0].upper() + word[1:] for word in words.split()]
    start = " " + " ".join(cased)
    return [start] if begins_word else [start, " ".join([words.split()[0], *cased[1:]])]
