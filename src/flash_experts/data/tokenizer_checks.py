"""A tokenizer's files checked before they are loaded: they may come from an untrusted source.

The tokenizers library takes what a tokenizer.json asks for: a normalizer that doubles a text thirty times, a regular
expression that takes hours, a prefix at which its BPE panics. Only parts whose cost is known reach it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MOST_TOKENS = 300_000  # Llama 3 has 128,256
MOST_ADDED = 10_000
_MOST_PARTS = 16  # of a sequence
_MOST_TEXT = 64  # characters of a replacement or a prefix
_KINDS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"},
    "pre_tokenizer": {
        *("ByteLevel", "Digits", "Split", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"),
    },
    "post_processor": {"ByteLevel", "TemplateProcessing"},
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "BPEDecoder"},
}
_ONCE = ("ByteLevel", "Metaspace")  # each writes a text longer than it was
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Regular expressions of known tokenizers: GPT-2, Llama 3 (GPT-4's), Qwen 2. Others may take time without a bound.
_EXPRESSIONS = {_GPT2, _GPT2_PUBLISHED, *(_CONTRACTIONS + digits + _TAIL for digits in (r"\p{N}{1,3}", r"\p{N}"))}

WORD_MARK = "\ue000"  # of Unicode's private use: what decoding puts before a whole word of a prompt
_BEFORE_WORDS = re.compile(r"\^\(\?=\(\?:[\w'|-]+\)\$\)")
_MOST_WORDS = 100_000  # characters


def before_words(words: Iterable[str]) -> str:
    """A regular expression of the empty text before a token that is one of these words, of letters and hyphens."""
    return f"^(?=(?:{'|'.join(words)})$)"


def check_tokenizer(content: dict[str, Any]) -> None:
    """Checks the content of a tokenizer.json: a BPE of known parts, and of bounded size.

    Raises:
        ValueError: it is not.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("its model is not a BPE, the kind of GPT-2 and Llama")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"a BPE with {key} is not one of GPT-2's or Llama's kind")
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("its vocabulary is damaged")
    if len(vocab) > MOST_TOKENS or len(merges) > 2 * MOST_TOKENS or len(added) > MOST_ADDED:
        raise ValueError(f"more than {MOST_TOKENS:,} tokens, or {MOST_ADDED:,} added ones")
    ids = [*vocab.values(), *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if not all(type(index) is int and 0 <= index < MOST_TOKENS + MOST_ADDED for index in ids):
        raise ValueError("a token has no id, or one that is larger than any vocabulary")
    for place, kinds in _KINDS.items():
        parts = list(_parts(place, content.get(place)))
        if any(sum(part.get("type") == once for part in parts) > 1 for once in _ONCE):
            raise ValueError(f"its {place} makes text longer more than once")
        for part in parts:
            if part.get("type") not in kinds:
                raise ValueError(f"its {place} {str(part.get('type'))[:40]!r} is not of {', '.join(sorted(kinds))}")
            _CHECKS.get(str(part["type"]), _check_nothing)(part)


def _parts(place: str, value: Any) -> Iterator[dict[str, Any]]:
    """The parts of a component: of a sequence each, else the one, or none."""
    parts: Any = [] if value is None else [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        parts = value.get(_PARTS.get(place, f"{place}s"))
    if not isinstance(parts, list) or len(parts) > _MOST_PARTS or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"its {place} is damaged, or of more than {_MOST_PARTS} parts")
    yield from parts


def _check_replace(part: dict[str, Any]) -> None:
    """A text for one that is not shorter, so that no sequence of these makes a text grow; or a mark before a word."""
    pattern, new = part.get("pattern"), part.get("content")
    words = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(words, str) and len(words) <= _MOST_WORDS and _BEFORE_WORDS.fullmatch(words) and new == WORD_MARK:
        return
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(old, str) or not isinstance(new, str) or not old or len(new) > len(old):
        raise ValueError("it replaces text by a longer one, or by a regular expression")


def _check_prepend(part: dict[str, Any]) -> None:
    if not isinstance(part.get("prepend"), str) or len(part["prepend"]) > _MOST_TEXT:
        raise ValueError("it puts a long text before each")


def _check_split(part: dict[str, Any]) -> None:
    pattern = part.get("pattern")
    if not isinstance(pattern, dict) or ("String" not in pattern and pattern.get("Regex") not in _EXPRESSIONS):
        raise ValueError("it splits text at a regular expression that is not of GPT-2, Llama 3 or Qwen 2")


def _check_template(part: dict[str, Any]) -> None:
    templates, special = (part.get("single"), part.get("pair")), part.get("special_tokens")
    tokens = list(special.values()) if isinstance(special, dict) else []
    if (
        not all(isinstance(pieces, list) and len(pieces) <= _MOST_PARTS for pieces in templates)
        or len(tokens) > _MOST_PARTS
        or not all(isinstance(token, dict) and len(token.get("ids") or ()) <= _MOST_PARTS for token in tokens)
    ):
        raise ValueError(f"its template adds more than {_MOST_PARTS} tokens")


def _check_nothing(part: dict[str, Any]) -> None:
    """A part without texts of its own."""


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Replace": _check_replace,
    "Prepend": _check_prepend,
    "Split": _check_split,
    "TemplateProcessing": _check_template,
}
