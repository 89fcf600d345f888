"""The swap baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation import compare
from flash_experts.evaluation.baselines import SwapBaseline, parts_of, swapped_names
from flash_experts.evaluation.scorers import NGramBaseline, PromptAttributes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Krenko, Mob Boss", ("Krenko", ", ", "Mob Boss")),
        ("Wrath of God", ("Wrath", " of ", "God")),
        ("Temple of the False God", ("Temple", " of the ", "False God")),
        ("Goblin Guide", ("Goblin", " ", "Guide")),
        ("Counterspell", None),
        ("Birds Sing Loudly", None),
    ],
)
def test_parts(name: str, parts: tuple[str, str, str] | None) -> None:
    assert parts_of(name) == parts


def test_parts_of_two_names_with_the_same_joint_are_exchanged_and_no_name_is_known() -> None:
    names = ["Goblin Guide", "Raging Kobold", "Wrath of God", "Hand of Honor", "Krenko, Mob Boss", "Counterspell"]
    known = {normal_form(name) for name in names}
    found = swapped_names(names, 10, known)
    assert set(found) == {"Goblin Kobold", "Raging Guide", "Wrath of Honor", "Hand of God"}, "Krenko has no partner"
    assert swapped_names(names, 3, known, seed=1) == swapped_names(names, 3, known, seed=1)
    assert len(swapped_names(names, 3, known)) == 3 and swapped_names(["Counterspell"], 3, known) == []


def test_probabilities_of_swapped_parts_sum_to_one_and_are_those_of_the_draws() -> None:
    cards = [card(name) for name in ("Goblin Guide", "Raging Kobold", "Goblin King", "Wrath of God", "Hand of Honor")]
    baseline = SwapBaseline(cards, cards[:2])
    drawn = baseline.sample(4000, seed=1)
    names = sorted(set(drawn))
    assert len(names) == 2 * 3 + 2 * 2 and baseline.sample(4000, seed=1) == drawn
    own = np.exp(-np.array([baseline._parts_for(UNCONDITIONAL).nats(name) for name in names]))
    assert own.sum() == pytest.approx(1)
    assert own == pytest.approx([drawn.count(name) / 4000 for name in names], abs=0.03)
    ngram = NGramBaseline(cards)
    every = [*names, "Counterspell"]
    of_ngrams = np.exp(-ngram.nats(every, [UNCONDITIONAL] * len(every)))
    expected = baseline.weight * np.append(own, 0) + (1 - baseline.weight) * of_ngrams
    assert np.exp(-baseline.nats(every, [UNCONDITIONAL] * len(every))) == pytest.approx(expected)


def test_parts_are_of_the_kind_where_it_has_enough_names() -> None:
    goblins = [card(f"Goblin {word}", ("Creature",)) for word in WORDS]
    spells = [card(f"Blue {word}", ("Instant",)) for word in WORDS]
    baseline = SwapBaseline([*goblins, *spells[:5]], goblins[:3])
    creature, instant = Attributes(types=("Creature",)), Attributes(types=("Instant",))
    assert all(name.startswith("Goblin ") for name in baseline.sample_each([creature] * 50, seed=0))
    assert {name.split()[0] for name in baseline.sample(300, 0, instant)} == {"Goblin", "Blue"}, "5 are too few"
    (shown,) = baseline.show([PromptAttributes()], 20, 0, [one.name for one in goblins])
    assert shown and not set(shown) & {one.name for one in goblins}


def test_it_is_a_row_of_compare(model_dirs: list[Path], data_dir: Path) -> None:
    result = compare([model_dirs[0], "swap", "ngram"], data_dir, samples=10, seed=1, device="cpu")
    assert [each.label for each in result.models] == ["one", "swap", "ngram"]
    differences = [each for each in result.differences if (each.first, each.second) == ("swap", "ngram")]
    assert differences and all(np.isfinite(each.bits.value) for each in differences)
    assert all("swap" in prompt.names for prompt in result.prompts)
    with pytest.raises(ValueError, match="no validation names"):
        SwapBaseline([card("Goblin Guide")], [])


WORDS = [first + second for first in ("Ash", "Bone", "Cave", "Dusk", "Elm", "Fire", "Gale") for second in
         ("born", "caller", "fiend", "guard", "hand", "seer")]  # fmt: skip


def card(name: str, types: tuple[str, ...] = ("Creature",)) -> Card:
    return Card(name=name, type_line=" ".join(types), supertypes=(), types=types, subtypes=(), colors=("R",),
                mana_value=2, source_id=name)  # fmt: skip
