"""Tokenizers: GPT-2's own, and small ones of the same kind trained on card names.

Both are byte-level BPE (Radford et al. 2019, section 2.2) behind one transformers class. A small vocabulary matters
for models trained from scratch: GPT-2's 50,257 embeddings would be most of a small model, and nearly all its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """One special token begins, ends and pads a text, as in GPT-2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, whole_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE like GPT-2's on texts.

    The same texts, in any order, give the same tokenizer byte for byte, although the library keeps words and pairs in
    hash maps whose order changes from run to run: words are counted, the alphabet is sorted, and candidates are
    ordered by frequency and then by ids, so that only two candidates of one pair could be taken in either order, and a
    pair becomes a candidate once. (Merges never cross the ends of what will be a token, so each token has one way of
    coming about, and all its places come about in one step; a pair is new in the step that makes its later half.)

    Args:
        texts: what to learn merges from.
        vocab_size: tokens at most, with the 256 bytes and the end of text among them. 257 learns no merges: a letter
            is a token (one with an accent two).
        whole_words: words that are one token each wherever they stand alone, with the space before them. They come
            besides, after ``vocab_size``.

    Raises:
        ValueError: ``vocab_size`` is under 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: a byte-level tokenizer needs {SMALLEST_VOCABULARY} or more"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in whole_words])
    return _wrap(tokenizer)


def gpt2_tokenizer(vocab: str | Path, merges: str | Path) -> PreTrainedTokenizerFast:
    """GPT-2's own tokenizer from its two files (``encoder.json`` and ``vocab.bpe`` as OpenAI named them)."""
    tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def load_tokenizer(source: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a checkpoint folder, or that of a hub id.

    Args:
        source: the folder or hub id.
        vocab_size: tokens that the model knows, if that is to be checked.

    Raises:
        ValueError: there is none, it lacks a begin or end symbol, or it has more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # whatever a library says of a file that may come from a stranger
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"no tokenizer at {source} (tokenizer.json is missing or damaged): {reason}") from error
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer at {source} has {len(tokenizer):,} tokens, but its model {vocab_size:,}: they do not "
            "belong together"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {source} has no begin or end symbol: names need both")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
