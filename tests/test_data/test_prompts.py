"""Attributes as users write them, and the prompts that condition a model."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.card_table import read_embedded
from flash_experts.data.cards import COLORS, SUPERTYPES, TYPES, Card, RawCard, in_color_order, parse_colors
from flash_experts.data.cleaning import clean
from flash_experts.data.prompts import (
    UNCONDITIONAL,
    Attributes,
    check_known,
    collect_conditions,
    prompt_words,
    read_conditions,
)
from flash_experts.data.type_lines import parse_type_line

KRENKO = Attributes(("Legendary",), ("Creature",), ("Goblin", "Warrior"), ("R",), 4)
CARD = Card("Krenko", "Goblin Warrior", (), (), ("Goblin", "Warrior"), ("R",), 4, "1")
EMBEDDED_PROMPTS = "18642d93f5a9eb062e5bde8ec887bc77defa494e465de768e676b21f090ebdf6"


def test_prompts() -> None:
    assert KRENKO.prompt() == "legendary creature goblin warrior, red, 4:"
    assert Attributes(colors=("R",)).prompt() == "red:"
    assert Attributes(colors=("W", "U"), mana_value=0).prompt() == "white blue, 0:"
    assert Attributes(types=("Artifact",), colors=()).prompt() == "artifact, colorless:"
    assert Attributes(supertypes=("Legendary",)).prompt() == "legendary:"
    assert UNCONDITIONAL.prompt() == Attributes().prompt() == ":"
    assert replace(KRENKO, rarity="mythic").prompt() == "legendary creature goblin warrior, red, 4, mythic:"
    assert Attributes(rarity="rare").prompt() == "rare:"


def test_unknown_attributes_are_not_in_the_prompt() -> None:
    (land,) = clean([RawCard("Jötun Ford", "Land")]).cards
    assert Attributes.of(land).prompt() == "land, colorless:"
    (bare,) = clean([RawCard("Sunlit Idol")]).cards
    assert Attributes.of(bare) == UNCONDITIONAL


@pytest.mark.parametrize(
    "type_line",
    [
        "Legendary Creature — Goblin Warrior",
        "legendary creature - goblin warrior",
        "LEGENDARY CREATURE -- GOBLIN WARRIOR",
        "Creature Legendary – Goblin Warrior",
        "goblin warrior legendary creature",
        "warrior goblin creature legendary",
    ],
)
@pytest.mark.parametrize("colors", ["R", "red", "Red", "{R}", " r "])
def test_attributes_can_be_written_in_many_ways(type_line: str, colors: str) -> None:
    assert Attributes.parse(type_line, colors, 4) == KRENKO


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("Token Creature — Elf", ((), ("Creature",), ("Elf",))),
        ("elf creature token", ((), ("Creature",), ("Elf",))),
        ("Token", (None, None, None)),
        ("Creature-Elf", ((), ("Creature",), ("Elf",))),
        ("Kreatur — Elf", ((), ("Creature",), ("Elf",))),
        ("legendäre artefaktkreatur - golem", (("Legendary",), ("Artifact", "Creature"), ("Golem",))),
        ("Standardland — Forest", (("Basic",), ("Land",), ("Forest",))),
        ("Creature — Human // Creature — Werewolf", ((), ("Creature",), ("Human",))),
    ],
)
def test_type_lines_are_read_as_set_files_have_them(line: str, parts: tuple[tuple[str, ...] | None, ...]) -> None:
    assert parse_type_line(line) == parts
    read = Attributes.parse(line, None, None)
    assert (read.supertypes, read.types, read.subtypes) == parts


def test_parse_of_nothing_and_of_parts() -> None:
    assert Attributes.parse(None, None, None) == Attributes.parse("", " ", None) == UNCONDITIONAL
    assert Attributes.parse("Creature — Assembly-Worker", None, None).subtypes == ("Assembly-Worker",)
    assert Attributes.parse("time lord creature", None, None).subtypes == ("Time Lord",)
    assert Attributes.parse("tribal instant", None, None).types == ("Kindred", "Instant")
    assert Attributes.parse("creature artifact", None, None).prompt() == "artifact creature:"
    assert Attributes.parse("elf", None, None).prompt() == "elf:"


@pytest.mark.parametrize(
    ("text", "colors"),
    [
        ("WU", "WU"),
        ("uw", "WU"),
        ("white blue", "WU"),
        ("Blue and White", "WU"),
        ("green/red", "RG"),
        ("W, B", "WB"),
        ("{G}{W}", "WG"),
        ("WUBRG", "WUBRG"),
        ("bug", "UBG"),
        ("colorless", ""),
        ("C", ""),
        ("colourless", ""),
    ],
)
def test_colors(text: str, colors: str) -> None:
    assert parse_colors(text) == tuple(colors)


@pytest.mark.parametrize(
    ("type_line", "colors", "mana_value", "error"),
    [
        ("Creature — Gobln", None, None, "unknown type 'Gobln': did you mean 'Goblin'"),
        ("Creeture", None, None, "unknown type 'Creeture': did you mean 'Creature'"),
        ("goblins", None, None, "did you mean 'Goblin'"),
        ("Creature — Qqqqq", None, None, "unknown type 'Qqqqq': a type line is like"),
        (None, "bleu", None, "unknown color 'bleu': did you mean 'blue'"),
        (None, "purple", None, "unknown color 'purple'"),
        (None, "XYZ", None, "unknown color 'XYZ': use white, blue, black, red, green, colorless"),
        (None, "colorless red", None, "^colorless cannot be combined with red: leave out one of them$"),
        (None, "CW", None, "^colorless cannot be combined with white: leave out one of them$"),
        (None, "{U}{C}{R}", None, "^colorless cannot be combined with blue and red: leave out one of them$"),
        (None, None, -1, "mana value must be from 0 to 10,000,000, not -1"),
        (None, None, True, "mana_value must be a whole number, not True"),
        (None, None, "3", "mana_value must be a whole number, not '3'"),
        (None, ["W", "U"], None, r"colors must be text, not \['W', 'U'\]: write 'WU'"),
        (7, None, None, "type_line must be text, not 7"),
    ],
)
def test_unknown_values_are_reported(
    type_line: str | None, colors: str | None, mana_value: int | None, error: str
) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        Attributes.parse(type_line, colors, mana_value)
    assert "\n" not in str(raised.value)


def test_every_real_type_line_is_parsed() -> None:
    for card in clean(read_embedded().rows, include=["franchises"]).cards[::5]:
        colors = None if card.colors is None else "".join(card.colors) or "C"
        parsed = Attributes.parse(card.type_line, colors, card.mana_value)
        known = Attributes.of(card)
        assert parsed.prompt() == known.prompt()
        assert parsed.subtypes == known.subtypes and parsed.colors == known.colors


@settings(deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(COLORS)))
def test_color_prompts_are_read_back(letters: set[str]) -> None:
    attributes = Attributes(colors=in_color_order(letters))
    assert parse_colors(attributes.prompt().removesuffix(":")) == attributes.colors


@settings(deadline=None, max_examples=60)
@given(
    st.permutations(SUPERTYPES).flatmap(lambda names: st.integers(0, 2).map(lambda count: names[:count])),
    st.permutations(TYPES).flatmap(lambda names: st.integers(1, 3).map(lambda count: names[:count])),
    st.lists(st.sampled_from(["Goblin", "Elf", "Time Lord", "Aura", "Assembly-Worker"]), unique=True),
)
def test_type_prompts_are_read_back(supertypes: list[str], types: list[str], subtypes: list[str]) -> None:
    parts = parse_type_line(f"{' '.join([*supertypes, *types])} — {' '.join(subtypes)}".lower())
    assert parts[0] == tuple(name for name in SUPERTYPES if name in supertypes)
    assert parts[1] == tuple(name for name in TYPES if name in types)
    assert parts[2] == tuple(subtypes)
    again = parse_type_line(Attributes(*parts).prompt().removesuffix(":"))
    assert again[:2] == parts[:2] and set(again[2] or ()) == set(subtypes)


def test_drop_keeps_all_or_none_at_its_ends_and_repeats_with_its_seed() -> None:
    assert all(KRENKO.drop(random.Random(seed), 0.0) == KRENKO for seed in range(50))
    assert all(KRENKO.drop(random.Random(seed), 1.0) == UNCONDITIONAL for seed in range(50))
    assert [KRENKO.drop(random.Random(7), 0.5) for _ in range(2)].count(KRENKO.drop(random.Random(7), 0.5)) == 2


def test_drop_leaves_each_attribute_out_at_its_rate() -> None:
    rng = random.Random(0)
    dropped = [KRENKO.drop(rng, 0.3) for _ in range(4000)]
    expected = 1 - (1 - 0.15) * (1 - 0.3)  # all together, or each alone
    for field in ("supertypes", "types", "subtypes", "colors", "mana_value"):
        share = sum(getattr(attributes, field) is None for attributes in dropped) / len(dropped)
        assert share == pytest.approx(expected, abs=0.03)
    unconditional = sum(attributes == UNCONDITIONAL for attributes in dropped) / len(dropped)
    assert unconditional == pytest.approx(0.15 + 0.85 * 0.3**5, abs=0.02)
    both = sum(a.types is None and a.colors is None for a in dropped) / len(dropped)
    assert both == pytest.approx(0.15 + 0.85 * 0.3**2, abs=0.03)


@pytest.mark.parametrize(
    ("text", "rarity"),
    [("rare", "rare"), (" Mythic  Rare ", "mythic"), ("M", "mythic"), ("C", "common"), ("", None), (None, None)],
)
def test_rarities(text: str | None, rarity: str | None) -> None:
    assert Attributes.parse(None, None, None, text).rarity == rarity


@pytest.mark.parametrize(
    ("text", "error"),
    [("uncomon", "unknown rarity 'uncomon': did you mean 'uncommon'"), ("epic", "use common, uncommon, rare, mythic")],
)
def test_unknown_rarities_are_reported(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Attributes.parse(None, None, None, text)


def test_optional_attributes_are_dropped_at_their_rate_and_change_no_other_drop() -> None:
    optional = {"rarity": "rare", "set_code": "ZEN", "released": 2009}
    rare, missing = replace(KRENKO, **optional), dict.fromkeys(optional)
    one, other = random.Random(0), random.Random(0)
    dropped = [(rare.drop(one, 0.3), KRENKO.drop(other, 0.3)) for _ in range(4000)]
    assert all(replace(with_it, **missing) == without for with_it, without in dropped)
    gone = {
        name: [getattr(with_it, name) is None for with_it, _ in dropped] for name in (*optional, "supertypes", "types")
    }
    for name in optional:
        assert sum(gone[name]) / 4000 == pytest.approx(1 - (1 - 0.15) * (1 - 0.3), abs=0.03)
    for pair in itertools.combinations(gone, 2):
        both = sum(map(all, zip(*(gone[name] for name in pair), strict=True))) / 4000
        assert both == pytest.approx(0.15 + 0.85 * 0.3**2, abs=0.03), "each by itself"
    assert rare.drop(random.Random(0), 0.0) == rare and rare.drop(random.Random(0), 1.0) == UNCONDITIONAL


def test_drop_takes_the_same_number_of_draws_whatever_is_given() -> None:
    one, other = random.Random(3), random.Random(3)
    KRENKO.drop(one, 0.5)
    UNCONDITIONAL.drop(other, 0.1)
    assert one.random() == other.random()


def test_the_words_of_prompts() -> None:
    cards = [CARD] * 3
    words = prompt_words(cards)
    assert {"legendary", "creature", "goblin", "warrior", "red", "colorless", "mythic"} <= set(words)
    assert len(words) == len(set(words)) and all(word == word.lower() for word in words)
    assert "goblin" not in prompt_words(cards[:2])
    printed = [replace(card, set_code="ZEN", released="2009-10-02") for card in cards]
    assert prompt_words(printed) == [*words, "ZEN", "2009"], "other words keep their tokens"
    assert prompt_words([*printed, replace(cards[0], name="The Year 2009")]) == [*words, "ZEN"]


def test_set_and_year_come_last_and_change_no_prompt_without_them() -> None:
    printed = replace(KRENKO, rarity="rare", set_code="ZEN", released=2009)
    assert printed.prompt() == "legendary creature goblin warrior, red, 4, rare, ZEN, 2009:"
    assert Attributes.parse(None, None, None, None, " zen ", 2009).prompt() == "ZEN, 2009:"
    prompts = "".join(Attributes.of(card).prompt() for card in clean(read_embedded().rows).cards)
    # Computed before prompts had sets: the released models were trained with exactly these bytes.
    assert hashlib.sha256(prompts.encode()).hexdigest() == EMBEDDED_PROMPTS


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"set_code": "Zendikar Rising"}, "its code"),
        ({"set_code": "2018"}, "its code"),
        ({"released": 18}, "date or year"),
        ({"released": 99999}, "date or year"),
    ],
)
def test_malformed_sets_and_years(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Attributes.parse(None, None, None, **given)


def test_a_model_knows_its_conditions() -> None:
    cards = [replace(CARD, set_code=code, released=date) for code, date in (("ZEN", "2009-10-02"), ("M10", "2019"))]
    conditions = collect_conditions(cards)
    assert conditions == {"set_code": ["M10", "ZEN"], "released": [2009, 2019]}
    assert read_conditions(json.loads(json.dumps({"conditions": conditions}))) == conditions
    check_known(Attributes(set_code="ZEN", released=2009), conditions)
    check_known(KRENKO, {})
    for attributes, known, error in [
        (Attributes(set_code="ZEM"), conditions, "'ZEM' is not among the sets .*: the nearest is 'ZEN'"),
        (Attributes(released=2017), conditions, "the nearest is 2019"),
        (Attributes(released=2019), {}, "not trained with years of release: leave 2019 out"),
        (Attributes(rarity="rare"), conditions, "not trained with rarities"),
    ]:
        with pytest.raises(ValueError, match=error) as raised:
            check_known(attributes, known)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("conditions", [3, {"color": ["R"]}, {"released": "2019"}, {"set_code": [3]}])
def test_malformed_conditions(conditions: Any) -> None:
    with pytest.raises(ValueError, match=r"config\.json: conditions"):
        read_conditions({"conditions": conditions})
