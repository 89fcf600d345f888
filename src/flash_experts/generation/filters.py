"""Token filters: which tokens may come next in a name.

Each filter is a transformers ``LogitsProcessor``, so it also serves in plain
``model.generate(logits_processor=[...])``. A filter looks at the *text* so far, never at token ids: one text
has many tokenizations, and a list of forbidden ids is escaped by all but one of them.

To write your own, say in which state a name is and what that state forbids::

    class NoLetter(NameFilter):                                       # no "e" before the second word
        def rule(self, name): return "no e" if len(name.split()) < 2 else None
        def forbidden(self, rule): return self.vocabulary.where(lambda text: "e" in text)

``rule`` is asked once a row and step, so keep it cheap; ``forbidden`` once a distinct rule, and remembered.

Letters in the shapes: B rows, T tokens of a row (prompt and name), V tokens of the vocabulary.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable
from typing import cast

import torch
from transformers import LogitsProcessor

from flash_experts.data.names import normal_form, shown_form
from flash_experts.generation.formatting import DANGLING_WORDS, SMALL_WORDS
from flash_experts.generation.vocabulary import NameVocabulary

# Letters of real cards and the marks that hold names together. Digits, "&", "." and quotes are on some cards,
# most of them of other franchises; pass your own alphabet to have them.
CARD_ALPHABET = frozenset(string.ascii_letters + " ,'-:!?" + "áàâäéèêëíîïñóôöúûüÁÂÄÉÍÎÓÖÚÛÜ")
# Bytes that do not complete a character yet, as `NameVocabulary` shows them.
PARTIAL_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))


class NoTokenLeftError(ValueError):
    """A filter forbids every token: constraints contradict each other, or a name ran into a dead end."""


class NameFilter(LogitsProcessor, ABC):
    """Base of the filters: rows in the same state share one mask over the vocabulary."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int) -> None:
        """Stores what every filter needs.

        Args:
            vocabulary: the texts of the tokens.
            prompt_length: tokens before the name in every row, the begin symbol counts. For
                ``model.generate`` it is ``input_ids.shape[1]`` of what you pass.
        """
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length
        self._masks: dict[Hashable, torch.Tensor] = {}

    @abstractmethod
    def rule(self, name: str) -> Hashable | None:
        """The state that decides what may follow ``name`` (its text so far, from its leading space on).

        Returns:
            None if anything may follow, else a key for `forbidden`.
        """

    @abstractmethod
    def forbidden(self, rule: Hashable) -> torch.Tensor:
        """(V,) bool on the CPU: tokens that must not follow in that state."""

    def mask(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` with forbidden tokens at minus infinity. A row may be left without any token.

        Args:
            input_ids: (B, T) int64, prompt and name so far.
            scores: (B, V) logits; never changed in place.

        Returns:
            (B, V).

        Raises:
            ValueError: V is not the vocabulary's size.
        """
        if scores.shape[-1] != self.vocabulary.size:
            raise ValueError(
                f"scores are {scores.shape[-1]} wide but the vocabulary {self.vocabulary.size}: build it "
                "with NameVocabulary(tokenizer, model.config.vocab_size)"
            )
        rules = [self.rule(name) for name in self.vocabulary.names(input_ids, self.prompt_length)]
        places = {rule: place for place, rule in enumerate(dict.fromkeys(rules))}
        if places.keys() == {None}:
            return scores
        table_RV = torch.stack([self._mask_of(rule, scores.device) for rule in places])
        if len(places) == 1:
            return scores.masked_fill(table_RV, float("-inf"))
        place_B = torch.tensor([places[rule] for rule in rules], device=scores.device)
        return scores.masked_fill(table_RV[place_B], float("-inf"))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, for ``model.generate``, which makes NaN of a row without a token.

        Raises:
            NoTokenLeftError: no token is left for some row.
        """
        masked = self.mask(input_ids, scores)
        if masked is not scores:
            dead_B = (masked == float("-inf")).all(dim=-1)
            if dead_B.any():
                row = int(dead_B.nonzero()[0, 0])
                name = self.vocabulary.names(input_ids[row : row + 1], self.prompt_length)[0].strip()
                raise NoTokenLeftError(
                    f"{type(self).__name__} leaves no token after {name!r}: loosen the constraints, or use "
                    "NameGenerator, which drops such names and tries others"
                )
        return masked

    def _mask_of(self, rule: Hashable | None, device: torch.device) -> torch.Tensor:
        if rule not in self._masks:
            size = self.vocabulary.size
            mask = torch.zeros(size, dtype=torch.bool) if rule is None else self.forbidden(rule)
            self._masks[rule] = mask
        mask = self._masks[rule] = self._masks[rule].to(device)
        return mask

    def _end(self) -> torch.Tensor:
        """(V,) bool: the end symbol alone."""
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        mask[self.vocabulary.end_id] = True
        return mask


class KnownNameFilter(NameFilter):
    """Novelty by construction: a name that is a known card cannot end, it has to go on.

    What counts is the normal form of the text, so neither another tokenization, nor case, accents or
    punctuation let a known name through. Only the end symbol is ever forbidden: names that begin as a known
    one stay possible.
    """

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, known: Collection[str]) -> None:
        """Stores the known names.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            known: *normal forms* (`flash_experts.data.names.normal_form`), a set or frozenset for speed.
        """
        super().__init__(vocabulary, prompt_length)
        self.known = known

    def rule(self, name: str) -> Hashable | None:
        return "known" if normal_form(name) in self.known else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return self._end()


class AllowedCharacters(NameFilter):
    """Only characters of an alphabet, and no special token but the end.

    The state is the bytes of a character that is not complete yet, nearly always none: one mask then serves
    all rows.
    """

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, alphabet: Collection[str] = CARD_ALPHABET
    ) -> None:
        super().__init__(vocabulary, prompt_length)
        self.alphabet = frozenset(alphabet)
        # Beginnings of the alphabet's characters in UTF-8: the only bytes that may wait for more.
        encoded = [character.encode() for character in self.alphabet]
        self._hanging = {code[:cut] for code in encoded for cut in range(1, len(code))}

    def rule(self, name: str) -> Hashable | None:
        return name[len(name.rstrip(PARTIAL_BYTES)) :]

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        pending = cast(str, rule).encode("utf-8", "surrogateescape")
        forbidden = ~self.vocabulary.where(lambda text: self._fits(pending, text))
        forbidden[self.vocabulary.end_id] = pending != b""
        return forbidden

    def _fits(self, pending: bytes, text: str) -> bool:
        joined = (pending + text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
        whole = joined.rstrip(PARTIAL_BYTES)
        tail = joined[len(whole) :].encode("utf-8", "surrogateescape")
        return self.alphabet.issuperset(whole) and (not tail or tail in self._hanging)


class WellFormed(NameFilter):
    """Spaces and marks as in names: one space before each word, none at the end, no loose marks.

    A name must not end on a space, on a mark that calls for more, or on a word such as "of".
    """

    _BAD = re.compile(rf" [ ,:;!?.\-]|[,:;][^ ]|-[^\w{PARTIAL_BYTES}]|''|[!?][\w']")
    _OPEN_END = " ,:;-'&"

    def rule(self, name: str) -> Hashable | None:
        if not name:
            return "", False
        tail = "a" if name[-1].isalnum() else name[-1]
        return tail, name.rpartition(" ")[2].lower() in DANGLING_WORDS

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        tail, dangling = cast(tuple[str, bool], rule)
        if tail == "":
            forbidden = ~self.vocabulary.where(
                lambda text: text[0] == " " and text[1:2] != "'" and not self._BAD.search(text)
            )
        else:
            forbidden = self.vocabulary.where(lambda text: self._BAD.search(tail + text) is not None)
        forbidden[self.vocabulary.end_id] = dangling or tail == "" or tail in self._OPEN_END
        return forbidden


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
