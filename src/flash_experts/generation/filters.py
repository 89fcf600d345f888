"""Token filters: which tokens may come next in a name.

Each filter is a transformers ``LogitsProcessor``, so it also serves in plain
``model.generate(logits_processor=[...])``. A filter looks at the *text* so far, never at token ids: one text
has many tokenizations, and a list of forbidden ids is escaped by all but one of them.

To write your own, say in which state a name is and what that state forbids::

    class NoLetter(NameFilter):                                       # no "e" before the second word
        def rule(self, name): return "no e" if len(name.split()) < 2 else None
        def forbidden(self, rule): return self.vocabulary.where(lambda text: "e" in text)

Hand the class to ``NameGenerator.generate(filters=[NoLetter])``; examples/extending/custom_filter.py runs two.
``rule`` is asked once a row and step, so keep it cheap; ``forbidden`` once a distinct rule, and remembered.

Letters in the shapes: B rows, T tokens of a row (prompt and name), V tokens of the vocabulary.
"""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from typing import cast

import torch
from transformers import LogitsProcessor

from flash_experts.data.names import normal_form
from flash_experts.generation.formatting import DANGLING_WORDS
from flash_experts.generation.vocabulary import NameVocabulary

# Letters of real cards and the marks that hold names together. Digits, "&", "." and quotes are on some cards,
# most of them of other franchises; pass your own alphabet to have them. Each letter has its capital, because a name is
# written with capitals in the end.
_ACCENTED = "áàâäéèêëíîïñóôöúûü"
CARD_ALPHABET = frozenset(string.ascii_letters + " ,'-:!?" + _ACCENTED + _ACCENTED.upper())
# Bytes that do not complete a character yet, as `NameVocabulary` shows them.
PARTIAL_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))
_REMEMBERED_BYTES = 32 << 20  # masks that a filter keeps at most


class NoTokenLeftError(ValueError):
    """A filter forbids every token: constraints contradict each other, or a name ran into a dead end."""


def at_least(name: str, value: int, least: int, hint: str) -> int:
    """``value``, if it is no less than ``least``.

    Raises:
        ValueError: it is less.
    """
    if value < least:
        raise ValueError(f"{name} is {value}: {hint}")
    return value


def room(limit: int, name: str) -> int:
    """Characters that may follow ``name`` if it has at most ``limit``.

    Its leading space does not count, nor do the bytes that complete its last character.
    """
    is_partial = name != "" and name[-1] in PARTIAL_BYTES
    return limit + 1 - len(name) + is_partial


