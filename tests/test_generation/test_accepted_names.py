"""What comes out is checked as a whole, whatever the filters of sub-words let through."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flash_experts.data.names import normal_form
from flash_experts.generation import KnownNames, NameGenerator, NameRequest

REAL = ["Goblin Guide", "Serra Angel"]


def generated(generator: NameGenerator, count: int = 8, **options: object) -> set[str]:
    """Texts of a search that may find fewer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name.text for name in generator.generate(count, temperature=0.5, top_k=6, seed=0, **options)}


def test_without_filters_neither_real_names_nor_those_against_the_rules_come_out(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NameRequest, "filters", lambda *_: [])
    names = [*REAL, "Elf of Norway", "Serra Bolt Ritual", "Goblin Ring"]
    free = generated(NameGenerator(parrot(names), tokenizer, []), allow_real_places=True)
    assert set(names) <= free, "the model wants them"
    held = generated(NameGenerator(parrot(names), tokenizer, REAL), max_words=2)
    assert "Goblin Ring" in held and not held & {*REAL, "Elf of Norway", "Serra Bolt Ritual"}


def test_a_name_that_the_context_cuts_off_does_not_come_out(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    long, short = "Serra Bolt Ritual Dragon Growth", "Goblin Ring"
    most = len(tokenizer(" " + long)["input_ids"]) - 1
    model = parrot([long, short])
    model.config.n_positions = model.prompt_length + most
    found = generated(NameGenerator(model, tokenizer, REAL))
    assert short in found and not any(name.startswith("Serra Bolt") for name in found)


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_a_name_at_exactly_the_lowest_distance_is_far_enough(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, edits: int
) -> None:
    """Such as two letters of ten for 0.2, which rounding must not hide."""
    known = "Goblin Lord"
    name = "Goblin Lord"[:-edits] + "xqz"[:edits]
    letters = len(normal_form(known))
    ((_, similarity),) = KnownNames((known,)).nearest([name])
    assert similarity == 1 - edits / letters
    generator = NameGenerator(parrot([name]), tokenizer, [known])
    assert name in generated(generator, 2, min_distance=edits / letters)
    assert name not in generated(generator, 2, min_distance=edits / letters + 0.01)
