"""Texts of the tokens of a byte-level BPE vocabulary: the strings that filters check.

A token need not be whole characters: a rare "û" is two tokens of one byte. Texts are decoded with ``surrogateescape``,
so each byte of an incomplete character is kept as one surrogate (U+DC80 to U+DCFF).

Shape suffixes: V tokens of the vocabulary, B batch rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's table of bytes as visible characters (its ``encoder.py``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


class NameVocabulary:
    """The texts of a byte-level BPE tokenizer's tokens.

    Attributes:
        size: V, the width of the model's logits. Ids that the tokenizer lacks (padding) have no text.
        texts: V strings; "" for ids without a token, special tokens, and whole-word tokens that absorb the space before
            them (`train_tokenizer` has them for prompts; names do not have them).
        prompt_texts: `texts`, and " word" for a whole-word token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> None:
        """Reads a byte-level BPE tokenizer; ``size`` is the model's ``config.vocab_size`` (default: the tokenizer's).

        Raises:
            ValueError: the tokenizer has no EOS token, has more tokens than the model, or is of another kind.
        """
        self.size = len(tokenizer) if size is None else size
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{type(tokenizer).__name__} is not from the tokenizers library: load it with AutoTokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token to that of training")
        if len(tokenizer) > self.size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the model only {self.size}: they do not "
                "belong together; load both from the same folder"
            )
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
        """Ids of a text as the tokenizer cuts it, without special tokens."""
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
        """(V,) bool on the CPU: tokens whose text satisfies the condition; false for tokens without text (EOS).

        Slow, so the answer is cached by ``key``, which identifies the condition.
        """
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
