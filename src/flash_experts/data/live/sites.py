"""The newest cards from Scryfall or MTGJSON, cached for a day; without a network, older ones with a warning.

FLASH_EXPERTS_CACHE           cache folder
FLASH_EXPERTS_SCRYFALL_URL    instead of https://api.scryfall.com
FLASH_EXPERTS_MTGJSON_URL     instead of https://mtgjson.com/api/v5

The cache has complete and verified files::

    <cache>/scryfall/manifest.json              names, SHA-256, version, time of download; replaced after its files
    <cache>/scryfall/oracle_cards-1f0c9a2b      content
    <cache>/scryfall/oracle_cards.part(.json)   an unfinished download
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flash_experts.data.card_table import EMBEDDED
from flash_experts.data.cards import CardSource, RawCard
from flash_experts.data.live import bulk_files
from flash_experts.data.live.bulk_files import DamagedError
from flash_experts.data.live.download import Downloader, DownloadError, Partial, checked_url
from flash_experts.extras import require
from flash_experts.files import sha256_of, whole_file

CACHE_VARIABLE = "FLASH_EXPERTS_CACHE"
MAX_AGE = timedelta(hours=24)  # Scryfall asks for this at least; MTGJSON is built once a day
_MANIFEST = "manifest.json"
_BULK_TYPE = "oracle_cards"
_CARDS, _SETS, _PRINTINGS = "AtomicCards.json.gz", "SetList.json.gz", "AllPrintings.json.gz"


def cache_folder() -> Path:
    """``$FLASH_EXPERTS_CACHE``, or the user's cache folder on this system."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    require(f"a cache outside of ${CACHE_VARIABLE}", "platformdirs")
    from platformdirs import user_cache_path

    return user_cache_path("flash-experts", appauthor=False)


@dataclass(frozen=True, slots=True)
class CachedFiles:
    """The cached files of a source."""

    version: str  # the source's own
    fetched: datetime  # of the download or last check, with a zone
    files: dict[str, Path]
    sha256: dict[str, str]

    def is_fresh(self, now: datetime) -> bool:
        """Whether no check for updates is needed. A date in the future, of a wrong clock, is not fresh."""
        return timedelta(0) <= now - self.fetched < MAX_AGE


class Cache:
    """The cache folder of one source, created when needed."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def lock(self, seconds: float) -> Iterator[None]:
        """Locks the folder for one process; a ValueError if another one holds it for longer than ``seconds``."""
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
        cached = self._recorded(CachedFiles(version, now, files, dict(digests)))
        for name, path in files.items():
            for old in self.folder.glob(f"{name}-{'[0-9a-f]' * 8}"):
                if old != path:
                    old.unlink(missing_ok=True)
        return cached

    def touch(self, cached: CachedFiles, now: datetime) -> CachedFiles:
        """Records that the cached files are still the newest."""
        return self._recorded(replace(cached, fetched=now))

    def _recorded(self, cached: CachedFiles) -> CachedFiles:
        files = {name: {"file": path.name, "sha256": cached.sha256[name]} for name, path in cached.files.items()}
        manifest = {"version": cached.version, "fetched": cached.fetched.isoformat(), "files": files}
        with whole_file(self.folder / _MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        return cached


def _base(variable: str, usual: str) -> str:
    return (os.environ.get(variable) or usual).rstrip("/")


@dataclass(frozen=True, slots=True)
class BulkFile:
    """An entry of Scryfall's index."""

    url: str
    updated: str  # time of the export
    size: int | None  # bytes


def bulk_file(downloader: Downloader, base: str) -> BulkFile:
    """The newest file in Scryfall's index: gzip of JSON lines, or (until July 2026) a JSON array.

    Raises a `DownloadError` if it is not listed.
    """
    address = f"{base}/bulk-data"
    text = downloader.text(address, accept="application/json")
    try:
        entries = json.loads(text)["data"]
        entry = next(entry for entry in entries if entry["type"] == _BULK_TYPE)
        compressed = "jsonl_download_uri" in entry
        url, updated = entry["jsonl_download_uri" if compressed else "download_uri"], entry["updated_at"]
        size = entry.get("compressed_size") if compressed else None
        return BulkFile(checked_url(str(url), address), str(updated), size if isinstance(size, int) else None)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        if isinstance(error, DownloadError):
            raise
        page = " (a web page: does the network require a login?)" if text.lstrip().startswith("<") else ""
        raise DownloadError(f"{address}: the response lists no file of {_BULK_TYPE}{page}") from error


