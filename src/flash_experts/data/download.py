"""A file over HTTP that arrives whole or not at all: streamed to disk, resumed, retried, bounded in size and time.

How an answer is taken:

    200                        the file from its beginning
    206, same validator        the rest of a file that broke off (Range, If-Range)
    408 425 429 500 502-504    again later: Retry-After is heeded, else exponential backoff with jitter
    anything else              an error at once

A broken connection counts as "again later". Nothing here knows what is in the files.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flash_experts.data.progress import Bar

if TYPE_CHECKING:
    import httpx

MAX_FILE_BYTES = 512 * 2**20  # ten times what the sources have; a server that sends more is broken
MAX_TEXT_BYTES = 2**20  # of an index or a checksum
MAX_REDIRECTS = 5
LOCKOUT_SECONDS = 30.0  # how long Scryfall answers nobody whom it told 429
_AGAIN_LATER = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        connect_seconds: for a connection.
        read_seconds: for the next bytes.
        total_seconds: for a whole file, with every retry and wait.
        attempts: requests for a file in all.
        connect_attempts: those that find no server: without a network one should hear of it soon.
        first_wait: seconds before the second attempt; doubled each time, less up to a half by chance.
        longest_wait: where doubling ends. A Retry-After may ask for more.
    """

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    total_seconds: float = 1800.0
    attempts: int = 8
    connect_attempts: int = 3
    first_wait: float = 1.0
    longest_wait: float = 60.0


class DownloadError(ValueError):
    """A file could not be had, in one line that says why."""


class _Unfinished(Exception):
    """An attempt failed in a way that another may not. ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


def user_agent() -> str:
    """``flash-experts/0.1.0``: sources ask for the true name and version of who calls."""
    try:
        return f"flash-experts/{version('flash-experts')}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "flash-experts/0"


class Partial:
    """A file on its way: what is there of it, and by what it is known to be the same file when the rest comes.

    Args:
        path: of the bytes. Beside it lies ``PATH.json`` with the server's validators.
    """

    def __init__(self, path: Path):
        self.path = path
        self._note = path.with_name(path.name + ".json")

    def start(self, url: str, response: httpx.Response) -> None:
        """A new file begins with this answer."""
        self.discard()
        note = {"url": url, "validators": _validators(response), "bytes": _length(response)}
        self._note.write_text(json.dumps(note), encoding="utf-8")

    def resumable(self, url: str) -> tuple[int, dict[str, str], int | None]:
        """Bytes that are there of this URL's file, its validators, and its whole length; 0 bytes begin anew."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            same, validators, whole = note["url"] == url, note["validators"], note["bytes"]
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}, None
        if not same or not validators:  # without a validator nobody knows what the rest is of
            return 0, {}, None
        return size, validators, whole

    def discard(self) -> None:
        """Forgets what is there."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


class Downloader:
    """Fetches files and small texts.

    Args:
        patience: time limits and numbers of attempts.
        sleep: waits so many seconds. Tests give one that does not.
        clock: seconds that only grow.
        rng: where the jitter comes from.
    """

    def __init__(
        self,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self.patience = patience or Patience()
        self._sleep = sleep
        self._clock = clock
        self._rng = rng or random.Random()

    def file(self, url: str, path: Path, expected_bytes: int | None = None) -> None:
        """Streams a file to ``path``, and goes on with what is there of it already.

        Args:
            url: https, or http where a base URL was set so on purpose.
            path: where to. When the call fails, what has come stays there for the next one.
            expected_bytes: for the progress bar, where the server does not say.

        Raises:
            DownloadError: it could not be had in the time and the attempts that `Patience` gives, is too large,
                or leads to an address that is not followed.
            OSError: it cannot be written. Nothing of it stays.
        """
        partial = Partial(path)
        try:
            self._persist(url, lambda client, deadline: self._receive(client, url, partial, deadline, expected_bytes))
        except OSError as error:
            partial.discard()
            hint = "free some space, or set FLASH_EXPERTS_CACHE to a folder elsewhere"
            raise OSError(error.errno, f"{error.strerror or error} ({hint})", str(path)) from error

    def text(self, url: str, accept: str = "*/*") -> str:
        """A small text, such as an index or a checksum.

        Raises:
            DownloadError: it could not be had, is no UTF-8, or has more than `MAX_TEXT_BYTES`.
        """

        def attempt(client: httpx.Client, deadline: float) -> str:
            with self._answer(client, url, {"Accept": accept}) as response:
                data = b""
                for chunk in response.iter_bytes():
                    self._check_time(url, deadline)
                    data += chunk
                    if len(data) > MAX_TEXT_BYTES:
                        raise DownloadError(f"{url}: more than {MAX_TEXT_BYTES:,} bytes of what should be short")
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DownloadError(f"{url}: the answer is not UTF-8 text") from error

        return self._persist(url, attempt)

    # ---------------------------------------------------------------------------------------------- attempts

    def _persist(self, url: str, attempt: Callable[[httpx.Client, float], T]) -> T:
        """Tries until it is done, or patience is over."""
        import httpx

        patience = self.patience
        deadline = self._clock() + patience.total_seconds
        timeout = httpx.Timeout(patience.read_seconds, connect=patience.connect_seconds)
        try:
            client = httpx.Client(timeout=timeout, headers={"User-Agent": user_agent()})
        except (ImportError, ValueError, OSError) as error:  # a proxy or certificates in the environment, unusable
            raise DownloadError(f"{url}: {error}") from error
        with client:
            for tries in range(1, patience.attempts + 1):
                try:
                    return attempt(client, deadline)
                except _Unfinished as problem:
                    last = patience.connect_attempts if problem.unreachable else patience.attempts
                    wait = self._wait(tries, problem)
                    if tries >= last or self._clock() + wait > deadline:
                        asked = f", asks to wait {problem.wait:,.0f} s" if problem.wait else ""
                        times = "once" if tries == 1 else f"{tries} times"
                        raise DownloadError(f"{url}: {problem}{asked} (tried {times})") from problem
                    self._sleep(wait)
        raise AssertionError("attempts is at least 1")

    def _wait(self, tries: int, problem: _Unfinished) -> float:
        backoff = min(self.patience.longest_wait, self.patience.first_wait * 2 ** (tries - 1))
        return max(problem.wait or 0.0, backoff * self._rng.uniform(0.5, 1.0))

    def _check_time(self, url: str, deadline: float) -> None:
        if self._clock() > deadline:
            raise DownloadError(f"{url}: not done after {self.patience.total_seconds:,.0f} s: the connection is slow")

    # --------------------------------------------------------------------------------------------- one request

    def _receive(
        self, client: httpx.Client, url: str, partial: Partial, deadline: float, expected_bytes: int | None
    ) -> None:
        """One request for the file, or for the rest of it."""
        have, validators, whole = partial.resumable(url)
        if have and have == whole:
            return
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}  # the bytes of the file, and no others
        if have:
            headers["Range"] = f"bytes={have}-"
            if strong := _strong(validators):
                headers["If-Range"] = strong
        with self._answer(client, url, headers) as response:
            if response.status_code == 200:
                partial.start(url, response)
                have, whole = 0, _length(response)
            elif not _continues(response, have, whole, validators):
                partial.discard()
                raise _Unfinished("the file changed while it was fetched")
            self._write(response, url, partial.path, deadline, have, whole or expected_bytes)
        size = partial.path.stat().st_size
        if whole is not None and size != whole:
            raise _Unfinished(f"{size:,} of {whole:,} bytes came")

    def _write(
        self, response: httpx.Response, url: str, path: Path, deadline: float, have: int, whole: int | None
    ) -> None:
        if (whole or 0) > MAX_FILE_BYTES:
            raise DownloadError(f"{url}: {whole:,} bytes are more than the {MAX_FILE_BYTES:,} that are taken")
        with open(path, "ab" if have else "wb") as file, Bar(response.url.host, have, whole) as bar:
            for chunk in response.iter_raw():
                self._check_time(url, deadline)
                have += len(chunk)
                if have > MAX_FILE_BYTES:
                    Partial(path).discard()
                    raise DownloadError(f"{url}: more than the {MAX_FILE_BYTES:,} bytes that are taken")
                file.write(chunk)
                bar.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _answer(self, client: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The answer at the end of redirects, if it is one that helps."""
        import httpx

        place = checked_url(url, url)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                with client.stream("GET", place, headers=headers) as response:
                    if response.status_code not in _REDIRECTS:
                        _check_status(response)
                        yield response
                        return
                    place = checked_url(response.headers.get("Location", ""), str(place))
            except httpx.InvalidURL as error:  # of a redirect, which httpx looks at before we do
                raise DownloadError(f"{place} leads to what is no address: {error}") from error
            except httpx.RequestError as error:
                unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                raise _Unfinished(_reason(error, httpx.URL(place).host), unreachable=unreachable) from error
        raise DownloadError(f"{url}: more than {MAX_REDIRECTS} redirects")


