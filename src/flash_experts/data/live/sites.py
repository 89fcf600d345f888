"""The newest cards from Scryfall or MTGJSON, cached for a day; without a network, older ones with a warning.

FLASH_EXPERTS_CACHE           cache folder
FLASH_EXPERTS_SCRYFALL_URL    instead of https://api.scryfall.com
FLASH_EXPERTS_MTGJSON_URL     instead of https://mtgjson.com/api/v5
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

from flash_experts.data.card_table import EMBEDDED
from flash_experts.data.cards import CardSource, RawCard
from flash_experts.data.live import mtgjson, scryfall
from flash_experts.data.live.cache import Cache, CachedFiles, cache_folder
from flash_experts.data.live.download import Downloader, DownloadError, Partial
from flash_experts.data.live.unpack import DamagedError
from flash_experts.extras import require
from flash_experts.files import sha256_of

T = TypeVar("T")


class Site(Protocol):
    """A live source of cards."""

    name: str
    title: str

    def refresh(self, downloader: Downloader, cache: Cache, cached: CachedFiles | None, now: datetime) -> CardSource:
        """Updates the cache and reads it."""

    def read(self, files: Mapping[str, Path], version: str) -> CardSource:
        """Reads cached or downloaded files."""


def _base(variable: str, usual: str) -> str:
    return (os.environ.get(variable) or usual).rstrip("/")


class Scryfall:
    """https://scryfall.com"""

    name, title = "scryfall", "Scryfall"

    def refresh(self, downloader: Downloader, cache: Cache, cached: CachedFiles | None, now: datetime) -> CardSource:
        file = scryfall.bulk_file(downloader, _base("FLASH_EXPERTS_SCRYFALL_URL", "https://api.scryfall.com"))
        if cached is not None and cached.version == file.updated:
            return self.read(cache.touch(cached, now).files, file.updated)
        part = cache.part(scryfall.BULK_TYPE)
        try:
            source = self._fetch(downloader, file, part)
        except DamagedError:
            source = self._fetch(downloader, file, part)
        cache.store({scryfall.BULK_TYPE: part}, {scryfall.BULK_TYPE: source.sha256}, file.updated, now)
        return source

    def _fetch(self, downloader: Downloader, file: scryfall.BulkFile, part: Path) -> CardSource:
        """Downloads and reads the file. (Scryfall publishes no checksum, but gzip contains one.)"""
        downloader.file(file.url, part, file.size)
        return _checked(file.url, part, lambda: self.read({scryfall.BULK_TYPE: part}, file.updated))

    def read(self, files: Mapping[str, Path], version: str) -> CardSource:
        path = files[scryfall.BULK_TYPE]
        return _source(self.name, version, path, tuple(scryfall.read_cards(path)))


class Mtgjson:
    """https://mtgjson.com, with all printings for rarities, or without."""

    title = "MTGJSON"

    def __init__(self, with_printings: bool):
        self.name = "mtgjson-printings" if with_printings else "mtgjson"
        self._names = (mtgjson.CARDS, mtgjson.SETS, *((mtgjson.PRINTINGS,) if with_printings else ()))

    def refresh(self, downloader: Downloader, cache: Cache, cached: CachedFiles | None, now: datetime) -> CardSource:
        base = _base("FLASH_EXPERTS_MTGJSON_URL", "https://mtgjson.com/api/v5")
        urls = {name: f"{base}/{name}" for name in self._names}
        digests = {name: mtgjson.checksum(downloader, url) for name, url in urls.items()}
        if cached is not None and cached.sha256 == digests:
            return self.read(cache.touch(cached, now).files, cached.version)
        parts = {name: cache.part(name) for name in urls}
        for name, url in urls.items():
            try:
                _fetch(downloader, url, parts[name], digests[name])
            except DamagedError:  # the site rebuilds its files each day, perhaps just now
                digests[name] = mtgjson.checksum(downloader, url)
                _fetch(downloader, url, parts[name], digests[name])
        source = _checked(urls[mtgjson.CARDS], parts[mtgjson.CARDS], lambda: self.read(parts, ""))
        cache.store(parts, digests, source.version, now)
        return source

    def read(self, files: Mapping[str, Path], version: str) -> CardSource:
        path = files[mtgjson.CARDS]
        sets = mtgjson.read_sets(files[mtgjson.SETS])
        rarities = mtgjson.read_rarities(files[mtgjson.PRINTINGS]) if mtgjson.PRINTINGS in self._names else {}
        return _source(self.name, mtgjson.read_version(path), path, tuple(mtgjson.read_cards(path, sets, rarities)))


SITES: dict[str, Site] = {
    site.name: site for site in (Scryfall(), Mtgjson(with_printings=False), Mtgjson(with_printings=True))
}


def _source(name: str, version: str, path: Path, rows: tuple[RawCard, ...]) -> CardSource:
    if not rows:
        raise DamagedError("it holds no cards")
    return CardSource(name, version, sha256_of(path), rows)


def _checked(url: str, part: Path, read: Callable[[], T]) -> T:
    """Reads a downloaded file; deletes it and names it in the error if it is damaged."""
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
    """Loads the cards of a live source, one of `SITES`; ``now`` has a time zone.

    Raises:
        ValueError: they are available neither from the network nor from the cache.
        OSError: the cache cannot be written.
    """
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