class Scryfall:
    """https://scryfall.com"""

    name, title = "scryfall", "Scryfall"

    def refresh(self, downloader: Downloader, cache: Cache, cached: CachedFiles | None, now: datetime) -> CardSource:
        """Updates the cache and reads it."""
        file = bulk_file(downloader, _base("FLASH_EXPERTS_SCRYFALL_URL", "https://api.scryfall.com"))
        if cached is not None and cached.version == file.updated:
            return self.read(cache.touch(cached, now).files, file.updated)
        part = cache.part(_BULK_TYPE)
        try:
            source = self._fetch(downloader, file, part)
        except DamagedError:
            source = self._fetch(downloader, file, part)
        cache.store({_BULK_TYPE: part}, {_BULK_TYPE: source.sha256}, file.updated, now)
        return source

    def _fetch(self, downloader: Downloader, file: BulkFile, part: Path) -> CardSource:
        # Scryfall publishes no checksum, but gzip contains one.
        downloader.file(file.url, part, file.size)
        return _checked(file.url, part, lambda: self.read({_BULK_TYPE: part}, file.updated))

    def read(self, files: Mapping[str, Path], version: str) -> CardSource:
        path = files[_BULK_TYPE]
        return _source(self.name, version, path, tuple(bulk_files.read_scryfall(path)))


class Mtgjson:
    """https://mtgjson.com, with all printings for rarities, or without."""

    title = "MTGJSON"

    def __init__(self, with_printings: bool):
        self.name = "mtgjson-printings" if with_printings else "mtgjson"
        self._names = (_CARDS, _SETS, *((_PRINTINGS,) if with_printings else ()))

    def refresh(self, downloader: Downloader, cache: Cache, cached: CachedFiles | None, now: datetime) -> CardSource:
        base = _base("FLASH_EXPERTS_MTGJSON_URL", "https://mtgjson.com/api/v5")
        urls = {name: f"{base}/{name}" for name in self._names}
        digests = {name: _checksum(downloader, url) for name, url in urls.items()}
        if cached is not None and cached.sha256 == digests:
            return self.read(cache.touch(cached, now).files, cached.version)
        parts = {name: cache.part(name) for name in urls}
        for name, url in urls.items():
            try:
                _fetch(downloader, url, parts[name], digests[name])
            except DamagedError:  # the site rebuilds its files each day, perhaps just now
                digests[name] = _checksum(downloader, url)
                _fetch(downloader, url, parts[name], digests[name])
        source = _checked(urls[_CARDS], parts[_CARDS], lambda: self.read(parts, ""))
        cache.store(parts, digests, source.version, now)
        return source

    def read(self, files: Mapping[str, Path], version: str) -> CardSource:
        path = files[_CARDS]
        sets = bulk_files.read_sets(files[_SETS])
        rarities = bulk_files.read_rarities(files[_PRINTINGS]) if _PRINTINGS in self._names else {}
        return _source(
            self.name, bulk_files.read_version(path), path, tuple(bulk_files.read_mtgjson(path, sets, rarities))
        )


def _checksum(downloader: Downloader, url: str) -> str:
    """The SHA-256 of the file at ``url``, from its ``.sha256`` file; a `DownloadError` if there is none."""
    text = downloader.text(f"{url}.sha256")
    found = re.match(r"\s*([0-9a-fA-F]{64})\b", text)
    if found is None:
        raise DownloadError(f"{url}.sha256: not a checksum but {text.strip()[:40]!r}")
    return found[1].lower()


SITES = {site.name: site for site in (Scryfall(), Mtgjson(with_printings=False), Mtgjson(with_printings=True))}


def _source(name: str, version: str, path: Path, rows: tuple[RawCard, ...]) -> CardSource:
    if not rows:
        raise DamagedError("it holds no cards")
    return CardSource(name, version, sha256_of(path), rows)


def _checked(url: str, part: Path, read: Callable[[], CardSource]) -> CardSource:
    """Reads a downloaded file; if it is damaged, deletes it and names it in the error."""
    try:
        return read()
    except DamagedError as error:
        Partial(part).discard()
        raise DamagedError(f"{url}: {error}") from error


def _fetch(downloader: Downloader, url: str, part: Path, digest: str) -> None:
    downloader.file(url, part)
    found = sha256_of(part)
    if found != digest:
        Partial(part).discard()
        raise DamagedError(f"{url}: its SHA-256 is {found[:12]}..., not {digest[:12]}...")


def read_live(name: str, downloader: Downloader | None = None, now: datetime | None = None) -> CardSource:
    """Loads the cards of one of `SITES`; a ValueError if neither the network nor the cache has them."""
    require(f"--source {name}", "httpx", "ijson")
    site, now = SITES[name], now or datetime.now(UTC)
    downloader = downloader or Downloader()
    cache = Cache(cache_folder() / name)
    with cache.lock(downloader.policy.total_seconds):
        cached = cache.load()
        if cached is not None and cached.is_fresh(now):
            return site.read(cached.files, cached.version)
        try:
            return site.refresh(downloader, cache, cached, now)
        except (DownloadError, DamagedError) as error:
            if cached is None:
                raise ValueError(f"no cards from {site.title}: {error}; use --source {EMBEDDED}") from error
            date = cached.fetched.astimezone().date().isoformat()
            warnings.warn(f"{error}; using {site.title}'s cards of {date} from the cache", stacklevel=2)
            return site.read(cached.files, cached.version)
