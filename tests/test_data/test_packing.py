"""Tokenization and sequence packing: labels, and likelihoods that packing does not change."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import EncodedName, encode_name, encode_names, name_nats, pack, pack_all, packed_length
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import load_tokenizer, train_tokenizer

RED_GOBLIN = Attributes.parse("Creature — Goblin", "R", 2)


def encoded(*lengths: tuple[int, int]) -> list[EncodedName]:
    """Names of (prompt, name) token counts with consecutive ids, so that each id identifies its place."""
    names, next_id = [], 0
    for prompt, name in lengths:
        names.append(EncodedName(tuple(range(next_id, next_id + prompt + name)), prompt, name))
        next_id += prompt + name
    return names


def test_the_worked_example_of_the_docstring() -> None:
    bos, prompt, eos = 0, 1, 9
    batch = pack([EncodedName((bos, prompt, 2, eos), 2, 2), EncodedName((bos, 3, 4, eos), 1, 3)])
    assert batch.input_ids.tolist() == [[0, 1, 2, 0, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.cu_seq_lens.tolist() == [0, 3, 6]
    assert batch.keep.tolist() == [1, 2, 3, 4, 5]
    assert batch.labels.tolist() == [2, 9, 3, 4, 9]
    assert batch.name_index.tolist() == [0, 0, 1, 1, 1]


def test_the_worked_example_of_shared_prompts() -> None:
    bos, prompt, eos = 0, 1, 9
    names = [EncodedName((bos, prompt, last, eos), 2, 2) for last in (2, 3)]
    batch = pack(names, share_prompts=True)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3]] and batch.position_ids.tolist() == [[0, 1, 2, 2]]
    assert batch.row_of is not None and batch.row_of.tolist() == [0, 1, 2, 0, 1, 3]
    assert batch.copy_of is not None and batch.copy_of.tolist() == [0, 1, 2, 5]
    assert batch.cu_seq_lens.tolist() == [0, 3, 6] and batch.max_length == 3
    assert batch.keep.tolist() == [1, 2, 1, 3] and batch.labels.tolist() == [2, 9, 3, 9]
    assert pack(names).row_of is None and pack(names[:1], share_prompts=True).row_of is None


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.sampled_from([(), (5,), (5, 6), (7, 8, 9)]), min_size=1, max_size=9),
    kind=st.sampled_from(["gpt2", "moe", "llama"]),
)
def test_shared_prompts_change_no_loss_and_no_gradient(prompts: list[tuple[int, ...]], kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    model: PreTrainedModel
    if kind == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        llama = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape, **sizes)
        model = LlamaForCausalLM(llama)
    else:
        gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **sizes)
        model = GPT2LMHeadModel(gpt2)
        if kind == "moe":  # balancing losses off: they are means over computed tokens
            model = GPT2MoEForCausalLM.from_dense(model, num_experts=4, router_aux_loss_coef=0, router_z_loss_coef=0)
    model = model.double().train()
    model.set_attn_implementation("fe_attention")
    names = []
    for number, prompt in enumerate(prompts):
        own = torch.randint(10, 40, (1 + number % 4,)).tolist()
        names.append(EncodedName((0, *prompt, *own, 1), 1 + len(prompt), len(own) + 1))
    found = []
    for share in (False, True):
        batch = pack(names, share)
        model.zero_grad()
        output = model(**batch.inputs_with_loss(10))
        output.loss.backward()
        found.append([output.logits, output.loss, *(parameter.grad for parameter in model.parameters())])
    shared = sum(len(one) + 1 for one, other in pairwise(prompts) if one == other)
    assert batch.num_tokens == sum(name.num_inputs for name in names) - shared == packed_length(names, True)
    rtol, atol = (1e-9, 1e-12) if kind == "gpt2" else (1e-5, 1e-7)  # routers and Llama's norms compute in float32
    for whole, less in zip(*found, strict=True):
        torch.testing.assert_close(less, whole, rtol=rtol, atol=atol)


@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=8))
def test_every_label_follows_its_position(lengths: list[tuple[int, int]]) -> None:
    names = encoded(*lengths)
    batch = pack(names)
    assert batch.num_names == len(names) and batch.input_ids.numel() == sum(name.num_inputs for name in names)
    inputs = batch.input_ids[0]
    assert torch.equal(batch.labels, inputs[batch.keep] + 1), "ids are consecutive, so the next one is the label"
    assert batch.max_length == max(name.num_inputs for name in names)
    for index, (_, name_length) in enumerate(lengths):
        assert int((batch.name_index == index).sum()) == name_length


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=12),
    tokens_per_batch=st.integers(1, 20),
)
def test_pack_all_keeps_every_name_in_order(lengths: list[tuple[int, int]], tokens_per_batch: int) -> None:
    names = encoded(*lengths)
    batches = pack_all(names, tokens_per_batch)
    assert sum(batch.num_names for batch in batches) == len(names)
    assert all(batch.input_ids.numel() <= tokens_per_batch or batch.num_names == 1 for batch in batches)
    together = [token for batch in batches for token in batch.input_ids[0].tolist()]
    assert together == [token for name in names for token in name.ids[:-1]]


def test_a_batch_may_be_full_to_the_last_token() -> None:
    names = encoded((1, 4), (2, 5), (1, 3))  # 4, 6 and 3 tokens
    for tokens, sizes in ((13, [3]), (12, [2, 1]), (10, [2, 1]), (9, [1, 2])):
        assert [batch.num_names for batch in pack_all(names, tokens)] == sizes


def test_nats_of_a_bfloat16_model_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    (name,) = encoded((1, 40))
    logits_LV = torch.randn(40, 50).bfloat16()

    class Model(torch.nn.Module):
        def forward(self, **_: object) -> CausalLMOutput:
            return CausalLMOutput(logits=logits_LV[None])

    nats = name_nats(Model(), pack([name]))
    expected = F.cross_entropy(logits_LV.double(), torch.arange(1, 41), reduction="sum")
    assert nats.dtype == torch.float32 and nats.item() == pytest.approx(expected.item(), rel=1e-6)


def test_prompt_and_name_are_tokenized_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    name = encode_name("Goblin Guide", RED_GOBLIN, tokenizer)
    assert name.ids[0] == tokenizer.bos_token_id and name.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(name.ids[1 : name.prompt_length]) == "creature goblin, red, 2:"
    assert tokenizer.decode(name.ids[name.prompt_length : -1]) == " Goblin Guide"
    assert name.characters == len("Goblin Guide") + 1
    assert encode_names([], [], tokenizer) == []


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(st.text("abcdefgh ,'-ûÆ", min_size=1, max_size=12), min_size=1, max_size=6),
    conditional=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_packing_changes_no_likelihood(
    scorer: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, names: list[str], conditional: list[bool]
) -> None:
    attributes = [RED_GOBLIN if is_conditional else Attributes() for is_conditional in conditional[: len(names)]]
    encoded_names = encode_names(names, attributes, tokenizer)
    with torch.no_grad():
        nats = name_nats(scorer, pack(encoded_names))
        for name, together in zip(encoded_names, nats, strict=True):
            logits = scorer(torch.tensor([name.ids])).logits[0, name.prompt_length - 1 : -1]
            alone = F.cross_entropy(logits, torch.tensor(name.ids[name.prompt_length :]), reduction="sum")
            torch.testing.assert_close(together, alone.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def scorer(tokenizer: PreTrainedTokenizerFast) -> GPT2MoEForCausalLM:
    from transformers import GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    return GPT2MoEForCausalLM.from_dense(GPT2LMHeadModel(config), 4, 2, 1).eval()


def test_the_loss_is_a_sum_over_all_labels_of_the_step(
    scorer: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = pack(encode_names(["Goblin Guide", "Bolt"], [RED_GOBLIN, Attributes()], tokenizer))
    with torch.no_grad():
        loss = scorer(**batch.inputs_with_loss(100)).loss
        torch.testing.assert_close(loss * 100, name_nats(scorer, batch).sum())


def test_prompt_words_are_one_token_and_names_are_characters() -> None:
    spelling = train_tokenizer(["Goblin Guide"], 257, ["creature", "goblin", "assembly-worker"])
    prompt = spelling("creature assembly-worker goblin, red, 3:")["input_ids"]
    assert [spelling.decode([token]) for token in prompt[:4]] == ["creature", "assembly-worker", "goblin", ","]
    assert len(spelling(" Goblin Guide")["input_ids"]) == len(" Goblin Guide")
    assert len(spelling(" hobgoblins")["input_ids"]) == len(" hobgoblins")
    assert len(spelling) == 257 + 3


def test_decoding_writes_the_spaces_of_prompts(tmp_path: Path) -> None:
    words = ["creature", "goblin", "assembly-worker", "urza's", "land"]
    trained = train_tokenizer(["Wetland", "Dryland"] * 9, 290, words)
    trained.save_pretrained(tmp_path)
    assert trained.convert_ids_to_tokens(trained(" Wetland")["input_ids"])[-1].endswith("land")
    for tokenizer in (trained, load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("creature assembly-worker goblin, red, 3:", "urza's creature: Lim-Dûl, the goblin's Wetland"):
            ids = tokenizer(text + "<|endoftext|>creature goblin")["input_ids"]
            assert tokenizer.decode(ids) == text + "<|endoftext|>creature goblin"
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_maximum_length_is_the_models(tmp_path: Path) -> None:
    trained = train_tokenizer(["Goblin"], 257)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 12}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.model_max_length == 12 and len(loaded("Goblin " * 9, truncation=True)["input_ids"]) == 12


def test_tokenizer_is_lossless_and_reproducible(tokenizer: PreTrainedTokenizerFast, tmp_path: object) -> None:
    for text in (" Lim-Dûl's Vault", " Æther Vial", " ꞉ 漢", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    texts = ["Goblin Guide", "Goblin Chainwhirler"] * 3
    assert train_tokenizer(texts, 280).get_vocab() == train_tokenizer(texts, 280).get_vocab()
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(" Jötun Grunt")["input_ids"] == tokenizer(" Jötun Grunt")["input_ids"]
    with pytest.raises(ValueError, match="257 or more"):
        train_tokenizer(texts, 100)
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer("nowhere/at/all")
