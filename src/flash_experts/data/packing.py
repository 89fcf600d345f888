"""Tokenization of names, and sequence packing: many names in one padding-free batch.

The training text is BOS + prompt + " " + name + EOS, with the loss on the name and its EOS alone. A packed sequence is
laid out as by transformers' ``DataCollatorWithFlattening``: positions start again at each name, without padding or a
padding mask. EOS is a label and never an input. Adjacent names with the same prompt may share its tokens.

Shape suffixes: T tokens of the packed sequence, E of its names written out (T if they share no prompt), L labels, N
names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes


@dataclass(frozen=True, slots=True)
class EncodedName:
    """One name as token ids: BOS, prompt, name, EOS."""

    ids: tuple[int, ...]
    prompt_length: int  # with BOS
    characters: int  # of the name, plus one for EOS
    top_row: int = -1  # row of its first label in a teacher's `TopLogits`; -1 without a teacher

    @property
    def num_inputs(self) -> int:
        """Tokens that this name adds to a packed sequence (all but EOS)."""
        return len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A packed sequence of names and its labels; all tensors are int64 but ``cu_seq_lens``, which is int32."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), from 0 in each name
    cu_seq_lens: torch.Tensor  # (N + 1,), start of each name, and E
    max_length: int  # tokens of the longest name, with its prompt
    keep: torch.Tensor  # (L,), positions whose next token is a label
    labels: torch.Tensor  # (L,), those next tokens
    name_index: torch.Tensor  # (L,), name of each label
    characters: torch.Tensor  # (N,), as `EncodedName.characters`
    top_rows: torch.Tensor  # (L,), as `EncodedName.top_row`, for each label
    # None if names share no prompt:
    row_of: torch.Tensor | None = None  # (E,), place in ``input_ids`` of each token of the names written out
    copy_of: torch.Tensor | None = None  # (T,), first copy of each token among those E

    @property
    def num_names(self) -> int:
        return self.characters.numel()

    @property
    def num_tokens(self) -> int:
        """T, the tokens that the model processes."""
        return self.input_ids.numel()

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a causal LM's forward, whose logits are (1, L, vocabulary)."""
        shared = {} if self.row_of is None else {"packed_row_of": self.row_of, "packed_copy_of": self.copy_of}
        return shared | {
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
        """`inputs` plus labels: the forward's ``.loss`` is the summed cross-entropy (nats) divided by ``num_items``.

        With the labels of all micro-batches and processes of a step, losses add up to that of one large batch.
        """
        return self.inputs | {
            "labels": self.labels[None],
            "shift_labels": self.labels[None],
            "num_items_in_batch": num_items,
        }

    def to(self, device: torch.device | str) -> PackedBatch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **moved)


def encode_name(name: str, attributes: Attributes, tokenizer: PreTrainedTokenizerBase) -> EncodedName:
    """`encode_names` of one name."""
    return encode_names([name], [attributes], tokenizer)[0]


def encode_names(
    names: Sequence[str], attributes: Sequence[Attributes], tokenizer: PreTrainedTokenizerBase
) -> list[EncodedName]:
    """Token ids of names after the prompts of their attributes, tokenized separately, as in generation."""
    assert len(names) == len(attributes)
    if not names:
        return []
    prompts = [attribute.prompt() for attribute in attributes]
    distinct = list(dict.fromkeys(prompts))  # few combinations of types and colors: tokenize each once
    ids_of_prompt = dict(zip(distinct, _token_ids(distinct, tokenizer), strict=True))
    ids_of_names = _token_ids([" " + name for name in names], tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = []
    for name, prompt, name_ids in zip(names, prompts, ids_of_names, strict=True):
        prompt_ids = ids_of_prompt[prompt]
        encoded.append(EncodedName((bos, *prompt_ids, *name_ids, eos), 1 + len(prompt_ids), len(name) + 1))
    return encoded


def encode_cards(
    cards: Sequence[Card],
    tokenizer: PreTrainedTokenizerBase,
    attributes_of: Callable[[Card], Attributes] = Attributes.of,
) -> list[EncodedName]:
    """`encode_names` of cards; ``attributes_of`` picks the attributes of each prompt."""
    return encode_names([card.name for card in cards], [attributes_of(card) for card in cards], tokenizer)


def split_by_context(
    cards: Sequence[Card], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Card], list[Card]]:
    """Splits cards into those whose prompt and name fit into ``context`` tokens (None: no limit), and the others."""
    if context is None:
        return list(cards), []
    # A token is at least one byte, so few names need to be tokenized. Plus one for BOS.
    lengths = [len(f"{Attributes.of(card).prompt()} {card.name}".encode()) + 1 for card in cards]
    candidates = [index for index, length in enumerate(lengths) if length > context]
    encoded = encode_cards([cards[index] for index in candidates], tokenizer)
    too_long = {index for index, name in zip(candidates, encoded, strict=True) if name.num_inputs > context}
    return (
        [card for index, card in enumerate(cards) if index not in too_long],
        [cards[index] for index in sorted(too_long)],
    )


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def packed_length(names: Sequence[EncodedName], share_prompts: bool) -> int:
    """`PackedBatch.num_tokens` of these names, without packing them."""
    prompts = [name.ids[: name.prompt_length] for name in names] if share_prompts else []
    return sum(name.num_inputs for name in names) - sum(len(one) for one, other in pairwise(prompts) if one == other)