def checked_url(url: str, base: str) -> str:
    """An absolute URL, relative to ``base``; https stays https.

    Raises:
        DownloadError: it is no URL, or leads from https to something else.
    """
    import httpx

    try:
        place = httpx.URL(base).join(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise DownloadError(f"{url!r} is no address: {error}") from error
    schemes = ("https",) if base.startswith("https:") else ("https", "http")
    if not url or place.scheme not in schemes or not place.host:
        raise DownloadError(f"{base} leads to {str(place)!r}: only {' and '.join(schemes)} are followed")
    return str(place)


def _check_status(response: httpx.Response) -> None:
    """Passes 200 and 206; 416 too, which says that a rest does not fit."""
    status = response.status_code
    if status in (200, 206, 416):
        return
    said = f"{response.url.host} answered {status} {response.reason_phrase}".rstrip()
    if status not in _AGAIN_LATER:
        raise DownloadError(f"{response.url}: {said}")
    wait = asked_to_wait(response.headers, datetime.now(UTC))
    raise _Unfinished(said, LOCKOUT_SECONDS if wait is None and status == 429 else wait)


def asked_to_wait(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that an answer asks to wait, by the clock of its server where it tells that: ours may be wrong."""
    try:
        date = parsedate_to_datetime(headers.get("Date", ""))
        now = date.replace(tzinfo=date.tzinfo or UTC)
    except ValueError:
        pass
    return retry_after(headers.get("Retry-After"), now)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header: a number, or an HTTP date; None if there is none that can be read."""
    text = (value or "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def _reason(error: Exception, host: str) -> str:
    """``connection to HOST lost (...)`` in one line."""
    text = " ".join(str(error).split()) or "it did not answer in time"
    return f"no connection to {host} ({text})"


def _validators(response: httpx.Response) -> dict[str, str]:
    found = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
    return {name: value for name, value in found.items() if value}


def _strong(validators: dict[str, str]) -> str | None:
    """What If-Range may hold: a strong ETag, else a date (RFC 9110, section 13.1.5)."""
    tag = validators.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else validators.get("Last-Modified")


def _length(response: httpx.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None


def _continues(response: httpx.Response, have: int, whole: int | None, validators: dict[str, str]) -> bool:
    """Whether an answer is the rest of what we have: the right range, of the same file."""
    if response.status_code != 206 or not have:
        return False
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != have or (whole is not None and span[2] not in ("*", str(whole))):
        return False
    now = _validators(response)
    return all(now.get(name, value) == value for name, value in validators.items())
