"""Load test of the playground, and load time of its page, against a server of its own on this machine.

    python benchmarks/playground.py [--clients 64] [--rounds 2] [--model models/mtg-base]

Prints counts (names, "busy", other results), times, and, if playwright and Chromium are installed, the time until the
page is interactive: the median of five visits with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx

from flash_experts.app.server import bind, make_server
from flash_experts.app.service import Playground

VISITS = 5
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/mtg-base")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="sequential requests per client")
    parser.add_argument("--count", type=int, default=20, help="names per request")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=r"found \d+ of \d+ names")
    server = make_server(Playground.load([args.model]))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            wait_until_up(url)
            print_visits(url)
            print_load(url, args.clients, args.rounds, args.count)
        finally:
            server.should_exit = True
            thread.join()


def wait_until_up(url: str) -> None:
    for _ in range(100):
        try:
            httpx.get(f"{url}/config", timeout=10)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server did not start within 10 s")


def print_visits(url: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        print("page: not measured: chromium or playwright is not installed")
        return
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        for _ in range(VISITS):
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(url)
            page.get_by_role("button", name="Make names").wait_for()
            seconds.append(time.perf_counter() - began)
            page.context.close()
        browser.close()
    listed = ", ".join(f"{each:.2f}" for each in seconds)
    print(f"page: {statistics.median(seconds):.2f} s until interactive, median of {VISITS} ({listed})")


def print_load(url: str, clients: int, rounds: int, count: int) -> None:
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    with httpx.Client(timeout=300, limits=limits) as client:

        def visit(number: int) -> list[tuple[str, float]]:
            return [ask(client, url, count, seed=1000 * number + turn) for turn in range(rounds)]

        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            outcomes = [outcome for each in pool.map(visit, range(clients)) for outcome in each]
        total = time.perf_counter() - began
        kinds = Counter(kind for kind, _ in outcomes)
        waits = sorted(seconds for kind, seconds in outcomes if kind == "names")
        print(
            f"load: {clients} clients at once, {rounds} requests each for {count} names: {dict(kinds)} in {total:.1f} s"
        )
        if waits:
            print(f"wait of those that got names: median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s")
        print(f"afterwards: {ask(client, url, count, seed=1)[0]}")


def ask(client: httpx.Client, url: str, count: int, seed: int) -> tuple[str, float]:
    """Sends one request; returns its outcome ("names", "busy", or an error) and its seconds."""
    began = time.perf_counter()
    endpoint = f"{url}/gradio_api/call/v2/generate"
    try:
        joined = client.post(endpoint, json={"settings": {"count": count, "seed": seed}})
        if joined.status_code == 503:
            return "busy", time.perf_counter() - began
        joined.raise_for_status()
        answer = client.get(f"{endpoint}/{joined.json()['event_id']}").text
        data = json.loads(answer.rstrip().rpartition("data: ")[2])
        kind = "names" if isinstance(data, list) and len(data[0]["names"]) == count else "less"
    except (httpx.HTTPError, ValueError) as error:
        kind = type(error).__name__
    return kind, time.perf_counter() - began


if __name__ == "__main__":
    main()