def pack(names: Sequence[EncodedName], share_prompts: bool = False) -> PackedBatch:
    """Packs names into one sequence.

    Two names of ids ``[b p | a e]`` and ``[b | c d e]`` (``b`` BOS, ``p`` prompt, ``e`` EOS) become::

        input_ids     b p a   b c d
        position_ids  0 1 2   0 1 2
        cu_seq_lens   0       3       6
        keep            1 2   3 4 5         labels    a e   c d e

    With ``share_prompts`` adjacent names of one prompt have its tokens once, and the attention function sees a copy for
    each of them: ``[b p | a e]`` and ``[b p | c e]`` become::

        input_ids     b p a c
        position_ids  0 1 2 2
        row_of        0 1 2   0 1 3         copy_of   0 1 2 5
        cu_seq_lens   0       3       6
        keep            1 2   1 3           labels    a e   c e
    """
    assert names, "a batch needs a name"
    input_ids: list[int] = []
    position_ids: list[int] = []
    row_of: list[int] = []
    copy_of: list[int] = []
    starts = [0]
    keep: list[int] = []
    labels: list[int] = []
    name_index: list[int] = []
    top_rows: list[int] = []
    prompt, prompt_rows = None, range(0)
    for index, name in enumerate(names):
        shared = name.prompt_length if share_prompts and name.ids[: name.prompt_length] == prompt else 0
        rows = [*prompt_rows[:shared], *range(len(input_ids), len(input_ids) + name.num_inputs - shared)]
        prompt, prompt_rows = name.ids[: name.prompt_length], range(rows[0], rows[0] + name.prompt_length)
        copy_of.extend(range(starts[-1] + shared, starts[-1] + name.num_inputs))
        row_of.extend(rows)
        input_ids.extend(name.ids[shared:-1])
        position_ids.extend(range(shared, name.num_inputs))
        keep.extend(rows[name.prompt_length - 1 :])
        labels.extend(name.ids[name.prompt_length :])
        num_labels = len(name.ids) - name.prompt_length
        name_index.extend([index] * num_labels)
        top_rows.extend(range(name.top_row, name.top_row + num_labels) if name.top_row >= 0 else [-1] * num_labels)
        starts.append(starts[-1] + name.num_inputs)
    is_shared = len(row_of) > len(input_ids)
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        cu_seq_lens=torch.tensor(starts, dtype=torch.int32),
        max_length=max(name.num_inputs for name in names),
        keep=torch.tensor(keep),
        labels=torch.tensor(labels),
        name_index=torch.tensor(name_index),
        characters=torch.tensor([name.characters for name in names]),
        top_rows=torch.tensor(top_rows),
        row_of=torch.tensor(row_of) if is_shared else None,
        copy_of=torch.tensor(copy_of) if is_shared else None,
    )


def pack_all(names: Sequence[EncodedName], tokens_per_batch: int) -> list[PackedBatch]:
    """Packs names in order into batches of at most ``tokens_per_batch`` tokens (a longer name is a batch by itself)."""
    batches: list[PackedBatch] = []
    pending: list[EncodedName] = []
    tokens = 0
    for name in names:
        if pending and tokens + name.num_inputs > tokens_per_batch:
            batches.append(pack(pending))
            pending, tokens = [], 0
        pending.append(name)
        tokens += name.num_inputs
    if pending:
        batches.append(pack(pending))
    return batches


def name_nats(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """(N,) float32 negative log-likelihood of each name and its EOS, in nats, by a model that uses ``fe_attention``.

    An upper bound, since the same text could be tokenized in other ways.
    """
    logits_LV = model(**batch.inputs).logits[0]
    nats_L = functional.cross_entropy(logits_LV.float(), batch.labels, reduction="none")
    return nats_L.new_zeros(batch.num_names).index_add_(0, batch.name_index, nats_L)
