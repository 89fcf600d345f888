"""Requests for names: wrong and contradictory arguments are refused before a model runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.card_table import known_names
from flash_experts.generation import (
    NameGenerator,
    NameRequest,
)
from flash_experts.generation.constraints import Constraints
from flash_experts.generation.request import Sampling
from flash_experts.generation.text_rules import KNOWN_CHARACTERS

REAL = ["Goblin Guide", "Lightning Bolt", "Jötun Grunt", "Lim-Dûl's Vault", "Serra Angel", "Wrath of God"]


@pytest.fixture
def generator(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> NameGenerator:
    return NameGenerator(model, tokenizer, known_names=REAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts_with": "Goblin", "max_length": 3}, "more than max_length 3"),
        ({"starts_with": "Goblin of the", "max_words": 2}, "more words than max_words 2"),
        ({"starts_with": "  "}, "starts_with is blank"),
        ({"max_words": 0}, "max_words"),
        ({"max_length": 0}, "max_length"),
        ({"preset": "wild"}, "unknown preset"),
        ({"temperature": 0}, "temperature"),
        ({"count": -1}, "count"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"starts_with": "Elf", "max_length": 3, "banned_words": ["elf"]}, "no name can be made"),
        ({"ends_with": " Wolf", "banned_words": ["wolf"]}, "banned word 'wolf'"),
        ({"starts_with": "Elf of", "banned_words": ["ELF"]}, "banned word 'elf'"),
        ({"starts_with": "Fire // Ice"}, "as on cards"),
        ({"starts_with": "&elf"}, "as on cards"),
        ({"contains": "//"}, "as on cards"),
        ({"pattern": "___ // ___"}, "as on cards"),
        ({"min_words": 3, "max_words": 2}, "min_words 3 is more than max_words 2"),
        ({"min_length": 9, "max_length": 8}, "min_length 9 is more than max_length 8"),
        ({"words": 2, "max_words": 2}, "leave out"),
        ({"words": 0}, "words"),
        ({"min_words": 5, "max_length": 8}, "5 words have 9 characters or more"),
        ({"ends_with": "Goblin", "max_length": 3}, "more than max_length 3"),
        ({"contains": "of the elves", "max_words": 2}, "more words than max_words 2"),
        ({"ends_with": " "}, "ends_with is blank"),
        ({"ends_with": "of the"}, "no name ends on 'the'"),
        ({"ends_with": "Goblin,"}, "no name ends on"),
        ({"contains": "a,b"}, "no name has"),
        ({"alliterate": True, "max_words": 1}, "two words"),
        ({"alliterate": True, "starts_with": "Goblin King"}, "does not alliterate"),
        ({"min_distance": 1.0}, "min_distance"),
        ({"min_distance": float("nan")}, "min_distance"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": ""}, "is blank"),
        ({"regex": "(Goblin){9}"}, "matches no name of at most 40"),
        ({"regex": "goblin"}, "matches no name"),
        ({"regex": "Goblin.*", "ends_with": "king", "max_length": 9}, "satisfies the other constraints"),
        ({"regex": "[A-F].*", "starts_with": "Goblin"}, "satisfies the other constraints"),
        ({"regex": r"\w+", "words": 2}, "satisfies the other constraints"),
        ({"best_of": 0}, "best_of"),
        ({"rarity": "rarest"}, "rarity"),
        ({"like": " ; "}, "like has no name"),
    ],
)
def test_bad_and_contradictory_arguments(generator: NameGenerator, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(**arguments)


def test_parts_of_banned_words_and_marks_within_names_are_allowed() -> None:
    NameRequest.of(ends_with="wolf", contains="elf", starts_with="Elf", banned_words=["wolf", "elf"])
    NameRequest.of(starts_with="Jötun, ", contains=" l'", ends_with="-ful")
    NameRequest.of(starts_with=" Goblin ", contains=" Axe ", ends_with=" Wolf")
    NameRequest.of(pattern="___'s ___, the ___")


@pytest.mark.parametrize(
    ("rule", "text", "character"),
    [
        ("contains", "ß", "ß"),
        ("contains", "@", "@"),
        ("contains", " ü", "Ü"),
        ("starts_with", "Дра", "Д"),
        ("starts_with", "Ü", "Ü"),
        ("starts_with", "ü", "Ü"),
        ("starts_with", "Jötun Ötun", "Ö"),
        ("starts_with", "龍", "龍"),
        ("ends_with", "Ж", "Ж"),
        ("pattern", "___ of ß", "ß"),
        ("pattern", "Ü___", "Ü"),
    ],
)
def test_a_character_that_no_card_has_is_refused_at_once(rule: str, text: str, character: str) -> None:
    with pytest.raises(ValueError, match=f"^{rule} '{re.escape(text.strip())}': no card's name has '{character}' in"):
        NameRequest.of(**{rule: text})


@pytest.mark.parametrize("text", ["Jötun", "Éo", "éo", "Lim-Dûl", "El-Hajjâj", "Kennerüd", "X-23", "Aye!", "Who?"])
def test_characters_of_cards_are_allowed(text: str) -> None:
    for rule in ("starts_with", "contains", "ends_with"):
        NameRequest.of(**{rule: text})
    NameRequest.of(pattern=f"{text} ___", max_length=30)
    NameRequest.of(contains="ü", ends_with="Û")


def test_the_known_characters_are_those_of_all_known_names() -> None:
    assert set("".join(known_names())) == KNOWN_CHARACTERS


@pytest.mark.parametrize(
    ("name", "meant"),
    [("start_with", "starts_with"), ("typeline", "type_line"), ("type", "type_line"), ("ban", "banned_words")],
)
def test_an_unknown_option_is_a_type_error(generator: NameGenerator, name: str, meant: str) -> None:
    """The names on the command line are suggested, too."""
    with pytest.raises(TypeError, match=f"unknown option '{name}': did you mean '{meant}'"):
        generator.generate(**{name: "Goblin"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": "2"}, "count must be a whole number, not '2'"),
        ({"count": True}, "count must be a whole number, not True"),
        ({"count": 2.0}, "count must be a whole number, not 2.0"),
        ({"mana_value": "3"}, "mana_value must be a whole number, not '3'"),
        ({"mana_value": 3.5}, "mana_value must be a whole number, not 3.5"),
        ({"colors": ["W", "U"]}, r"colors must be text, not \['W', 'U'\]: write 'WU'"),
        ({"type_line": ["Elf", "Druid"]}, r"type_line must be text, not \['Elf', 'Druid'\]: write 'Elf Druid'"),
        ({"starts_with": 3}, "starts_with must be text, not 3"),
        ({"banned_words": "fire"}, r"banned_words must be a list, such as \[a,b\], not 'fire'"),
        ({"banned_words": [1]}, "banned_words must be a list"),
        ({"alliterate": "no"}, "alliterate must be true or false, not 'no'"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"quality": ["fast"]}, "quality is .* but it is one of"),
        ({"filters": [object()]}, "filters has <object .* subclass of NameFilter"),
        ({"filters": 3}, "filters must be a list"),
    ],
)
def test_arguments_of_a_wrong_type(generator: NameGenerator, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.stream(**arguments)


def test_rules_and_sampling_check_types_by_themselves() -> None:
    with pytest.raises(ValueError, match="words must be a whole number, not '2'"):
        Constraints(words="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k must be a whole number, not True"):
        Sampling(top_k=True)


def test_numbers_of_numpy_and_any_collection_of_words_are_accepted(generator: NameGenerator) -> None:
    given = {"count": np.int64(2), "mana_value": np.int32(3), "temperature": np.float32(1), "top_k": np.int64(0)}
    same = generator.generate(2, mana_value=3, temperature=1, top_k=0, banned_words=["fire"], seed=4)
    assert generator.generate(**given, min_distance=0, banned_words={"fire"}, seed=np.int64(4)) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "Serra"}, "has no gap"),
        ({"pattern": "Serra __ Angel"}, "has no gap"),
        ({"pattern": "Serra ___", "regex": "x"}, "give one of them"),
        ({"pattern": "Serra --___"}, "no name has"),
        ({"pattern": "Hitler's ___"}, "swear words"),
        ({"pattern": "Serra ___ ring", "max_words": 1}, "matches no name"),
    ],
)
def test_a_pattern_that_no_name_can_have(generator: NameGenerator, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(1, **options)
