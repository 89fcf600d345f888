"""The download cache: a file in it is complete and verified, or absent.

    <cache>/scryfall/manifest.json              names, SHA-256, version, time of download
    <cache>/scryfall/oracle_cards-1f0c9a2b      content
    <cache>/scryfall/oracle_cards.part(.json)   an unfinished download

The manifest is replaced atomically after the files that it names, so a reader sees the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from flash_experts.extras import require
from flash_experts.files import sha256_of

CACHE_VARIABLE = "FLASH_EXPERTS_CACHE"
MAX_AGE = timedelta(hours=24)  # Scryfall asks for this at least; MTGJSON is built once a day
_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """``$FLASH_EXPERTS_CACHE``, or the user's cache folder on this system."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    require(f"a cache outside of ${CACHE_VARIABLE}", "platformdirs")
    from platformdirs import user_cache_path

    return user_cache_path("flash-experts", appauthor=False)


@dataclass(frozen=True, slots=True)
class CachedFiles:
    """The cached files of a source with its own version; ``fetched`` (with a zone) is the download or last check."""

    version: str
    fetched: datetime
    files: dict[str, Path]
    sha256: dict[str, str]

    def is_fresh(self, now: datetime) -> bool:
        """Whether no check for updates is needed. A date in the future, from a wrong clock, is not fresh."""
        return timedelta(0) <= now - self.fetched < MAX_AGE


class Cache:
    """The cache folder of one source, created when needed."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def lock(self, seconds: float) -> Iterator[None]:
        """Locks the folder for one process; raises a ValueError if another one holds it for longer than ``seconds``."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=seconds):
                yield
        except Timeout as error:
            raise ValueError(f"another process is downloading to {self.folder}: wait for it to end") from error

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def load(self) -> CachedFiles | None:
        """The cached files, if every file still has its SHA-256; else None."""
        try:
            manifest = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
            files = {name: self.folder / entry["file"] for name, entry in manifest["files"].items()}
            fetched = datetime.fromisoformat(manifest["fetched"])
            whole = all(sha256_of(file) == digests[name] for name, file in files.items())
            if fetched.tzinfo is None or not files or not whole:
                return None
            return CachedFiles(manifest["version"], fetched, files, digests)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def store(self, parts: Mapping[str, Path], digests: Mapping[str, str], version: str, now: datetime) -> CachedFiles:
        """Moves complete, verified files into the cache, by name. For a reader, all files change or none."""
        files = {}
        for name, part in parts.items():
            files[name] = self.folder / f"{name}-{digests[name][:8]}"
            os.replace(part, files[name])
            part.with_name(part.name + ".json").unlink(missing_ok=True)
        cached = CachedFiles(version, now, files, dict(digests))
        self._write_manifest(cached)
        for name, path in files.items():
            for old in self.folder.glob(f"{name}-{'[0-9a-f]' * 8}"):
                if old != path:
                    old.unlink(missing_ok=True)
        return cached

    def touch(self, cached: CachedFiles, now: datetime) -> CachedFiles:
        """Records that the cached files are still the newest."""
        cached = CachedFiles(cached.version, now, cached.files, cached.sha256)
        self._write_manifest(cached)
        return cached

    def _write_manifest(self, cached: CachedFiles) -> None:
        files = {name: {"file": path.name, "sha256": cached.sha256[name]} for name, path in cached.files.items()}
        manifest = {"version": cached.version, "fetched": cached.fetched.isoformat(), "files": files}
        temporary = self.folder / f"{_MANIFEST}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / _MANIFEST)
