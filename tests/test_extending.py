"""The examples of docs/change_this.md: each is run, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_examples import example

CITIES = Path(__file__).parent.parent / "examples/extending/cities.txt"


@pytest.mark.slow
def test_custom_dataset_makes_names_that_are_not_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_dataset.py")
    made = re.findall(r"^  (.+?) +nearest in the list: (.+)$", said, re.MULTILINE)
    listed = set(CITIES.read_text("utf-8").splitlines())
    assert len(made) == 12
    assert not listed & {name for name, _ in made} and {nearest for _, nearest in made} <= listed
    curve = re.search(r"bits per character: (.+)", said)
    assert curve
    steps = [float(bits) for bits in curve[1].split()]
    assert min(steps) < 0.9 * steps[0], "it learns cities"


@pytest.mark.slow
def test_custom_router_is_exact_and_routes(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_router.py")
    off = re.search(r"logits off by: (\S+)", said)
    assert off and float(off[1]) < 1e-3
    entropies = [float(value) for value in re.findall(r" entropy ([\d.]+)", said)]
    assert len(entropies) == 2 and entropies[0] != entropies[1], "another router routes otherwise"


@pytest.mark.slow
def test_custom_attention_reaches_as_far_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = example(capsys, "extending/custom_attention.py")
    whole, near = (float(nats) for nats in re.findall(r"attention: ([\d.]+) nats", said))
    assert near > whole, "what is far is missed"
    reach = re.search(r"reach: (\d+) tokens, (\d+) expected", said)
    assert reach and 0 < int(reach[1]) <= int(reach[2])
    assert "the same text: True" in said
