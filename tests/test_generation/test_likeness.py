"""Names that resemble examples."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.prompts import Attributes
from flash_experts.generation import NameGenerator, NameVocabulary
from flash_experts.generation.likeness import Resembles, examples_of, filled_in, shared_attributes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Goblin Guide, Lightning Bolt", ["Goblin Guide", "Lightning Bolt"]),
        ("Krenko, Mob Boss, Goblin Guide", ["Krenko, Mob Boss", "Goblin Guide"]),
        ("krenko, mob boss; My Own, Name", ["krenko, mob boss", "My Own", "Name"]),
        (["My Own, Name"], ["My Own, Name"]),
    ],
)
def test_a_comma_within_a_cards_name_is_no_separator(text: str | list[str], names: list[str]) -> None:
    assert examples_of(text) == names


def test_attributes_are_those_that_most_examples_share() -> None:
    goblins = shared_attributes(["Goblin Guide", "Krenko, Mob Boss", "Mogg Fanatic", "A Name of My Own"])
    assert (goblins.types, goblins.subtypes, goblins.colors) == (("Creature",), ("Goblin",), ("R",))
    assert shared_attributes(["Goblin Guide", "Lightning Bolt"]) == Attributes(colors=("R",))
    assert shared_attributes(["A Name of My Own"]) == Attributes()


def test_given_attributes_have_priority() -> None:
    given = Attributes.parse("Elf", None, 3)
    assert filled_in(given, Attributes.parse("Goblin Creature", "R", None)) == Attributes.parse("Elf", "R", 3)
    assert filled_in(Attributes(), Attributes.parse("Goblin", "R", None)) == Attributes.parse("Goblin", "R", None)


def test_sub_words_of_examples_are_favored_until_a_name_has_them(vocabulary: NameVocabulary) -> None:
    one = Resembles(vocabulary, 0, ["Goblin Guide", "Goblin King"], strength=2.0)
    goblin = vocabulary.encode(" Goblin")[0]
    scores = torch.zeros(2, vocabulary.size)
    favored = one.apply([" Serra", " Goblin"], scores)
    assert favored[0, goblin] == 2.0 and favored[1, goblin] == 0.0
    assert favored[0].sum() > 2.0 and favored[0].max() == 2.0
    assert (favored >= 0).all() and not scores.any()


def test_names_come_nearer_to_the_examples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Even for a random model."""
    generator = NameGenerator(model, tokenizer, [])

    def share(**options: object) -> float:
        names = generator.generate(60, seed=1, **options)
        return sum("Goblin" in name.text or "Grunt" in name.text for name in names) / len(names)

    assert share(like=["Goblin Grunt", "Grunt Goblin"]) > 2 * share()
