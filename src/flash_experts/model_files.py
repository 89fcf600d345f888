"""Finds, bounds and reads the files of model folders, which may come from untrusted sources, as strict JSON."""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flash_experts.extras import install_command
from flash_experts.released import is_released, model_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_MEGABYTE = 2**20
# Every file except the weights that a library may read, and its maximum size in bytes.
_MOST_BYTES = {
    CONFIG: _MEGABYTE,
    "generation_config.json": _MEGABYTE,
    INDEX: 16 * _MEGABYTE,
    TOKENIZER: 24 * _MEGABYTE,  # Llama 3's, indented, has 17
    TOKENIZER_CONFIG: 4 * _MEGABYTE,
    "special_tokens_map.json": _MEGABYTE,
    "added_tokens.json": 4 * _MEGABYTE,
    "vocab.json": 16 * _MEGABYTE,
    "merges.txt": 16 * _MEGABYTE,
    "tokenizer.model": 16 * _MEGABYTE,
    "chat_template.json": _MEGABYTE,
    "chat_template.jinja": _MEGABYTE,
    "processor_config.json": _MEGABYTE,
    "preprocessor_config.json": _MEGABYTE,
}
_TEMPLATES = "additional_chat_templates"
_MOST_CONTAINERS = 1_000_000  # lists and objects of a JSON file: each takes some 60 bytes of memory and 2 of the file
_MOST_DIGITS = 40  # transformers writes 10 ** 30 for "no limit"
_ANY_FAMILY: ContextVar[bool] = ContextVar("any_family", default=False)


@contextmanager
def any_family() -> Iterator[None]:
    """Within it, models of every family of transformers may be loaded, not only gpt2, gpt2_moe and llama.

    transformers reads their configuration and tokenizer, so a malicious folder can cost time and memory.
    """
    token = _ANY_FAMILY.set(True)
    try:
        yield
    finally:
        _ANY_FAMILY.reset(token)


def any_family_is_allowed() -> bool:
    """Whether this is within `any_family`."""
    return _ANY_FAMILY.get()


def local_folder(source: str | Path) -> Path:
    """A model folder: the path itself, a released model, or the download of a hub id; else a ValueError."""
    if not str(source):
        raise ValueError("no model: its name is empty: give a folder or a hub id")
    folder = model_folder(source)
    if folder is None and is_released(source):  # on a hub that name would be somebody else's
        raise ValueError(f"no model at {source}: {install_command('models')} brings the released ones")
    return folder or _downloaded(str(source))


@cache
def _downloaded(model_id: str) -> Path:
    _check_hub(model_id)
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.safetensors", *_MOST_BYTES], ignore_patterns="*/*"))
    except Exception as error:  # any error of the hub client
        raise ValueError(_unreachable(model_id, error)) from error


def _check_hub(model_id: str) -> None:
    """Fails at once if the hub cannot be reached; its client would retry for two minutes."""
    try:
        cached = try_to_load_from_cache(model_id, CONFIG)
    except HFValidationError as error:
        raise ValueError(_unreachable(model_id, error)) from error
    if isinstance(cached, str) or constants.is_offline_mode() or getproxies():
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=10).close()
    except OSError as error:
        raise ValueError(_unreachable(model_id, error)) from error


def _unreachable(source: str | Path, error: Exception) -> str:
    return (
        f"no model at {source}: there is no such folder, and it is not available from the hub. Give a folder, or "
        f"models/mtg-base, which needs no hub ({first_line(error)})"
    )


def check_files(folder: Path) -> None:
    """Checks every file that a library may read, except the weights.

    Raises:
        ValueError: a file is too large, is not a regular file, or is a link that leads out of the folder.
    """
    paths = [folder / name for name in _MOST_BYTES]
    if os.path.lexists(folder / _TEMPLATES):
        check_place(folder, folder / _TEMPLATES)
        paths += (folder / _TEMPLATES).glob("*")
    for path in paths:
        if not os.path.lexists(path):
            continue
        check_place(folder, path)
        most, size = _MOST_BYTES.get(path.name, _MEGABYTE), path.stat().st_size
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        if size > most:
            raise ValueError(f"{path} is damaged: {size:,} bytes, where at most {most:,} are allowed")


def check_place(folder: Path, path: Path) -> None:
    """Checks that a file is in its folder, links followed; raises a ValueError.

    The hub's cache keeps files next to its snapshots.
    """
    try:
        real, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is a broken link") from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise ValueError(f"{path} is a link that leads out of its folder: copy the file into the folder")


def has_holes(path: Path) -> bool:
    """Whether more than half of a sparse file was never written: it takes no disk, but memory when read."""
    if not hasattr(os, "SEEK_HOLE"):
        return False
    size, holes, place = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while place < size and holes <= size // 2:
            hole = file.seek(place, os.SEEK_HOLE)
            try:
                place = file.seek(hole, os.SEEK_DATA) if hole < size else size
            except OSError:  # no data after it
                place = size
            holes += place - hole
    return holes > size // 2


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, else ValueError. `check_files` must have bounded its size."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it does not hold settings")
    return content


def parse_json(data: bytes) -> Any:
    """Parses JSON from an untrusted source: UTF-8, finite numbers of at most 40 digits, no duplicate keys.

    Raises:
        ValueError: anything else, in one line.
    """
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"more than {_MOST_CONTAINERS:,} lists and objects")
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON, {error.msg} at line {error.lineno}, column {error.colno}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(double, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {double[:40]!r} occurs twice")
    return values


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not finite")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_doubles, parse_int=_whole, parse_float=_finite, parse_constant=_finite
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
