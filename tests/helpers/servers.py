"""A local web server for tests with scripted replies, including faulty ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """One reply.

    Attributes:
        body: whole file.
        status: 200 becomes 206 for a valid Range request.
        headers: in addition to Content-Length.
        cut: bytes after which the connection drops.
        stall: bytes after which nothing more is sent.
        ranges: whether Range is supported.
        checks_if_range: whether If-Range is supported.
        sends_length: whether there is a Content-Length; else the end of the connection ends the file.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    stall: int | None = None
    ranges: bool = True
    checks_if_range: bool = True
    sends_length: bool = True


class TestServer:
    """Replies by path. Several replies of a path are sent in turn, the last one repeatedly."""

    __test__ = False

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()
        self.url = ""

    def serve(self, path: str, *replies: Reply) -> str:
        """Sets the replies of a path. Returns its URL."""
        self.replies[path] = list(replies)
        return self.url + path

    def requests_to(self, path: str) -> list[dict[str, str]]:
        """Lower-case headers of each request for a path."""
        return [headers for requested, headers in self.requests if requested == path]

    def next_reply(self, path: str) -> Reply:
        replies = self.replies.get(path, [Reply(b"nothing here", 404)])
        return replies.pop(0) if len(replies) > 1 else replies[0]


def _answer(handler: BaseHTTPRequestHandler, server: TestServer) -> None:
    headers = {name.lower(): value for name, value in handler.headers.items()}
    server.requests.append((handler.path, headers))
    reply = server.next_reply(handler.path)
    status, first = reply.status, 0
    validator = headers.get("if-range")
    same = validator is None or not reply.checks_if_range or validator in reply.headers.values()
    if "range" in headers and reply.ranges and status == 200 and same:
        first = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        status = 206 if first < len(reply.body) else 416
    body = reply.body[first:]
    handler.send_response(status)
    if status == 206:
        handler.send_header("Content-Range", f"bytes {first}-{len(reply.body) - 1}/{len(reply.body)}")
    if reply.sends_length:
        handler.send_header("Content-Length", str(len(body)))
    else:
        handler.send_header("Connection", "close")
    for name, value in reply.headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body[: reply.cut if reply.cut is not None else reply.stall])
    handler.wfile.flush()
    if reply.stall is not None:
        server.ended.wait(10)
    handler.close_connection = True


@contextmanager
def running_server() -> Iterator[TestServer]:
    """A server on a free port."""
    server = TestServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, server)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        listener.shutdown()
        listener.server_close()
