"""What a session remembers: kept names in the browser, links, history, files; and requests for several cards."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from dataclasses import replace

import pytest

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")

from flash_experts.app import form
from flash_experts.app.handlers import Handlers
from flash_experts.app.service import Playground, Row
from flash_experts.app.session import (
    FORMATS,
    MOST_IN_HISTORY,
    MOST_KEPT,
    Session,
    exported,
    link_of,
    read_link,
    restored,
    stored,
)
from flash_experts.app.settings import PREFIX, Settings, with_gap, words_of
from flash_experts.generation import GeneratedName

ANGEL = Settings(type_line="Creature — Angel", colors="W", seed=3, count=2)
EVIL = '<script>alert("x")</script>'


def row(text: str, settings: Settings = ANGEL, locked: bool = False) -> Row:
    return Row(GeneratedName(text, -12.5, "Serra Angel", 0.25), settings, "dense", locked)


def values(settings: Settings) -> dict[str, object]:
    return form.values_of(settings) | {"model": "dense"}


# -------------------------------------------------------------------------------------------------------- the browser


def test_kept_names_survive_the_browser() -> None:
    kept = (row("Dawn Herald", locked=True), row("Vow, the Kind", Settings(), locked=True))
    assert restored(json.dumps(stored(kept))) == kept


def test_settings_that_are_too_long_to_be_stored_are_left_out() -> None:
    long = Settings(banned_words=tuple(f"word{number}{'x' * 20}" for number in range(50)))
    kept = tuple(row(f"Name {number} " + "é" * 50, long, locked=True) for number in range(MOST_KEPT))
    text = json.dumps(stored(kept))
    assert len(text) < 60_000 and {each.settings for each in restored(text)} == {Settings()}
    assert len(restored(text)) == MOST_KEPT


@pytest.mark.parametrize(
    "text",
    [
        None, 3, "", "{", "[" * 5000, "3", "{}", "[1]", '[{"text": 1}]', '[{"text": ""}]', '[{"text": "a\\u0000"}]',
        '[{"text": ["a"]}]', json.dumps([{"text": "a" * 101}]), "[" + "9" * 5000 + "]", " " * 60_001,
    ],
)  # fmt: skip
def test_nonsense_in_the_browser_is_left_out(text: object) -> None:
    assert restored(text) == ()


def test_numbers_and_settings_from_the_browser_are_checked() -> None:
    entries = [
        {"text": "A", "log_prob": float("nan"), "similarity": 7, "settings": "flash-experts:9?x=1", "model": "gone"},
        {"text": "B", "log_prob": 10**400, "similarity": "x", "settings": PREFIX + "colors=R"},
        {"text": "B"},
    ]
    first, second = restored(json.dumps(entries))
    assert (first.name.log_prob, first.name.similarity, first.settings, first.model) == (0, 1, Settings(), "gone")
    assert (second.name.log_prob, second.name.similarity, second.settings) == (0, 0, Settings())
    assert first.locked and second.name.nearest_card is None


def test_a_page_is_restored(playground: Playground) -> None:
    handlers, session = Handlers(playground), Session()
    kept = json.dumps(stored((row("Dawn Herald", locked=True), row(EVIL, locked=True))))
    opened = handlers.open_page(kept, "?" + link_of(ANGEL, "experts"), session)
    assert form.settings_of(opened.values) == ANGEL and opened.values["model"] == "experts"
    assert [each.name.text for each in session.kept] == ["Dawn Herald", EVIL]
    table, _, remembered = handlers.finished(session)
    assert "<script" not in table
    assert json.loads(remembered) | {"number": 0} == {
        "number": 0, "address": None, "link": None, "kept": json.loads(kept)
    }  # fmt: skip
    assert handlers.open_page("", "", Session()).values == {}


def test_a_name_of_a_model_that_is_not_served_any_more_keeps_its_card(playground: Playground) -> None:
    panel = Handlers(playground).inspect(Row(GeneratedName("Dawn Herald", -1, None, 0), ANGEL, "gone", True))
    assert "Creature — Angel" in panel and "no model" in panel


# ----------------------------------------------------------------------------------------------------------- the links


def test_a_link_brings_settings_and_model_back() -> None:
    full = Settings(type_line="Creature — Angel", contains="a&b+c", like=("Serra Angel",), colors="W", seed=7)
    for model in ("", "a b&c=d"):
        assert read_link("?" + link_of(full, model) + "&__theme=dark&view=api") == (full, model)
    assert read_link("?" + link_of(Settings())) == (Settings(), "")


@pytest.mark.parametrize("query", [None, 3, "", "?", "?view=api", "?__theme=dark", "?count=3", "?v=2&count=3"])
def test_other_queries_are_no_links(query: object) -> None:
    assert read_link(query) is None


@pytest.mark.parametrize("query", ["?v=1&cuont=3", "?v=1&count=999", "?v=1&" + "x" * 3000, "?v=1&model=../../etc"])
def test_a_bad_link_is_reported(playground: Playground, query: str) -> None:
    opened = Handlers(playground).open_page("", query, Session())
    assert opened.values == {} and "fe-failure" in opened.status and "the settings of the link" in opened.status


def test_the_address_has_the_settings_and_the_link_the_seed(playground: Playground) -> None:
    handlers, session = Handlers(playground), Session()
    *_, shown = handlers.make(values(Settings(colors="W", count=2)), session)
    remembered = json.loads(handlers.finished(session)[2])
    assert read_link(remembered["address"]) == (Settings(colors="W", count=2), "dense")
    settings, _ = read_link(remembered["link"]) or (None, "")
    assert settings is not None and settings.to_string() == shown.settings and settings.seed is not None


# --------------------------------------------------------------------------------------------------------- the history


def test_an_earlier_request_is_opened_again(playground: Playground) -> None:
    handlers, session = Handlers(playground), Session()
    first = [*handlers.make(values(ANGEL), session)][-1].rows
    session.press(first[1].name.text)
    asked = Settings(colors="R", count=3, contains="a")
    [*handlers.make(values(asked), session)]
    shown = handlers.history(session)
    assert shown.index("Any type · red · Contains a") < shown.index("Creature — Angel · white")
    opened = handlers.open_request("0", session)
    assert form.settings_of(opened.values) == ANGEL and opened.settings == ANGEL.to_string()
    assert {each.name.text for each in session.rows} == {each.name.text for each in first}
    assert [each.name.text for each in session.kept] == [first[1].name.text]
    opened = handlers.open_request(1, session)
    assert form.settings_of(opened.values) == asked and len(session.rows) == 1 + 3, "with the seed that was asked for"
    for nonsense in (None, "2", -1, [], "x" * 5000):
        assert "fe-failure" in handlers.open_request(nonsense, session).status


def test_back_opens_a_request_or_the_settings_of_an_address(playground: Playground) -> None:
    handlers, session = Handlers(playground), Session()
    names = [*handlers.make(values(replace(ANGEL, seed=None)), session)][-1].rows
    entry = json.loads(handlers.finished(session)[2])
    [*handlers.make(values(Settings(colors="R", count=3)), session)]
    opened = handlers.revisit(entry["address"], entry["link"], session)
    assert session.rows == names and form.settings_of(opened.values) == replace(ANGEL, seed=None)
    assert "2 names of an earlier request" in opened.status
    assert json.loads(handlers.finished(session)[2])["address"] == entry["address"]
    for link in ("", None, [], entry["link"] + "&x=1", "x" * 5000):
        opened = handlers.revisit("?" + entry["address"], link, session)
        assert form.settings_of(opened.values) == replace(ANGEL, seed=None) and "Settings of the link" in opened.status
        assert json.loads(handlers.finished(session)[2])["address"] is None, "the browser has changed it"
    for query in ("", None, "?__theme=dark"):
        assert form.settings_of(handlers.revisit(query, "", session).values) == Settings()
    assert "fe-failure" in handlers.revisit("?v=1&cuont=3", "", session).status


@pytest.mark.parametrize("several", [False, True])
def test_a_seed_makes_its_names_although_some_are_kept(playground: Playground, several: bool) -> None:
    handlers, session = Handlers(playground), Session()

    def made(seed: int | None) -> list[str]:
        asked = values(Settings(starts_with="Serra's", count=4, seed=seed))
        stream = (
            handlers.make_several(asked, "Land\nInstant", "2", session) if several else handlers.make(asked, session)
        )
        return [each.name.text for each in [*stream][-1].rows]

    names = made(11)
    session.press(names[0])
    session.press(names[3])
    assert made(11) == names and [each.name.text for each in session.kept] == [names[0], names[3]]
    assert len(set(made(None))) == 2 + 4, "without a seed all others are new"


def test_the_same_request_is_remembered_once_and_old_ones_go() -> None:
    session = Session()
    for seed in (1, 1, 2):
        settings = Settings(seed=seed)
        for count in (1, 2, 3):
            session.put(session.begin(), tuple(row(str(number), settings) for number in range(count)), settings)
    assert [(each.number, each.asked.seed, len(each.rows)) for each in session.history] == [(0, 1, 3), (1, 2, 3)]
    for seed in range(10, 20):
        rows = tuple(row(str(number), Settings(seed=seed)) for number in range(100))
        session.put(session.begin(), rows, Settings())
    assert sum(len(each.rows) for each in session.history) == MOST_IN_HISTORY
    assert session.history[-1].number == 11


@pytest.mark.parametrize("ended_by", ["stop", "reset", "open", "another"])
@pytest.mark.parametrize("several", [False, True])
def test_a_request_that_has_ended_adds_nothing(playground: Playground, ended_by: str, several: bool) -> None:
    """Its thread may still be at work: what it finds then changes neither the names nor the page's address."""
    handlers, session = Handlers(playground), Session()
    [*handlers.make(values(Settings(colors="W", count=2)), session)]
    asked = values(Settings(colors="R", count=5))
    stream = handlers.make_several(asked, "Land\nInstant", "2", session) if several else handlers.make(asked, session)
    next(stream)
    end = {
        "stop": lambda: handlers.stopped(session),
        "reset": session.reset,
        "open": lambda: handlers.open_request(0, session),
        "another": lambda: next(handlers.make(values(ANGEL), session)),
    }
    end[ended_by]()
    rows, shown, history = session.rows, session.shown, session.history
    assert list(stream) == []
    assert (session.rows, session.shown, session.history) == (rows, shown, history)


