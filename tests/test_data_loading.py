"""Card names from a file to prepared splits and back, and errors for damaged files."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from flash_experts.data import prepare as prepare_module
from flash_experts.data.card_table import read_embedded
from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.prepare import load_meta, load_split, prepare
from flash_experts.data.sources import load_source

DATA = Path(__file__).parent / "test_data"


# ---------------------------------------------------------------------------------------- files of one's own


@pytest.mark.parametrize("name", ["own.csv", "own.json", "own.jsonl", "own_mtgjson.json", "own_scryfall.jsonl"])
def test_every_file_format_gives_the_same_cards(name: str) -> None:
    cleaned = clean(load_source(DATA / name).rows)
    assert [(card.name, card.type_line, card.colors, card.mana_value) for card in cleaned.cards] == [
        ("Ember, the Unquiet", "Legendary Creature — Elemental", ("R",), 3),
        ("Twin Tides", "Sorcery", ("W", "U"), 4),
        ("Hollow Idol", "Artifact", (), 2),
        ("Jötun Ford", "Land", (), None),
    ]
    assert len({card.source_id for card in cleaned.cards}) == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "Sunlit Idol\n\n  Moth Queen \n"),
        ("names.csv", "Sunlit Idol\nMoth Queen\n"),
        ("names.csv", "\ufeffName\r\nSunlit Idol\r\nMoth Queen\r\n"),
        ("names.json", '["Sunlit Idol", "Moth Queen"]'),
        ("names.jsonl", '"Sunlit Idol"\n{"name": "Moth Queen"}\n'),
    ],
)
def test_a_list_of_names_is_enough(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    source = load_source(tmp_path / name)
    assert [card.name for card in clean(source.rows).cards] == ["Sunlit Idol", "Moth Queen"]
    assert source.name == name


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("a.txt", b"", r"a\.txt: no card names in it"),
        ("a.txt", b"\n \n", r"a\.txt: no card names in it"),
        ("a.txt", b"Goblin\nDand\xe2n\n", r"a\.txt:2: not UTF-8"),
        ("a.csv", b"name,type\nGoblin,Creature\nOrc\n", r"a\.csv:3: 1 cells, but the heading has 2"),
        (
            "a.csv",
            b"label,type\nGoblin,Creature\n",
            r"a\.csv:1: no column 'name' in the heading \(label, type\)",
        ),
        ("a.csv", b'name,type\nGoblin,"Creature\n', r"a\.csv:2: unexpected end of data"),
        ("a.jsonl", b'{"name": "Goblin"}\n{"name": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"type": "Creature"}\n', r"a\.jsonl:1: a card needs a name"),
        (
            "a.jsonl",
            b'{"text": "Goblin"}\n',
            r"a\.jsonl:1: a card needs a name, and has no key 'name', but 'text'",
        ),
        ("a.jsonl", b'{"name": "Goblin", "type_line": 3}\n', r"a\.jsonl:1: type_line must be text, not 3"),
        ("a.json", b'[\n"Goblin",\n', r"a\.json:3: not JSON"),
        ("a.json", b'{"data": {}}', r"a\.json:1: expected an array"),
        ("a.json", b'["Goblin", 3]', r"a\.json\[1\]: expected a name or a card, not int"),
        ("a.png", b"PNG", r"a\.png: cards are read from \.csv"),
        ("a.txt", b"PK\x03\x04\0\0\x08", r"a\.txt:1: not UTF-8 text: it is a zip archive or a spreadsheet"),
        ("a.csv", "name\nGoblin\n".encode("utf-32"), r"a\.csv:1: not UTF-8 text"),
        ("a.json", "[\n'Goblin']".encode("utf-16"), r"a\.json:2: not JSON"),
        ("a.json", b'["Goblin",\n"\xe2"]', r"a\.json:2: not UTF-8 text"),
        ("a.txt", b"Goblin\n" + b"x" * 400, r"a\.txt:2: 400 characters are not a card name: give one name per line"),
        ("a.csv", b"name\n" + b"x" * 400, r"a\.csv:2: 400 characters are not a card name"),
        ("a.csv", b'name\n"' + b"x\n" * 100_000, r"a\.csv:\d+: field larger than field limit"),
        ("a.jsonl", b'"Goblin"\n' + b"[" * 100_000, r"a\.jsonl:2: not the JSON of a card: maximum recursion depth"),
        ("a.jsonl", b'{"name": "Goblin", "cmc": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not the JSON of a card: Exceeds"),
        ("a.jsonl", b'{"name": "Gob\\ud800lin"}', r"a\.jsonl:1: half a character"),
        ("a.jsonl", b'{"name": "Goblin", "rarity": 3}', r"a\.jsonl:1: rarity must be text, not 3"),
    ],
)
def test_malformed_files_are_reported_with_their_line(tmp_path: Path, name: str, data: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=error) as raised:
        load_source(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_line_of_100_mb_is_refused_without_being_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(b'"Goblin"\n')
        file.truncate(100 * 2**20)  # a hole: zeros, or letters, would be refused all the same
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{name}:2: a line of more than 1,048,576 bytes is not a card"):
        load_source(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_json_file_too_large_to_parse_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    with open(path, "wb") as file:
        file.truncate(150 * 2**20)
    with pytest.raises(ValueError, match=r"all\.json: 150 MB: json is read up to 64 MB, jsonl .one card per line"):
        load_source(path)


def test_more_cards_than_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_experts.data.sources.MAX_CARDS", 2)
    (tmp_path / "a.txt").write_text("One\nTwo\nThree\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt: more than 2 cards"):
        load_source(tmp_path / "a.txt")


def test_rarity_set_and_date_of_a_file_become_columns(tmp_path: Path) -> None:
    text = "name,rarity,set,released_at\nSunlit Idol,Mythic Rare,abc,2026-02-06\nMoth Queen,special,,\nAsh Fen,,,\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    idol, queen, fen = clean(load_source(tmp_path / "a.csv").rows).cards
    assert (idol.rarity, idol.set_code, idol.released) == ("mythic", "ABC", "2026-02-06")
    assert (queen.rarity, queen.set_code, queen.released) == (fen.rarity, fen.set_code, fen.released) == (None,) * 3
    assert not {"rarity", "set_code", "released"} & set(queen.to_json())
    (tmp_path / "b.jsonl").write_text('{"name": "Ash Fen", "released": 2019}\n', encoding="utf-8")
    assert clean(load_source(tmp_path / "b.jsonl").rows).cards[0].released == "2019"
    for card in (idol, queen):
        assert Card.from_json(json.loads(json.dumps(card.to_json())), "here:1") == card


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown source 'embeded': did you mean 'embedded'"):
        load_source("embeded")
    with pytest.raises(
        ValueError, match="unknown source 'xyz': use 'embedded', 'scryfall', 'mtgjson', 'mtgjson-printings' or a file"
    ):
        load_source("xyz")
    with pytest.raises(ValueError, match=r"no file mine\.csv"):
        load_source("mine.csv")
    with pytest.raises(ValueError, match="is a folder"):
        load_source(tmp_path)


# --------------------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 cards of the embedded table: quick to split."""
    cards = clean(read_embedded().rows).cards[5000:6000]
    path = tmp_path_factory.mktemp("source") / "thousand.jsonl"
    path.write_text("".join(json.dumps(card.to_json()) + "\n" for card in cards), encoding="utf-8")
    return path


