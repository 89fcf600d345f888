"""The web server: Gradio's app behind middleware that allows only what the page and the endpoints need."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from ipaddress import ip_address

import fastapi
import gradio as gr
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flash_experts.app.page import build_page
from flash_experts.app.service import Playground
from flash_experts.terminal import one_line

_LOG = logging.getLogger(__name__)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MOST_CONNECTIONS = 512
MOST_HEARTBEATS = MOST_CONNECTIONS // 2  # connections of open pages; the others are for requests
HEARTBEATS_PER_CLIENT = 64
_HEARTBEAT = "/gradio_api/heartbeat/"
CLIENT_SECONDS = 15.0  # an idle client is disconnected after one to two times this
_NO_LINGER = struct.pack("ii", 1, 0)
LARGEST_BODY = 64 * 1024  # bytes of a request's body
_OPEN = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.*"
    r"|gradio_api/(info/?|openapi\.json|startup-events|app_id/?|theme\.css|queue/join|queue/data|cancel|reset/?"
    r"|heartbeat/\w+|run/predict|call/[\w/]+))"
)
# The page may load only from its own origin. Gradio's scripts are inline and compile templates, hence the unsafe-*.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def make_app(playground: Playground, hosts: Iterable[str] = ()) -> fastapi.FastAPI:
    """The ASGI application; see `Gate` for the hosts."""
    page = build_page(playground)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=["api"],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        max_file_size=1,
        theme=_theme(),
        # As css=, Gradio would prefix our selectors with its own.
        head=f"<style>{_resource('style.css')}</style><script>{_resource('page.js')}</script>",
    )
    app.add_middleware(Gate, hosts=tuple(hosts))
    return app


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _theme() -> gr.themes.Base:
    """Gradio's soft theme with system fonts, since its default fonts are downloaded."""
    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        spacing_size="sm",
    )
    return theme.set(
        body_background_fill="*neutral_50",
        input_border_width="1px",
        input_border_color="*neutral_300",
        checkbox_border_color="*neutral_400",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        button_secondary_border_color="*neutral_300",
        button_border_width="1px",
        button_secondary_border_color_dark="*neutral_500",
        input_border_color_dark="*neutral_600",
        checkbox_label_border_color_dark="*neutral_600",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
    )


def make_server(playground: Playground, hosts: Iterable[str] = ()) -> uvicorn.Server:
    """A server of `make_app`; it serves with ``run(sockets=[listener])`` until SIGINT, SIGTERM, or ``should_exit``."""
    config = uvicorn.Config(
        make_app(playground, hosts),
        log_level="critical",  # connections that end with the server are not errors; `Gate` logs errors
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
        http=TimeoutProtocol,
    )
    return uvicorn.Server(config)


class TimeoutProtocol(H11Protocol):
    """HTTP with timeouts for clients that neither complete their request nor read its answer (slowloris attacks).

    uvicorn waits for such clients forever, and `MOST_CONNECTIONS` of them would block the server.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(2 * CLIENT_SECONDS * 1000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._check(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_check.cancel()
        super().connection_lost(exc)

    def _check(self, before: object) -> None:
        """Ends the connection if it has been waiting for the same request since the last check."""
        cycle = self.cycle
        is_waiting = cycle is None or cycle.response_complete or cycle.more_body
        now = ("request", cycle) if is_waiting else None
        if now is not None and now == before:
            # Without this the system would keep unread data for minutes.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.transport.abort()
        self._next_check = self.loop.call_later(CLIENT_SECONDS, self._check, now)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises a ValueError if the port or the host is not available."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port}: it must be from 0 (any free port) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), backlog=MOST_CONNECTIONS, family=family)
    except OSError as error:
        wrong = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another {wrong}"
        ) from None


class Gate:
    """Middleware that refuses requests for unknown hosts, from other sites' pages, or for paths that are not needed.

    Allowed hosts are ``hosts`` and `LOCAL_HOSTS`: checking Host and Origin prevents DNS rebinding, where another site
    points its name at this machine. Also sets the security headers of every answer.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self.app = app
        self._own_hosts = {_host_name(host.lower()) for host in hosts}
        self._heartbeats: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        if not self._is_own(host, scope):
            name = f"not a name of this server: {host[:100]}. Start it with --allowed-host NAME to allow one"
            await _refuse(send, 400, name.encode("ascii", "replace"))
        elif origin and not self._is_own_page(origin, host):
            await _refuse(send, 403, b"pages of other sites may not ask this server")
        elif not _OPEN.fullmatch(scope["path"]):
            await _refuse(send, 404, b"not found")
        elif not length.isdigit() or int(length) > LARGEST_BODY:
            await _refuse(send, 413, b"too large")
        elif scope["path"].startswith(_HEARTBEAT):
            await self._heartbeat(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _is_own(self, host: str, scope: Scope) -> bool:
        """Whether a Host header is an allowed name, or the address that the client connected to."""
        name = _host_name(host)
        reached = str((scope.get("server") or ("",))[0])
        return name in LOCAL_HOSTS or name in self._own_hosts or (name == reached and _is_address(name))

    def _is_own_page(self, origin: str, host: str) -> bool:
        """Whether a request comes from a page of this server, under this or another allowed name."""
        _, _, place = origin.partition("://")
        return place == host or _host_name(place) in self._own_hosts

    async def _heartbeat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers for as long as a page is open. Their number is limited, so that connections are left for requests."""
        client = str((scope.get("client") or ("",))[0])
        if self._heartbeats[client] >= HEARTBEATS_PER_CLIENT or self._heartbeats.total() >= MOST_HEARTBEATS:
            await _refuse(send, 503, b"too many open pages")
            return
        self._heartbeats[client] += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._heartbeats[client] -= 1
            if not self._heartbeats[client]:
                del self._heartbeats[client]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        left, started = LARGEST_BODY, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLargeError
            return message

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = [pair for pair in message["headers"] if not pair[0].lower().startswith(b"access-control-")]
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except _TooLargeError:
            if not started:
                await _refuse(send, 413, b"too large")
        except Exception as error:  # an invalid request for Gradio: log one line instead of a traceback
            _LOG.error("%s", one_line(f"{scope['method']} {scope['path']}: {error!r}"))
            if not started:
                await _refuse(send, 500, b"this request cannot be answered")


def _host_name(host: str) -> str:
    """The name or address in ``name:port`` or ``[address]:port``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if _is_address(host) else host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class _TooLargeError(Exception):
    pass


async def _refuse(send: Send, status: int, text: bytes) -> None:
    """Sends a refusal and closes the connection, which makes room for another client."""
    own = {"content-type": "text/plain", "content-length": str(len(text)), "connection": "close", **_HEADERS}
    headers = [(name.encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
