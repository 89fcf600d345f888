"""A tokenizer without the tokens that no card needs.

GPT-2's vocabulary is the web's. Card names and their prompts use a part of it, while in short texts the embeddings and
the last product over all 50,257 tokens take much of the time and memory. What is kept here are the tokens that given
texts use, every token on the way to them (a BPE merges step by step), and all bytes, so that any text can still be
written. The given texts are cut exactly as before; others may be cut into smaller pieces.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes


def texts_of_cards(cards: Sequence[Card]) -> list[str]:
    """All that a model reads or writes of cards: names as they are learned, and prompts of all attributes, of each, of
    any two and of none. A prompt of another subset is made of pieces of these, cut at the same spaces and commas."""
    texts = {" " + card.name for card in cards}
    names = tuple(field.name for field in fields(Attributes))
    for attributes in {Attributes.of(card) for card in cards}:
        given = [name for name in names if getattr(attributes, name) is not None]
        texts.add(attributes.prompt())
        for count in range(min(2, len(given)) + 1):
            for told in itertools.combinations(given, count):
                texts.add(Attributes(**{name: getattr(attributes, name) for name in told}).prompt())
    return sorted(texts)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer reduced to what texts need.

    Args:
        tokenizer: a byte-level BPE, as GPT-2's.
        texts: cut afterwards exactly as before.

    Returns:
        The new tokenizer, and for each of its ids the old one, ascending: the rows of the embedding that are to stay.

    Raises:
        ValueError: another kind of tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("trimming needs a byte-level BPE tokenizer with a tokenizer.json, as GPT-2's")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or (state["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        raise ValueError(f"trimming needs a byte-level BPE tokenizer as GPT-2's, not {state['model']['type']}")
    vocabulary: dict[str, int] = state["model"]["vocab"]
    text_of = {token: text for text, token in vocabulary.items()}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in state["model"]["merges"]]
    parts_of = {left + right: (left, right) for left, right in merges}

    kept = {byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    used = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    waiting = [text_of[token] for token in set(itertools.chain.from_iterable(used)) if token in text_of]
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
    _renumber_template(state["post_processor"], new_id)
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


def _renumber_template(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """Special tokens that are added around a text are named in its template by id, too."""
    if processor is not None and processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[old] for old in token["ids"]]
