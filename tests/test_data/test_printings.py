"""Conditioning on sets and years of release, from cards to a trained model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flash_experts import GPT2MoEForCausalLM, NameGenerator
from flash_experts.data.cards import Card
from flash_experts.data.prompts import CONDITIONS, Attributes
from flash_experts.evaluation.scorers import LanguageModel
from flash_experts.models.upcycling import to_dense
from flash_experts.training.build import build_model
from flash_experts.training.training_config import ModelConfig

EXPECTED = {"set_code": ["M10", "ZEN"], "released": [2009, 2019]}
SMALL = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_positions=128, vocab_size=257, num_experts=2)


def cards(printed: bool) -> list[Card]:
    names = ["".join(random.Random(index).choices("abcdefgh", k=7)).title() for index in range(12)]
    plain = [Card(name, "Creature", (), ("Creature",), (), ("R",), 3, str(place)) for place, name in enumerate(names)]
    printings = [("ZEN", "2009-10-02"), ("M10", "2019")] * 6
    if not printed:
        return plain
    return [replace(card, set_code=s, released=d) for card, (s, d) in zip(plain, printings, strict=True)]


def test_generation_can_be_conditioned_on_sets_and_years(tmp_path: Path) -> None:
    model, tokenizer = build_model(None, SMALL, cards(printed=True), seed=0)
    assert {"ZEN", "M10", "2009", "2019"} <= tokenizer.get_added_vocab().keys()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = NameGenerator.from_pretrained(tmp_path, "cpu")
    assert generator.model.config.to_dict()[CONDITIONS] == EXPECTED
    options = {"count": 2, "seed": 1, "max_length": 12}
    conditional, plain = generator.generate(**options, set_code="zen", released=2009), generator.generate(**options)
    assert len(conditional) == len(plain) == 2
    assert [name.log_prob for name in conditional] != [name.log_prob for name in plain], "the prompts differ"
    with pytest.raises(ValueError, match=r"'ZEM' is not among the sets .* nearest is 'ZEN'"):
        generator.generate(set_code="ZEM")
    with pytest.raises(ValueError, match="the nearest is 2019"):
        generator.generate(released=2031)


def test_conditions_stay_with_a_model(tmp_path: Path) -> None:
    """Through upcycling, averaging of the experts, and further training."""
    dense, tokenizer = build_model(None, replace(SMALL, num_experts=0), cards(printed=True), seed=0)
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts=2, num_experts_per_tok=1)
    assert moe.config.to_dict()[CONDITIONS] == to_dense(moe).config.to_dict()[CONDITIONS] == EXPECTED
    moe.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for newer, sets in (
        ([], ["M10", "ZEN"]),
        ([replace(cards(printed=True)[0], set_code="NEW")], ["M10", "NEW", "ZEN"]),
    ):
        again, _ = build_model(str(tmp_path), ModelConfig(num_experts=0), [*cards(printed=False), *newer], seed=0)
        assert again.config.to_dict()[CONDITIONS] == {"set_code": sets, "released": [2009, 2019]}


@pytest.mark.parametrize("learned", [True, False])
def test_evaluation_uses_only_conditions_of_the_model(learned: bool) -> None:
    """Cards of another source may have more attributes, which would be noise in the model's prompts."""
    scorer = LanguageModel(*build_model(None, SMALL, cards(printed=learned), seed=0), label="model")
    held_out = [replace(card, rarity="rare") for card in cards(printed=True)]
    names, given = [card.name for card in held_out], [Attributes.of(card) for card in held_out]
    kept = [replace(each, rarity=None, **({} if learned else dict.fromkeys(EXPECTED))) for each in given]
    assert (kept[0].set_code, kept[0].released) == (("ZEN", 2009) if learned else (None, None))
    assert (scorer.nats(names, given) == scorer.nats(names, kept)).all()
    assert scorer.sample_each(given, seed=0) == scorer.sample_each(kept, seed=0)
    assert scorer.sample(3, 0, given[0]) == scorer.sample(3, 0, kept[0])


def test_a_model_of_the_embedded_table_has_no_conditions() -> None:
    model, tokenizer = build_model(None, SMALL, cards(printed=False), seed=0)
    assert CONDITIONS not in model.config.to_dict()
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and "2009" not in tokenizer.get_vocab()
