"""The card type that a name fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_experts.data.cards import Card, load_source
from flash_experts.data.cleaning import clean
from flash_experts.generation import TypeJudge, type_fit


def card(name: str, type_line: str, supertypes: tuple[str, ...] = ()) -> Card:
    types = tuple(type_line.split())
    return Card(name, type_line, supertypes, types, (), None, None, "test")


def test_worked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_fit, "_PRIOR_RUNS", 3)
    judge = TypeJudge([card("a", "Instant"), card("b", "Sorcery"), card("b", "Sorcery")])
    assert judge.types == ["Sorcery", "Instant"]
    # "a" between its ends has three runs, seen once each among the 3 of instants and the 9 of all names (1/9), never
    # among the 6 of sorceries. Odds of each with 3 runs of all names added: instants (1 + 3/9) / (3 + 3) * 9 = 2,
    # sorceries (0 + 3/9) / (6 + 3) * 9 = 1/3. Each counts a fourteenth; sorceries are twice as common.
    instant = 6 ** (3 / 14) / (6 ** (3 / 14) + 2)
    assert judge.probabilities(["a"])[0] == pytest.approx([1 - instant, instant])
    # Runs that no name has: each type's names might have had them as often, 3 / 6 and 3 / 9.
    never = 1.5 ** (3 / 14) / (1.5 ** (3 / 14) + 2)
    assert judge.probabilities(["x"])[0] == pytest.approx([1 - never, never])
    [best] = judge.best(["b"])
    assert best.type_line == "Sorcery" and best.probability > 2 / 3


def test_legends_are_a_type_of_their_own_and_rare_types_none() -> None:
    cards = (
        [card("Elf", "Creature")] * 200 + [card("Krenko", "Creature", ("Legendary",))] * 200 + [card("War", "Battle")]
    )
    judge = TypeJudge([*cards, Card("Nothing", "", (), (), (), None, None, "test")])
    assert set(judge.types) == {"Creature", "Legendary Creature"}
    assert [fit.type_line for fit in judge.best(["Krenko", "Elf"])] == ["Legendary Creature", "Creature"]
    assert judge.best([]) == []


def test_cards_without_types_teach_nothing() -> None:
    with pytest.raises(ValueError, match="no card has a type"):
        TypeJudge([Card("Elf", "", (), (), (), None, None, "test")])


JUDGE = TypeJudge([card("Goblin Guide", "Creature"), card("Lightning Bolt", "Instant")])


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_whatever_the_name_its_types_share_one(names: list[str]) -> None:
    together = JUDGE.probabilities(names)
    assert together.sum(axis=1) == pytest.approx(1) and (together > 0).all()
    assert together[-1] == pytest.approx(JUDGE.probabilities(names[-1:])[0])


def test_types_of_real_names_are_found_more_often_than_by_the_commonest() -> None:
    cards = [one for one in clean(load_source("embedded").rows).cards if one.types and one.source_id]
    judge = TypeJudge(one for index, one in enumerate(cards) if index % 10)
    held_out = cards[::10]
    fits = judge.best([one.name for one in held_out])
    right = [fit.type_line == type_fit._type_line(one) for fit, one in zip(fits, held_out, strict=True)]
    commonest = sum(type_fit._type_line(one) == "Creature" for one in held_out) / len(held_out)
    assert sum(right) / len(right) > commonest + 0.1
    sure = [is_right for is_right, fit in zip(right, fits, strict=True) if fit.probability > 0.9]
    assert len(sure) > 100 and sum(sure) / len(sure) > 0.85
