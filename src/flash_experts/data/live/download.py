"""HTTP downloads: streamed to disk, resumed, retried, limited in size and time; complete or failed.

By status of the response:

    200                        the file from its beginning
    206, same validator        the rest of an interrupted download (Range, If-Range)
    408 425 429 500 502-504    retry: after Retry-After if given, else exponential backoff with jitter
    anything else              an error at once (a broken connection is retried)
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

from flash_experts.terminal import ProgressBar

if TYPE_CHECKING:
    import httpx


MAX_FILE_BYTES = 512 * 2**20  # ten times the size of the sources; a server that sends more is broken
MAX_TEXT_BYTES = 2**20  # limit for an index or a checksum
MAX_REDIRECTS = 5
LOCKOUT_SECONDS = 30.0  # how long Scryfall refuses a client after 429
_RETRYABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Timeouts and retries of a download."""

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    total_seconds: float = 1800.0
    attempts: int = 8
    connect_attempts: int = 3  # if no server is found: few, so that a missing network is reported soon
    first_wait: float = 1.0  # seconds; doubles up to the longest wait, times a random 0.5 to 1 (jitter)
    longest_wait: float = 60.0  # but a Retry-After may ask for more


class DownloadError(ValueError):
    """A download failed; the message is one line with the reason."""


class _RetryableError(Exception):
    """A failed attempt that is worth a retry, after the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


def user_agent() -> str:
    """The User-Agent, ``flash-experts/0.1.0``: sources ask for the client's name and version."""
    try:
        return f"flash-experts/{version('flash-experts')}"
    except PackageNotFoundError:  # a checkout that is not installed
        return "flash-experts/0"


