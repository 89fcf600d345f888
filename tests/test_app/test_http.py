"""The endpoints, the middleware, and many clients at once: a server in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flash_experts import NameGenerator, released
from flash_experts.app.service import Playground
from flash_experts.cli import main

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
from starlette.types import Receive, Scope, Send

from flash_experts.app import server as server_module
from flash_experts.app.server import LARGEST_BODY, bind, make_server

CLIENT = httpx.Client(timeout=120)  # shared: each client would read the machine's certificates again


@pytest.fixture(scope="module")
def url(base: NameGenerator, experts: NameGenerator) -> Iterator[str]:
    server = make_server(Playground({"dense": base, "experts": experts}, time_limit=600))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def ask(url: str, endpoint: str, **given: Any) -> Any:
    """The last message of an endpoint: its data, or {"error": ...}."""
    joined = CLIENT.post(f"{url}/gradio_api/call/v2/{endpoint}", json=given)
    if joined.status_code != 200:
        return {"status": joined.status_code, "error": joined.text}
    answer = CLIENT.get(f"{url}/gradio_api/call/v2/{endpoint}/{joined.json()['event_id']}").text
    data = json.loads(answer.rstrip().rpartition("data: ")[2])
    return data[0] if isinstance(data, list) else data


def test_names(url: str, base: NameGenerator) -> None:
    got = ask(url, "generate", settings={"type_line": "Goblin", "count": 4, "seed": 7})
    expected = base.generate(4, type_line="Goblin", seed=7)
    assert [name["text"] for name in got["names"]] == [name.text for name in expected]
    assert got["names"][0]["nearest_card"] == expected[0].nearest_card and got["is_over"]
    again = ask(url, "generate", settings=ask(url, "settings", text=got["settings"]))
    assert again["names"] == got["names"], "the string brings them back"


def test_names_come_one_by_one(url: str) -> None:
    joined = CLIENT.post(f"{url}/gradio_api/call/v2/stream", json={"settings": {"count": 3}})
    answer = CLIENT.get(f"{url}/gradio_api/call/v2/stream/{joined.json()['event_id']}").text
    messages = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: [")]
    assert [len(message[0]["names"]) for message in messages if message][:3] == [1, 2, 3]


def test_comparison_and_inspection(url: str, experts: NameGenerator) -> None:
    left, right = ask(url, "compare", settings={"count": 3}, preset_a="conservative", preset_b="creative")
    assert left["seed"] == right["seed"] and left["names"] != right["names"]
    inspected = ask(url, "inspect", name="Goblin Warfang", settings={"colors": "R"}, model="experts")
    blocks = range(1, experts.model.config.n_layer, 2)
    assert inspected["num_experts"] == 4 and set(inspected["experts"]) == set(map(str, blocks))
    assert len(inspected["experts"]["1"]) == len(inspected["tokens"]) == len(inspected["attention"][0][0])
    assert ask(url, "inspect", name="Goblin Warfang", settings={}, model="dense")["experts"] is None
    options = ask(url, "options")
    assert options["models"] == ["dense", "experts"] and options["settings"]["count"] == 20


@pytest.mark.parametrize(
    ("endpoint", "given", "message"),
    [
        ("generate", {"settings": {"count": 101}}, "from 1 to 100"),
        ("generate", {"settings": {"counts": 3}}, "unknown setting 'counts'"),
        ("generate", {"settings": [1]}, "must be an object"),
        ("generate", {"settings": {"colors": "purple"}}, "purple"),
        ("generate", {"settings": {}, "model": "../../etc/passwd"}, "no model"),
        ("generate", {"settings": {}, "model": {"path": "x"}}, "must be text"),
        ("generate", {"settings": {"regex": "(((((.{40}){40}){40}){40}){40}){40}"}}, "regex"),
        ("generate", {"settings": {"regex": "x{30}y{30}"}}, "matches no name"),
        ("compare", {"settings": {}, "preset_a": "bold"}, "unknown preset"),
        ("inspect", {"name": "a" * 61, "settings": {}}, "the most is 60"),
        ("inspect", {"name": 3, "settings": {}}, "must be text"),
        ("settings", {"text": "count=3"}, "must begin with"),
    ],
)
def test_a_bad_request_is_reported(url: str, endpoint: str, given: dict[str, Any], message: str) -> None:
    assert message in ask(url, endpoint, **given)["error"]


def test_it_is_documented(url: str) -> None:
    described = CLIENT.get(f"{url}/gradio_api/openapi.json").json()
    for endpoint in ("generate", "stream", "compare", "inspect", "settings", "options"):
        assert described["paths"][f"/gradio_api/call/v2/{endpoint}"]["post"]["description"]


def test_the_gate(url: str) -> None:
    for path in (
        *("upload", "file=/etc/passwd", "file/etc/passwd", "proxy=http://example.org", "component_server", "runs"),
        *("stream/a", "deep_link", "vibe-edit", "run/generate", "api/generate", "../../etc/passwd"),
    ):
        for method in ("GET", "POST"):
            assert CLIENT.request(method, f"{url}/gradio_api/{path}").status_code == 404, path
    for path in ("monitoring", "docs", "login", "assets/../../../pyproject.toml", "static/%2e%2e/%2e%2e/routes.py"):
        assert CLIENT.get(f"{url}/{path}").status_code in (403, 404), path
    join = f"{url}/gradio_api/queue/join"
    assert CLIENT.post(join, content=b"x" * (LARGEST_BODY + 1)).status_code == 413
    assert CLIENT.post(join, content=iter([b"x" * LARGEST_BODY, b"x"])).status_code in (400, 413)
    headers = CLIENT.get(url).headers
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_only_its_own_names_and_pages_are_answered(url: str) -> None:
    """DNS rebinding: a page of another site may point its own name at this machine."""
    join = f"{url}/gradio_api/call/v2/options"
    port = url.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
    ):
        refused = CLIENT.get(url, headers={"host": host})
        assert refused.status_code == 400 and "--allowed-host" in refused.text, host
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert CLIENT.get(url, headers={"host": host}).status_code == 200, host
    for origin in ("https://evil.example", "null", f"http://localhost:{int(port) ^ 1}", f"http://evil.example:{port}"):
        refused = CLIENT.post(join, json={}, headers={"origin": origin})
        assert refused.status_code == 403, origin
    for method in ("OPTIONS", "POST"):
        headers = {"origin": url, "access-control-request-method": "POST"}
        own = CLIENT.request(method, join, json={}, headers=headers)
        assert own.status_code == 200 and not [name for name in own.headers if name.startswith("access-control")]


def test_names_that_are_allowed() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    gate = server_module.Gate(never, ["Names.example.org:443", "0.0.0.0", "fd00::7"])
    for host in ("names.example.org", "names.example.org:443", "0.0.0.0:7860", "[fd00::7]:7860", "localhost"):
        assert gate._is_own(host, {"server": ("127.0.0.1", 7860)}), host
    assert gate._is_own("192.168.1.5:7860", {"server": ("192.168.1.5", 7860)}), "what was connected to"
    assert not gate._is_own("evil.example", {"server": ("evil.example", 80)}), "an address, no name"
    for host in ("example.org", "names.example.org.evil.example", "", "[", "192.168.1.6"):
        assert not gate._is_own(host, {"server": ("192.168.1.5", 7860)}), host
    assert gate._is_own_page("https://names.example.org", "127.0.0.1:7860"), "behind a proxy that changes Host"


def test_open_pages_leave_connections_for_requests(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEARTBEATS_PER_CLIENT", 3)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    asked = b"GET /gradio_api/heartbeat/%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    pages = [socket.create_connection(address, timeout=20) for _ in range(8)]
    answers = []
    for number, page in enumerate(pages):
        page.sendall(asked % number)
        answers.append(page.recv(12))
    assert answers == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"] * 5
    for page in pages[3:]:
        while page.recv(4096):
            pass  # until the server ends it: a refused page holds no connection
    assert ask(url, "generate", settings={"count": 1})["is_over"]
    for page in pages:
        page.close()
    deadline, status = time.monotonic() + 20, 0
    while status != 200 and time.monotonic() < deadline:  # a page that is closed makes room
        with CLIENT.stream("GET", f"{url}/gradio_api/heartbeat/9") as answer:
            status = answer.status_code
        time.sleep(0.05)
    assert status == 200


def test_invalid_values_break_nothing(url: str) -> None:
    """Functions of the page, called directly and through the queue, with anything in place of their values."""
    functions = [each["id"] for each in CLIENT.get(f"{url}/config").json()["dependencies"]]
    assert len(functions) > 10
    for number in (*functions, -1, 10**9, "x", None):
        for data in ([], [None] * 40, [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}] * 5, "x"):
            body = {"fn_index": number, "data": data, "session_hash": "abc", "event_data": [1]}
            direct = CLIENT.post(f"{url}/gradio_api/run/predict", json=body)
            assert direct.status_code >= 400 or "passwd" not in direct.text
        CLIENT.post(f"{url}/gradio_api/queue/join", json=body)
    assert len(ask(url, "generate", settings={"count": 1})["names"]) == 1


def test_64_clients_at_once(url: str) -> None:
    """Each gets its names or an error that the server is busy; afterwards everything is as before."""
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda seed: ask(url, "generate", settings={"count": 2, "seed": seed}), range(64)))
    kinds = Counter("names" if answer.get("is_over") else answer["status"] for answer in answers)
    assert set(kinds) <= {"names", 503} and kinds["names"] >= 32, kinds
    assert all("full" in answer["error"] for answer in answers if "error" in answer)
    assert len(ask(url, "generate", settings={"count": 2})["names"]) == 2


def test_idle_clients_are_disconnected(
    base: NameGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a request, half a body, no request, an answer never read, sockets dropped: all are cleaned up.

    The long form, with memory and 10,000 requests, is `benchmarks/server_faults.py`.
    """
    monkeypatch.setattr(server_module, "CLIENT_SECONDS", 0.3)
    server = make_server(Playground({"dense": base}))
    whole = b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n"
    starts = [b"", whole[:30], b"POST /config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc", whole * 40]
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = listener.getsockname()
        clients = []
        for number in range(40):
            client = socket.create_connection(address, timeout=20)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(starts[number % 4])
            clients.append(client)
        for number in range(40):  # left amid a request, or as soon as it is sent
            with socket.create_connection(address) as client:
                client.sendall(whole if number % 2 else whole[:9])
        assert ask(f"http://127.0.0.1:{address[1]}", "generate", settings={"count": 1})["is_over"]
        deadline, state = time.monotonic() + 60, server.server_state
        while (len(state.connections) > 1 or state.tasks) and time.monotonic() < deadline:  # ours stays, for more
            time.sleep(0.05)
        assert len(state.connections) <= 1 and not state.tasks
        for number, client in enumerate(clients):
            if number % 4 == 3:  # what it did not take is not held for it
                client.settimeout(1)
                with pytest.raises((ConnectionResetError, TimeoutError)):
                    while client.recv(65536):
                        pass
            client.close()
        server.should_exit = True
        thread.join()
    assert not caplog.records


