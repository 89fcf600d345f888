"""Names to token ids, and many names to one padding-free row.

A name is learned as the text ``<|endoftext|> + prompt + " " + name + <|endoftext|>``. The loss is on the name and
its end symbol alone. A batch is one row of such names, one after the other, with the positions starting again at
each (the layout of transformers' ``DataCollatorWithFlattening``), so no padding token is ever multiplied. The
final end symbol is a target and never an input: nothing follows it, so the row leaves it out.

Letters in the shapes: T tokens of the row, L labelled positions, N names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes


@dataclass(frozen=True, slots=True)
class EncodedName:
    """One name as token ids.

    Attributes:
        ids: begin symbol, prompt, name, end symbol.
        prompt_length: how many of ``ids`` come before the name (the begin symbol counts).
        characters: letters of the name plus one for the end symbol.
    """

    ids: tuple[int, ...]
    prompt_length: int
    characters: int

    @property
    def num_inputs(self) -> int:
        """Tokens that this name adds to a packed row (all but the end symbol)."""
        return len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Names in one row without padding, and where the loss is.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, from 0 in each name.
        cu_seq_lens: (N + 1,) int32, where each name starts, and T at the end.
        max_length: tokens of the longest name.
        keep: (L,) int64, the positions whose next token is a label.
        labels: (L,) int64, those next tokens.
        name_index: (L,) int64, the name that each label belongs to.
        characters: (N,) int64, letters of each name plus one for its end symbol.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    keep: torch.Tensor
    labels: torch.Tensor
    name_index: torch.Tensor
    characters: torch.Tensor

    @property
    def num_names(self) -> int:
        return self.characters.numel()

    @property
    def num_tokens(self) -> int:
        """T: the tokens that the model multiplies. None of them is padding."""
        return self.input_ids.numel()

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a causal LM's forward; its logits come out as (1, L, vocabulary)."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "logits_to_keep": self.keep,
            "use_cache": False,
        }

    def inputs_with_loss(self, num_items: int | torch.Tensor) -> dict[str, Any]:
        """As `inputs`, and the forward's ``.loss`` is the summed cross-entropy (nats) divided by ``num_items``.

        Args:
            num_items: labels of the whole optimizer step, over all its micro-batches and processes. With it the
                sum of the micro-batches' losses is the loss of one large batch.
        """
        return self.inputs | {
            "labels": self.labels[None],
            "shift_labels": self.labels[None],
            "num_items_in_batch": num_items,
        }

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **moved)


def encode_name(name: str, attributes: Attributes, tokenizer: PreTrainedTokenizerBase) -> EncodedName:
    """Token ids of one name after the prompt of its attributes. See `encode_names`."""
    return encode_names([name], [attributes], tokenizer)[0]


def encode_names(
    names: Sequence[str], attributes: Sequence[Attributes], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedName]:
    """Token ids of names, each after the prompt of its attributes.

    Prompt and name are tokenized apart, so that the boundary is the same when a name is generated after a prompt.
    The same prompt comes often (there are few colors and types): each distinct one is tokenized once.
    """
    assert len(names) == len(attributes)
    if not names:
        return []
    prompts = [attribute.prompt() for attribute in attributes]
    distinct = list(dict.fromkeys(prompts))
    ids_of_prompt = dict(zip(distinct, _token_ids(distinct, tokenizer), strict=True))
    ids_of_names = _token_ids([" " + name for name in names], tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = []
    for name, prompt, name_ids in zip(names, prompts, ids_of_names, strict=True):
        prompt_ids = ids_of_prompt[prompt]
        encoded.append(EncodedName((begin, *prompt_ids, *name_ids, end), 1 + len(prompt_ids), len(name) + 1))
    return encoded


def encode_cards(
    cards: Sequence[Card],
    tokenizer: PreTrainedTokenizerBase,
    attributes_of: Callable[[Card], Attributes] = Attributes.of,
) -> list[EncodedName]:
    """`encode_names` of cards; ``attributes_of`` says what the prompt of each tells (default: all of it)."""
    return encode_names([card.name for card in cards], [attributes_of(card) for card in cards], tokenizer)


def split_by_context(
    cards: Sequence[Card], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Card], list[Card]]:
    """Cards whose name fits into a model after the prompt of all its attributes, and those whose name does not.

    Args:
        cards: what to look at.
        tokenizer: the model's.
        context: tokens that the model takes at most; None for any number.
    """
    if context is None:
        return list(cards), []
    # A token is a byte of text or more, so few names need to be tokenized. One more is the BOS token.
    lengths = [len(f"{Attributes.of(card).prompt()} {card.name}".encode()) + 1 for card in cards]
    perhaps = [index for index, length in enumerate(lengths) if length > context]
    encoded = encode_cards([cards[index] for index in perhaps], tokenizer)
    too_long = {index for index, name in zip(perhaps, encoded, strict=True) if name.num_inputs > context}
    return (
        [card for index, card in enumerate(cards) if index not in too_long],
        [cards[index] for index in sorted(too_long)],
    )


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def pack(names: Sequence[EncodedName]) -> PackedBatch:
    """Puts names into one row.

    Two names of ids ``[b p | a e]`` and ``[b | c d e]`` (``b`` begin, ``p`` prompt, ``e`` end) become::

        input_ids     b p a   b c d
        position_ids  0 1 2   0 1 2
        cu_seq_lens   0       3       6
        keep            1 2   3 4 5         labels    a e   c d e
    """
    assert names, "a batch needs a name"
    input_ids: list[int] = []
    position_ids: list[int] = []
    starts = [0]
    keep: list[int] = []
    labels: list[int] = []
    name_index: list[int] = []
    for index, name in enumerate(names):
        start, length = starts[-1], name.num_inputs
        input_ids.extend(name.ids[:-1])
        position_ids.extend(range(length))
        keep.extend(range(start + name.prompt_length - 1, start + length))
        labels.extend(name.ids[name.prompt_length :])
        name_index.extend([index] * (len(name.ids) - name.prompt_length))
        starts.append(start + length)
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        cu_seq_lens=torch.tensor(starts, dtype=torch.int32),
        max_length=max(end - start for start, end in pairwise(starts)),
        keep=torch.tensor(keep),
        labels=torch.tensor(labels),
        name_index=torch.tensor(name_index),
        characters=torch.tensor([name.characters for name in names]),
    )


def pack_all(names: Sequence[EncodedName], tokens_per_batch: int) -> list[PackedBatch]:
    """All names, in their order, in rows of at most ``tokens_per_batch`` tokens (a longer name has its own row)."""
    batches: list[PackedBatch] = []
    row: list[EncodedName] = []
    tokens = 0
    for name in names:
        if row and tokens + name.num_inputs > tokens_per_batch:
            batches.append(pack(row))
            row, tokens = [], 0
        row.append(name)
        tokens += name.num_inputs
    if row:
        batches.append(pack(row))
    return batches
