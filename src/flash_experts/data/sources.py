"""Loads raw cards from the embedded table, a live source or a user's file."""

from __future__ import annotations

from pathlib import Path

from flash_experts.data.card_table import EMBEDDED, read_embedded
from flash_experts.data.cards import FILE_KINDS, FILE_SUFFIXES, CardSource
from flash_experts.terminal import did_you_mean

LIVE = ("scryfall", "mtgjson", "mtgjson-printings")


def load_source(source: str | Path) -> CardSource:
    """Loads the raw cards of ``"embedded"``, one of `LIVE`, or a csv, tsv, json, jsonl or txt file.

    Raises:
        ValueError: the source is unknown, malformed (``file:line``), or available neither from the network nor from
            the cache.
    """
    if source == EMBEDDED:
        return read_embedded()
    if source in LIVE:
        from flash_experts.data.live.sites import read_live

        return read_live(str(source))
    path = Path(source)
    if path.is_file():
        from flash_experts.data.card_files import read_file

        return read_file(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file ({FILE_KINDS}) or the source {EMBEDDED!r}")
    if path.suffix.lower() in FILE_SUFFIXES or path.parent != Path("."):
        raise ValueError(f"no file {path}: name an existing file, or the source {EMBEDDED!r}")
    choices = f"use {', '.join(map(repr, (EMBEDDED, *LIVE)))} or a file ({FILE_KINDS})"
    hint = did_you_mean(str(source), [EMBEDDED, *LIVE, *_card_files_next_to(path)], choices)
    raise ValueError(f"unknown source {str(source)!r}: {hint}")


def _card_files_next_to(path: Path) -> list[str]:
    return [file.name for file in path.parent.iterdir() if file.suffix.lower() in FILE_SUFFIXES]
