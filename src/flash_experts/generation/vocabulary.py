"""What each token of a vocabulary says: the strings that filters check.

A byte-level BPE token is a run of bytes, which need not be whole characters: a rare "û" is two tokens of one
byte each. Texts here are decoded with ``surrogateescape``, so a byte that does not complete a character is
kept as one surrogate (U+DC80 to U+DCFF) and nothing is lost when the next token brings the rest.

Letters in the shapes: V tokens of the vocabulary (of the model's logits), B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def _byte_of_character() -> dict[str, int]:
    """Inverse of GPT-2's table that shows every byte as one visible character (its ``encoder.py``)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


class NameVocabulary:
    """The texts of a byte-level BPE tokenizer's tokens.

    Attributes:
        size: V, the width of the model's logits. Ids that the tokenizer lacks (padding) have no text.
        end_id: the token that ends a name.
        texts: V strings; "" for special tokens, for ids without a token, and for whole words that swallow the space
            before them (`train_tokenizer` has them for prompts): within a name their text would not be what it was.
        prompt_texts: V strings; `texts`, and " word" for such a whole word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> None:
        """Reads the vocabulary once (about 0.1 s for GPT-2's 50,257 tokens).

        Args:
            tokenizer: byte-level BPE with an end symbol, such as GPT-2's.
            size: V, the model's ``config.vocab_size``; the tokenizer's own size if None.

        Raises:
            ValueError: no end symbol, more tokens than the model has, or no byte-level tokenizer of the tokenizers
                library.
        """
        self.size = len(tokenizer) if size is None else size
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{type(tokenizer).__name__} is not of the tokenizers library: load it with AutoTokenizer")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end symbol: set tokenizer.eos_token to that of training")
        if len(tokenizer) > self.size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but the model only {self.size}: they do not "
                "belong together, load both from one folder"
            )
        self.end_id: int = tokenizer.eos_token_id
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
        # As the tokenizer itself does when it is called, which takes three times as long: it finds out more than ids.
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the end symbol. A name begins with the space that separates it from its prompt."""
        pieces = []
        for token in ids:
            if token == self.end_id:
                break
            pieces.append(self._pieces[token])
        return b"".join(pieces).decode("utf-8", "surrogateescape")

    def names(self, input_ids_BT: torch.Tensor, prompt_length: int) -> list[str]:
        """B names so far: the texts after the first ``prompt_length`` tokens."""
        return [self.decode(row) for row in input_ids_BT[:, prompt_length:].tolist()]

    def extend(self, name: str, token: int) -> str:
        """``name`` and one more token, as `decode` of all its tokens would give it."""
        piece = self._pieces[token]
        if name and "\udc80" <= name[-1] <= "\udcff":  # a character that waits for its last bytes
            return (name.encode("utf-8", "surrogateescape") + piece).decode("utf-8", "surrogateescape")
        return name + self.texts[token]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(V,) int64: characters of each token's text."""
        return torch.tensor([len(text) for text in self.texts])

    def where(self, says: Callable[[str], bool]) -> torch.Tensor:
        """(V,) bool on the CPU: tokens whose text satisfies ``says``; never those without text (the end)."""
        return torch.tensor([text != "" and says(text) for text in self.texts])


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
                f"token {index} ({token!r}) is not byte-level: name generation takes byte-level BPE "
                "tokenizers, as GPT-2's and those of train_tokenizer"
            ) from None
    return tuple(pieces)
