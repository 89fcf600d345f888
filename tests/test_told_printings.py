"""Sets and years of release, from a source that tells them to a model that listens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flash_experts import GPT2MoEForCausalLM, NameGenerator
from flash_experts.data.cards import Card
from flash_experts.data.prompts import CONDITIONS, Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.scorers import LanguageModel
from flash_experts.models.downcycling import to_dense
from flash_experts.training.build import build_model
from flash_experts.training.model_config import ModelConfig

TOLD = {"set_code": ["M10", "ZEN"], "released": [2009, 2019]}
SMALL = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_positions=128, vocab_size=257, num_experts=2)


def cards(told: bool) -> list[Card]:
    names = ["".join(random.Random(index).choices("abcdefgh", k=7)).title() for index in range(12)]
    untold = [Card(name, "Creature", (), ("Creature",), (), ("R",), 3, str(place)) for place, name in enumerate(names)]
    printings = [("ZEN", "2009-10-02"), ("M10", "2019")] * 6
    if not told:
        return untold
    return [replace(card, set_code=s, released=d) for card, (s, d) in zip(untold, printings, strict=True)]


def test_a_model_that_learned_sets_and_years_can_be_asked_for_them(tmp_path: Path) -> None:
    model, tokenizer = build_model(None, SMALL, cards(told=True), seed=0)
    assert {"ZEN", "M10", "2009", "2019"} <= tokenizer.get_added_vocab().keys()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = NameGenerator.from_pretrained(tmp_path, "cpu")
    assert generator.model.config.to_dict()[CONDITIONS] == TOLD
    asked = {"count": 2, "seed": 1, "max_length": 12}
    told, untold = generator.generate(**asked, set_code="zen", released=2009), generator.generate(**asked)
    assert len(told) == len(untold) == 2
    assert [name.log_prob for name in told] != [name.log_prob for name in untold], "the prompt is another"
    with pytest.raises(ValueError, match=r"'ZEM' is none of the sets .* nearest is 'ZEN'"):
        generator.generate(set_code="ZEM")
    with pytest.raises(ValueError, match="the nearest is 2019"):
        generator.generate(released=2031)


def test_what_a_model_was_told_stays_with_it(tmp_path: Path) -> None:
    """Through upcycling, averaging of the experts, and further training."""
    dense, tokenizer = build_model(None, replace(SMALL, num_experts=0), cards(told=True), seed=0)
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts=2, num_experts_per_tok=1)
    assert moe.config.to_dict()[CONDITIONS] == to_dense(moe).config.to_dict()[CONDITIONS] == TOLD
    moe.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for newer, sets in (([], ["M10", "ZEN"]), ([replace(cards(told=True)[0], set_code="NEW")], ["M10", "NEW", "ZEN"])):
        again, _ = build_model(str(tmp_path), ModelConfig(num_experts=0), [*cards(told=False), *newer], seed=0)
        assert again.config.to_dict()[CONDITIONS] == {"set_code": sets, "released": [2009, 2019]}


@pytest.mark.parametrize("learned", [True, False])
def test_a_model_is_measured_with_what_it_can_know(learned: bool) -> None:
    """Cards of another source than the model's own tell more: in its prompts that would be noise."""
    scorer = LanguageModel(*build_model(None, SMALL, cards(told=learned), seed=0), label="model")
    held_out = [replace(card, rarity="rare") for card in cards(told=True)]
    names, told = [card.name for card in held_out], [Attributes.of(card) for card in held_out]
    kept = [replace(each, rarity=None, **({} if learned else dict.fromkeys(TOLD))) for each in told]
    assert (kept[0].set_code, kept[0].released) == (("ZEN", 2009) if learned else (None, None))
    assert (scorer.nats(names, told) == scorer.nats(names, kept)).all()
    assert scorer.sample_each(told, seed=0) == scorer.sample_each(kept, seed=0)
    assert scorer.sample(3, 0, told[0]) == scorer.sample(3, 0, kept[0])


def test_a_model_of_the_embedded_cards_is_as_before() -> None:
    model, tokenizer = build_model(None, SMALL, cards(told=False), seed=0)
    assert CONDITIONS not in model.config.to_dict()
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and "2009" not in tokenizer.get_vocab()
    released = load_tokenizer("models/mtg-names")
    prompt = "legendary creature goblin warrior, red, 4:"
    words = ["legendary", "creature", "goblin", "warrior", ",", "red", ",", "Ġ", "4", ":"]
    assert released.convert_ids_to_tokens(released(prompt, add_special_tokens=False)["input_ids"]) == words