def test_prepare_writes_what_it_reports(names_file: Path, tmp_path: Path) -> None:
    meta = prepare(names_file, tmp_path / "out")
    splits = {name: load_split(tmp_path / "out", name) for name in ("train", "validation", "test", "test_iid")}
    assert meta["counts"] == {name: len(cards) for name, cards in splits.items()}
    assert sum(meta["counts"].values()) == meta["names"] == 1000
    together = [card for cards in splits.values() for card in cards]
    assert {card.name for card in together} == {card.name for card in clean(load_source(names_file).rows).cards}
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*meta["sha256"], "meta.json"}
    written = load_meta(tmp_path / "out")
    assert written == {key: value for key, value in meta.items() if key != "up_to_date"}
    assert (written["source"], written["cleaning_version"]) == ("thousand.jsonl", 2)


def test_a_prepared_line_has_the_documented_fields(names_file: Path, tmp_path: Path) -> None:
    prepare(names_file, tmp_path)
    line = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert list(json.loads(line)) == list(CARD)


def test_prepare_is_idempotent_and_reports_it(names_file: Path, tmp_path: Path) -> None:
    assert prepare(names_file, tmp_path)["up_to_date"] is False
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert prepare(names_file, tmp_path)["up_to_date"] is True
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    (tmp_path / "test.jsonl").write_text("", encoding="utf-8")
    assert prepare(names_file, tmp_path, overwrite=True)["up_to_date"] is False
    assert before.keys() == {path.name for path in tmp_path.iterdir()}
    assert all(path.read_bytes() == before[path.name][0] for path in tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_files(
    names_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(names_file, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path.parent / "other.jsonl"
    lines = names_file.read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(lines[:900]), encoding="utf-8")
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_known_names_are_those_of_the_source_and_of_all_cards(tmp_path: Path, names_file: Path) -> None:
    own = tmp_path / "own.txt"
    names = [card.name for card in clean(load_source(names_file).rows).cards]
    own.write_text("\n".join([*names, "Zzyzx the Unheard"]), encoding="utf-8")
    prepare(own, tmp_path / "out")
    known = (tmp_path / "out" / "known_names.txt").read_text(encoding="utf-8").splitlines()
    assert {"Zzyzx the Unheard", "Black Lotus", "The One Ring"} <= set(known)
    assert len(known) == len(set(known))


def test_too_few_names_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Sunlit Idol\nMoth Queen\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 names in 2 families are too few.*give 200 names or more"):
        prepare(tmp_path / "few.txt", tmp_path / "out")
    (tmp_path / "none.csv").write_text("name,type\nTazeem,Plane\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no name is left after cleaning \(1 plane\)"):
        prepare(tmp_path / "none.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused(names_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="out is a file: give --out a folder"):
        prepare(names_file, tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


CARD = {
    "name": "Ember",
    "type_line": "Creature",
    "types": ["Creature"],
    "subtypes": [],
    "supertypes": [],
    "colors": ["R"],
    "mana_value": 3,
    "source_id": "x:1",
}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"name": "Emb', r"train\.jsonl:2: not JSON"),
        (b"\xff\xfe", r"train\.jsonl:2: not UTF-8"),
        (json.dumps(CARD | {"name": "\ud800"}).encode(), r"train\.jsonl:2: half a character .*: run .*prepare. again"),
        (b"[" * 100_000, r"train\.jsonl:2: not the JSON of a card"),
        (b"[1]", r"train\.jsonl:2: a card must be a JSON object, not list"),
        (
            json.dumps({k: v for k, v in CARD.items() if k != "colors"}).encode(),
            r"train\.jsonl:2: no 'colors'",
        ),
        (json.dumps(CARD | {"name": " "}).encode(), r"train\.jsonl:2: the name is empty"),
        (
            json.dumps(CARD | {"name": None}).encode(),
            r"train\.jsonl:2: name, type_line and source_id must be text",
        ),
        (json.dumps(CARD | {"types": "Creature"}).encode(), r"train\.jsonl:2: types must be a list of texts"),
        (json.dumps(CARD | {"colors": ["Q"]}).encode(), r"train\.jsonl:2: colors must be a list of letters"),
        (
            json.dumps(CARD | {"mana_value": "3"}).encode(),
            r"train\.jsonl:2: mana_value must be a whole number",
        ),
        (
            json.dumps(CARD | {"mana_value": True}).encode(),
            r"train\.jsonl:2: mana_value must be a whole number",
        ),
        (json.dumps(CARD | {"rarity": "epic"}).encode(), r"train\.jsonl:2: rarity must be one of common, uncommon"),
        (json.dumps(CARD | {"released": 2026}).encode(), r"train\.jsonl:2: released must be text or null, not 2026"),
        (json.dumps(CARD | {"released": "soon"}).encode(), r"train\.jsonl:2: a release is given by its date or year"),
    ],
)
def test_malformed_prepared_lines_are_reported(tmp_path: Path, line: bytes, error: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(CARD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=error):
        load_split(tmp_path, "train")


def test_missing_and_empty_prepared_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prepared names in (.*nowhere): run `flash-experts prepare --out \1`$"):
        load_split(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"no prepared names in .*nowhere: run `flash-experts prepare --out"):
        load_meta(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no train\.jsonl in"):
        load_split(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty: run `flash-experts prepare` again"):
        load_split(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev': there are train, validation"):
        load_split(tmp_path, "dev")
    for text in ("{", "[" * 100_000):
        (tmp_path / "meta.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"meta\.json: not JSON"):
            load_meta(tmp_path)


def test_cards_survive_json() -> None:
    for card in clean(read_embedded().rows[:500]).cards:
        assert Card.from_json(json.loads(json.dumps(card.to_json())), "here:1") == card
