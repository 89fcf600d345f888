"""Robustness of `flash-experts serve` against hostile or disconnecting clients: no leak of memory, files or threads.

    python benchmarks/server_faults.py [--requests 10000] [--model DIR] [--out results.json]

One server runs in its own process. After a warm-up of a tenth of everything, its memory, open files and threads are
read from /proc. Then come `--requests` requests for pages, endpoints and invalid paths, clients that send half a
request, clients that never read their response, sockets closed during a request or response, requests whose names are
never fetched, and bodies of 10 MB. Each part counts its tries and the correct responses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
CALL = "/gradio_api/call/v2"
MOST_GROWTH = {"rss_mb": 60, "files": 4, "threads": 8}
# Idle connections end after 30 s, unfetched responses after 60 s.
SETTLED_SECONDS = 65
LARGE = 10 * 2**20


def state_of(process: int) -> dict[str, float]:
    """Reads memory, open files and threads of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes, threads = (int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads"))  # type: ignore[index]
    return {"rss_mb": round(kilobytes / 1024, 1), "files": len(os.listdir(f"/proc/{process}/fd")), "threads": threads}


class Clients:
    """Clients of one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.http = httpx.Client(timeout=60, base_url=url)

    def call(self, endpoint: str, given: dict[str, Any]) -> str:
        """Calls an endpoint and returns its whole response."""
        joined = self.http.post(f"{CALL}/{endpoint}", json=given)
        if joined.status_code != 200:
            return joined.text
        return self.http.get(f"{CALL}/{endpoint}/{joined.json()['event_id']}").text

    def request(self, number: int) -> bool:
        """Sends one of a mix of requests; returns whether the response is correct."""
        kinds: list[Callable[[], bool]] = [
            lambda: self.http.get("/").status_code == 200,
            lambda: self.http.get("/config").status_code == 200,
            lambda: self.http.get(f"/nothing/{number}").status_code == 404,
            lambda: self.http.post("/gradio_api/upload", content=b"x" * 1000).status_code == 404,
            lambda: self.http.post(f"{CALL}/options", content=b"{").status_code >= 400,
            lambda: '"models"' in self.call("options", {}),
            lambda: "must be an object" in self.call("generate", {"settings": [number]}),
            lambda: '"names"' in self.call("generate", {"settings": {"count": 1, "seed": number}}),
        ]
        return kinds[number % len(kinds)]()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return connection

    def is_left(self, connection: socket.socket) -> bool:
        """Whether the server closes the connection."""
        try:
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        connection.close()
        return True

    def silent(self, count: int) -> int:
        """Sends half a header, half a body, or nothing, and waits; the server must serve others meanwhile."""
        starts = [
            b"",
            b"GET / HTTP/1.1\r\nHo",
            b"POST /config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc",
        ]
        waiting = [self.connect() for _ in range(count)]
        for number, connection in enumerate(waiting):
            connection.sendall(starts[number % len(starts)])
        served = all(self.request(number) for number in range(8))
        return sum(map(self.is_left, waiting)) if served else 0

    def deaf(self, count: int) -> int:
        """Requests the page repeatedly without reading the responses."""
        waiting = [self.connect() for _ in range(count)]
        for connection in waiting:
            connection.settimeout(1)
            try:
                for _ in range(200):
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            except TimeoutError:
                pass
            connection.settimeout(60)
        served = all(self.request(number) for number in range(8))
        time.sleep(35)
        return sum(map(self.is_left, waiting)) if served else 0

    def dropped(self, number: int) -> bool:
        """Disconnects during a request, or right after it."""
        body = b'{"settings": {"count": 2}}'
        head = f"POST {CALL}/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with self.connect() as connection:
            connection.sendall(whole[: [5, 60, len(whole) - 4, len(whole)][number % 4]])
        return True

    def unfetched(self, number: int) -> bool:
        """Starts a request and never fetches its names, or disconnects during the response."""
        joined = self.http.post(f"{CALL}/stream", json={"settings": {"count": 2, "seed": number}})
        if joined.status_code == 200 and number % 2:
            with self.http.stream("GET", f"{CALL}/stream/{joined.json()['event_id']}") as answer:
                next(answer.iter_bytes(), None)
        return joined.status_code in (200, 503)

    def large(self, number: int) -> bool:
        """Sends 10 MB, with a content length or chunked."""
        pieces = (b"x" * 2**16 for _ in range(LARGE // 2**16))
        try:
            answer = self.http.post(f"{CALL}/generate", content=b"x" * LARGE if number % 2 else pieces)
        except httpx.TransportError:  # rejected before all was sent
            return True
        return answer.status_code in (400, 413)

    def many(self, kind: Callable[[int], bool], count: int) -> int:
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(kind, range(count)))


def settled(clients: Clients, process: int) -> dict[str, float]:
    """Reads the state after all timeouts."""
    time.sleep(SETTLED_SECONDS)
    for number in range(8):  # idle threads end at the next request: up to 40 of them
        clients.request(number)
    return state_of(process)


def experiment(clients: Clients, process: int, requests: int) -> dict[str, Any]:
    """Runs all parts at a tenth of the size, then at full size."""
    parts: dict[str, Callable[[int], int]] = {
        "requests": lambda share: clients.many(clients.request, requests // share),
        "silent clients": lambda share: clients.silent(requests // 25 // share),
        "clients that take no answer": lambda share: clients.deaf(requests // 100 // share),
        "dropped sockets": lambda share: clients.many(clients.dropped, requests // 10 // share),
        "names nobody fetches": lambda share: clients.many(clients.unfetched, requests // 20 // share),
        "bodies of 10 MB": lambda share: clients.many(clients.large, requests // 50 // share),
    }
    divisors = dict(zip(parts, (1, 25, 100, 10, 20, 50), strict=True))
    for part in parts.values():
        part(10)
    before = settled(clients, process)
    counts: dict[str, dict[str, Any]] = {}
    lost: list[dict[str, Any]] = []
    for name, part in parts.items():
        tried = requests // divisors[name]
        counts[name] = {"tried": tried, "survived": part(1)}
        counts[name] |= {"after": state_of(process)}
        print(f"{name}: {counts[name]}", file=sys.stderr, flush=True)
        if counts[name]["survived"] != tried:
            lost.append({name: counts[name]})
    after = settled(clients, process)
    lost += [
        {name: [before[name], after[name]]} for name, most in MOST_GROWTH.items() if after[name] > before[name] + most
    ]
    tried = sum(count["tried"] for count in counts.values())
    survived = sum(count["survived"] for count in counts.values())
    return {"tried": tried, "survived": survived, "lost": lost, "before": before, "after": after, "parts": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="number of requests")
    parser.add_argument("--model", default=None, help="model folder (default: a tiny new model)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model
        if model is None:
            from tests.helpers.command_line import make_workplace

            make_workplace(Path(temporary))
            model = f"{temporary}/models/base"
        command = [sys.executable, "-m", "flash_experts.cli", "serve", "--port", "0", "--model", model]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                url = server.stdout.readline().split()[2]
                result = experiment(Clients(url), server.pid, args.requests)
            finally:
                server.terminate()
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(result["lost"]))


if __name__ == "__main__":
    main()
