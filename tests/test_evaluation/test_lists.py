"""Lists of names for requests of held-out cards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.sources import load_source
from flash_experts.evaluation import format_lists
from flash_experts.evaluation.held_out import Reference, names_of
from flash_experts.evaluation.lists import ListEvaluation, ListMetrics, requests_of

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def reference() -> Reference:
    cards = list(clean(load_source("embedded").rows).cards)
    names = tuple(card.name for card in cards)
    return Reference(tuple(cards[:4000]), (), (), tuple(cards[4000:5200]), names)


def test_requests_are_distinct_and_as_particular_as_the_cards_allow(reference: Reference) -> None:
    requests = requests_of(reference.test_iid, count=15, per_list=20)
    assert len(requests) == len({(one.type_line, one.colors) for one in requests}) == 15
    assert requests == requests_of(reference.test_iid, count=15, per_list=20)
    for request in requests:
        assert len(set(request.cards)) == 20
        typed, _, subtype = request.type_line.partition(" — ")
        for card in request.cards:
            assert [*card.supertypes, *card.types] == typed.split()
            assert not subtype or subtype in card.subtypes
            assert request.colors in (None, "".join(card.colors or ()) or "C")


class Shuffled:
    """Gives real names of other cards: neither type nor color is right."""

    classifier: object = None

    def __init__(self, cards: tuple[Card, ...]) -> None:
        self.names, self.asked = names_of(cards), list[str]()

    def generate(self, count: int, *, quality: str, **given: object) -> list:
        self.asked.append(quality)
        start = len(self.asked) * count % (len(self.names) - count)
        return [type("Name", (), {"text": name}) for name in self.names[start : start + count]]


@pytest.fixture(scope="module")
def found(reference: Reference) -> dict[str, ListMetrics]:
    lists = ListEvaluation(reference, requests=12)
    careless = Shuffled(tuple(sorted(reference.test_iid, key=lambda card: card.name)))
    measured = [lists.real(), lists.swapped(), *lists.generated(careless)]  # type: ignore[arg-type]
    assert Counter(careless.asked) == dict.fromkeys(("fast", "good", "best"), 12)
    assert careless.classifier is not None, "the reranker knows the training cards alone"
    return {one.label: one for one in measured}


def test_real_names_are_recognized_and_names_of_other_cards_are_not(found: dict[str, ListMetrics]) -> None:
    real, other = found["real names"], found["good"]
    assert real.names == other.names == 12 * 20
    for task, margin in {"type": 0.05, "color": 0.1}.items():
        assert real.recognized[task].value > other.recognized[task].value + margin
    assert real.separation is None and other.separation is not None
    assert other.separation.strong.value < 0.75, "they are real names, too"
    # In alphabetical order, neighbours share their first words: such lists are less varied.
    assert other.distinct_words < real.distinct_words <= 1


def test_swapped_parts_keep_the_kind_and_are_no_real_names(found: dict[str, ListMetrics]) -> None:
    swapped, other = found["swapped parts"], found["good"]
    assert swapped.names > 0.8 * 12 * 20 and swapped.per_second is None
    for task in ("type", "color"):
        assert swapped.recognized[task].value > other.recognized[task].value


def test_the_table_has_a_row_for_each_quality(found: dict[str, ListMetrics]) -> None:
    text = format_lists(list(found.values()))
    for label in ("real names", "swapped parts", "fast", "good", "best", "color", "names/s"):
        assert label in text
    assert found["best"].to_json()["recognized"]["type"]["value"] == found["best"].recognized["type"].value


def test_too_few_cards(reference: Reference, tmp_path: Path) -> None:
    few = Reference(reference.train, (), (), reference.test_iid[:19], reference.known_names)
    with pytest.raises(ValueError, match="needs more cards"):
        ListEvaluation(few)
    with pytest.raises(ValueError, match="requests must be 1 or more, not 0"):
        ListEvaluation(reference, requests=0)


def test_what_data_of_one_kind_cannot_show_is_left_out(reference: Reference) -> None:
    """All cards are creatures of unknown color with names of one word: no types to tell apart, no parts to swap."""
    plain = {"type_line": "Creature", "supertypes": (), "types": ("Creature",), "subtypes": (), "colors": None}
    cards = tuple(replace(card, name=card.name.split()[0], **plain) for card in reference.train[:600])
    lists = ListEvaluation(Reference(cards[:400], (), (), cards[400:], tuple(names_of(cards))), requests=3)
    real, swapped = lists.real(), lists.swapped()
    assert real.names == 20 and real.recognized == {}
    assert swapped.names == 0 and swapped.recognized == {}
    assert swapped.separation is swapped.unknown_words is swapped.near_known is None
    text = format_lists([real, swapped])
    assert "color" not in text and "legendary" not in text and "real names" in text
    assert json.loads(json.dumps(real.to_json(), allow_nan=False))["recognized"] == {}
