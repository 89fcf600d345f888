"""Attention under our name: a packed row equals its names one by one; padding and caches as in transformers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from flash_experts import GPT2MoEForCausalLM
from flash_experts.models.flash_attention import fe_attention_forward


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention by its definition, (1, H, S, C) three times to (1, S, H, C)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packed_attention_is_each_name_alone(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(1, 2, total, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    module = torch.nn.Identity()
    packed, _ = fe_attention_forward(module, q, k, v, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    found, _ = fe_attention_forward(module, q, k, v, None, cu_seq_lens_q=starts)
    parts = [x.split(lengths, dim=2) for x in (q, k, v)]
    expected = torch.cat([softmax_attention(*part) for part in zip(*parts, strict=True)], dim=1)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(packed)
    ours = torch.autograd.grad((packed * weight).sum(), (q, k, v))
    plain = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_packed_sequence_rejects_a_cache_and_a_batch() -> None:
    q = torch.randn(2, 2, 6, 4)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch size 1 and no KV cache"):
        fe_attention_forward(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=starts)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("with_starts", [True, False])
def test_a_packed_sequence_gives_the_logits_and_gradients_of_its_names(
    dense: GPT2LMHeadModel, kind: str, with_starts: bool
) -> None:
    """In the layout of transformers' own collator; with the starts of the names, or from the positions alone."""
    dense.set_attn_implementation("fe_attention")
    model = (GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2) if kind == "moe" else dense).double().eval()
    names = [{"input_ids": list(range(start, start + length))} for start, length in ((5, 4), (40, 1), (90, 7), (3, 2))]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=with_starts, return_tensors="pt")(names)
    packed = model(**batch, use_cache=False)
    singles = [model(torch.tensor([name["input_ids"]])).logits for name in names]
    torch.testing.assert_close(packed.logits, torch.cat(singles, dim=1), rtol=0, atol=1e-12)
    loss = sum(
        F.cross_entropy(logits[0, :-1], torch.tensor(name["input_ids"][1:]), reduction="sum")
        for logits, name in zip(singles, names, strict=True)
        if len(name["input_ids"]) > 1
    )
    targets = (batch["labels"] != -100).sum()
    torch.testing.assert_close((packed.loss * targets).double(), loss, rtol=1e-6, atol=0)
    # transformers computes its loss in float32: for the gradients take the same sum in float64.
    packed_loss = F.cross_entropy(packed.logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    parameters = list(model.parameters())
    packed_gradients = torch.autograd.grad(packed_loss, parameters, allow_unused=True)
    single_gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for mine, theirs in zip(packed_gradients, single_gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "positions",
    ["012012", "567012", "340101", "123123", "012567", "345678", "000000", "543210"],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_document_starts_where_positions_jump(dense: GPT2LMHeadModel, positions: str, rows: int) -> None:
    """As transformers' own eager attention has it: such as a document that a packer cut in two."""
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2).double()
    position_ids = torch.tensor([[int(position) for position in positions]] * rows)
    ids = torch.arange(6 * rows).view(rows, 6)
    jumps = [i for i in range(1, 6) if position_ids[0, i] != position_ids[0, i - 1] + 1]
    pieces = [slice(start, end) for start, end in pairwise([0, *jumps, 6])]
    alone = torch.cat([model(ids[:, piece], position_ids=position_ids[:, piece]).logits for piece in pieces], dim=1)
    for attention in ("fe_attention", "eager"):
        model.set_attn_implementation(attention)
        packed = model(ids, position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_another_model_keeps_its_mask_of_packed_sequences() -> None:
    """Mistral's blocks limit attention to a sliding window, which a packed sequence must not lose."""
    config = MistralConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=2,
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    inputs = {"input_ids": torch.arange(8)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("fe_attention")
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, rtol=0, atol=1e-12)
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="sliding_window"):
        model(**inputs, use_cache=False, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=5, max_length_k=5)


def test_left_padding_changes_nothing(dense: GPT2LMHeadModel) -> None:
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2).double()
    ids = torch.arange(6)[None]
    padded = F.pad(ids, (3, 0), value=9)
    mask = F.pad(torch.ones_like(ids), (3, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-12)


def test_cached_decoding_equals_one_pass(dense: GPT2LMHeadModel) -> None:
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2).double()
    ids = torch.arange(8).view(2, 4)
    step = model(ids[:, :3], use_cache=True)
    last = model(ids[:, 3:], past_key_values=step.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last, model(ids).logits[:, 3:], rtol=0, atol=1e-12)
