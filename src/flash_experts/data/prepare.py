"""Prepares the dataset: cleans a source, splits it and writes JSON lines; and loads prepared files."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flash_experts.data.card_table import EMBEDDED, face_names, known_names
from flash_experts.data.cards import Card, CardSource, RawCard
from flash_experts.data.cleaning import CLEANING_VERSION, FLAGS, NOT_CARDS, clean
from flash_experts.data.names import faces_of, normal_form, shown_form
from flash_experts.data.sources import LIVE, load_source, parsed_json
from flash_experts.data.splits import SPLITS, split_by_family
from flash_experts.files import deferred_ctrl_c, flush_file, folder_lock, sha256_of, whole_file, whole_files

META = "meta.json"
KNOWN_NAMES = "known_names.txt"
FILES = (*(f"{split}.jsonl" for split in SPLITS), KNOWN_NAMES, META)
_REPLACING = ".prepare.json"  # old and new hashes: a kill between two renames leaves no meta.json
NAMES_LISTED = 50  # changed names in meta.json; the counts are of all
_HINT = "run `flash-experts prepare`"


def prepare(
    source: str | Path = "embedded",
    out: str | Path = Path("data/mtg"),
    include: Sequence[str] = (),
    overwrite: bool = False,
    only: str | None = None,
) -> dict[str, Any]:
    """Writes train, validation, test and test_iid .jsonl, known_names.txt and meta.json.

    The same source gives the same bytes. ``meta.json`` is written last, so a folder that has one is complete. Its
    ``"changes"`` lists the names that the last run added and removed.

    Args:
        source: see `flash_experts.data.sources.load_source`.
        include: flagged names to keep: ``"jokes"``, ``"franchises"``.
        overwrite: replace existing files that prepare did not write, or that were changed since.
        only: use the cards with this flag alone, without ``include``.

    Returns:
        The content of meta.json, and ``"up_to_date"``: whether identical files existed already.

    Raises:
        ValueError: the source is unknown, malformed or unreachable, or ``out`` has files that must not be replaced.
    """
    out = Path(out)
    if only is not None and include:
        raise ValueError(f"only the {only} are taken: leave out --include {','.join(include)}, or --only")
    _check_out(out, source, overwrite)
    cards = load_source(source)
    rows = cards.rows if only is None else _flagged(cards.rows, only)
    cleaned = clean(rows, include if only is None else [only])
    if not cleaned.cards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in cleaned.dropped.items())
        raise ValueError(f"{source}: no name is left after cleaning ({reasons or 'there was none'})")
    split = split_by_family(cleaned.cards)
    known = dict.fromkeys((*known_names(), *_names_of(cards)))
    files = {f"{name}.jsonl": _lines(card.to_json() for card in split.parts[name]) for name in SPLITS}
    files[KNOWN_NAMES] = "".join(f"{name}\n" for name in known).encode("utf-8")
    meta: dict[str, Any] = {
        "source": cards.name,
        "version": cards.version,
        "source_sha256": cards.sha256,
        "cleaning_version": CLEANING_VERSION,
        "include": sorted(set(include)),
        **({} if only is None else {"only": only}),
        "rows": len(rows),
        "faces": cleaned.faces,
        "dropped": cleaned.dropped,
        "unread": {**cards.unread, **cleaned.unread},
        "names": len(cleaned.cards),
        "counts": {name: len(split.parts[name]) for name in SPLITS},
        "known_names": len(known),
        "families": {
            "count": split.families,
            "largest": split.largest_family,
            "too_large_to_hold_out": split.oversized,
        },
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    up_to_date = _write(out, source, overwrite, files, meta, [card.name for card in cleaned.cards])
    return meta | {"up_to_date": up_to_date}


def _flagged(rows: Iterable[RawCard], flag: str) -> tuple[RawCard, ...]:
    if flag not in FLAGS:
        raise ValueError(f"no cards have the flag {flag!r}: use {' or '.join(FLAGS)}")
    return tuple(row for row in rows if row.flag == flag)


def _names_of(source: CardSource) -> Iterable[str]:
    """Names of a source that count as known: all names of a user's file, tokens and duplicates included."""
    if source.name in (EMBEDDED, *LIVE):
        return face_names(row.name for row in source.rows if row.layout not in NOT_CARDS)
    return filter(None, (shown_form(face) for row in source.rows for face in faces_of(row.name)))


def _write(
    out: Path, source: str | Path, overwrite: bool, files: dict[str, bytes], meta: dict[str, Any], names: Sequence[str]
) -> bool:
    """Adds the changes to ``meta`` and writes all files; whether identical ones existed already."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(out):
            meta["changes"] = _changes(out, meta, names)
            files[META] = (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
            if all((out / name).is_file() and (out / name).read_bytes() == data for name, data in files.items()):
                return True
            _check_out(out, source, overwrite)
            _write_all(out, files, meta["sha256"])
            return False
    except BaseException:
        if made:
            with suppress(OSError):
                out.rmdir()
        raise


def _check_out(out: Path, source: str | Path, overwrite: bool) -> None:
    """Checks by hash that existing files were written by a previous run, and none of them is the source."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")
    hashes = _hashes_of(out / META)
    known = [*hashes, *_hashes_of(out / _REPLACING)]
    for path in (out / name for name in FILES):
        if Path(source).is_file() and path.exists() and path.samefile(source):
            raise ValueError(f"--source {source} is one of the files that prepare writes to {out}: give another --out")
        is_own = bool(hashes) if path.name == META else path.is_file() and (path.name, sha256_of(path)) in known
        if not is_own and os.path.lexists(path) and (path.is_dir() or not overwrite):
            raise ValueError(
                f"{path} was not written by prepare, or has changed since: give another --out, or --overwrite to "
                "replace it"
            )


