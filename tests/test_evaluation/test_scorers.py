"""Models behind one interface: their nats are those of their own loss, and scoring changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flash_experts.data.packing import encode_names
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation import evaluate, format_evaluation
from flash_experts.evaluation.scorers import LanguageModel, NGramBaseline, PromptAttributes
from flash_experts.models.moe import GPT2MoEForCausalLM
from tests.helpers.evaluation import make_card, tiny_model


@pytest.fixture
def attributes(names: dict[str, list[str]]) -> list[Attributes]:
    return [Attributes(types=("Creature",), colors=("R",))] * len(names["test"])


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(
    name_tokenizer: PreTrainedTokenizerFast, data_dir: Path, names: dict[str, list[str]]
) -> None:
    model = tiny_model(name_tokenizer, seed=0)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # tied to the head: every logit is zero
    result = evaluate(model, data_dir, ("test",), samples=0, tokenizer=name_tokenizer)
    encoded = encode_names(names["test"], [Attributes()] * len(names["test"]), name_tokenizer)
    tokens = sum(len(name.ids) - name.prompt_length for name in encoded)
    characters = sum(len(name) + 1 for name in names["test"])
    expected = tokens * math.log2(len(name_tokenizer)) / characters
    figures = result.splits["test"]
    assert figures.unconditional.value == pytest.approx(expected, rel=1e-6)
    # Its words are independent, and it ignores its prompt.
    assert figures.association is not None
    assert figures.association.value == pytest.approx(0.0, abs=1e-4)
    assert "Word association" in format_evaluation(result)
    assert figures.control is not None
    assert figures.control.value == pytest.approx(0.0, abs=1e-6)


def test_nats_do_not_depend_on_packing(
    model: GPT2LMHeadModel,
    name_tokenizer: PreTrainedTokenizerFast,
    names: dict[str, list[str]],
    attributes: list[Attributes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scorer = LanguageModel(model, name_tokenizer, "tiny")
    one_row = scorer.nats(names["test"], attributes)
    monkeypatch.setattr("flash_experts.evaluation.scorers.TOKENS_PER_BATCH", 1)
    one_each = scorer.nats(names["test"], attributes)
    np.testing.assert_allclose(one_each, one_row, rtol=1e-5)


def test_scoring_is_teacher_forcing_with_the_model_itself(
    model: GPT2LMHeadModel, name_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against transformers' own loss on the plain text, one name at a time."""
    scorer = LanguageModel(model, name_tokenizer, "tiny")
    for name in ("Goblin Guide", "Zx"):
        encoded = encode_names([name], [Attributes()], name_tokenizer)[0]
        ids = torch.tensor([encoded.ids])
        labels = ids.clone()
        labels[:, : encoded.prompt_length] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        nats = loss.item() * (len(encoded.ids) - encoded.prompt_length)
        assert scorer.nats([name], [Attributes()])[0] == pytest.approx(nats, rel=1e-5)


def test_scoring_leaves_the_model_as_it_was(model: GPT2LMHeadModel, name_tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    attention = model.config._attn_implementation
    LanguageModel(model, name_tokenizer, "tiny").nats(["Goblin"], [Attributes()])
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scoring_has_no_dropout(name_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(name_tokenizer, seed=0).train()
    scorer = LanguageModel(model, name_tokenizer, "tiny")
    assert scorer.nats(["Goblin"], [Attributes()]) == scorer.nats(["Goblin"], [Attributes()])


def test_nats_of_another_architecture_are_those_of_its_own_loss(name_tokenizer: PreTrainedTokenizerFast) -> None:
    """A Llama does not support our packed sequences: names are padded, and score as they do alone."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(name_tokenizer), max_position_embeddings=64, initializer_range=0.2, **size)
    llama = LlamaForCausalLM(config).eval()
    names = ["Goblin Guide", "Zx", "Elvish Warden of the Long Name"]
    attributes = [Attributes(types=("Creature",)), Attributes(), Attributes(colors=("R",))]
    scorer = LanguageModel(llama, name_tokenizer, "llama")
    nats = scorer.nats(names, attributes)
    for encoded, measured in zip(encode_names(names, attributes, name_tokenizer), nats, strict=True):
        ids = torch.tensor([encoded.ids])
        labels = ids.clone()
        labels[:, : encoded.prompt_length] = -100
        with torch.no_grad():
            loss = llama(ids, labels=labels).loss.item()
        assert measured == pytest.approx(loss * (len(encoded.ids) - encoded.prompt_length), rel=1e-5)
    assert len(scorer.sample(3, 0)) == 3
    assert all(len(shown) == 2 for shown in scorer.show([PromptAttributes()], 2, 0, []))


def test_one_name_for_each_card_is_drawn_from_its_own_prompt(
    model: GPT2LMHeadModel, name_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Batches of prompts of all lengths: each first token has the distribution of its own prompt."""
    scorer = LanguageModel(model, name_tokenizer, "tiny")
    prompts = [Attributes(), Attributes(types=("Creature",), subtypes=("Goblin",), colors=("R",))]
    drawn = scorer.sample_each(prompts * 400, seed=0)
    assert drawn == scorer.sample_each(prompts * 400, seed=0)
    for index, prompt in enumerate(prompts):
        alone = scorer.sample(400, 1, prompt)
        first, second = (Counter(name[:1] for name in some) for some in (drawn[index::2], alone))
        common = max(second, key=second.__getitem__)
        share = (first[common] + second[common]) / 800
        assert abs(first[common] - second[common]) / 400 < 4 * math.sqrt(2 * share * (1 - share) / 400)


def test_no_names(model: GPT2LMHeadModel, name_tokenizer: PreTrainedTokenizerFast) -> None:
    baseline = NGramBaseline([make_card("Goblin Guide")])
    for scorer in (LanguageModel(model, name_tokenizer, "tiny"), baseline):
        assert scorer.sample(0, 0) == scorer.sample_each([], 0) == scorer.nats([], []).tolist() == []


def test_loads_of_experts_average_to_one(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    moe = GPT2MoEForCausalLM.from_dense(dense, num_experts=4, num_experts_per_tok=2, moe_layer_freq=2)
    names = ["Goblin Guide", "Serra Angel"]
    moe.train().transformer.h[0].eval()  # a part that is frozen
    modes = [module.training for module in moe.modules()]
    loads = LanguageModel(moe, tokenizer, "moe").expert_loads(names, [Attributes()] * 2)
    assert list(loads) == ["1", "3"]
    assert [module.training for module in moe.modules()] == modes
    for block in loads.values():
        assert len(block) == 4 and sum(block) / 4 == pytest.approx(1.0)
    with torch.no_grad():
        moe.transformer.h[1].mlp.router.weight.zero_()  # all equal: the same two experts are always taken
    loads = LanguageModel(moe, tokenizer, "moe").expert_loads(names, [Attributes()] * 2)
    assert sorted(loads["1"]) == [0.0, 0.0, 2.0, 2.0]
    assert LanguageModel(dense, tokenizer, "dense").expert_loads(names, [Attributes()] * 2) == {}
