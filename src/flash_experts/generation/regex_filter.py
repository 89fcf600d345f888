r"""A regular expression as a filter. See `flash_experts.generation.filters` for what a filter is.

llguidance (of the guidance-ai project) compiles the expression to an automaton, lazily, and walks it
together with a trie of the vocabulary. Unlike an index built ahead it intersects languages: the expression with
"at most so many characters" and "letters of the alphabet", so no token is ever offered from which the expression
cannot be completed in time, and an expression that no name can match is seen before the first token. Where it leaves
one text alone, it offers the tokenizer's own cut of it: masks push towards odd tokens otherwise.

Each text is read from its start, by one matcher that is set back: the states that it has built stay, and to read a
name costs it 5 us, no more than to copy a matcher that stands at the end of the name before. What cost six times that
was to cut the name into tokens, so the cuts of words are remembered.

outlines-core was tried beside it, with GPT-2's vocabulary: it builds an index ahead (0.59 s for "(\w+ ){2,3}\w+",
against 5 ms here), cannot intersect, and took 87 s for "a{2000}{2000}", which is refused here at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch

from flash_experts.generation.filters import CARD_ALPHABET, NameFilter
from flash_experts.generation.vocabulary import NameVocabulary

_REMEMBERED_TEXTS = 10_000
_WORD = re.compile("^[^ ]+| [^ ]*")  # with the space before it: a byte-level tokenizer's tokens end before a space


class MatchesRegex(NameFilter):
    """Names that a regular expression matches from their first letter to their last.

    The syntax is that of Rust's ``regex`` crate: no look-around and no back references; ``(?i)`` at the start
    ignores case.
    """

    def __init__(
        self,
        vocabulary: NameVocabulary,
        prompt_length: int,
        pattern: str,
        max_length: int,
        alphabet: Collection[str] = CARD_ALPHABET,
        also: Sequence[str] = (),
    ) -> None:
        """Compiles the expression.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            pattern: the expression; ``^`` and ``$`` around it change nothing.
            max_length: characters that a name has at most.
            alphabet: characters that a name may have.
            also: more expressions that must match.

        Raises:
            ValueError: it is no regular expression, no name of that length and alphabet matches it, or
                llguidance is missing.
        """
        super().__init__(vocabulary, prompt_length)
        if find_spec("llguidance") is None:
            raise ValueError("regex needs the package llguidance: pip install llguidance")
        from llguidance import LLMatcher, LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        self.pattern = pattern
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(vocabulary)))
        source = _slashed(pattern.removeprefix("^").removesuffix("$"))
        alone = LLMatcher(self.tokenizer, f"start: NAME\nNAME: /{source}/", log_level=0)
        if not pattern or "\n" in pattern or alone.is_error():
            raise ValueError(f"regex {pattern!r} is no regular expression: {_reason(alone.get_error())}")
        letters = "".join(f"\\u{{{ord(character):x}}}" for character in sorted(alphabet))
        parts = [*(f" (?:{one})" for one in (source, *also)), f".{{2,{max_length + 1}}}", f"[{letters}]*"]
        parts.append(r" [^\p{Ll} ].*")  # as a finished name begins
        grammar = "start: NAME\nNAME: " + " & ".join(f"/{part}/" for part in parts)
        self._start = LLMatcher(self.tokenizer, grammar, log_level=0)
        if self._start.is_error():
            raise ValueError(f"regex {pattern!r} is too complex: {_reason(self._start.get_error())}")
        self._matcher = self._start.deep_copy()
        self._ids: dict[str, list[int]] = {}
        self._bits: dict[str, bytes] = {}
        if not self._unpacked(self._bits_after("")).any():
            raise ValueError(
                f"regex {pattern!r} matches no name of at most {max_length} characters in the letters of cards"
                + (" that holds the other constraints" if also else "")
            )

    def rule(self, name: str) -> Hashable | None:
        bits = self._bits.get(name)
        if bits is None:
            if len(self._bits) > _REMEMBERED_TEXTS:
                self._bits.clear()
            bits = self._bits[name] = self._bits_after(name)
        return bits

    def forbidden(self, rule: Hashable) -> torch.Tensor:
        return ~self._unpacked(cast(bytes, rule))

    def matches(self, text: str) -> bool:
        """Whether the expression matches a finished name."""
        return bool(self._unpacked(self._bits_after(" " + text))[self.vocabulary.end_id])

    def _bits_after(self, name: str) -> bytes:
        """One bit a token: what may follow. Empty if ``name`` is no beginning of a match."""
        ids = [token for word in _WORD.findall(name) for token in self._ids_of(word)]
        bits = self._read(ids)
        if self._matcher.is_error():  # it stays in it; after many texts it may have built more states than it may
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
        """A word as the tokenizer cuts it, though not as one of the whole words that only prompts have."""
        ids = self._ids.get(word)
        if ids is None:
            if len(self._ids) > _REMEMBERED_TEXTS:
                self._ids.clear()
            ids = self.tokenizer.tokenize_bytes(word.encode("utf-8", "surrogateescape"))
            if not all(self.vocabulary.texts[token] for token in ids):
                ids = self.tokenizer.greedy_tokenize(word)
            self._ids[word] = ids
        return ids

    def _unpacked(self, bits: bytes) -> torch.Tensor:
        """(V,) bool of one bit a token."""
        allowed_V = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: self.vocabulary.size]
        allowed_V[: len(flags)] = torch.from_numpy(flags).bool()
        return allowed_V


class _Bytes:
    """The vocabulary as llguidance reads one: the bytes of each token."""

    bos_token_id = None

    def __init__(self, vocabulary: NameVocabulary) -> None:
        self.eos_token_id = vocabulary.end_id
        self.special_token_ids = [token for token, text in enumerate(vocabulary.texts) if not text]
        self.tokens = [text.encode("utf-8", "surrogateescape") for text in vocabulary.texts]
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.encode(text)


def _slashed(pattern: str) -> str:
    """A pattern between slashes: slashes of its own are escaped."""
    return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern)


def _reason(error: str) -> str:
    """What llguidance says, in one line: the parser's own words if there are some."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said: Any = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    return said or (lines[0] if lines else "it is blank")