def _hashes_of(path: Path) -> list[tuple[str, str]]:
    """Names and SHA-256 of files listed in a meta.json; empty if prepare did not write it."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        hashes = meta["sha256"]
        pairs = hashes.items() if isinstance(hashes, dict) else hashes
        return [(str(name), str(digest)) for name, digest in pairs] if "cleaning_version" in meta else []
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []


def _changes(out: Path, meta: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any] | None:
    """Names added and removed since the existing files; their own record if nothing changed; None without files."""
    try:
        before = load_meta(out)
        if {**before, "changes": None} == {**meta, "changes": None}:
            return before.get("changes")
        old = {card.name for split in SPLITS for card in load_split(out, split)}
    except (ValueError, OSError):
        return None
    new = set(names)
    added, removed = sorted(new - old), sorted(old - new)
    return {
        "since": {key: before.get(key) for key in ("source", "version", "cleaning_version", "include")},
        "names_before": len(old),
        "added": len(added),
        "removed": len(removed),
        "added_names": added[:NAMES_LISTED],
        "removed_names": removed[:NAMES_LISTED],
    }


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")


def _write_all(out: Path, files: dict[str, bytes], hashes: Mapping[str, str]) -> None:
    """Writes all files or, if one fails, none."""
    replacing = out / _REPLACING
    either = {"cleaning_version": CLEANING_VERSION, "sha256": [*_hashes_of(out / META), *hashes.items()]}
    with deferred_ctrl_c(), whole_files([out / name for name in files]) as temporaries:  # META is the last
        for temporary, data in zip(temporaries, files.values(), strict=True):
            temporary.write_bytes(data)
            flush_file(temporary)
        with whole_file(replacing) as temporary:
            temporary.write_text(json.dumps(either), encoding="utf-8")
        Path(os.path.realpath(out / META)).unlink(missing_ok=True)
    replacing.unlink(missing_ok=True)


def load_split(folder: str | Path, split: str) -> list[Card]:
    """Loads one of `SPLITS` from a folder that `prepare` wrote; a ValueError for an unknown one, or as `load_cards`."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
    return load_cards(_existing(folder, f"{split}.jsonl"))


def load_cards(path: str | Path) -> list[Card]:
    """Loads a file of prepared lines, which may be compressed (``.jsonl.xz``).

    Raises:
        ValueError: there is no such file, it is empty, or a line is malformed (``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: give a file of prepared lines, such as generate --attributes-from writes")
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            cards = [_card(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not a whole xz file ({error})") from error
    if not cards:
        raise ValueError(f"{path} is empty: {_HINT} again")
    return cards


def _card(line: bytes, where: str) -> Card:
    try:
        fields = parsed_json(line.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {_HINT} again") from error
    except ValueError as error:
        raise ValueError(f"{error}: {_HINT} again") from error
    return Card.from_json(fields, where)


def load_known_names(folder: str | Path) -> frozenset[str]:
    """Normal forms of all names in a prepared folder: known cards and the names of the splits."""
    names = _existing(folder, KNOWN_NAMES).read_text(encoding="utf-8").splitlines()
    names += [card.name for split in SPLITS for card in load_split(folder, split)]
    return frozenset(map(normal_form, names))


def extra_cards(path: str | Path, folder: str | Path) -> list[Card]:
    """Loads cards to train on in addition to a folder's training split, such as a teacher's names.

    Raises a ValueError as `load_cards`, or if a name is in a held-out split of the folder.
    """
    cards = load_cards(path)
    held_out = {normal_form(card.name) for split in SPLITS if split != "train" for card in load_split(folder, split)}
    for number, card in enumerate(cards, start=1):
        if normal_form(card.name) in held_out:
            raise ValueError(
                f"{path}: name {number:,}, {card.name!r}, is held out in {folder}: a model trained on it could not be "
                "evaluated there. Remove its line"
            )
    return cards


def load_meta(folder: str | Path) -> dict[str, Any]:
    """Loads the meta.json that `prepare` wrote; a ValueError if it is missing or malformed."""
    path = _existing(folder, META)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {_HINT} again") from error
    if not isinstance(meta, dict) or "counts" not in meta:
        raise ValueError(f"{path}: not what prepare wrote: {_HINT} again")
    return meta


def _existing(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        missing = path.name if path.parent.is_dir() else "prepared names"
        raise ValueError(f"no {missing} in {path.parent}: run `flash-experts prepare --out {path.parent}`")
    return path


def check_prepared(folder: str | Path, splits: Sequence[str] = ("train", "validation")) -> None:
    """Raises a ValueError if a split's file differs from its SHA-256 in meta.json."""
    recorded = load_meta(folder).get("sha256", {})
    for split in splits:
        path = Path(folder) / f"{split}.jsonl"
        if path.name not in recorded or not path.is_file():  # `load_split` reports a missing file
            continue
        if sha256_of(path) != recorded[path.name]:
            raise ValueError(
                f"{path} is not the file that was prepared (its SHA-256 is not the one in meta.json): run "
                f"`flash-experts prepare --out {folder}` again, or, if you changed it on purpose, remove its line from "
                "sha256 in meta.json"
            )
