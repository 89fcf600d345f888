"""Vocabulary trimming: removes unused tokens from a tokenizer and from a model's embeddings."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# A capitalized word after a space, which byte-level BPE writes as Ġ, or a piece of a word.
_WORD = re.compile("Ġ[A-Z][a-z]+|[a-z]+")


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], keep_words: bool = False
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Reduces a byte-level BPE tokenizer to the tokens that some texts need; their tokenization does not change.

    ``keep_words`` also keeps capitalized words and parts of words, so that new words in names are not split into
    smaller pieces than in training. Returns the new tokenizer, and the old id of each of its ids, ascending.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("trimming needs a byte-level BPE tokenizer with a tokenizer.json, as GPT-2's")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, before = state["model"]["type"], (state["pre_tokenizer"] or {}).get("type", "no pre-tokenizer")
    if (kind, before) != ("BPE", "ByteLevel"):
        raise ValueError(f"trimming needs a byte-level BPE tokenizer as GPT-2's, not {kind} after {before}")
    vocabulary: dict[str, int] = state["model"]["vocab"]
    text_of = {token: text for text, token in vocabulary.items()}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in state["model"]["merges"]]
    parts_of = {left + right: (left, right) for left, right in merges}

    kept = {byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    used = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    waiting = [text_of[token] for token in set(itertools.chain.from_iterable(used)) if token in text_of]
    if keep_words:
        waiting += filter(_WORD.fullmatch, vocabulary)
    while waiting:
        text = waiting.pop()
        if text not in kept:
            kept.add(text)
            waiting.extend(parts_of.get(text, ()))
    specials = [token["id"] for token in state["added_tokens"]]
    old_ids = sorted({vocabulary[text] for text in kept} | set(specials))
    new_id = {old: new for new, old in enumerate(old_ids)}

    state["model"]["vocab"] = {text: new_id[old] for text, old in vocabulary.items() if old in new_id}
    state["model"]["merges"] = [list(merge) for merge in merges if "".join(merge) in kept]
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(state["post_processor"] or {}, new_id)
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=None,
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
    )
    return trimmed, old_ids


def _renumber(processor: dict[str, Any], new_id: dict[int, int]) -> None:
    """Gives a post-processor, which adds special tokens, their new ids."""
    for part in processor.get("processors", ()):  # of a Sequence
        _renumber(part, new_id)
    for token in processor.get("special_tokens", {}).values():  # of a template
        token["ids"] = [new_id[old] for old in token["ids"]]
    for pair in (processor[name] for name in ("sep", "cls") if name in processor):  # BERT's and RoBERTa's
        pair[1] = new_id[pair[1]]


@torch.no_grad()
def trim_vocabulary(model: PreTrainedModel, kept_ids: Sequence[int]) -> None:
    """Shrinks a model's input and output embeddings, tied or not, from (V, D) to (W, D), in place.

    ``kept_ids`` are the old ids in the order of the new ones, whose logits do not change.
    """
    before_VD, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(before_VD, torch.Tensor)
    V, D = before_VD.shape
    beyond = [token for token in kept_ids if not 0 <= token < V]
    if beyond:
        raise ValueError(
            f"token {beyond[0]} is not in the model's vocabulary of {V}: is this the model's own tokenizer?"
        )
    new_id = {old: new for new, old in enumerate(kept_ids)}
    new_symbols = []
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old = getattr(config, name, None)  # some models have a list of EOS tokens
            ids = old if isinstance(old, list) else [] if old is None else [old]
            if gone := [token for token in ids if token not in new_id]:
                raise ValueError(f"{name} {gone[0]} is not among the kept tokens: keep it")
            new_ids = [new_id[token] for token in ids]
            new_symbols.append((config, name, new_ids if isinstance(old, list) else next(iter(new_ids), None)))
    for config, name, new in new_symbols:
        setattr(config, name, new)
    index_W = torch.tensor(kept_ids, device=before_VD.device)
    tied = head.weight is before_VD
    after = nn.Embedding(len(kept_ids), D, device="meta")
    after.weight = nn.Parameter(before_VD[index_W], before_VD.requires_grad)
    model.set_input_embeddings(after)
    head.weight = after.weight if tied else nn.Parameter(head.weight[index_W], head.weight.requires_grad)
    head.out_features = len(kept_ids)
    model.config.vocab_size = len(kept_ids)