def test_any_is_a_word_as_others_in_a_text() -> None:
    """In a list of choices it stands for none of them."""
    asked = replace(ANGEL, contains="any", banned_words=("any",))
    assert form.settings_of(form.values_of(asked)) == asked


def test_messages_to_the_browser_are_numbered(playground: Playground) -> None:
    """A page that stays open may get a new session: its messages are newer, too."""
    handlers, session = Handlers(playground), Session()
    numbers = [json.loads(handlers.finished(each)[2])["number"] for each in (session, session, Session(), Session())]
    assert numbers == sorted(numbers) and numbers[0] < numbers[1] < 2**53


def test_all_kept_names_are_released_and_settings_reset(playground: Playground) -> None:
    session = Session((row("Dawn Herald", locked=True), row("Vow")))
    assert not any(each.locked for each in session.release()) and len(session.rows) == 2
    session.put(session.begin(), (row("Dawn Herald"),), ANGEL)
    session.reset()
    remembered = json.loads(Handlers(playground).finished(session)[2])
    assert remembered.pop("number") < session.next_message()
    assert remembered == {"address": None, "link": None, "kept": []} and len(session.history) == 1
    opened = Handlers(playground).defaults()
    assert form.settings_of(opened.values) == Settings() and opened.values["model"] == "dense"


