"""The swap baseline."""

from __future__ import annotations

import pytest

from flash_experts.data.names import normal_form
from flash_experts.evaluation.swap import parts_of, swapped_names


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
