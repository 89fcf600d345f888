"""The folder where downloaded files are kept: whole and checked, or not there.

    <cache>/scryfall/manifest.json              what is there: names, SHA-256, version, when it was fetched
    <cache>/scryfall/oracle_cards-1f0c9a2b      the bytes
    <cache>/scryfall/oracle_cards.part(.json)   a file on its way

The manifest is replaced after the files that it names, at once, so a reader sees the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

CACHE_VARIABLE = "FLASH_EXPERTS_CACHE"
KEEP = timedelta(hours=24)  # Scryfall asks for this at least; MTGJSON is built once a day
_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """``$FLASH_EXPERTS_CACHE``, or the place where this system keeps a user's caches."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise ValueError(f"a cache needs platformdirs (pip install platformdirs), or set {CACHE_VARIABLE}") from error
    return user_cache_path("flash-experts", appauthor=False)


@dataclass(frozen=True, slots=True)
class Held:
    """What the cache holds of a source.

    Attributes:
        version: what the source called it, to ask whether there is something newer.
        fetched: when, with its time zone.
        files: where each file is, by name.
        sha256: of each file, by name.
    """

    version: str
    fetched: datetime
    files: dict[str, Path]
    sha256: dict[str, str]

    def is_fresh(self, now: datetime) -> bool:
        """Whether it is young enough to ask nobody. A date in the future is a wrong clock, and not fresh."""
        return timedelta(0) <= now - self.fetched < KEEP


class Cache:
    """The files of one source.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def lock(self, seconds: float) -> Iterator[None]:
        """One process at a time.

        Raises:
            ValueError: another one has it for longer than ``seconds``.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=seconds):
                yield
        except Timeout as error:
            raise ValueError(f"another process is downloading to {self.folder}: wait for it to end") from error

    def part(self, name: str) -> Path:
        """Where a file grows until it is whole."""
        return self.folder / f"{name}.part"

    def held(self) -> Held | None:
        """What is there, if every file has the bytes that were checked when it came; else None."""
        try:
            manifest = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
            files = {name: self.folder / entry["file"] for name, entry in manifest["files"].items()}
            fetched = datetime.fromisoformat(manifest["fetched"])
            whole = all(sha256_of(file) == digests[name] for name, file in files.items())
            if fetched.tzinfo is None or not files or not whole:
                return None
            return Held(manifest["version"], fetched, files, digests)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def store(self, parts: Mapping[str, Path], digests: Mapping[str, str], version: str, now: datetime) -> Held:
        """Takes in whole files that were checked. Either all change places or, for a reader, none.

        Args:
            parts: name -> file, which is moved.
            digests: name -> SHA-256 of it.
            version: the source's word for it.
            now: with a time zone.
        """
        files = {}
        for name, part in parts.items():
            files[name] = self.folder / f"{name}-{digests[name][:8]}"
            os.replace(part, files[name])
            part.with_name(part.name + ".json").unlink(missing_ok=True)
        held = Held(version, now, files, dict(digests))
        self._write_manifest(held)
        for name, path in files.items():
            for old in self.folder.glob(f"{name}-{'[0-9a-f]' * 8}"):
                if old != path:
                    old.unlink(missing_ok=True)
        return held

    def touch(self, held: Held, now: datetime) -> Held:
        """Notes that what is there was still the newest."""
        held = Held(held.version, now, held.files, held.sha256)
        self._write_manifest(held)
        return held

    def _write_manifest(self, held: Held) -> None:
        files = {name: {"file": path.name, "sha256": held.sha256[name]} for name, path in held.files.items()}
        manifest = {"version": held.version, "fetched": held.fetched.isoformat(), "files": files}
        temporary = self.folder / f"{_MANIFEST}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / _MANIFEST)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
