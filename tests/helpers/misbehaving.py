"""A local server, in its own process, with all live sources that drops connections, fails and truncates in turn."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

from tests.helpers.live_samples import atomic_card, jsonl, new_names, printed, scryfall_card
from tests.helpers.servers import Reply, running_server

SITES = ("scryfall", "mtgjson", "mtgjson-printings")
_NAMES = new_names(300)


def _files() -> dict[str, bytes]:
    """Served files, by path. Scryfall's index is made later, when the address is known."""
    sets = [{"code": "ABC", "name": "A B C", "releaseDate": "2026-02-06", "type": "expansion"}]
    meta = {"date": "2026-11-01", "version": "5.3.0+20261101"}
    printings = {"ABC": printed("ABC", "2026-02-06", "expansion", dict.fromkeys(_NAMES, "rare"))}
    cards = {name: [atomic_card(name)] for name in _NAMES}
    bodies = {"AtomicCards": cards, "SetList": sets, "AllPrintings": printings}
    files = {"/cards.jsonl.gz": jsonl([scryfall_card(name) for name in _NAMES])}
    for name, data in bodies.items():
        files[f"/api/v5/{name}.json.gz"] = gzip.compress(json.dumps({"meta": meta, "data": data}).encode(), mtime=0)
    return files


def _serve(writer: int) -> None:
    """Serves until killed; writes its address to the pipe."""
    with running_server() as server:
        replies = {}
        for path, body in _files().items():
            tag = {"ETag": f'"{path}"'}
            cut = [Reply(body, headers=tag, cut=len(body) * share // 4) for share in (1, 2, 3)]
            whole, busy = Reply(body, headers=tag), Reply(b"", 503)
            replies[path] = cycle([cut[0], whole, busy, cut[1], cut[2], whole, whole])
            replies[f"{path}.sha256"] = cycle([Reply(hashlib.sha256(body).hexdigest().encode()), busy])
        entry = {"type": "oracle_cards", "updated_at": "2026-11-02T09:00:00Z"}
        entry["jsonl_download_uri"] = f"{server.url}/cards.jsonl.gz"
        index = json.dumps({"object": "list", "has_more": False, "data": [entry]}).encode()
        replies["/bulk-data"] = cycle([Reply(index), Reply(index, cut=9), Reply(b"", 503)])
        server.next_reply = lambda path: next(replies[path])  # type: ignore[method-assign]
        os.write(writer, server.url.encode())
        signal.pause()


@contextmanager
def misbehaving_server() -> Iterator[dict[str, str]]:
    """Runs the server; yields environment variables that point the program to it, with a cache in its folder."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _serve(writer)
        finally:
            os._exit(1)
    os.close(writer)
    url = os.read(reader, 100).decode()
    os.close(reader)
    try:
        yield {
            "NO_PROXY": "127.0.0.1",
            "FLASH_EXPERTS_CACHE": "cache",
            "FLASH_EXPERTS_SCRYFALL_URL": url,
            "FLASH_EXPERTS_MTGJSON_URL": f"{url}/api/v5",
        }
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
