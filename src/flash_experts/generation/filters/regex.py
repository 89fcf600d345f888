"""Regular expressions as a filter (constrained decoding).

llguidance compiles the expression lazily to an automaton, which walks a trie of the vocabulary. With the length limit
and the alphabet intersected, every token offered can lead to a match in time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from typing import Any, cast

import numpy as np
import torch

from flash_experts.generation.filters.base import NameFilter, NameVocabulary
from flash_experts.generation.text_rules import CARD_ALPHABET

_CACHED_TEXTS = 10_000
_NOT_UTF8 = "\udcff"  # the byte ff, which no text has, and by which llguidance marks special tokens
_END = re.compile(r"(?<!\\)((?:\\\\)*)\$$")  # not an escaped dollar
_WORD = re.compile("^[^ ]+| [^ ]*")  # with the space before it: a byte-level tokenizer's tokens end before a space


class MatchesRegex(NameFilter):
    """Names that a regular expression matches as a whole: syntax of Rust's ``regex`` crate, without look-around."""

    def __init__(
        self,
        vocabulary: NameVocabulary,
        prompt_length: int,
        pattern: str,
        max_length: int,
        alphabet: Collection[str] = CARD_ALPHABET,
        also: Sequence[str] = (),
    ) -> None:
        """Compiles the expression; those of ``also`` must match, too. Raises a ValueError if no name can match."""
        super().__init__(vocabulary, prompt_length)
        from llguidance import LLMatcher, LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        self.pattern = pattern
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(vocabulary)))
        source = _slashed(_END.sub(r"\1", pattern.removeprefix("^")))
        alone = LLMatcher(self.tokenizer, f"start: NAME\nNAME: /{source}/", log_level=0)
        if not pattern or "\n" in pattern or alone.is_error():
            raise ValueError(f"regex {pattern!r} {_problem('is not a regular expression', alone.get_error())}")
        letters = "".join(f"\\u{{{ord(character):x}}}" for character in sorted(alphabet))
        parts = [*(f" (?:{one})" for one in (source, *also)), f".{{2,{max_length + 1}}}", f"[{letters}]*"]
        parts.append(r" [^\p{Ll} ].*")  # how a finished name starts
        grammar = "start: NAME\nNAME: " + " & ".join(f"/{part}/" for part in parts)
        self._start = LLMatcher(self.tokenizer, grammar, log_level=0)
        if self._start.is_error():
            raise ValueError(f"regex {pattern!r} {_problem('is too complex', self._start.get_error())}")
        self._matcher = self._start.deep_copy()
        self._ids: dict[str, list[int]] = {}
        self._bits: dict[str, bytes] = {}
        if not self._unpacked(self._bits_after("")).any():
            raise ValueError(
                f"regex {pattern!r} matches no name of at most {max_length} characters in the alphabet of cards"
                + (" that satisfies the other constraints" if also else "")
            )

    def rule(self, name: str) -> Hashable | None:
        bits = self._bits.get(name)
        if bits is None:
            if len(self._bits) > _CACHED_TEXTS:
                self._bits.clear()
            bits = self._bits[name] = self._bits_after(name)
        return bits

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return ~self._unpacked(cast(bytes, rule))

    def matches(self, text: str) -> bool:
        """Whether the expression matches a finished name."""
        return bool(self._unpacked(self._bits_after(" " + text))[self.vocabulary.eos_id])

    def _bits_after(self, name: str) -> bytes:
        """One bit per token that may follow; empty if no match starts with ``name``."""
        if _NOT_UTF8 in name:
            return b""
        ids = [token for word in _WORD.findall(name) for token in self._ids_of(word)]
        bits = self._read(ids)
        if self._matcher.is_error():  # permanent; after many texts it may exceed its limit of states
            self._matcher = self._start.deep_copy()
            bits = self._read(ids)
        return bits

    def _read(self, ids: list[int]) -> bytes:
        self._matcher.reset()
        if self._matcher.try_consume_tokens(ids) < len(ids):
            return b""
        bits = self._matcher.compute_bitmask()
        return b"" if self._matcher.is_error() else bits

    def _ids_of(self, word: str) -> list[int]:
        """Without the whole-word tokens that only prompts have."""
        ids = self._ids.get(word)
        if ids is None:
            if len(self._ids) > _CACHED_TEXTS:
                self._ids.clear()
            read, text = self.tokenizer.tokenize_bytes, word.encode("utf-8", "surrogateescape")
            ids = read(text)
            if not all(self.vocabulary.texts[token] for token in ids):
                ids = [token for byte in text for token in read(bytes([byte]))]
            self._ids[word] = ids
        return ids

    def _unpacked(self, bits: bytes) -> torch.Tensor:
        allowed_V = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: self.vocabulary.size]
        allowed_V[: len(flags)] = torch.from_numpy(flags).bool()
        return allowed_V


class _Bytes:
    """The vocabulary in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, vocabulary: NameVocabulary) -> None:
        self.eos_token_id = vocabulary.eos_id
        self.special_token_ids = [token for token, text in enumerate(vocabulary.texts) if not text]
        self.tokens = [text.encode("utf-8", "surrogateescape") for text in vocabulary.texts]
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.encode(text)


def _slashed(pattern: str) -> str:
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern)


def _problem(what: str, error: str) -> str:
    """``what`` and the most telling line of llguidance's error message."""
    if re.search("look-?around", error):
        return r"has ^, $, \b or look-around within it: leave them out, it is for the whole name"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    reason: Any = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    return f"{what}: {reason or (lines[0] if lines else 'it is blank')}"
