"""Token filters (constrained decoding): which tokens may come next in a name, and the texts of the tokens.

Each filter is a transformers ``LogitsProcessor`` that looks at the *text* so far, since one text has many
tokenizations. Your own needs the state of a name, and what that forbids::

    class NoLetter(NameFilter):                                       # no "e" before the second word
        def rule(self, name): return "no e" if len(name.split()) < 2 else None
        def forbidden(self, rule): return self.vocabulary.where(lambda text: "e" in text)

Pass the class to ``NameGenerator.generate(filters=[NoLetter])``, as examples/extending/custom_filter.py does.

A token need not be whole characters: a rare "û" is two tokens of one byte. With ``surrogateescape``, each byte of an
incomplete character is one surrogate (U+DC80 to U+DCFF).

Shape suffixes: B batch rows, T tokens of prompt and name, V tokens of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cached_property
from typing import cast

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts.data.names import normal_form
from flash_experts.data.tokenizer import check_fits
from flash_experts.generation.text_rules import BAD_MARKS, CARD_ALPHABET, DANGLING_WORDS, OPEN_END, PARTIAL_BYTES

_CACHE_BYTES = 32 << 20  # largest cache of masks of a filter


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's table of bytes as characters (its ``encoder.py``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


class NameVocabulary:
    """The texts of a byte-level BPE tokenizer's tokens.

    Attributes:
        size: V, the width of the model's logits.
        texts: V strings; "" for padding, special tokens, and the whole-word tokens of prompts (`train_tokenizer`),
            which absorb the space before them.
        prompt_texts: `texts`, and " word" for a whole-word token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> None:
        """Reads a byte-level BPE tokenizer with BOS and EOS tokens, or raises a ValueError.

        ``size`` is the model's ``config.vocab_size`` (default: the tokenizer's).
        """
        self.size = len(tokenizer) if size is None else size
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{type(tokenizer).__name__} is not from the tokenizers library: load it with AutoTokenizer"
            )
        check_fits(tokenizer, self.size)
        self.eos_id: int = tokenizer.eos_token_id
        self._found: dict[Hashable, torch.Tensor] = {}
        self._backend = tokenizer.backend_tokenizer
        self._pieces = _pieces(tokenizer, self.size)
        self.texts = tuple(piece.decode("utf-8", "surrogateescape") for piece in self._pieces)
        prompt_texts = list(self.texts)
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.lstrip and not token.special:
                prompt_texts[index] = " " + token.content
        self.prompt_texts = tuple(prompt_texts)

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own ids, without special tokens."""
        # What calling the tokenizer does, without the outputs other than ids that make it slow.
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the EOS token. A name starts with the space that separates it from its prompt."""
        pieces = []
        for token in ids:
            if token == self.eos_id:
                break
            pieces.append(self._pieces[token])
        return b"".join(pieces).decode("utf-8", "surrogateescape")

    def names(self, input_ids_BT: torch.Tensor, prompt_length: int) -> list[str]:
        """B texts after the first ``prompt_length`` tokens."""
        return [self.decode(row) for row in input_ids_BT[:, prompt_length:].tolist()]

    def extend(self, name: str, token: int) -> str:
        """``name`` and one more token, equal to `decode` of all its tokens."""
        piece = self._pieces[token]
        if name and "\udc80" <= name[-1] <= "\udcff":  # an incomplete character
            return (name.encode("utf-8", "surrogateescape") + piece).decode("utf-8", "surrogateescape")
        return name + self.texts[token]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(V,) int64: characters of each token's text."""
        return torch.tensor([len(text) for text in self.texts])

    def where(self, condition: Callable[[str], bool], key: Hashable = None) -> torch.Tensor:
        """(V,) bool on the CPU: tokens with a text that satisfies the condition. Slow; cached if it has a ``key``."""
        found = self._found.get(key)
        if found is None:
            found = torch.tensor([text != "" and condition(text) for text in self.texts])
            if key is not None:
                self._found[key] = found
        return found.clone()


def _pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[bytes, ...]:
    byte_of = _byte_of_character()
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    special = set(tokenizer.all_special_tokens)
    pieces = [b""] * size
    for token, index in tokenizer.get_vocab().items():
        if token in special:
            continue
        if token in added:
            pieces[index] = b"" if added[token].lstrip else token.encode()
            continue
        try:
            pieces[index] = bytes(byte_of[character] for character in token)
        except KeyError:
            raise ValueError(
                f"token {index} ({token!r}) is not byte-level: name generation needs a byte-level BPE tokenizer, "
                "such as GPT-2's or one from train_tokenizer"
            ) from None
    return tuple(pieces)


class NoTokenLeftError(ValueError):
    """Every token is forbidden: constraints contradict each other, or a name reached a dead end."""


def room(limit: int, name: str) -> int:
    """Characters that may follow a name, whose leading space and partial character do not count."""
    is_partial = name != "" and name[-1] in PARTIAL_BYTES
    return limit + 1 - len(name) + is_partial


