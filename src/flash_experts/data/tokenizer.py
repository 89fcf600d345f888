"""Trains byte-level BPE tokenizers, and loads tokenizers after checks, since their files may be untrusted.

The tokenizers library executes whatever a tokenizer.json asks for: a normalizer that doubles a text thirty times, a
regular expression that takes hours. Only components of bounded cost are accepted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts import model_files

MAX_TOKENS = 300_000  # Llama 3 has 128,256
MAX_ADDED_TOKENS = 10_000
_MAX_PARTS = 16  # parts of a sequence
_MAX_TEXT = 64  # characters of a prefix
_KINDS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"},
    "pre_tokenizer": {"ByteLevel", "Digits", "Split", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"},
    "post_processor": {"ByteLevel", "TemplateProcessing"},
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "BPEDecoder"},
}
_ONCE = ("ByteLevel", "Metaspace")  # each makes a text longer
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Regular expressions of known tokenizers: GPT-2, Llama 3 (GPT-4's), Qwen 2. The run time of others is unbounded.
_EXPRESSIONS = {_GPT2, _GPT2_PUBLISHED, *(_CONTRACTIONS + digits + _TAIL for digits in (r"\p{N}{1,3}", r"\p{N}"))}
WORD_MARK = "\ue000"  # private-use character that decoding puts before a whole word of a prompt
_BEFORE_WORDS = re.compile(r"\^\(\?=\(\?:[\w'|-]+\)\$\)")
_MAX_PATTERN = 100_000  # characters


def before_words(words: Iterable[str]) -> str:
    """A regular expression for the empty text before a token that is one of these words."""
    return f"^(?=(?:{'|'.join(words)})$)"


def check_tokenizer(content: dict[str, Any]) -> None:
    """Checks that a tokenizer.json is a BPE of known components and bounded size; raises a ValueError if not."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("its model is not a BPE, the kind of GPT-2 and Llama")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"a BPE with {key} is not one of GPT-2's or Llama's kind")
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("its vocabulary is damaged")
    if len(vocab) > MAX_TOKENS or len(merges) > 2 * MAX_TOKENS or len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"it has more than {MAX_TOKENS:,} tokens, or {MAX_ADDED_TOKENS:,} added ones")
    ids = [*vocab.values(), *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if not all(type(index) is int and 0 <= index < MAX_TOKENS + MAX_ADDED_TOKENS for index in ids):
        raise ValueError("a token has no id, or one that is larger than any vocabulary")
    for place, kinds in _KINDS.items():
        parts = list(_parts(place, content.get(place)))
        if any(sum(part.get("type") == once for part in parts) > 1 for once in _ONCE):
            raise ValueError(f"its {place} makes text longer more than once")
        for part in parts:
            if part.get("type") not in kinds:
                raise ValueError(f"its {place} {str(part.get('type'))[:40]!r} is not one of {', '.join(sorted(kinds))}")
            if check := _CHECKS.get(str(part["type"])):
                check(part)


def _parts(place: str, value: Any) -> Iterator[dict[str, Any]]:
    """The parts of a component: all of a sequence, else the component itself, if any."""
    parts: Any = [] if value is None else [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        parts = value.get(_PARTS.get(place, f"{place}s"))
    if not isinstance(parts, list) or len(parts) > _MAX_PARTS or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"its {place} is damaged, or has more than {_MAX_PARTS} parts")
    yield from parts


def _check_replace(part: dict[str, Any]) -> None:
    """Accepts a replacement that is not longer, so that no text grows, or a mark before a word."""
    pattern, new = part.get("pattern"), part.get("content")
    words = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(words, str) and len(words) <= _MAX_PATTERN and _BEFORE_WORDS.fullmatch(words) and new == WORD_MARK:
        return
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(old, str) or not isinstance(new, str) or not old or len(new) > len(old):
        raise ValueError("it replaces text by a longer one, or by a regular expression")


def _check_prepend(part: dict[str, Any]) -> None:
    if not isinstance(part.get("prepend"), str) or len(part["prepend"]) > _MAX_TEXT:
        raise ValueError("it puts a long text before each")


def _check_split(part: dict[str, Any]) -> None:
    pattern = part.get("pattern")
    if not isinstance(pattern, dict) or ("String" not in pattern and pattern.get("Regex") not in _EXPRESSIONS):
        raise ValueError("it splits text at a regular expression other than those of GPT-2, Llama 3 and Qwen 2")


def _check_template(part: dict[str, Any]) -> None:
    templates, special = (part.get("single"), part.get("pair")), part.get("special_tokens")
    tokens = list(special.values()) if isinstance(special, dict) else []
    if (
        not all(isinstance(pieces, list) and len(pieces) <= _MAX_PARTS for pieces in templates)
        or len(tokens) > _MAX_PARTS
        or not all(isinstance(token, dict) and len(token.get("ids") or ()) <= _MAX_PARTS for token in tokens)
    ):
        raise ValueError(f"its template adds more than {_MAX_PARTS} tokens")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Replace": _check_replace,
    "Prepend": _check_prepend,
    "Split": _check_split,
    "TemplateProcessing": _check_template,
}
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # all bytes, and the end of text

