"""Downloads from a server that drops, truncates, stalls, rate-limits and redirects. No test sleeps."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.live import download
from flash_experts.data.live.download import Downloader, DownloadError, RetryPolicy, checked_url, retry_after
from tests.helpers.servers import Reply, TestServer, running_server

BODY = random.Random(0).randbytes(100_000)
TAGGED = {"ETag": '"one"'}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def downloader(waits: list[float]) -> Downloader:
    return Downloader(RetryPolicy(read_seconds=5), sleep=waits.append, rng=random.Random(0))


def test_a_file_is_complete_and_the_request_has_a_user_agent(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(BODY))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    (request,) = server.requests_to("/file")
    assert request["user-agent"].startswith("flash-experts/0.1.0") and request["accept"] == "*/*"
    assert request["accept-encoding"] == "identity" and "range" not in request
    assert waits == []


def test_a_dropped_connection_is_resumed(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(BODY, headers=TAGGED, cut=60_000), Reply(BODY, headers=TAGGED))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    first, second = server.requests_to("/file")
    assert "range" not in first
    assert second["range"] == "bytes=60000-" and second["if-range"] == '"one"', "only the rest is requested"
    assert len(waits) == 1


def test_the_next_run_resumes_a_partial_file(server: TestServer, waits: list[float], tmp_path: Path) -> None:
    url = server.serve("/file", Reply(BODY, headers=TAGGED, cut=60_000), Reply(BODY, headers=TAGGED))
    with pytest.raises(DownloadError, match="tried once"):
        Downloader(RetryPolicy(attempts=1), sleep=waits.append).file(url, tmp_path / "file")
    Downloader(sleep=waits.append).file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests_to("/file")[1]["range"] == "bytes=60000-"
    Downloader(sleep=waits.append).file(url, tmp_path / "file")
    assert len(server.requests_to("/file")) == 2, "it is complete: no request"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TAGGED, {"ETag": '"two"'}),
        ({"Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}, {"Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT"}),
        ({"ETag": 'W/"one"'}, {"ETag": 'W/"two"'}),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("checks_if_range", [True, False])
def test_a_file_that_changed_between_two_halves_is_downloaded_again(
    server: TestServer,
    downloader: Downloader,
    tmp_path: Path,
    first: dict[str, str],
    second: dict[str, str],
    checks_if_range: bool,
) -> None:
    other = BODY[::-1]
    url = server.serve(
        "/file", Reply(BODY, headers=first, cut=60_000), Reply(other, headers=second, checks_if_range=checks_if_range)
    )
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == other


def test_a_server_without_ranges_sends_the_whole_file_again(
    server: TestServer, downloader: Downloader, tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(BODY, headers=TAGGED, cut=60_000), Reply(BODY, headers=TAGGED, ranges=False))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_shorter_file_is_downloaded_again(server: TestServer, downloader: Downloader, tmp_path: Path) -> None:
    short = Reply(BODY[:50_000], headers=TAGGED)
    url = server.serve("/file", Reply(BODY, headers=TAGGED, cut=60_000), short)
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY[:50_000]


def test_many_drops_are_retried_up_to_a_limit(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    drops = [Reply(BODY, headers=TAGGED, cut=10_000) for _ in range(7)]
    url = server.serve("/file", *drops, Reply(BODY, headers=TAGGED))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert [headers.get("range") for headers in server.requests_to("/file")][1:] == [
        f"bytes={n}0000-" for n in range(1, 8)
    ]
    url = server.serve("/other", Reply(BODY, cut=10))
    with pytest.raises(DownloadError, match=r"/other: no connection to 127\.0\.0\.1 .*tried 8 times") as raised:
        downloader.file(url, tmp_path / "other")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_followed(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path, status: int
) -> None:
    later = Reply(b"slow down", status, {"Retry-After": "77"})
    url = server.serve("/file", later, Reply(BODY))
    downloader.file(url, tmp_path / "file")
    assert waits == [77.0]


def test_429_without_a_time_waits_out_the_lockout(
    server: TestServer, downloader: Downloader, waits: list[float]
) -> None:
    url = server.serve("/index", Reply(b"", 429), Reply(b"text"))
    assert downloader.text(url) == "text"
    assert waits == [30.0]


def test_a_retry_after_beyond_the_total_limit_fails_at_once(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(b"", 429, {"Retry-After": "86400"}))
    with pytest.raises(DownloadError, match=r"answered 429 Too Many Requests, asks to wait 86,400 s \(tried once\)"):
        downloader.file(url, tmp_path / "file")
    assert waits == []


def test_retry_after_is_a_number_or_a_date() -> None:
    now = datetime(2026, 11, 2, 10, tzinfo=UTC)
    assert retry_after("120", now) == 120
    assert retry_after(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90
    assert retry_after(format_datetime(now - timedelta(seconds=90), usegmt=True), now) == 0
    for nonsense in (None, "", "soon", "-5", "Mon, 99 Foo 2026"):
        assert retry_after(nonsense, now) is None


def test_server_errors_are_retried(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(b"", 500), Reply(b"", 502), Reply(b"", 503), Reply(BODY))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits)) and len(waits) == 3


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_waits_double_with_jitter_up_to_the_longest(seed: int) -> None:
    waits: list[float] = []
    downloader = Downloader(
        RetryPolicy(attempts=9, longest_wait=20), sleep=waits.append, clock=lambda: 0.0, rng=random.Random(seed)
    )

    def fails(*_: object) -> None:
        raise download._RetryableError("no")

    with pytest.raises(DownloadError, match="tried 9 times"):
        downloader._retry("http://x", fails)
    bounds = [1, 2, 4, 8, 16, 20, 20, 20]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def test_permanent_errors_are_reported(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path
) -> None:
    url = server.serve("/file", Reply(b"", 500))
    with pytest.raises(DownloadError, match=r"answered 500 Internal Server Error \(tried 8 times\)"):
        downloader.file(url, tmp_path / "file")
    waits.clear()
    with pytest.raises(DownloadError, match="answered 404 Not Found"):
        downloader.file(f"{server.url}/nowhere", tmp_path / "file")
    assert waits == [] and len(server.requests_to("/nowhere")) == 1


def test_a_stalled_server_times_out(server: TestServer, waits: list[float], tmp_path: Path) -> None:
    url = server.serve("/file", Reply(BODY, headers=TAGGED, stall=5000), Reply(BODY, headers=TAGGED))
    Downloader(RetryPolicy(read_seconds=1), sleep=waits.append).file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests_to("/file")[1]["range"] == "bytes=5000-"


def test_slow_bytes_end_at_the_total_limit(server: TestServer, waits: list[float], tmp_path: Path) -> None:
    seconds = iter(range(0, 100_000, 400))
    downloader = Downloader(RetryPolicy(total_seconds=1000), sleep=waits.append, clock=lambda: float(next(seconds)))
    url = server.serve("/file", Reply(BODY * 20))
    with pytest.raises(DownloadError, match="not done after 1,000 s: the connection is slow"):
        downloader.file(url, tmp_path / "file")
    with pytest.raises(DownloadError, match="not done after 1,000 s"):
        Downloader(
            RetryPolicy(total_seconds=1000),
            clock=iter([0.0, *[2000.0] * 9]).__next__,
        ).text(url)


def test_an_unreachable_server_is_reported_soon(downloader: Downloader, waits: list[float], tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(DownloadError, match=r"no connection to 127\.0\.0\.1 \(.*tried 3 times"):
        downloader.file(f"http://127.0.0.1:{port}/file", tmp_path / "file")
    assert len(waits) == 2 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- redirects


def test_redirects_to_http_addresses_are_followed(server: TestServer, downloader: Downloader, tmp_path: Path) -> None:
    url = server.serve("/old", Reply(b"", 302, {"Location": "/new?x=1"}))
    server.serve("/new?x=1", Reply(b"", 307, {"Location": f"{server.url}/newest"}))
    server.serve("/newest", Reply(BODY))
    downloader.file(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:1", ""])
def test_redirects_elsewhere_are_refused(
    server: TestServer, downloader: Downloader, waits: list[float], tmp_path: Path, place: str
) -> None:
    url = server.serve("/old", Reply(b"", 302, {"Location": place}))
    with pytest.raises(DownloadError, match=r"only https and http are followed|not a valid address|to an invalid"):
        downloader.file(url, tmp_path / "file")
    assert waits == [] and not (tmp_path / "file").exists()


def test_https_is_never_left() -> None:
    assert checked_url("/x", "https://api.example/y") == "https://api.example/x"
    with pytest.raises(DownloadError, match=r"redirects to 'http://api\.example/x': only https are followed"):
        checked_url("http://api.example/x", "https://api.example/y")


def test_endless_redirects_end(server: TestServer, downloader: Downloader, tmp_path: Path) -> None:
    url = server.serve("/old", Reply(b"", 301, {"Location": "/old"}))
    with pytest.raises(DownloadError, match="more than 5 redirects"):
        downloader.file(url, tmp_path / "file")


# ------------------------------------------------------------------------------------------------- bounds


def test_too_large_downloads_are_refused(
    server: TestServer, downloader: Downloader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_FILE_BYTES", 50_000)
    monkeypatch.setattr(download, "MAX_TEXT_BYTES", 1_000)
    url = server.serve("/file", Reply(BODY))
    with pytest.raises(DownloadError, match="100,000 bytes are more than the limit of 50,000"):
        downloader.file(url, tmp_path / "file")
    server.serve("/file", Reply(BODY, sends_length=False))
    with pytest.raises(DownloadError, match="more than the limit of 50,000 bytes"):
        downloader.file(url, tmp_path / "file")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DownloadError, match="more than the limit of 1,000 bytes for a text"):
        downloader.text(url)


def test_text_that_is_not_utf_8(server: TestServer, downloader: Downloader) -> None:
    url = server.serve("/text", Reply(b"\xff\xfe\x00"))
    with pytest.raises(DownloadError, match="not UTF-8 text"):
        downloader.text(url)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_leaves_nothing(server: TestServer, downloader: Downloader, tmp_path: Path) -> None:
    url = server.serve("/file", Reply(BODY))
    part = tmp_path / "file"

    class Full(download.Partial):
        def start(self, *arguments: object) -> None:
            super().start(*arguments)  # type: ignore[arg-type]
            self.path.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "Partial", Full)
        with pytest.raises(OSError, match=r"No space left on device .*FLASH_EXPERTS_CACHE") as raised:
            downloader.file(url, part)
    assert raised.value.filename == str(part)
    assert not list(tmp_path.iterdir())
