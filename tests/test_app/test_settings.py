"""Settings of the playground: the settings string round-trips, and invalid values are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.app import form
from flash_experts.app.settings import LONGEST_STRING, OPTIONS, PREFIX, Settings

FULL = Settings(
    type_line="Legendary Creature — Goblin Warrior",
    colors="RW",
    mana_value=0,
    rarity="mythic",
    set_code="ZEN",
    released=2009,
    preset="creative",
    temperature=1.25,
    top_k=7,
    top_p=0.5,
    min_p=0.00001,
    repetition_penalty=1.1,
    guidance=1.5,
    starts_with="Krén & +b",
    ends_with=" Axe",
    contains="a+b&c",
    regex=".*[=%<]?.*",
    min_words=2,
    max_words=3,
    min_length=5,
    max_length=30,
    banned_words=("fire", "ice"),
    alliterate=False,
    min_distance=0.25,
    allow_profanity=True,
    allow_real_places=True,
    like=("Goblin Guide", "Krenko, Mob Boss"),
    count=3,
    quality="best",
    seed=2**31 - 1,
)  # fmt: skip


def test_every_setting_goes_through_the_string() -> None:
    text = FULL.to_string()
    assert Settings.from_string(text) == FULL
    left_out = {"words", "alliterate", "pattern"}  # they contradict others of FULL
    assert {name for name in OPTIONS if f"&{name}=" not in text.replace("?", "&")} == left_out
    assert Settings.from_string(Settings(words=2, alliterate=True).to_string()) == Settings(words=2, alliterate=True)
    assert Settings.from_string(Settings(pattern="___ & ___").to_string()) == Settings(pattern="___ & ___")
    assert Settings.from_string(PREFIX) == Settings() and Settings().to_string() == PREFIX


numbers = st.floats(0.1, 2).map(lambda value: round(value, 9))
texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "S"]), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None)
@given(st.builds(Settings, temperature=st.none() | numbers, count=st.integers(1, 100), seed=st.integers(0, 2**31 - 1),
                 banned_words=st.lists(texts.filter(lambda text: ";" not in text), max_size=4).map(tuple),
                 min_p=st.none() | st.floats(0, 0.5)))  # fmt: skip
def test_the_string_round_trips(value: Settings) -> None:
    assert Settings.from_string(value.to_string()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with"),
        ("count=3", "begin with"),
        ("flash-experts:2?count=3", "begin with"),
        (PREFIX + "count", "name=value"),
        (PREFIX + "count=3&&seed=1", "name=value"),
        (PREFIX + "counts=3", "did you mean 'count'"),
        (PREFIX + "count=3&count=4", "twice"),
        (PREFIX + "count=101", "from 1 to 100"),
        (PREFIX + "count=0", "from 1 to 100"),
        (PREFIX + "count=3.5", "whole number"),
        (PREFIX + "quality=luck", "one of fast, good, best"),
        (PREFIX + "quality=bests", "did you mean 'best'"),
        (PREFIX + "count=-3", "whole number"),
        (PREFIX + "count=٣", "whole number"),
        (PREFIX + "count=" + "9" * 400, "whole number"),
        (PREFIX + "temperature=nan", "number such as"),
        (PREFIX + "temperature=1e400", "number such as"),
        (PREFIX + "temperature=0", "0.1 to 2"),
        (PREFIX + "mana_value=17", "0 to 16"),
        (PREFIX + "alliterate=yes", "give 1, or leave it out"),
        (PREFIX + "preset=bold", "unknown preset"),
        (PREFIX + "type_line=Goblinn", "did you mean 'Goblin'"),
        (PREFIX + "colors=purple", "purple"),
        (PREFIX + "regex=" + "a" * 101, "the most is 100"),
        (PREFIX + "starts_with=%00", "control character"),
        (PREFIX + "starts_with=%FF", "name=value"),
        (PREFIX + "banned_words=" + ";".join(["a"] * 51), "the most is 50"),
        (PREFIX + "banned_words=a;;b", "blank entry"),
        (PREFIX + "min_words=3&max_words=2", "more than max_words"),
        (PREFIX + "model=/etc/passwd", "unknown setting"),
        (PREFIX + "x" * LONGEST_STRING, "the most is"),
    ],
)
def test_a_bad_string_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_string(text)


@pytest.mark.parametrize(
    "values",
    [
        {"count": "3"}, {"count": True}, {"count": 3.5}, {"count": [3]}, {"seed": -1}, {"colors": 7}, {"regex": ["a"]},
        {"banned_words": 5}, {"banned_words": [5]}, {"alliterate": 1}, {"temperature": float("nan")}, {"top_k": 1e9},
        {"like": [";"]}, {"preset": 3}, {"min_distance": "0.5"}, {"starts_with": {"a": 1}},
    ],
)  # fmt: skip
def test_values_of_wrong_types_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Settings.from_values(values)


def test_values_of_a_form_are_tidied() -> None:
    got = Settings.from_values(
        {"count": 3.0, "colors": " ", "seed": None, "banned_words": "fire, ice", "like": "Krenko, Mob Boss; Lava Axe"}
    )
    assert got == Settings(count=3, banned_words=("fire", "ice"), like=("Krenko, Mob Boss", "Lava Axe"))


def test_hints_are_shown_as_they_are_written() -> None:
    assert form.control("pattern").info == r"\_\_\_ stands for what is to be filled in", "Gradio reads Markdown"
