"""Card names from a source to prepared files: cleaning, the embedded table, files of one's own, errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_experts.data import prepare as prepare_module
from flash_experts.data.cards import Card, join_type_line, known_names, load_source, split_type_line
from flash_experts.data.cleaning import clean, colors_of_cost, mana_value
from flash_experts.data.names import faces_of, normal_form, shown_form
from flash_experts.data.prepare import load_meta, load_split, prepare
from flash_experts.data.sources import RawCard, embedded_table, read_embedded

DATA = Path(__file__).parent / "test_data"


def only(**fields: object) -> Card:
    """The one card that cleaning makes of a row."""
    (card,) = clean([RawCard(**fields)]).cards  # type: ignore[arg-type]
    return card


# ------------------------------------------------------------------------------------------------------------- names


def test_shown_form_normalizes_look_alikes_and_keeps_accents() -> None:
    assert shown_form("Ratonhnhaké꞉ton") == "Ratonhnhaké:ton"
    assert shown_form("  Lim-Du\u0302l’s\u00a0  Vault\u200b ") == "Lim-Dûl's Vault"
    assert shown_form("Jo\u0308tun Grunt") == "Jötun Grunt"


def test_normal_form_folds_what_readers_take_for_the_same() -> None:
    assert normal_form("Lim-Dûl's Vault") == normal_form("LIM DULS VAULT") == "limdulsvault"
    assert normal_form("Æther Vial") == normal_form("Aether  Vial!")
    assert normal_form("Fire Ball") == normal_form("Fireball") != normal_form("Fireballs")
    assert normal_form("_____ !") == ""


@given(st.text(max_size=30))
def test_forms_are_idempotent_and_agree(name: str) -> None:
    assert shown_form(shown_form(name)) == shown_form(name)
    assert normal_form(normal_form(name)) == normal_form(name)
    assert shown_form(name).split() == shown_form(name).strip().split(" ") or shown_form(name) == ""


@given(st.text("aeiouLmdrst'- ûöéÉæ", max_size=20))
def test_the_shown_form_of_a_name_has_its_normal_form(name: str) -> None:
    assert normal_form(shown_form(name)) == normal_form(name)


# ---------------------------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("cost", "value", "colors"),
    [
        ("{2}{W}{W}", 4, "W"),
        ("{X}{R}", 1, "R"),
        ("{G/W}{G/W}", 2, "WG"),
        ("{2/R}{2/R}", 4, "R"),
        ("{1}{U/P}", 2, "U"),
        ("{G/U/P}", 1, "UG"),
        ("{C}{S}", 2, ""),
        ("{0}", 0, ""),
        ("{HW}", 0, "W"),
        ("{HW}{HW}{B}", 2, "WB"),
        ("{1000000}", 1_000_000, ""),
        ("{C/W}", 1, "W"),
    ],
)
def test_mana_costs(cost: str, value: int, colors: str) -> None:
    assert mana_value(cost) == value
    assert colors_of_cost(cost) == tuple(colors)


def test_a_card_is_read_from_its_row() -> None:
    card = only(name="Krenko, Mob Boss", type_line="Legendary Creature — Goblin Warrior", mana_cost="{2}{R}{R}")
    assert (card.supertypes, card.types, card.subtypes) == (("Legendary",), ("Creature",), ("Goblin", "Warrior"))
    assert (card.colors, card.mana_value) == (("R",), 4)


def test_faces_are_names_of_their_own() -> None:
    row = RawCard("Fire // Ice", "Instant // Instant", "{1}{R} // {1}{U}", layout="split")
    fire, ice = clean([row]).cards
    assert (fire.name, fire.colors, fire.mana_value) == ("Fire", ("R",), 2)
    assert (ice.name, ice.colors, ice.mana_value) == ("Ice", ("U",), 2)


def test_what_is_not_told_of_a_second_face_is_unknown() -> None:
    front, back = clean([RawCard("Realm-Cloaked Giant // Cast Off", "Creature — Giant", "{5}{W}{W}")]).cards
    assert (front.types, front.colors, front.mana_value) == (("Creature",), ("W",), 7)
    assert (back.type_line, back.types, back.colors, back.mana_value) == ("", (), None, None)


def test_a_face_with_a_row_of_its_own_is_told_by_that_row() -> None:
    rows = [
        RawCard("Delver of Secrets // Insectile Aberration", "Creature — Human Wizard", "{U}", layout="transform"),
        RawCard("Insectile Aberration", "Creature — Human Insect", None, "U", layout="transform"),
    ]
    cleaned = clean(rows)
    assert [(card.name, card.subtypes, card.colors) for card in cleaned.cards] == [
        ("Delver of Secrets", ("Human", "Wizard"), ("U",)),
        ("Insectile Aberration", ("Human", "Insect"), ("U",)),
    ]
    assert cleaned.dropped == {"repeated": 1}


def test_a_land_has_no_mana_value_and_is_colorless() -> None:
    land = only(name="Wasteland", type_line="Land", mana_value=0)
    assert (land.mana_value, land.colors) == (None, ())


def test_a_plain_name_has_only_a_name() -> None:
    card = only(name="Sunlit Idol")
    assert (card.type_line, card.types, card.colors, card.mana_value) == ("", (), None, None)


def test_every_dropped_face_is_counted_by_its_reason() -> None:
    rows = [
        RawCard("Goblin Guide", "Creature — Goblin Scout", "{R}"),
        RawCard("A-Goblin Guide", "Creature — Goblin Scout", "{R}"),
        RawCard("A-Frame", "Artifact", "{1}"),  # no Frame beside it: a name like others
        RawCard("Goblin  Guide!", "Creature — Goblin Scout", "{R}"),
        RawCard("Tazeem", "Plane — Zendikar", layout="planar"),
        RawCard("Mutual Epiphany", "Phenomenon"),
        RawCard("Your Inescapable Doom", "Ongoing Scheme", layout="scheme"),
        RawCard("Serra Angel Avatar", "Vanguard", layout="vanguard"),
        RawCard("Ancestral Hot Dog Minotaur", "Stickers"),
        RawCard("Bumper Cars", "Artifact — Attraction"),
        RawCard("Rocket-Powered Turbo Slug", "Artifact — Contraption"),
        RawCard("Adorable Kitten", "Host Creature — Cat", "{W}", layout="host"),
        RawCard("Bat-", "Creature — Bat", layout="augment"),
        RawCard("Throat Wolf", "Summon Wolf", "{R}{R}"),
        RawCard("_____ Goblin", "Creature — Goblin", "{R}"),
        RawCard("!", "Instant", "{R}"),
        RawCard("Chicken à la King", "Creature — Bird Noble", "{1}{U}{U}", flag="jokes"),
        RawCard("The One Ring", "Legendary Artifact", "{4}", flag="franchises"),
        RawCard("Soldier", "Token Creature — Soldier"),
    ]
    cleaned = clean(rows)
    assert [card.name for card in cleaned.cards] == ["Goblin Guide", "A-Frame"]
    assert cleaned.dropped == dict.fromkeys(
        "rebalanced repeated plane phenomenon scheme vanguard stickers attraction contraption host augment odd_type "
        "blank no_letters jokes franchises token".split(),
        1,
    )
    with_flagged = clean(rows, include=["jokes", "franchises"])
    assert [card.name for card in with_flagged.cards[2:]] == ["Chicken à la King", "The One Ring"]


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot include 'joke': take jokes or franchises"):
        clean([], include=["joke"])


ROWS = st.builds(
    RawCard,
    name=st.lists(st.text("AbcDé'- ", min_size=1, max_size=8), min_size=1, max_size=2).map(" // ".join),
    type_line=st.sampled_from([None, "Creature — Elf", "Land", "Instant // Sorcery", "Plane — X", "Tribal Instant"]),
    mana_cost=st.sampled_from([None, "{1}{G}", "{W/U} // {R}"]),
    flag=st.sampled_from(["", "", "jokes"]),
)


@given(st.lists(ROWS, max_size=12))
def test_cleaning_accounts_for_every_face_and_is_idempotent(rows: list[RawCard]) -> None:
    cleaned = clean(rows)
    assert cleaned.faces == sum(len(faces_of(row.name)) for row in rows)
    assert cleaned.faces == len(cleaned.cards) + sum(cleaned.dropped.values())
    assert len({normal_form(card.name) for card in cleaned.cards}) == len(cleaned.cards)
    again = clean(
        RawCard(
            card.name,
            card.type_line or None,
            colors="?" if card.colors is None else "".join(card.colors),
            mana_value=card.mana_value,
        )
        for card in cleaned.cards
    )
    assert [replace(card, source_id="") for card in cleaned.cards] == list(again.cards)
    assert again.dropped == {}


# ----------------------------------------------------------------------------------------------------- embedded table


def test_the_embedded_table_is_whole() -> None:
    source = read_embedded()
    assert len(source.rows) == 35_033
    assert len({row.name for row in source.rows}) == 35_033
    assert Counter(row.flag for row in source.rows)["franchises"] > 3_000
    assert source.sha256 == hashlib.sha256(embedded_table().read_bytes()).hexdigest()


def test_what_remains_of_the_embedded_table() -> None:
    cleaned = clean(read_embedded().rows)
    assert 29_900 < len(cleaned.cards) < 30_200
    assert cleaned.dropped["franchises"] == pytest.approx(3_176, abs=20)
    assert cleaned.dropped["plane"] == 207
    names = {card.name: card for card in cleaned.cards}
    for name in ("Lim-Dûl's Vault", "Jötun Grunt", "Snapcaster Mage", "Command Tower", "Dawn", "Drizzt Do'Urden"):
        assert name in names
    for name in ("The One Ring", "Captain Kirk, Boldly Going", "Spider-Man 2099", "Blacker Lotus", "Tazeem"):
        assert name not in names
    assert names["Ancestral Vision"].colors == ("U",)  # no mana cost, a color indicator
    assert names["Mox Emerald"].colors == ()
    assert names["Insectile Aberration"].colors == ("U",)
    assert names["Ice"].colors == ("U",)
    assert names["Crimson Kobolds"].colors == ("R",)
    assert names["Bitterblossom"].type_line == "Kindred Enchantment — Faerie"


def test_type_lines_and_costs_of_the_embedded_table_are_understood() -> None:
    for card in clean(read_embedded().rows).cards:
        assert card.name == shown_form(card.name)
        assert join_type_line(*split_type_line(card.type_line)) == card.type_line
        assert card.mana_value is None or 0 <= card.mana_value <= 16


def test_known_names_hold_every_face_flagged_or_not() -> None:
    known = set(known_names())
    for name in ("Fire", "Ice", "The One Ring", "Blacker Lotus", "Tazeem", "Ratonhnhaké:ton", "Insectile Aberration"):
        assert name in known
    assert not any(" // " in name for name in known)
    assert "A-Vivi Ornitier" not in known
    assert {card.name for card in clean(read_embedded().rows).cards} <= known


def test_a_damaged_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "cards.csv.xz"
    damaged.write_bytes(embedded_table().read_bytes()[:1000])
    monkeypatch.setattr("flash_experts.data.sources.embedded_table", lambda: damaged)
    with pytest.raises(ValueError, match=r"cards\.csv\.xz is damaged .*build_card_table"):
        read_embedded.__wrapped__()


# ----------------------------------------------------------------------------------------------------- files of one's own


@pytest.mark.parametrize("name", ["own.csv", "own.json", "own.jsonl", "own_mtgjson.json", "own_scryfall.jsonl"])
def test_every_kind_of_file_tells_the_same_cards(name: str) -> None:
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
        ("a.csv", b"title,type\nGoblin,Creature\n", r"a\.csv:1: no column 'name' in the heading \(title, type\)"),
        ("a.csv", b'name,type\nGoblin,"Creature\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", b"name,colors\nGoblin,R\nOrc,purple\n", r"a\.csv:3: unknown color 'purple'"),
        ("a.csv", b"name,cmc\nGoblin,two\n", r"a\.csv:2: mana_value must be a number, not 'two'"),
        ("a.jsonl", b'{"name": "Goblin"}\n{"name": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"type": "Creature"}\n', r"a\.jsonl:1: a card needs a name"),
        ("a.jsonl", b'{"name": "Goblin", "type_line": 3}\n', r"a\.jsonl:1: type_line must be text, not 3"),
        ("a.json", b'[\n"Goblin",\n', r"a\.json:3: not JSON"),
        ("a.json", b'{"data": {}}', r"a\.json:1: expected an array"),
        ("a.json", b'["Goblin", 3]', r"a\.json\[1\]: expected a name or a card, not int"),
        ("a.xlsx", b"PK", r"a\.xlsx: cards are read from \.csv"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path: Path, name: str, data: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=error) as raised:
        load_source(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown source 'embeded': did you mean 'embedded'"):
        load_source("embeded")
    with pytest.raises(ValueError, match="unknown source 'xyz': take 'embedded' or a file"):
        load_source("xyz")
    with pytest.raises(ValueError, match=r"no file mine\.csv"):
        load_source("mine.csv")
    with pytest.raises(ValueError, match="is a folder"):
        load_source(tmp_path)


# ----------------------------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 cards of the embedded table: quick to split."""
    cards = clean(read_embedded().rows).cards[5000:6000]
    path = tmp_path_factory.mktemp("source") / "thousand.jsonl"
    path.write_text("".join(json.dumps(card.to_json()) + "\n" for card in cards), encoding="utf-8")
    return path