def _remember(known: dict[Hashable, torch.Tensor], rule: Hashable, row: torch.Tensor) -> None:
    if rule not in known and len(known) >= max(_CACHE_BYTES // row.nbytes, 64):
        del known[next(iter(known))]
    known[rule] = row


class NameFilter(LogitsProcessor, ABC):
    """Base class of filters: batch rows in the same state share one mask over the vocabulary."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int) -> None:
        """``prompt_length``: tokens before the name, BOS included; ``input_ids.shape[1]`` for ``model.generate``."""
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length
        self._masks: dict[Hashable, torch.Tensor] = {}
        self._penalties: dict[Hashable, torch.Tensor] = {}

    @abstractmethod
    def rule(self, name: str) -> Hashable | None:
        """The state after ``name``, the text so far with its leading space: a key for `forbidden`, None for no rule."""

    @abstractmethod
    def forbidden(self, rule: Hashable) -> torch.Tensor:
        """(V,) bool on the CPU: tokens that must not follow in this state."""

    def apply(self, names: Sequence[str], scores: torch.Tensor) -> torch.Tensor:
        """(B, V) masked logits, as `mask` for B texts."""
        rules = [self.rule(name) for name in names]
        first = rules[0]
        if all(rule == first for rule in rules):
            return scores if first is None else scores + self._penalty_of(first, scores)
        return scores + torch.stack([self._penalty_of(rule, scores) for rule in rules])

    def mask(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) logits with forbidden tokens at minus infinity, possibly all of a row; ``scores`` stay as they are."""
        if scores.shape[-1] != self.vocabulary.size:
            raise ValueError(
                f"the scores have {scores.shape[-1]} tokens but the vocabulary {self.vocabulary.size}: make it "
                "with NameVocabulary(tokenizer, model.config.vocab_size)"
            )
        return self.apply(self.vocabulary.names(input_ids, self.prompt_length), scores)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As `mask`, but raises NoTokenLeftError for a row without tokens, which ``model.generate`` makes NaN."""
        return self._checked(input_ids, scores, self.mask(input_ids, scores))

    def _checked(self, input_ids: torch.Tensor, scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
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
        """`forbidden` of a rule, cached; nothing is forbidden for None."""
        mask = self._masks.get(rule)
        if mask is None:
            size = self.vocabulary.size
            mask = torch.zeros(size, dtype=torch.bool) if rule is None else self.forbidden(rule)
            _remember(self._masks, rule, mask)
        return mask

    def _penalty_of(self, rule: Hashable | None, scores: torch.Tensor) -> torch.Tensor:
        """(V,) minus infinity or 0: on CPUs, adding is faster than a masked fill."""
        penalty = self._penalties.get(rule)
        if penalty is None or penalty.device != scores.device or penalty.dtype != scores.dtype:
            penalty = torch.zeros(self.vocabulary.size).masked_fill_(self.mask_of(rule), -torch.inf).to(scores)
            _remember(self._penalties, rule, penalty)
        return penalty

    def _eos_only(self) -> torch.Tensor:
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        mask[self.vocabulary.eos_id] = True
        return mask


class AllOf(NameFilter):
    """Several filters as one: masks are cached by combination of rules; filters that override `apply` come last.

    For ``model.generate`` give filters one by one: joined, an upper limit leaves a name no token instead of ending it.
    """

    def __init__(self, filters: Sequence[NameFilter]) -> None:
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
    """A known name cannot end, so it must continue."""

    def __init__(self, vocabulary: NameVocabulary, prompt_length: int, known: Collection[str]) -> None:
        """``known``: normal forms (`flash_experts.data.names.normal_form`), as a set for speed."""
        super().__init__(vocabulary, prompt_length)
        self.known = known

    def rule(self, name: str) -> Hashable | None:
        return "known" if normal_form(name) in self.known else None

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return self._eos_only()


class AllowedCharacters(NameFilter):
    """Only characters of an alphabet. The state is the bytes of an incomplete UTF-8 character."""

    def __init__(
        self, vocabulary: NameVocabulary, prompt_length: int, alphabet: Collection[str] = CARD_ALPHABET
    ) -> None:
        super().__init__(vocabulary, prompt_length)
        self.alphabet = frozenset(alphabet)
        # Prefixes of the alphabet's UTF-8 codes: the only bytes that may wait for more.
        encoded = [character.encode() for character in self.alphabet]
        self._partial_characters = {code[:cut] for code in encoded for cut in range(1, len(code))}

    def rule(self, name: str) -> Hashable | None:
        return name[len(name.rstrip(PARTIAL_BYTES)) :]

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        pending = cast(str, rule).encode("utf-8", "surrogateescape")
        forbidden = ~self.vocabulary.where(lambda text: self._fits(pending, text), ("fits", self.alphabet, pending))
        forbidden[self.vocabulary.eos_id] = pending != b""
        return forbidden

    def _fits(self, pending: bytes, text: str) -> bool:
        joined = (pending + text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
        whole = joined.rstrip(PARTIAL_BYTES)
        tail = joined[len(whole) :].encode("utf-8", "surrogateescape")
        return self.alphabet.issuperset(whole) and (not tail or tail in self._partial_characters)


class WellFormed(NameFilter):
    """Spaces and punctuation as in names, which do not end in a space, an open mark or "of"."""

    def rule(self, name: str) -> Hashable | None:
        if not name:
            return "", False
        tail = "a" if name[-1].isalnum() else name[-1]
        return tail, name.rpartition(" ")[2].lower() in DANGLING_WORDS

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        tail, dangling = cast(tuple[str, bool], rule)
        if tail == "":
            forbidden = ~self.vocabulary.where(
                lambda text: text[0] == " " and text[1:2] != "'" and not BAD_MARKS.search(text), "starts a name"
            )
        else:
            forbidden = self.vocabulary.where(
                lambda text: BAD_MARKS.search(tail + text) is not None, ("bad marks", tail)
            )
        forbidden[self.vocabulary.eos_id] = dangling or tail == "" or tail in OPEN_END
        return forbidden
