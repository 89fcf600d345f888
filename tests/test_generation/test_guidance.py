"""Classifier-free guidance: the published formula; 1 changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from flash_experts.generation.decoding import DecodedName, NameDecoder, guided
from flash_experts.generation.request import Sampling

END = 0
CONDITIONAL, UNCONDITIONAL = [END, 5, 9, 7], [END, 7]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END)).eval()


def decode(model: GPT2LMHeadModel, sampling: Sampling, indices: range = range(20)) -> list[DecodedName]:
    with torch.no_grad():
        return list(
            NameDecoder(model, CONDITIONAL, END, sampling, [], 30, 3, UNCONDITIONAL).stream(indices, len(indices))
        )


def logits_after(model: GPT2LMHeadModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[:, -1]


def test_the_formula_is_that_of_transformers(model: GPT2LMHeadModel) -> None:
    conditional_1V, unconditional_1V = logits_after(model, CONDITIONAL), logits_after(model, UNCONDITIONAL)
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, model, torch.tensor([UNCONDITIONAL]))
    expected_1V = processor(torch.tensor([CONDITIONAL]), conditional_1V)
    torch.testing.assert_close(guided(conditional_1V, unconditional_1V, 2.5), expected_1V)


def test_each_token_is_the_likeliest_under_guidance(model: GPT2LMHeadModel) -> None:
    """Compares every greedy step with a forward of both texts without a cache; log_prob is the conditional one."""
    [name] = decode(model, Sampling(top_k=1, guidance=3.0), range(1))
    assert len(name.ids) > 3
    ids, log_prob = list[int](), 0.0
    for token in [*name.ids, END][: len(name.ids) + name.is_whole]:
        conditional_1V, unconditional_1V = (
            logits_after(model, [*CONDITIONAL, *ids]),
            logits_after(model, [*UNCONDITIONAL, *ids]),
        )
        assert guided(conditional_1V, unconditional_1V, 3.0).argmax() == token
        log_prob += float(conditional_1V.log_softmax(-1)[0, token])
        ids.append(token)
    assert name.log_prob == pytest.approx(log_prob, abs=1e-4)
    assert name.ids != decode(model, Sampling(top_k=1), range(1))[0].ids


def test_guided_names_do_not_depend_on_their_batch(model: GPT2LMHeadModel) -> None:
    sampling = Sampling(guidance=1.7)
    apart = [name for start in range(0, 20, 7) for name in decode(model, sampling, range(start, min(start + 7, 20)))]
    with torch.no_grad():
        decoder = NameDecoder(model, CONDITIONAL, END, sampling, [], 30, 3, UNCONDITIONAL)
        streamed = list(decoder.stream(range(20), batch_size=6))  # rows come and go
    together = decode(model, sampling)
    assert [name.ids for name in apart] == [name.ids for name in together] == [name.ids for name in streamed]


def test_without_guidance_one_prompt_is_computed(model: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        assert len(NameDecoder(model, CONDITIONAL, END, Sampling(), [], 30, 3, UNCONDITIONAL).prompts) == 1
        assert (
            len(NameDecoder(model, UNCONDITIONAL, END, Sampling(guidance=2.0), [], 30, 3, UNCONDITIONAL).prompts) == 1
        )
        assert len(NameDecoder(model, CONDITIONAL, END, Sampling(guidance=2.0), [], 30, 3, UNCONDITIONAL).prompts) == 2
