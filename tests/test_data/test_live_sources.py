"""Live sources from a local server with files in their format: cache, damage, and the output of prepare."""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flash_experts.cli import main
from flash_experts.data.card_table import read_embedded
from flash_experts.data.live import bulk_files
from flash_experts.data.live.bulk_files import DamagedError
from flash_experts.data.live.download import Downloader, RetryPolicy
from flash_experts.data.live.sites import read_live
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import load_source
from tests.helpers.live_samples import atomic_card, jsonl, new_names, printed, scryfall_card
from tests.helpers.servers import Reply, TestServer, running_server

NOW = datetime(2026, 11, 2, 10, tzinfo=UTC)
FILE = "/file/oracle-cards-20261102.jsonl.gz"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TestServer]:
    with running_server() as running:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("FLASH_EXPERTS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("FLASH_EXPERTS_SCRYFALL_URL", running.url)
        monkeypatch.setenv("FLASH_EXPERTS_MTGJSON_URL", f"{running.url}/api/v5")
        yield running


@pytest.fixture
def downloader() -> Downloader:
    return Downloader(RetryPolicy(attempts=2, connect_attempts=1), sleep=lambda _: None)


def index(server: TestServer, data: bytes, updated: str = "2026-11-02T09:00:00Z", path: str = FILE) -> None:
    """Serves Scryfall's index, and the file that it names."""
    entry = {"object": "bulk_data", "type": "oracle_cards", "updated_at": updated, "compressed_size": len(data)}
    entry["jsonl_download_uri"] = server.url + path
    rulings = {"object": "bulk_data", "type": "rulings", "updated_at": updated, "jsonl_download_uri": "https://x/y"}
    document = {"object": "list", "has_more": False, "data": [rulings, entry]}
    server.serve("/bulk-data", Reply(json.dumps(document).encode()))
    server.serve(path, Reply(data, headers={"ETag": f'"{updated}"'}))


def mtgjson(
    server: TestServer, cards: dict[str, Any], version: str = "5.3.0+20261101", printings: dict[str, Any] | None = None
) -> bytes:
    """Serves MTGJSON's files with their checksums. Returns the bytes of the cards."""
    meta = {"date": "2026-11-01", "version": version}
    sets = [{"code": "ABC", "name": "A B C", "releaseDate": "2026-02-06", "type": "expansion"}]
    sets += [{"code": "MEM", "name": "M", "releaseDate": "2026-03-01", "type": "memorabilia"}]
    files = {"AtomicCards": {"meta": meta, "data": cards}, "SetList": {"meta": meta, "data": sets}}
    files |= {"AllPrintings": {"meta": meta, "data": printings or {}}}
    bodies = {}
    for name, document in files.items():
        body = bodies[name] = gzip.compress(json.dumps(document).encode(), mtime=0)
        path = f"/api/v5/{name}.json.gz"
        server.serve(path, Reply(body))
        server.serve(f"{path}.sha256", Reply(hashlib.sha256(body).hexdigest().encode()))
    return bodies["AtomicCards"]


# ---------------------------------------------------------------------------------------------------- fetching


def test_scryfall_gets_the_headers_that_it_asks_for(server: TestServer, downloader: Downloader) -> None:
    data = jsonl([scryfall_card(name) for name in new_names(5)])
    index(server, data)
    source = read_live("scryfall", downloader, NOW)
    assert [row.name for row in source.rows] == new_names(5)
    assert (source.name, source.version) == ("scryfall", "2026-11-02T09:00:00Z")
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    (request,) = server.requests_to("/bulk-data")
    assert request["user-agent"] == "flash-experts/0.1.0" and request["accept"] == "application/json"
    assert server.requests_to(FILE)[0]["user-agent"] == "flash-experts/0.1.0"


def test_the_format_of_before_july_2026(server: TestServer, downloader: Downloader) -> None:
    cards = [scryfall_card(name) for name in new_names(3)]
    entry = {"type": "oracle_cards", "updated_at": "2026-05-29", "download_uri": f"{server.url}/x.json", "size": 1}
    server.serve("/bulk-data", Reply(json.dumps({"data": [entry]}).encode()))
    server.serve("/x.json", Reply(("[\n" + ",\n".join(map(json.dumps, cards)) + "\n]").encode()))
    assert [row.name for row in read_live("scryfall", downloader, NOW).rows] == new_names(3)


def test_mtgjson_is_verified_by_its_checksums(server: TestServer, downloader: Downloader) -> None:
    body = mtgjson(server, {name: [atomic_card(name)] for name in new_names(5)})
    source = read_live("mtgjson", downloader, NOW)
    assert [row.name for row in source.rows] == new_names(5)
    assert (source.version, source.sha256) == ("5.3.0+20261101", hashlib.sha256(body).hexdigest())


def test_rarities_are_those_of_first_printings(server: TestServer, downloader: Downloader) -> None:
    printings = {
        "NEW": printed(
            "NEW", "2026-02-06", "expansion", {"Zaba Zo": "mythic", "Kib Ka": "uncommon", "Lud Lo": "special"}
        ),
        "MEM": printed("MEM", "1990-01-01", "memorabilia", {"Zaba Zo": "common"}),
        "OLD": printed("OLD", "1999-10-04", "core", {"Zaba Zo": "uncommon", "Kib Ka": "rare"}),
        "POL": printed("POL", "1999-10-04", "promo", {"Zaba Zo": "rare"}),
    }
    names = ["Zaba Zo", "Kib Ka", "Lud Lo", "Mip Mo"]
    mtgjson(server, {name: [atomic_card(name)] for name in names}, printings=printings)
    rows = read_live("mtgjson-printings", downloader, NOW).rows
    assert {row.name: row.rarity for row in rows} == {
        "Zaba Zo": "uncommon", "Kib Ka": "rare", "Lud Lo": None, "Mip Mo": None,
    }  # fmt: skip
    assert read_live("mtgjson-printings", downloader, NOW + timedelta(hours=1)).rows == rows, "from the cache"
    assert all(row.rarity is None for row in read_live("mtgjson", downloader, NOW).rows)


def test_printings_of_another_format(server: TestServer, downloader: Downloader) -> None:
    mtgjson(server, {"Zaba Zo": [atomic_card("Zaba Zo")]}, printings={"NEW": {"type": "expansion", "cards": [{}]}})
    with pytest.raises(ValueError, match=r"its set 'NEW' is not as expected \(KeyError: 'rarity'\)"):
        read_live("mtgjson-printings", downloader, NOW)


def test_the_cache_is_used_for_a_day_then_checked_for_updates(
    server: TestServer, downloader: Downloader, tmp_path: Path
) -> None:
    index(server, jsonl([scryfall_card(name) for name in new_names(5)]))
    first = read_live("scryfall", downloader, NOW)
    assert read_live("scryfall", downloader, NOW + timedelta(hours=23)) == first
    assert len(server.requests) == 2, "less than a day old: no request"
    assert read_live("scryfall", downloader, NOW + timedelta(hours=25)) == first
    assert len(server.requests) == 3, "nothing newer: the index alone"
    assert read_live("scryfall", downloader, NOW + timedelta(hours=48)) == first
    assert len(server.requests) == 3, "checked 23 hours ago"
    index(server, jsonl([scryfall_card(name) for name in new_names(6)]), "2026-11-05T09:00:00Z", "/file/new")
    second = read_live("scryfall", downloader, NOW + timedelta(hours=73))
    assert len(second.rows) == 6 and second.version == "2026-11-05T09:00:00Z"
    files = {path.name.split("-")[0] for path in (tmp_path / "cache/scryfall").iterdir()} - {".lock"}
    assert files == {"manifest.json", "oracle_cards"}
    assert len(list((tmp_path / "cache/scryfall").glob("oracle_cards*"))) == 1, "the old file is gone"


def test_unchanged_files_of_mtgjson_are_not_fetched_again(server: TestServer, downloader: Downloader) -> None:
    mtgjson(server, {name: [atomic_card(name)] for name in new_names(5)})
    first = read_live("mtgjson", downloader, NOW)
    before = len(server.requests)
    assert read_live("mtgjson", downloader, NOW + timedelta(days=2)) == first
    assert all(path.endswith(".sha256") for path, _ in server.requests[before:])


@pytest.mark.parametrize("name", ["scryfall", "mtgjson"])
def test_without_a_network_the_cache_is_used_and_its_date_reported(
    server: TestServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    index(server, jsonl([scryfall_card(name) for name in new_names(5)]))
    mtgjson(server, {name: [atomic_card(name)] for name in new_names(5)})
    first = read_live(name, downloader, NOW)
    monkeypatch.setenv(f"FLASH_EXPERTS_{name.upper()}_URL", "http://127.0.0.1:9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_live(name, downloader, NOW + timedelta(hours=1)) == first
    with pytest.warns(UserWarning, match=r"no connection .*; using .* cards of 2026-11-02 from the cache") as warned:
        assert read_live(name, downloader, NOW + timedelta(days=9)) == first
    assert "\n" not in str(warned[0].message)


@pytest.mark.parametrize(("name", "title"), [("scryfall", "Scryfall"), ("mtgjson", "MTGJSON")])
def test_without_network_and_cache_the_embedded_source_is_named(
    server: TestServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch, name: str, title: str
) -> None:
    monkeypatch.setenv(f"FLASH_EXPERTS_{name.upper()}_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"no cards from {title}: .*no connection.*--source embedded") as raised:
        read_live(name, downloader, NOW)
    assert "\n" not in str(raised.value)


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
GOOD = jsonl([scryfall_card(name) for name in new_names(50)])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (GOOD[:-200], "its gzip is damaged"),
        (GOOD[:-8] + bytes(8), "its gzip is damaged: CRC check failed"),
        (GOOD[:500] + bytes(20) + GOOD[520:], "its gzip is damaged"),
        (PAGE, "it is a web page"),
        (gzip.compress(b'{"name": "Zz', mtime=0), "it is not JSON"),
        (gzip.compress(b'{"object": "error"}\n', mtime=0), r"its line 1 is not as expected \(KeyError"),
        (gzip.compress(b"[" * 50_000, mtime=0), "it is not JSON"),
        (gzip.compress(b"", mtime=0), "it holds no cards"),
        (b"", "it holds no cards"),
        (gzip.compress(b"\xff\xfe\xfd\n", mtime=0), "it is not JSON"),
    ],
    ids=range(10),
)
def test_damaged_files_are_downloaded_twice_and_then_reported(
    server: TestServer, downloader: Downloader, tmp_path: Path, data: bytes, error: str
) -> None:
    index(server, data)
    with pytest.raises(ValueError, match=error) as raised:
        read_live("scryfall", downloader, NOW)
    assert "\n" not in str(raised.value) and FILE in str(raised.value)
    assert len(server.requests_to(FILE)) == 2
    assert [path.name for path in (tmp_path / "cache/scryfall").iterdir()] == [".lock"], "nothing half-written"
    server.serve(FILE, Reply(data, headers={"ETag": '"x"'}), Reply(GOOD, headers={"ETag": '"x"'}))
    assert len(read_live("scryfall", downloader, NOW).rows) == 50, "the second time it is whole"


def test_a_damaged_file_does_not_replace_a_good_one(server: TestServer, downloader: Downloader) -> None:
    index(server, GOOD)
    first = read_live("scryfall", downloader, NOW)
    index(server, GOOD[:-9], "2026-11-05T09:00:00Z")
    with pytest.warns(UserWarning, match="damaged.*cards of 2026-11-02 from the cache"):
        assert read_live("scryfall", downloader, NOW + timedelta(days=3)) == first


def test_a_dropped_connection_is_resumed(server: TestServer, downloader: Downloader) -> None:
    index(server, GOOD)
    tag = {"ETag": '"x"'}
    server.serve(FILE, Reply(GOOD, headers=tag, cut=len(GOOD) // 2), Reply(GOOD, headers=tag))
    assert len(read_live("scryfall", downloader, NOW).rows) == 50
    assert server.requests_to(FILE)[1]["range"] == f"bytes={len(GOOD) // 2}-"


def test_files_that_unpack_to_too_much_are_refused(
    server: TestServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(server, gzip.compress(b"\n" * 10**6))
    monkeypatch.setattr(bulk_files, "MAX_UNPACKED_BYTES", 10**5)
    with pytest.raises(ValueError, match="it unpacks to more than 100,000 bytes"):
        read_live("scryfall", downloader, NOW)
    monkeypatch.setattr(bulk_files, "MAX_UNPACKED_BYTES", 10**7)
    monkeypatch.setattr(bulk_files, "MAX_LINE_BYTES", 10**5)
    index(server, gzip.compress(b"x" * 10**6), "later")
    with pytest.raises(ValueError, match="its line 1 has more than 100,000 bytes"):
        read_live("scryfall", downloader, NOW)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (PAGE, "lists no file of oracle_cards .a web page: does the network require a login"),
        (b'{"data": []}', "lists no file of oracle_cards"),
        (b'{"data": [{"type": "oracle_cards", "updated_at": "x"}]}', "lists no file of oracle_cards"),
        (b"[" * 10_000, "lists no file of oracle_cards"),
        (
            b'{"data": [{"type": "oracle_cards", "updated_at": "x", "jsonl_download_uri": "file:///etc/passwd"}]}',
            "redirects to 'file:/+etc/passwd': only https and http are followed",
        ),
    ],
)
def test_a_malformed_index(server: TestServer, downloader: Downloader, body: bytes, error: str) -> None:
    server.serve("/bulk-data", Reply(body))
    with pytest.raises(ValueError, match=error):
        read_live("scryfall", downloader, NOW)


def test_a_wrong_checksum_is_requested_again(server: TestServer, downloader: Downloader, tmp_path: Path) -> None:
    body = mtgjson(server, {name: [atomic_card(name)] for name in new_names(5)})
    path = "/api/v5/AtomicCards.json.gz"
    wrong, right = Reply(b"0" * 64), Reply(hashlib.sha256(body).hexdigest().encode() + b"  AtomicCards.json.gz\n")
    server.serve(f"{path}.sha256", wrong)
    with pytest.raises(ValueError, match=r"AtomicCards\.json\.gz: its SHA-256 is [0-9a-f]{12}\.\.\., not 000000000000"):
        read_live("mtgjson", downloader, NOW)
    assert not list((tmp_path / "cache/mtgjson").glob("Atomic*")), "what is wrong is not kept"
    server.serve(f"{path}.sha256", wrong, right)
    assert len(read_live("mtgjson", downloader, NOW).rows) == 5
    server.serve(f"{path}.sha256", Reply(PAGE))
    with pytest.warns(UserWarning, match="not a checksum but '<!DOCTYPE html>"):
        read_live("mtgjson", downloader, NOW + timedelta(days=2))


@pytest.mark.parametrize("document", [{"data": {"X": [{"name": 1}]}}, {"data": 3}, {"meta": {"version": "1"}}, []])
def test_mtgjson_of_another_format(server: TestServer, downloader: Downloader, document: Any) -> None:
    mtgjson(server, {})
    body = gzip.compress(json.dumps(document).encode())
    server.serve("/api/v5/AtomicCards.json.gz", Reply(body))
    server.serve("/api/v5/AtomicCards.json.gz.sha256", Reply(hashlib.sha256(body).hexdigest().encode()))
    with pytest.raises(ValueError, match=r"AtomicCards\.json\.gz: it") as raised:
        read_live("mtgjson", downloader, NOW)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spoil", ["file", "manifest"])
def test_a_damaged_cache_is_downloaded_again(
    server: TestServer, downloader: Downloader, tmp_path: Path, spoil: str
) -> None:
    index(server, GOOD)
    first = read_live("scryfall", downloader, NOW)
    pattern = "oracle_cards-*" if spoil == "file" else "manifest.json"
    (path,) = (tmp_path / "cache/scryfall").glob(pattern)
    path.write_bytes(path.read_bytes()[:-3])
    assert read_live("scryfall", downloader, NOW) == first
    assert len(server.requests_to(FILE)) == 2


# ------------------------------------------------------------------------------------------------ prepare


def scryfall_of_the_table(first: int, last: int) -> list[dict[str, Any]]:
    """Real names from the embedded table in Scryfall's format, with rarities."""
    rarities = ("common", "uncommon", "rare", "mythic")
    return [
        scryfall_card(row.name, row.type_line, row.mana_cost, colors=list(row.colors or ""), rarity=rarities[n % 4])
        for n, row in enumerate(read_embedded().rows[first:last])
        if row.layout == "normal"
    ]


def test_prepare_from_scryfall_and_what_changed_since(
    server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [scryfall_card("Zzyrt Elf", "Token Creature — Elf", "", layout="token", set_type="token")]
    old, new = new_names(3, seed=1), new_names(2, seed=2)
    cards = [*scryfall_of_the_table(5000, 6000), *tokens]
    index(server, jsonl([*cards, *map(scryfall_card, old)]))
    out = tmp_path / "out"
    command = ["prepare", "--source", "scryfall", "--out", str(out)]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "source: scryfall, 2026-11-02T09:00:00Z" in output.out and output.err == ""
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    assert meta["dropped"]["token"] == 1 and meta["changes"] is None and meta["source"] == "scryfall"
    train = load_split(out, "train")
    assert {card.rarity for card in train} == {"common", "uncommon", "rare", "mythic"}
    assert Attributes.of(train[0]).prompt().endswith(f", {train[0].rarity}, ABC, 2026:")
    assert train[0].released == "2026-02-06" and train[0].set_code == "ABC"
    known = (out / "known_names.txt").read_text("utf-8").splitlines()
    assert set(old) <= set(known) and "Zzyrt Elf" not in known, "a token's name is free"

    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}

    monkeypatch.setenv("FLASH_EXPERTS_CACHE", str(tmp_path / "other"))
    index(server, jsonl([*cards, *map(scryfall_card, old[1:] + new)]), "2026-11-05T09:00:00Z", "/file/new")
    assert main(command) == 0
    output = capsys.readouterr()
    assert "changed since scryfall, 2026-11-02T09:00:00Z: 2 names added" in output.out
    assert f"1 names removed ({old[0]})" in output.out
    changes = json.loads((out / "meta.json").read_text("utf-8"))["changes"]
    assert changes["added_names"] == sorted(new) and changes["removed_names"] == [old[0]]
    assert (changes["added"], changes["removed"], changes["names_before"]) == (2, 1, meta["names"])
    assert prepare("scryfall", out)["up_to_date"], "what the last change was stays written"
    (out / "test.jsonl").write_text("", encoding="utf-8")
    assert prepare("scryfall", out, overwrite=True)["changes"] == changes, "a repair is not a change"


def test_prepare_without_a_network_is_one_line(
    server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_EXPERTS_MTGJSON_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flash_experts.data.live.download.time.sleep", lambda _: None)
    monkeypatch.setattr("flash_experts.data.live.sites.Downloader", lambda: Downloader(sleep=lambda _: None))
    assert main(["prepare", "--source", "mtgjson", "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and "--source embedded" in output.err
    assert not (tmp_path / "out").exists()


def test_live_sources_are_loaded_by_name(server: TestServer) -> None:
    with pytest.raises(ValueError, match="unknown source 'scryfal': did you mean 'scryfall'"):
        load_source("scryfal")
    index(server, GOOD)
    assert load_source("scryfall").name == "scryfall"


def test_a_truncated_file_is_reported_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(GOOD[:100])
    with pytest.raises(DamagedError), bulk_files.unpacked(tmp_path / "x") as file:
        list(bulk_files.json_lines(file))