def test_prepare_writes_what_it_says(names_file: Path, tmp_path: Path) -> None:
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
    assert (written["source"], written["cleaning_version"]) == ("thousand.jsonl", 1)


def test_a_prepared_line_has_the_documented_fields(names_file: Path, tmp_path: Path) -> None:
    prepare(names_file, tmp_path)
    line = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    fields = "name type_line types subtypes supertypes colors mana_value source_id".split()
    assert list(json.loads(line)) == fields


def test_prepare_is_idempotent_and_says_so(names_file: Path, tmp_path: Path) -> None:
    assert prepare(names_file, tmp_path)["up_to_date"] is False
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert prepare(names_file, tmp_path)["up_to_date"] is True
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    (tmp_path / "test.jsonl").write_text("", encoding="utf-8")
    assert prepare(names_file, tmp_path)["up_to_date"] is False
    assert before.keys() == {path.name for path in tmp_path.iterdir()}
    assert all(path.read_bytes() == before[path.name][0] for path in tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_files(
    names_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(names_file, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (short := tmp_path.parent / "short.txt").write_text(
        "\n".join(card.name for card in load_split(tmp_path, "train")), encoding="utf-8"
    )

    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(short, tmp_path)
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
    with pytest.raises(ValueError, match="2 names in 2 families are too few.*give 200 names or more"):
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
        (b"[1]", r"train\.jsonl:2: a card must be a JSON object, not list"),
        (json.dumps({k: v for k, v in CARD.items() if k != "colors"}).encode(), r"train\.jsonl:2: no 'colors'"),
        (json.dumps(CARD | {"name": " "}).encode(), r"train\.jsonl:2: the name is empty"),
        (json.dumps(CARD | {"name": None}).encode(), r"train\.jsonl:2: name, type_line and source_id must be text"),
        (json.dumps(CARD | {"types": "Creature"}).encode(), r"train\.jsonl:2: types must be a list of texts"),
        (json.dumps(CARD | {"colors": ["Q"]}).encode(), r"train\.jsonl:2: colors must be a list of letters"),
        (json.dumps(CARD | {"mana_value": "3"}).encode(), r"train\.jsonl:2: mana_value must be a whole number"),
        (json.dumps(CARD | {"mana_value": True}).encode(), r"train\.jsonl:2: mana_value must be a whole number"),
    ],
)
def test_malformed_prepared_lines_are_named(tmp_path: Path, line: bytes, error: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(CARD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=error):
        load_split(tmp_path, "train")


def test_missing_and_empty_prepared_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prepared names in .*nowhere: run `flash-experts prepare` --out"):
        load_split(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no prepared names in .*nowhere: run `flash-experts prepare`"):
        load_meta(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no train\.jsonl in"):
        load_split(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty: run `flash-experts prepare` again"):
        load_split(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev': there are train, validation"):
        load_split(tmp_path, "dev")
    (tmp_path / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"meta\.json: not JSON"):
        load_meta(tmp_path)


def test_cards_survive_json() -> None:
    for card in clean(read_embedded().rows[:500]).cards:
        assert Card.from_json(json.loads(json.dumps(card.to_json())), "here:1") == card


def test_an_installed_package_finds_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "flash_experts" / "data"
    (package / "embedded").mkdir(parents=True)
    shutil.copy(embedded_table(), package / "embedded" / "cards.csv.xz")
    monkeypatch.setattr("flash_experts.data.sources.__file__", os.fspath(package / "sources.py"))
    assert embedded_table() == (package / "embedded" / "cards.csv.xz").resolve()
    (package / "embedded" / "cards.csv.xz").unlink()
    with pytest.raises(ValueError, match="the embedded card table cards.csv.xz is missing"):
        embedded_table()