# Classes of transformers that tokenizer.json describes completely.
_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"} | {
    f"{name}Tokenizer{fast}" for name in ("GPT2", "Llama", "CodeLlama", "Qwen2") for fast in ("", "Fast")
}


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
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
    """Trains a byte-level BPE like GPT-2's on texts; in any order, they give the same tokenizer byte for byte.

    Args:
        vocab_size: most tokens, with the 256 bytes and the end of text; a ValueError if it is less than 257.
        whole_words: in addition one token each wherever they stand alone, with the space before them.
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
    # A word that is already a BPE token also ends names ("Wetl" + "and"): it gets no space on decoding.
    spaced = [word for word in whole_words if tokenizer.token_to_id(word) is None]
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in whole_words])
    tokenizer.decoder = _decoder_with_spaces(spaced)
    return _wrap(tokenizer)


def _decoder_with_spaces(words: Sequence[str]) -> decoders.Decoder:
    """Byte-level decoding that restores the space before whole words, except at the beginning of a text."""
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
    """GPT-2's tokenizer from OpenAI's ``encoder.json`` and ``vocab.bpe``."""
    tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def load_tokenizer(source: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint folder or hub id; ``vocab_size`` is the model's.

    Raises:
        ValueError: there is no tokenizer, it lacks a BOS or EOS token, or it has more tokens than the model.
    """
    try:
        folder = model_files.local_folder(source)
        model_files.check_files(folder)
        tokenizer = _read_tokenizer(folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # any failure on an untrusted file; a panic in Rust is not an Exception
        raise ValueError(
            f"no tokenizer at {source} (tokenizer.json is missing or damaged): {model_files.first_line(error)}"
        ) from error
    if vocab_size is not None and (most := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise ValueError(
            f"the tokenizer at {source} has a token id {most:,}, but its model only {vocab_size:,} tokens: they do not "
            "belong together"
        )
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at {source} has no BOS or no EOS token: names need both")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """A ValueError unless the tokenizer has BOS and EOS tokens, and no more tokens than a model."""
    for kind in ("BOS", "EOS"):
        if getattr(tokenizer, f"{kind.lower()}_token_id") is None:
            raise ValueError(
                f"the tokenizer has no {kind} token: set tokenizer.{kind.lower()}_token to that of training"
            )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {vocab_size}: they do not belong together; "
            "load both from the same folder"
        )


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer with known settings alone; unless any family is allowed, it must be GPT-2's or Llama's kind."""
    settings = {**_optional(folder / "special_tokens_map.json"), **_optional(folder / model_files.TOKENIZER_CONFIG)}
    if model_files.any_family_is_allowed():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return tokenizer
    _check_settings(settings)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / model_files.TOKENIZER).is_file():
        content = model_files.read_object(folder / model_files.TOKENIZER)
        check_tokenizer(content)
        backend = Tokenizer.from_str(json.dumps(content))
    elif vocab.is_file() and merges.is_file():
        backend = gpt2_tokenizer(vocab, merges).backend_tokenizer
    else:
        raise ValueError(f"{folder / model_files.TOKENIZER} is missing")
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_known_settings(folder, settings, backend))


def _optional(path: Path) -> dict[str, Any]:
    return model_files.read_object(path) if path.is_file() else {}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings that name code, other files, or an unknown tokenizer class."""
    if settings.get("auto_map"):
        raise ValueError("auto_map names code of its own to run: remote code is never run")
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise ValueError(f"its tokenizer_class is {str(kind)[:40]!r}, not one of {', '.join(sorted(_CLASSES))}")
    for key in ("vocab_file", "merges_file", "tokenizer_file"):
        if (value := settings.get(key)) and (not isinstance(value, str) or Path(value).name != value):
            raise ValueError(f"{key} names a file that is not in the folder: remove it from tokenizer_config.json")
    extra = [settings.get("extra_special_tokens") or (), settings.get("additional_special_tokens") or ()]
    if any(len(tokens) > MAX_ADDED_TOKENS if isinstance(tokens, dict | list) else tokens for tokens in extra):
        raise ValueError(f"its special tokens are not a list, or more than {MAX_ADDED_TOKENS:,}")


def _known_settings(folder: Path, settings: Mapping[str, Any], backend: Tokenizer) -> dict[str, Any]:
    """Special tokens (by name, or by the ids of config.json) and settings such as padding side and chat template."""
    known: dict[str, Any] = {"clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces") is True}
    config = _optional(folder / model_files.CONFIG)
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
