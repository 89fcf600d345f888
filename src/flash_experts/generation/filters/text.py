"""Filters on letters that a name must have, and on words: repeated, banned, swear words, places, alliteration.

Shape suffix: V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import cast

import torch

from flash_experts.data.names import normal_form, shown_form
from flash_experts.generation.filters.base import NameFilter, NameVocabulary, room
from flash_experts.generation.filters.limits import LowerLimit
from flash_experts.generation.text_rules import (
    BAD_MARKS,
    PARTIAL_BYTES,
    SMALL_WORDS,
    WORD,
    Check,
    alliterates,
    place_at_end,
    profanity_at_end,
)

_FAVOR = 4.0  # nats: the wanted letters come in about one of e^4 = 55 places where they could
_FAVOR_PER_CHARACTER = 0.5  # nats past a name's usual length, or rare letters would come too late
_USUAL_LENGTH = 12
_FORCE = 50.0  # nats: practically certain
_MUCH = 3  # letters of the wanted text
_SHORTEST_COUNTED_WORD = 4  # letters: "of the ... of the" and the "s" after apostrophes may repeat


class StartsWith(NameFilter):
    """A prefix, as given or capitalized, in the tokenizer's own cut; a token may cross its end (" Dragon", "Drag")."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, prefix: str) -> None:
        super().__init__(vocabulary, prompt_length)
        if not shown_form(prefix):
            raise ValueError("starts_with is blank: leave it out, or give the letters that names start with")
        # Text up to a token boundary within the prefix -> the tokenizer's next tokens.
        self._next: dict[str, set[int]] = {}
        self._forms = tuple(dict.fromkeys(_prefix_forms(prefix)))
        for form in self._forms:
            ids = vocabulary.encode(form.rstrip())
            for place, token in enumerate(ids):
                self._next.setdefault(vocabulary.decode(ids[:place]), set()).add(token)
            self._next.setdefault(vocabulary.decode(ids), set())  # a trailing space belongs to the next token

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


def _prefix_forms(prefix: str) -> list[str]:
    """ " " and the prefix, its last word as given and capitalized."""
    *words, last = shown_form(prefix).split()
    space = " " if prefix[-1].isspace() else ""
    lasts = [last, _capital(last)] if words else [_capital(last)]
    before = "".join(f" {word}" for word in [*map(_capital, words[:1]), *_cased(words[1:])])
    return [f"{before} {form}{space}" for form in lasts]


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _cased(words: Iterable[str]) -> list[str]:
    """Words within a name in card capitals."""
    return [word if word.lower() in SMALL_WORDS else _capital(word) for word in words]


