"""Names for several cards and for sets, as the page asks for them, and the time limit of a request."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import zipfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")

from flash_experts.app import form, service, sets
from flash_experts.app.handlers import Handlers
from flash_experts.app.service import Playground, Progress, Row
from flash_experts.app.session import FORMATS, Session
from flash_experts.app.settings import Settings
from flash_experts.generation import GeneratedName
from flash_experts.generation.card_files import card_rows_of
from flash_experts.generation.card_sets import name_rows
from flash_experts.generation.filters.base import NoTokenLeftError

ANGEL = Settings(type_line="Creature — Angel", colors="W", seed=3, count=2)
EVIL = '<script>alert("x")</script>'


def row(text: str, settings: Settings = ANGEL, locked: bool = False) -> Row:
    return Row(GeneratedName(text, -12.5, "Serra Angel", 0.25), settings, "dense", locked)


def values(settings: Settings) -> dict[str, object]:
    return form.values_of(settings) | {"model": "dense"}


def unzipped(content: str) -> str:
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(content))) as archive:
        return archive.read("set").decode("utf-8")


def test_names_for_several_cards(playground: Playground) -> None:
    handlers, session = Handlers(playground), Session()
    lines = "Creature — Angel, W, 5\n\n  Instant,U \nLand"
    *_, shown = handlers.make_several(values(Settings(seed=1, quality="fast")), lines, "2", session)
    asked = [each.settings for each in shown.rows]
    assert [each.type_line for each in asked] == ["Creature — Angel"] * 2 + ["Instant"] * 2 + ["Land"] * 2
    assert [(each.colors, each.mana_value) for each in asked[::2]] == [("W", 5), ("U", None), (None, None)]
    assert len({each.name.text for each in shown.rows}) == 6 and "6 names for 3 of 3 cards" in shown.status
    assert shown.table.count("fe-group") == 3 and "Creature — Angel · white · mana value 5" in shown.table
    assert len(session.history) == 3


SET = """name,Type line,Colors,Mana value,notes
,Creature — Goblin,Red,2,=1+1
Old Name,Instant,U,1,
,Creature — Goblin,R,2,
,Land,,,
"""


@pytest.fixture
def patient(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> Playground:
    """Without a time limit; for a land no name can be made."""
    found = Playground({"dense": playground.model("dense").generator}, time_limit=600)
    names = found.names

    def refused(settings: Settings, *others: Any) -> Iterator[Progress]:
        if settings.type_line == "Land":
            raise NoTokenLeftError("no name can be made")
        return names(settings, *others)

    monkeypatch.setattr(found, "names", refused)
    return found


def test_a_set_is_named_as_the_command_names_it(patient: Playground) -> None:
    handlers, session = Handlers(patient), Session()
    asked = values(Settings(seed=4, quality="fast"))
    *_, shown = handlers.make_several(asked, SET, "2", session)
    *rows, _ = card_rows_of(SET, "the cards")
    named = list(name_rows(patient.model().generator, rows, 2, seed=4, quality="fast"))
    assert [row.name.text for row in shown.rows] == [name.text for one in named for name in one.names]
    assert len(shown.rows) == 4 and shown.table.count("fe-group") == 2, "a heading for each card"
    assert "4 names for 2 of 3 cards" in shown.status and "the cards:5: no name: no name can be made" in shown.status

    session.press(named[0].names[1].text)
    file = json.loads(handlers.export_set(session, "csv"))
    table = list(csv.DictReader(io.StringIO(file["text"])))
    assert file["name"] == "named-set.csv" and [one["Type line"] for one in table] == [
        "Creature — Goblin", "Instant", "Creature — Goblin", "Land",
    ]  # fmt: skip
    assert (table[0]["name"], table[0]["alternatives"]) == (named[0].names[1].text, named[0].names[0].text), "kept"
    assert [one["name"] for one in table[1:]] == ["Old Name", named[2].text, ""] and table[0]["notes"] == "'=1+1"
    for suffix in FORMATS.values():
        file = json.loads(handlers.export_set(session, suffix))
        content = file["text"] if suffix != "mse-set" else unzipped(file["base64"])
        assert "Old Name" in content and named[2].text in content

    # Opened again, it keeps its names: only the others are made.
    *_, again = handlers.make_several(asked, json.loads(handlers.export_set(session, "json"))["text"], "2", session)
    assert "0 names for 0 of 1 cards" in again.status


def test_a_set_stops_at_the_limits_and_says_so(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_experts.app.sets.MOST_IN_A_SET", 4)
    handlers, session = Handlers(playground), Session()
    *_, shown = handlers.make_several(values(Settings(quality="fast")), "Land\nInstant\nLand\nLand", "2", session)
    assert len(shown.rows) == 4 and "4 names for 2 of 4 cards" in shown.status
    assert "line 3, line 4: no name: not reached: a request gives at most 4 names" in shown.status
    assert "open it again" in shown.status
    assert handlers.export_set(Session(), "csv") == "", "no set was named"


@pytest.mark.parametrize(
    ("cards", "count", "message"),
    [
        ("", "5", "no cards: write a line for each"),
        (None, "5", "no cards"),
        ("Land\n" * 10_000, "5", "the most is 48,000"),
        ("Land", "11", "the most is 10"),
        ("Land", "x", "whole number"),
        ("Goblinn", "1", "line 1: no name: &#39;Goblinn&#39;: unknown type"),
        ("Land, W, 3, x", "1", "type line, colors and a mana value"),
        ("Land, W, 99", "1", "line 1: no name: Mana value is 99"),
        (EVIL, "1", "&lt;script&gt;"),
        ("type_line,colors\nInstant,purple\n", "1", "the cards:2: no name: colors &#39;purple&#39; is not understood"),
        ("type_line,contains\nInstant," + "x" * 41, "1", "the cards:2: no name: contains has 41 characters"),
        ("name,type_line\nA,Instant\n", "1", "each of these cards has a name"),
        ("type_line\n" + "Land\n" * 2001, "1", "more than 2,000 cards"),
        ("[" * 40_000, "1", "the cards: not a list of cards"),
        ('[{"type_line": "Instant"', "1", "the cards: not JSON"),
        ('["Land"]', "1", "the cards: not a list of cards"),
        ('[{"type_line": {"a": "Land"}}]', "1", "the cards[0]"),
    ],
)  # fmt: skip
def test_bad_cards_are_reported(playground: Playground, cards: str, count: str, message: str) -> None:
    (shown,) = Handlers(playground).make_several(values(Settings()), cards, count, Session())
    assert "fe-failure" in shown.status and message in shown.status and "\n" not in shown.status


@pytest.mark.parametrize(
    ("cards", "problems"),
    [
        ("Creature — Angel, W, 5\nGoblinn\nInstant, purple\nLand",
         ["line 2: no name: &#39;Goblinn&#39;: unknown type",
          "line 3: no name: &#39;Instant, purple&#39;: unknown color"]),
        ("type_line,starts_with\nInstant,\nInstannt,\nInstant," + "x" * 41 + "\nInstant,Дра\nInstant,Fire // Ice\n"
         "Land,",
         ["the cards:3: no name: unknown type", "the cards:4: no name: Starts with has 41 characters",
          "the cards:5: no name: Starts with &#39;Дра&#39;", "the cards:6: no name: "]),
    ],
)  # fmt: skip
def test_good_cards_get_names_and_bad_ones_are_reported(
    playground: Playground, cards: str, problems: list[str]
) -> None:
    session = Session()
    *_, shown = Handlers(playground).make_several(values(Settings(seed=1, quality="fast")), cards, "1", session)
    assert [each.settings.type_line for each in shown.rows][-1] == "Land" and len(shown.rows) == 2
    assert all(problem in shown.status for problem in problems) and "fe-failure" not in shown.status
    assert [bool(one.names) for one in session.named] == [True, *[False] * len(problems), True]


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own, 20 ms later at each look: on any machine a limit is reached after as many decoding steps."""
    ticks = itertools.count()
    for module in (service, sets):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 50))


@pytest.mark.usefixtures("ticking")
def test_several_cards_share_one_time_limit(playground: Playground) -> None:
    limited = Playground({"dense": playground.model("dense").generator}, time_limit=8)
    *_, shown = Handlers(limited).make_several(
        values(Settings(quality="best", seed=1)), "Land\nInstant\nSorcery\nEnchantment", "10", Session()
    )
    assert 0 < len(shown.rows) < 40 and " for 4 of 4 cards" in shown.status, "each has a share of the time"


@pytest.mark.usefixtures("ticking")
def test_the_time_limit_leaves_names_of_good_quality(playground: Playground) -> None:
    limited, session = Playground({"dense": playground.model("dense").generator}, time_limit=1.0), Session()
    *_, shown = Handlers(limited).make(values(Settings(count=100)), session)
    assert 0 < len(shown.rows) < 100 and "stopped after 1 s" in shown.status
    assert shown.rows == session.rows and shown.table.count('class="fe-name"') == len(shown.rows)
