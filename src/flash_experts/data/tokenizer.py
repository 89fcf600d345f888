"""Tokenizers: GPT-2's own, and small ones of the same kind trained on card names.

Both are byte-level BPE (Radford et al. 2019, section 2.2) behind one transformers class. A small vocabulary matters
for models trained from scratch: GPT-2's 50,257 embeddings would be most of a small model, and nearly all its time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts.data.tokenizer_checks import MOST_ADDED, WORD_MARK, before_words, check_tokenizer
from flash_experts.model_files import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    any_family_is_allowed,
    check_files,
    first_line,
    local_folder,
    read_object,
)

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text
# Classes of transformers whose tokenizer.json holds all that they do.
_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"} | {
    f"{name}Tokenizer{fast}" for name in ("GPT2", "Llama", "CodeLlama", "Qwen2") for fast in ("", "Fast")
}


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """One special token begins, ends and pads a text, as in GPT-2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None,
        clean_up_tokenization_spaces=False,
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
    # A word that is a token already ends names as well ("Wetl" + "and"): no space may come before it there.
    spaced = [word for word in whole_words if tokenizer.token_to_id(word) is None]
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in whole_words])
    tokenizer.decoder = _decoder_with_spaces(spaced)
    return _wrap(tokenizer)


def _decoder_with_spaces(words: Sequence[str]) -> decoders.Decoder:
    """Byte-level decoding that writes the space before whole words, whose tokens hold it without showing it.

    There is none at the beginning of a text, where encoding found none.
    """
    plain = [word for word in words if re.fullmatch(r"[\w'-]+", word)]
    if not plain:
        return decoders.ByteLevel()
    return decoders.Sequence(
        [
            decoders.Replace(Regex(before_words(plain)), WORD_MARK),
            decoders.ByteLevel(),
            decoders.Strip(WORD_MARK, 1, 0),
            decoders.Replace(END_OF_TEXT + WORD_MARK, END_OF_TEXT),
            decoders.Replace(WORD_MARK, " "),
        ]
    )


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
        folder = local_folder(source)
        check_files(folder)
        tokenizer = _read_tokenizer(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a library reports of an untrusted file; a panic in Rust is no Exception
        raise ValueError(
            f"no tokenizer at {source} (tokenizer.json is missing or damaged): {first_line(error)}"
        ) from error
    if vocab_size is not None and (most := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise ValueError(
            f"the tokenizer at {source} has a token {most:,}, but its model {vocab_size:,} tokens: they do not "
            "belong together"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {source} has no begin or end symbol: names need both")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ------------------------------------------------------------------------------------------------ tokenizers of folders


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder whose files `check_files` has checked; of its settings, those that are known.

    Raises:
        ValueError: it is not of GPT-2's or Llama's kind, and `any_family` is not on.
    """
    settings = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / TOKENIZER_CONFIG)}
    if any_family_is_allowed():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return tokenizer
    _check_settings(settings)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / TOKENIZER).is_file():
        content = read_object(folder / TOKENIZER)
        check_tokenizer(content)
        backend = Tokenizer.from_str(json.dumps(content))
    elif vocab.is_file() and merges.is_file():
        backend = gpt2_tokenizer(vocab, merges).backend_tokenizer
    else:
        raise ValueError(f"{folder / TOKENIZER} is missing")
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_known_settings(folder, settings, backend))


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings that name code, files, or a tokenizer of another kind."""
    if settings.get("auto_map"):
        raise ValueError("auto_map names code of its own to run: this program runs none")
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise ValueError(f"its tokenizer_class is {str(kind)[:40]!r}, not one of {', '.join(sorted(_CLASSES))}")
    for key in ("vocab_file", "merges_file", "tokenizer_file"):
        if (value := settings.get(key)) and (not isinstance(value, str) or Path(value).name != value):
            raise ValueError(f"{key} names a file that is not in the folder: remove it from tokenizer_config.json")
    extra = [settings.get("extra_special_tokens") or (), settings.get("additional_special_tokens") or ()]
    if any(len(tokens) > MOST_ADDED if isinstance(tokens, dict | list) else tokens for tokens in extra):
        raise ValueError(f"its special tokens are no list, or more than {MOST_ADDED:,}")


def _known_settings(folder: Path, settings: Mapping[str, Any], backend: Tokenizer) -> dict[str, Any]:
    """The special tokens, by name or else by the ids of config.json, and what tells how texts are handled.

    The longest text is that of the tokenizer or of its model, whichever is shorter.
    """
    known: dict[str, Any] = {"clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces") is True}
    config = _optional(folder / CONFIG)
    for name in ("bos", "eos", "pad", "unk"):
        token, index = settings.get(f"{name}_token"), config.get(f"{name}_token_id")
        if isinstance(token, dict):
            token = token.get("content")
        if token is None and type(index) is int and 0 <= index < 2**31:
            token = backend.id_to_token(index)
        if token is not None and (not isinstance(token, str) or backend.token_to_id(token) is None):
            raise ValueError(f"its {name}_token {str(token)[:40]!r} is not in the vocabulary")
        known[f"{name}_token"] = token
    lengths = [settings.get("model_max_length"), config.get("n_positions"), config.get("max_position_embeddings")]
    if lengths := [int(most) for most in lengths if isinstance(most, int | float) and 1 <= most < math.inf]:
        known["model_max_length"] = min(lengths)
    for key in ("padding_side", "truncation_side"):
        if settings.get(key) in ("left", "right"):
            known[key] = settings[key]
    template = folder / "chat_template.jinja"
    written = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(written, str):
        known["chat_template"] = written
    return known