# --------------------------------------------------------------------------------------------------------------- files


def test_files_of_names(playground: Playground) -> None:
    session = Session((row("=cmd(), the *Bold*", locked=True), row("Vow <i>")))

    def text(suffix: str) -> str:
        return json.loads(exported(session.rows, suffix))["text"]

    assert text("txt") == "=cmd(), the *Bold*\nVow <i>\n"
    assert text("md") == "- =cmd(), the \\*Bold\\*\n- Vow \\<i\\>\n"
    header, first, _ = text("csv").splitlines()
    assert header == "text,log_prob,score,nearest_card,similarity" and first.startswith('"\'=cmd(), the *Bold*",')
    assert [each["text"] for each in json.loads(text("json"))] == ["=cmd(), the *Bold*", "Vow <i>"]
    assert "<name>Vow &lt;i&gt;</name>" in text("xml")
    for suffix in FORMATS.values():
        file = json.loads(Handlers(playground).export(session, suffix, is_kept=True))
        content = file["text"] if suffix != "mse-set" else unzipped(file["base64"])
        assert file["name"] == f"names.{suffix}" and "Vow" not in content and "Bold" in content
    with pytest.raises(ValueError, match="no format"):
        exported(session.rows, "../x")


def unzipped(content: str) -> str:
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(content))) as archive:
        return archive.read("set").decode("utf-8")


# --------------------------------------------------------------------------------------------------------- another word


@pytest.mark.parametrize(
    ("name", "words", "pattern"),
    [
        ("Serra's Sea-Angel", ["Serra", "Sea-Angel"], "___'s Sea-Angel"),
        ("Krenko, Mob Boss", ["Krenko", "Mob", "Boss"], "___, Mob Boss"),
        ("Who's There?", ["Who", "There"], "___'s There?"),
        ("Vow", [], None),
    ],
)
def test_the_words_of_a_name(name: str, words: list[str], pattern: str | None) -> None:
    assert words_of(name) == words
    if pattern is None:
        with pytest.raises(ValueError, match="no such word"):
            with_gap(ANGEL, name, 0)
    else:
        assert with_gap(ANGEL, name, "0").pattern == pattern


def test_one_word_of_a_name_is_replaced(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_experts.app.service.secrets.randbelow", lambda _: 1)
    handlers, session = Handlers(playground), Session()
    old = Row(
        GeneratedName("Dawn Herald", -9, None, 0),
        replace(ANGEL, contains="Dawn", max_words=3, quality="fast"),
        "dense",
        True,
    )
    session.add_kept(old)
    assert 'data-do="word" data-number="1" data-key="word 1"' in handlers.inspect(old)
    *_, shown = handlers.another_word(old, "0", session)
    new = [each for each in shown.rows if not each.locked]
    assert new and session.kept == (old,)
    names = [each.name.text for each in new]
    assert all(name.lower().endswith(" herald") and len(name.split()) == 2 for name in names), names
    assert "Dawn Herald" not in names
    rules = {"pattern": "___ Herald", "min_words": 2, "max_words": 2}
    asked = Settings(type_line="Creature — Angel", colors="W", quality="fast", **rules)
    assert session.history[-1].asked == asked and form.settings_of(form.values_of(asked)) == asked
    assert "Name with gaps ___ Herald" in handlers.history(session)
    for nonsense in (None, "2", -1, [], "x" * 5000):
        (failed,) = handlers.another_word(old, nonsense, session)
        assert "fe-failure" in failed.status and "no such word" in failed.status
    assert list(handlers.another_word(None, 0, session)) == []