class Partial:
    """An unfinished download: bytes at ``path``, and the server's validators in ``PATH.json`` next to it."""

    def __init__(self, path: Path):
        self.path = path
        self._note = path.with_name(path.name + ".json")

    def start(self, url: str, response: httpx.Response) -> None:
        self.discard()
        note = {"url": url, "validators": _validators(response), "bytes": _length(response)}
        self._note.write_text(json.dumps(note), encoding="utf-8")

    def resumable(self, url: str) -> tuple[int, dict[str, str], int | None]:
        """Bytes already downloaded from this URL (0 to start again), the validators and the total length."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            same, validators, whole = note["url"] == url, note["validators"], note["bytes"]
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}, None
        if not same or not validators:  # without a validator the file may have changed
            return 0, {}, None
        return size, validators, whole

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


class Downloader:
    """Downloads files and small texts; tests replace ``sleep``, the monotonic ``clock`` and the jitter's ``rng``."""

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self.policy = policy or RetryPolicy()
        self._sleep = sleep
        self._clock = clock
        self._rng = rng or random.Random()

    def file(self, url: str, path: Path, expected_bytes: int | None = None) -> None:
        """Streams a file to ``path``, resuming a partial download there, as a `DownloadError` leaves it.

        ``expected_bytes`` is for the progress bar, if the server sends no length.
        """
        partial = Partial(path)
        try:
            self._retry(url, lambda client, deadline: self._receive(client, url, partial, deadline, expected_bytes))
        except OSError as error:
            partial.discard()
            hint = "free some space, or set FLASH_EXPERTS_CACHE to a folder elsewhere"
            raise OSError(error.errno, f"{error.strerror or error} ({hint})", str(path)) from error

    def text(self, url: str, accept: str = "*/*") -> str:
        """Downloads a text of at most `MAX_TEXT_BYTES`, such as an index or a checksum."""

        def attempt(client: httpx.Client, deadline: float) -> str:
            with self._response(client, url, {"Accept": accept}) as response:
                data = b""
                for chunk in response.iter_bytes():
                    self._check_time(url, deadline)
                    data += chunk
                    if len(data) > MAX_TEXT_BYTES:
                        raise DownloadError(f"{url}: more than the limit of {MAX_TEXT_BYTES:,} bytes for a text")
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DownloadError(f"{url}: the response is not UTF-8 text") from error

        return self._retry(url, attempt)

    def _retry(self, url: str, attempt: Callable[[httpx.Client, float], T]) -> T:
        """Repeats an attempt until it succeeds or `RetryPolicy` is exhausted."""
        import httpx

        policy = self.policy
        deadline = self._clock() + policy.total_seconds
        timeout = httpx.Timeout(policy.read_seconds, connect=policy.connect_seconds)
        try:
            client = httpx.Client(timeout=timeout, headers={"User-Agent": user_agent()})
        except (ImportError, ValueError, OSError) as error:  # unusable proxy or certificates in the environment
            raise DownloadError(f"{url}: {error}") from error
        with client:
            for tries in range(1, policy.attempts + 1):
                try:
                    return attempt(client, deadline)
                except _RetryableError as problem:
                    last = policy.connect_attempts if problem.unreachable else policy.attempts
                    wait = self._wait(tries, problem)
                    if tries >= last or self._clock() + wait > deadline:
                        asked = f", asks to wait {problem.wait:,.0f} s" if problem.wait else ""
                        times = "once" if tries == 1 else f"{tries} times"
                        raise DownloadError(f"{url}: {problem}{asked} (tried {times})") from problem
                    self._sleep(wait)
        raise AssertionError("attempts is at least 1")

    def _wait(self, tries: int, problem: _RetryableError) -> float:
        backoff = min(self.policy.longest_wait, self.policy.first_wait * 2 ** (tries - 1))
        return max(problem.wait or 0.0, backoff * self._rng.uniform(0.5, 1.0))

    def _check_time(self, url: str, deadline: float) -> None:
        if self._clock() > deadline:
            raise DownloadError(f"{url}: not done after {self.policy.total_seconds:,.0f} s: the connection is slow")

    def _receive(
        self, client: httpx.Client, url: str, partial: Partial, deadline: float, expected_bytes: int | None
    ) -> None:
        have, validators, whole = partial.resumable(url)
        if have and have == whole:
            return
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}  # the bytes of the file itself, not compressed
        if have:
            headers["Range"] = f"bytes={have}-"
            if strong := _strong_validator(validators):
                headers["If-Range"] = strong
        with self._response(client, url, headers) as response:
            if response.status_code == 200:
                partial.start(url, response)
                have, whole = 0, _length(response)
            elif not _continues(response, have, whole, validators):
                partial.discard()
                raise _RetryableError("the file changed during the download")
            self._write(response, url, partial.path, deadline, have, whole or expected_bytes)
        size = partial.path.stat().st_size
        if whole is not None and size != whole:
            raise _RetryableError(f"{size:,} of {whole:,} bytes arrived")

    def _write(
        self, response: httpx.Response, url: str, path: Path, deadline: float, have: int, whole: int | None
    ) -> None:
        if (whole or 0) > MAX_FILE_BYTES:
            raise DownloadError(f"{url}: {whole:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
        bar = ProgressBar(response.url.host, have, whole, in_bytes=True)
        with open(path, "ab" if have else "wb") as file, bar:
            for chunk in response.iter_raw():
                self._check_time(url, deadline)
                have += len(chunk)
                if have > MAX_FILE_BYTES:
                    Partial(path).discard()
                    raise DownloadError(f"{url}: more than the limit of {MAX_FILE_BYTES:,} bytes")
                file.write(chunk)
                bar.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _response(self, client: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """The successful response after redirects."""
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
            except httpx.InvalidURL as error:  # from a redirect, which httpx checks before we do
                raise DownloadError(f"{place} redirects to an invalid address: {error}") from error
            except httpx.RequestError as error:
                unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                raise _RetryableError(_reason(error, httpx.URL(place).host), unreachable=unreachable) from error
        raise DownloadError(f"{url}: more than {MAX_REDIRECTS} redirects")


def checked_url(url: str, base: str) -> str:
    """An absolute URL, relative to ``base``; a `DownloadError` if it is none, or leads from https to another scheme."""
    import httpx

    try:
        place = httpx.URL(base).join(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise DownloadError(f"{url!r} is not a valid address: {error}") from error
    schemes = ("https",) if base.startswith("https:") else ("https", "http")
    if not url or place.scheme not in schemes or not place.host:
        raise DownloadError(f"{base} redirects to {str(place)!r}: only {' and '.join(schemes)} are followed")
    return str(place)


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status in (200, 206, 416):
        return
    reason = f"{response.url.host} answered {status} {response.reason_phrase}".rstrip()
    if status not in _RETRYABLE_STATUS:
        raise DownloadError(f"{response.url}: {reason}")
    wait = requested_wait(response.headers, datetime.now(UTC))
    raise _RetryableError(reason, LOCKOUT_SECONDS if wait is None and status == 429 else wait)


def requested_wait(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that a response asks to wait, by the server's clock if it sends one, since ours may be wrong."""
    try:
        date = parsedate_to_datetime(headers.get("Date", ""))
        now = date.replace(tzinfo=date.tzinfo or UTC)
    except ValueError:
        pass
    return retry_after(headers.get("Retry-After"), now)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header, a number or an HTTP date; None if it is missing or unreadable."""
    text = (value or "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())


def _reason(error: Exception, host: str) -> str:
    text = " ".join(str(error).split()) or "it did not answer in time"
    return f"no connection to {host} ({text})"


def _validators(response: httpx.Response) -> dict[str, str]:
    found = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
    return {name: value for name, value in found.items() if value}


def _strong_validator(validators: dict[str, str]) -> str | None:
    tag = validators.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else validators.get("Last-Modified")


def _length(response: httpx.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None


def _continues(response: httpx.Response, have: int, whole: int | None, validators: dict[str, str]) -> bool:
    """Whether a response continues the partial file: the right range of the same file."""
    if response.status_code != 206 or not have:
        return False
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != have or (whole is not None and span[2] not in ("*", str(whole))):
        return False
    now = _validators(response)
    return all(now.get(name, value) == value for name, value in validators.items())