def test_a_client_that_reads_nothing_is_disconnected_while_its_answer_is_written(
    base: NameGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unread data grows meanwhile. A busy server once kept writing for minutes."""

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 2000, "more_body": True})
            await asyncio.sleep(0.05)

    monkeypatch.setattr(server_module, "CLIENT_SECONDS", 0.3)
    server = make_server(Playground({"dense": base}))
    server.config.app, server.config.lifespan = endless, "off"
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with socket.create_connection(listener.getsockname(), timeout=20) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            deadline, state = time.monotonic() + 30, server.server_state
            while not state.connections and time.monotonic() < deadline:
                time.sleep(0.05)
            while state.connections and time.monotonic() < deadline:
                time.sleep(0.05)
            left_after = deadline - time.monotonic()
        server.should_exit = True
        thread.join()
    assert left_after > 0


def test_a_slow_answer_does_not_disconnect_the_client(base: NameGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client stays connected while its names take longer than the timeout of idle clients, up to the time limit."""
    monkeypatch.setattr(server_module, "CLIENT_SECONDS", 0.1)
    server = make_server(Playground({"dense": base}, time_limit=2))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert "stopped after 2 s" in ask(url, "generate", settings={"min_distance": 0.8, "count": 100})["note"]
        server.should_exit = True
        thread.join()


# --------------------------------------------------------------------------------------------------------- the command


def test_bad_input_of_the_command_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(released, "_CHECKOUT", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--model", "nowhere"], "no model at nowhere"),
            ([], 'no model: pip install "flash-experts[models]" brings'),
            (["--model", "nowhere", "--port", port], "Choose another --port"),
            (["--model", "nowhere", "--port", "70000"], "65535"),
            (["--model", "nowhere", "--host", "no.such.host.invalid"], "cannot listen"),
        ):
            assert main(["serve", *arguments]) == 1
            err = capsys.readouterr().err
            assert message in err and err.count("\n") == 1, err
    assert main(["serve", "--prt", "1"]) == 2 and "did you mean 'port'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve"]) == 1
    assert 'pip install "flash-experts[app]"' in capsys.readouterr().err