class WantedText(LowerLimit):
    """A name cannot end before it has the wanted letters, in any case.

    Tokens that start the letters get a bias, that of the exact posterior if the letters were equally likely to follow
    every prefix (a twist function, Lew et al. 2023, "Sequential Monte Carlo steering"). Letters once started are
    completed, in time for the length limit.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, text: str, max_length: int) -> None:
        """A leading space means that the letters start a word."""
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
        # As a separate word: the part so far -> the next token. Within a word: the first token, if it has enough of
        # the text; single letters would be repeated.
        first, *others = words.split()
        ids = vocabulary.encode("".join(f" {word}" for word in _cased([first, *others])))
        self._first = [] if BAD_MARKS.match(f" {words}") else [ids[0]]  # no word starts with "!"
        self._next = {vocabulary.decode(ids[:place]): token for place, token in enumerate(ids) if place}
        within = vocabulary.encode(" ".join([first, *_cased(others)]))[0]
        is_enough = not text[0].isspace() and len(vocabulary.texts[within]) >= min(len(words), _MUCH)
        self._within = [within] if is_enough else []
        self._continues_word[self._within] = False  # such a token may follow a whole word

    @abstractmethod
    def state(self, text: str) -> int:
        """Number of wanted characters that ``text`` (lower case) ends with, all once it has them."""

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
        forbidden[self.vocabulary.eos_id] = state < len(self.text)
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
        """Tokens that start or continue the wanted text, with their biases."""
        if not self.is_short(name):
            return []
        begun = [(token, _FORCE) for part, token in self._next.items() if name.endswith(part)]
        if begun or not (name == "" or name[-1].isalpha()):
            return begun
        weight = _FAVOR + max(0, len(name) - _USUAL_LENGTH) * _FAVOR_PER_CHARACTER
        return [(token, weight) for token in [*self._first, *(self._within if name else ())]]

    def _states_after(self, state: int) -> torch.Tensor:
        """(V,) int64: the state after each token (Knuth-Morris-Pratt)."""
        if state not in self._states:
            matched = self.text[:state]
            self._states[state] = torch.tensor([self.state(matched + text.lower()) for text in self.vocabulary.texts])
        return self._states[state]

    def _overlap(self, text: str) -> int:
        return next((size for size in range(len(self.text), 0, -1) if text.endswith(self.text[:size])), 0)


class Contains(WantedText):
    """Names that have the letters anywhere."""

    def state(self, text: str) -> int:
        return len(self.text) if self.text in text else self._overlap(text)


class EndsWith(WantedText):
    """Names that end with the letters."""

    def state(self, text: str) -> int:
        return self._overlap(text)

    def favored(self, name: str) -> list[tuple[int, float]]:
        return super().favored(name) if self.is_short(name) else [(self.vocabulary.eos_id, _FAVOR)]


class LeadsTo(NameFilter):
    """A bias to the fixed text after a pattern's gaps, or the model fills a gap until only that has room."""

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, before: str, parts: Sequence[str], ends: bool
    ) -> None:
        """``before`` the first gap, ``parts`` after gaps, of which the last ``ends`` the name."""
        super().__init__(vocabulary, prompt_length)
        self._last = len(parts) - 1 if ends else len(parts)
        self._before = len(before) + 1  # with the space that a name starts with
        self._parts = [part.lower() for part in parts]
        self._spaced_V = vocabulary.where(lambda text: text.startswith(" "))
        self._next: list[dict[str, int]] = []  # for each part: what there is of it -> its next token
        for part in parts:
            first, *words = part.rstrip().split(" ")
            ids = vocabulary.encode(" ".join([first, *_cased(words)]))
            self._next.append({vocabulary.decode(ids[:place]): token for place, token in enumerate(ids)})

    def rule(self, name: str) -> Hashable | None:
        return None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return torch.zeros(self.vocabulary.size, dtype=torch.bool)

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        found = [(row, *bias) for row, name in enumerate(names) if (bias := self._favored(name)) is not None]
        if not found:
            return scores
        scores = scores.clone()
        for row, tokens, weight in found:
            scores[row, tokens] += weight
        return scores

    def _favored(self, name: str) -> tuple[int | torch.Tensor, float] | None:
        """Tokens of the next fixed text, one or (V,) bool, and their bias; None where it cannot start."""
        low, start = name.lower(), self._before
        for number, (part, following) in enumerate(zip(self._parts, self._next, strict=True)):
            place, gap, is_last = low.find(part, start + 1), name[start:], number == self._last
            if low.endswith(part.rstrip()) and len(gap) > len(part.rstrip()) and (is_last or part[-1] == " "):
                return (self.vocabulary.eos_id, _FAVOR) if is_last else (self._spaced_V, _FORCE)
            if place >= 0 and not is_last:
                start = place + len(part)
                continue
            begun = [token for text, token in following.items() if text and gap.endswith(text) and gap != text]
            if begun:
                return begun[-1], _FORCE
            if len(gap.strip()) < _MUCH or not gap[-1].isalpha():
                return None
            late = max(0, len(name) + len(part) - _USUAL_LENGTH)
            return following[""], _FAVOR + late * _FAVOR_PER_CHARACTER
        return None


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
    """No word of four letters or more twice."""

    def refuses(self, words: list[str]) -> bool:
        return len(words[-1]) >= _SHORTEST_COUNTED_WORD and words[-1] in words[:-1]


class BannedWords(WordFilter):
    """No such words, in any case. Longer words may include them."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, words: Iterable[str]) -> None:
        super().__init__(vocabulary, prompt_length)
        self.words = frozenset(normal_form(_single(word)) for word in words)

    def refuses(self, words: list[str]) -> bool:
        return normal_form(words[-1]) in self.words


class UnwantedWords(WordFilter):
    """Words that a `Check` refuses; one that cannot become acceptable leaves no token."""

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
    """No words with a swear word or slur in them; needs the package better-profanity."""

    check = staticmethod(profanity_at_end)


class NoRealPlaces(UnwantedWords):
    """No countries, nations or large cities; needs the packages countryinfo and tzdata."""

    check = staticmethod(place_at_end)


UNWANTED: dict[Check, type[UnwantedWords]] = {profanity_at_end: NoProfanity, place_at_end: NoRealPlaces}


class Alliterates(WordFilter):
    """All words start with the same letter; case, accents and small words do not count."""

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
        """Whether all words that start in a token may follow ``letter``."""
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
