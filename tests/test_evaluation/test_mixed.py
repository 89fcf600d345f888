"""A model mixed with the n-gram baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation import compare, evaluate, evaluate_names
from flash_experts.evaluation.baselines import MixedWithNGrams, mixed, without_suffix
from flash_experts.evaluation.evaluate import load_scorer
from flash_experts.evaluation.held_out import HeldOut
from flash_experts.evaluation.scorers import LanguageModel, NGramBaseline
from flash_experts.models.moe import GPT2MoEForCausalLM
from tests.helpers.evaluation import make_card


def test_the_probabilities_are_mixed_by_worked_numbers() -> None:
    first_N, second_N = -np.log([0.5, 0.01]), -np.log([0.1, 0.25])
    np.testing.assert_allclose(np.exp(-mixed(first_N, second_N, np.array([0.75, 0.5]))), [0.4, 0.13])


def test_the_name_of_a_mixture() -> None:
    assert without_suffix("models/mine+ngram") == "models/mine"
    assert without_suffix("models/mine") is None and without_suffix("ngram") is without_suffix("+ngram") is None


def test_each_name_has_the_weight_that_validation_chose(model_dirs: list[Path], data_dir: Path) -> None:
    held_out = HeldOut.load(data_dir)
    both = load_scorer(f"{model_dirs[0]}+ngram", held_out, device="cpu")
    alone, baseline = (load_scorer(name, held_out, device="cpu") for name in (model_dirs[0], "ngram"))
    assert isinstance(both, MixedWithNGrams) and both.label == f"{model_dirs[0].name}+ngram"
    cards = held_out.splits["test"]
    names, given = [card.name for card in cards], [Attributes.of(card) for card in cards]
    for attributes, weight in (([UNCONDITIONAL] * len(names), both.unconditional), (given, both.conditional)):
        expected = mixed(alone.nats(names, attributes), baseline.nats(names, attributes), np.full(len(names), weight))
        np.testing.assert_allclose(both.nats(names, attributes), expected)
    assert 0.5 <= both.unconditional < 1 and both.size.total == alone.size.total + baseline.size.total
    assert both.sample(5, 3) == alone.sample(5, 3), "its names are the model's"
    assert both.sample_each(given[:5], 3) == alone.sample_each(given[:5], 3) and both.costs == alone.costs


def test_the_loads_of_a_mixture_are_those_of_the_model(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts=4, num_experts_per_tok=2)
    cards = [make_card("Goblin Guide", 1), make_card("Serra Angel", 2)]
    alone, baseline = LanguageModel(moe, tokenizer, "moe"), NGramBaseline(cards)
    both, names, given = MixedWithNGrams(alone, baseline, cards), [card.name for card in cards], [UNCONDITIONAL] * 2
    monkeypatch.setattr(baseline, "nats", None)  # the n-grams have no experts: they are not asked
    assert both.expert_loads(names, given) == alone.expert_loads(names, given) != {}


def test_a_random_model_gains_what_the_ngrams_know(model_dirs: list[Path], data_dir: Path) -> None:
    name = f"{model_dirs[0]}+ngram"
    result = compare([model_dirs[0], name, "ngram"], data_dir, samples=0, device="cpu")
    alone, both, baseline = (one.splits["test"].unconditional.value for one in result.models)
    assert baseline < both < alone
    names = [card.name for card in HeldOut.load(data_dir).splits["test"]]
    assert evaluate_names(names, name, data_dir, device="cpu").bits.value == pytest.approx(both)


def test_a_missing_model_is_named_without_the_suffix(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="no model at nowhere"):
        evaluate("nowhere+ngram", data_dir)