def _remember(known: dict[Hashable, torch.Tensor], rule: Hashable, row: torch.Tensor) -> None:
    """Keeps a row for a rule; the oldest goes when there are too many."""
    if rule not in known and len(known) >= max(_REMEMBERED_BYTES // row.nbytes, 64):
        del known[next(iter(known))]
    known[rule] = row


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
        self._penalties: dict[Hashable, torch.Tensor] = {}

    @abstractmethod
    def rule(self, name: str) -> Hashable | None:
        """The state that decides what may follow ``name`` (its text so far, from its leading space on).

        Returns:
            None if anything may follow, else a key for `forbidden`.
        """

    @abstractmethod
    def forbidden(self, rule: Hashable) -> torch.Tensor:
        """(V,) bool on the CPU: tokens that must not follow in that state."""

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, where the texts of the rows are known already.

        Args:
            names: B texts so far.
            scores: (B, V) logits; never changed in place.

        Returns:
            (B, V).
        """
        rules = [self.rule(name) for name in names]
        first = rules[0]
        if all(rule == first for rule in rules):
            return scores if first is None else scores + self._penalty_of(first, scores)
        return scores + torch.stack([self._penalty_of(rule, scores) for rule in rules])

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
        return self.apply(self.vocabulary.names(input_ids, self.prompt_length), scores)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, for ``model.generate``, which makes NaN of a row without a token.

        Raises:
            NoTokenLeftError: no token is left for some row.
        """
        return self._checked(input_ids, scores, self.mask(input_ids, scores))

    def _checked(self, input_ids: torch.Tensor, scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """``masked``, if it leaves each row a token."""
        if masked is not scores:
            dead_B = (masked == -torch.inf).all(dim=-1)
            if dead_B.any():
                row = int(dead_B.nonzero()[0, 0])
                name = self.vocabulary.names(input_ids[row : row + 1], self.prompt_length)[0].strip()
                raise NoTokenLeftError(
                    f"{type(self).__name__} leaves no token after {name!r}: loosen the constraints, or use "
                    "NameGenerator, which drops such names and tries others"
                )
        return masked

    def mask_of(self, rule: Hashable | None) -> torch.Tensor:
        """(V,) bool on the CPU: what `forbidden` says of a rule, remembered; nothing for None."""
        mask = self._masks.get(rule)
        if mask is None:
            size = self.vocabulary.size
            mask = torch.zeros(size, dtype=torch.bool) if rule is None else self.forbidden(rule)
            _remember(self._masks, rule, mask)
        return mask

    def _penalty_of(self, rule: Hashable | None, scores: torch.Tensor) -> torch.Tensor:
        """(V,) like the scores: minus infinity for forbidden tokens, else 0. To add it takes a CPU a twentieth of the
        time of a masked fill."""
        penalty = self._penalties.get(rule)
        if penalty is None or penalty.device != scores.device or penalty.dtype != scores.dtype:
            penalty = torch.zeros(self.vocabulary.size).masked_fill_(self.mask_of(rule), -torch.inf).to(scores)
            _remember(self._penalties, rule, penalty)
        return penalty

    def _end(self) -> torch.Tensor:
        """(V,) bool: the end symbol alone."""
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        mask[self.vocabulary.end_id] = True
        return mask


class AllOf(NameFilter):
    """Several filters as one: a row's masks are joined once a combination of rules, then remembered.

    One pass over the scores instead of one a filter. Filters that do more than mask (those with an `apply` of
    their own) come after the joined mask, in their order.
    """

    def __init__(self, filters: Sequence[NameFilter]) -> None:
        """Stores the filters.

        Args:
            filters: one or more, of one vocabulary and prompt length.
        """
        super().__init__(filters[0].vocabulary, filters[0].prompt_length)
        self.joined = [one for one in filters if type(one).apply is NameFilter.apply]
        self.others = [one for one in filters if type(one).apply is not NameFilter.apply]

    def rule(self, name: str) -> Hashable | None:
        rules = tuple([one.rule(name) for one in self.joined])
        return None if rules.count(None) == len(rules) else rules

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        for one, its_rule in zip(self.joined, cast(tuple[Hashable | None, ...], rule), strict=True):
            if its_rule is not None:
                mask |= one.mask_of(its_rule)
        return mask

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        scores = super().apply(names, scores) if self.joined else scores
        for one in self.others:
            scores = one.apply(names, scores)
        return scores


class KnownNameFilter(NameFilter):
    """Novelty by construction: a name that is a known card cannot end, it has to go on.

    What counts is the normal form of the text, so neither another tokenization, nor case, accents or
    punctuation let a known name through. Only the end symbol is ever forbidden: names that begin as a known
    one stay possible. So the question is only whether the text so far is a whole known name, which a set
    answers at once; a trie would also say which names it begins, and nothing here needs that.
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

    BAD = re.compile(rf" [ ,:;!?.\-]|[,:;][^ ]|-[^\w{PARTIAL_BYTES}]|''|[!?][\w']")
    OPEN_END = " ,:;-'&"

    def rule(self, name: str) -> Hashable | None:
        if not name:
            return "", False
        tail = "a" if name[-1].isalnum() else name[-1]
        return tail, name.rpartition(" ")[2].lower() in DANGLING_WORDS

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        tail, dangling = cast(tuple[str, bool], rule)
        if tail == "":
            forbidden = ~self.vocabulary.where(
                lambda text: text[0] == " " and text[1:2] != "'" and not self.BAD.search(text)
            )
        else:
            forbidden = self.vocabulary.where(lambda text: self.BAD.search(tail + text) is not None)
        forbidden[self.vocabulary.end_id] = dangling or tail == "" or tail in self.OPEN_END
        return forbidden
