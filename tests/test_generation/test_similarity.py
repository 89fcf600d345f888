"""Nearest real cards, and names that resemble examples."""

from __future__ import annotations

import random
import time

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation import KnownNames, NameGenerator, NameVocabulary
from flash_experts.generation.similarity import Resembles, examples_of, filled_in, shared_attributes


def _distance(one: str, other: str) -> int:
    """Levenshtein by the book, as the reference."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row, before = [i], row
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_nearest_is_the_one_of_least_edit_distance() -> None:
    known = ["Goblin Guide", "Goblin King", "Lightning Bolt", "Jötun Grunt"]
    queries = ["Goblin Ring", "jotun GRUNTS", "Lightning Dolt", "Qq"]
    found = KnownNames(tuple(known)).nearest(queries)
    for query, (card, similarity) in zip(queries, found, strict=True):
        one = normal_form(query)
        forms = [normal_form(name) for name in known]
        best = max(1 - _distance(one, form) / max(len(one), len(form)) for form in forms)
        assert similarity == pytest.approx(best, abs=1e-6)
        assert card in known
    assert [card for card, _ in found[:3]] == ["Goblin King", "Jötun Grunt", "Lightning Bolt"]


def test_a_known_name_is_wholly_similar_and_shown_as_on_its_card() -> None:
    assert KnownNames(("Lim-Dûl's Vault",)).nearest(["LIM-DUL'S VAULT"]) == [("Lim-Dûl's Vault", 1.0)]


def test_nothing_known() -> None:
    assert KnownNames(()).nearest(["Goblin"]) == [(None, 0.0)]
    assert KnownNames(("!!!",)).normal_forms == frozenset()


def test_twenty_names_against_35000_are_quick() -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    known = KnownNames(tuple("".join(rng.choices(letters, k=rng.randint(8, 24))) for _ in range(35_000)))
    names = ["".join(rng.choices(letters, k=17)) for _ in range(20)]
    known.nearest(names[:1])  # normal forms of the known names are made once
    start = time.thread_time()  # other processes take none of it
    known.nearest(names)
    assert time.thread_time() - start < 0.3


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
    assert filled_in(Attributes.parse(None, "U", None), Attributes.parse(None, "R", None)).colors == ("U",)


def test_sub_words_of_examples_are_favored_until_a_name_has_them(vocabulary: NameVocabulary) -> None:
    one = Resembles(vocabulary, 0, ["Goblin Guide", "Goblin King"], strength=2.0)
    goblin = vocabulary.encode(" Goblin")[0]
    scores = torch.zeros(2, vocabulary.size)
    favored = one.apply([" Serra", " Goblin"], scores)
    assert favored[0, goblin] == 2.0 and favored[1, goblin] == 0.0
    shares = sorted({round(weight, 5) for weight in favored[0].tolist()})
    assert shares == pytest.approx([0.0, 2 * 0.5**0.5, 2.0], abs=1e-4), (
        "by the root of the share of the examples that have it"
    )
    assert (favored >= 0).all() and not scores.any()


def test_an_example_counts_once_and_small_words_and_letters_do_not(vocabulary: NameVocabulary) -> None:
    examples = ["Goblin Goblin of", "Goblin of Red", "Grunt of"]
    weights = Resembles(vocabulary, 0, examples, strength=2.0).weights
    goblin, grunt, of = (vocabulary.encode(text)[-1] for text in (" Goblin", " Grunt", " of"))
    assert (weights[goblin], weights[grunt]) == (2.0, 2.0 * 0.5**0.5), "two of three examples, and one"
    assert of not in weights
    assert all(len(vocabulary.texts[token].strip()) > 1 for token in weights)


def test_names_come_nearer_to_the_examples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Even for a random model."""
    generator = NameGenerator(model, tokenizer, [])

    def share(**options: object) -> float:
        names = generator.generate(60, seed=1, **options)
        return sum("Goblin" in name.text or "Grunt" in name.text for name in names) / len(names)

    assert share(like=["Goblin Grunt", "Grunt Goblin"]) > 2 * share()
