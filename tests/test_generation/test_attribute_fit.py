"""Which of several names fits the card best."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import NameGenerator
from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.generation.attribute_fit import AttributeJudge, attribute_judge_of_real_cards, fitness_of


@pytest.fixture
def generator(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> NameGenerator:
    return NameGenerator(model, tokenizer, known_names=["Goblin Guide"])


def card(name: str, *types: str, color: str = "G", supertypes: tuple[str, ...] = ()) -> Card:
    return Card(name, " ".join(types), supertypes, types, (), (color,), 1, "test")


def test_a_run_that_only_red_cards_have_speaks_for_red_by_worked_numbers() -> None:
    judge = AttributeJudge([card("a", "Instant", color="R"), card("b", "Instant")])
    # Runs of a name of one letter, ends included: "\na", "a\n", "\na\n". Each name has three, each run is one of six.
    # The red card has three of them, and so have the others: a run of neither speaks for neither.
    only_red = np.log(1 / (1 / 6) + 40_000) - np.log(40_000)
    evidence_N = judge.evidence(Attributes(colors=("R",)))(["a", "b", "c"])
    np.testing.assert_allclose(evidence_N * 14 / 3, [only_red, -only_red, 0], rtol=1e-9, atol=1e-12)


def test_evidence_for_all_that_is_told_is_added_and_what_no_card_has_is_none() -> None:
    judge = attribute_judge_of_real_cards()
    names = ["Goblin Firebrand", "Serene Dawn"]
    parts = [Attributes(subtypes=("Goblin",)), Attributes(colors=("R",)), Attributes(supertypes=())]
    whole = Attributes(subtypes=("Goblin",), colors=("R",), supertypes=())
    np.testing.assert_allclose(judge.evidence(whole)(names), sum(judge.evidence(part)(names) for part in parts))
    assert judge.evidence(whole)(names)[0] > judge.evidence(whole)(names)[1]
    assert judge.evidence(Attributes(subtypes=("Nobody",)))(names).tolist() == [0, 0]


def test_it_recognizes_colors_of_names_that_it_did_not_read() -> None:
    """Real names of unseen cards, which of two colors: half would be chance."""
    from flash_experts.data.cards import load_source
    from flash_experts.data.cleaning import clean

    cards = [one for one in clean(load_source("embedded").rows).cards if one.colors in (("R",), ("U",))]
    judge = AttributeJudge(cards[::2])
    red, blue = (judge.evidence(Attributes(colors=(color,)))([one.name for one in cards[1::2]]) for color in "RU")
    is_red = np.array([one.colors == ("R",) for one in cards[1::2]])
    assert ((red > blue) == is_red).mean() > 0.75


def test_the_best_of_a_group_is_the_fittest(generator: NameGenerator) -> None:
    drawn = [name.text for name in generator.generate(12, type_line="Dragon", colors="R", seed=9)]
    best = generator.generate(3, type_line="Dragon", colors="R", seed=9, best_of=4, best_by="fit")
    fitness = fitness_of("fit", 4, Attributes.parse("Dragon", "R", None))
    assert fitness is not None
    groups = [drawn[start : start + 4] for start in (0, 4, 8)]
    assert [name.text for name in best] == [group[int(fitness(group).argmax())] for group in groups]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_by": "luck", "best_of": 2}, "score .* or fit"),
        ({"best_by": "fit", "colors": "R"}, "set best_of"),
        ({"best_by": "fit", "best_of": 2}, "tell its type or colors"),
    ],
)
def test_no_choice(generator: NameGenerator, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(1, **options)
