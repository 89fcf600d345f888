"""transformers' ``generate`` on padded batches: each row as its prompt alone. Dense GPT-2 is the control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from flash_experts import GPT2MoEForCausalLM

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [40])


@pytest.fixture(params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param).double()


def left_padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    return {
        "input_ids": torch.tensor([[99] * (longest - len(prompt)) + prompt for prompt in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]),
    }


def new_tokens(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 99} | options
    return model.generate(**inputs, **options)[:, -options["max_new_tokens"] :].tolist()


def alone() -> Iterator[dict[str, torch.Tensor]]:
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_rows_do_not_depend_on_padding(model: PreTrainedModel, options: dict[str, Any]) -> None:
    expected = [new_tokens(model, inputs, **options)[0] for inputs in alone()]
    assert new_tokens(model, left_padded(), **options) == expected


def test_embeddings_and_token_types_are_padded_alike(model: PreTrainedModel) -> None:
    batch = left_padded()
    mask = {"attention_mask": batch["attention_mask"]}
    expected = new_tokens(model, batch)
    embedded = mask | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    assert new_tokens(model, embedded) == expected
    typed = [new_tokens(model, inputs | {"token_type_ids": inputs["input_ids"]})[0] for inputs in alone()]
    assert new_tokens(model, batch | {"token_type_ids": batch["input_ids"]}) == typed != expected


def test_sampling_draws_from_the_logits_of_the_row_alone(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    options = {"do_sample": True, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 5}
    out = model.generate(**left_padded(), **options, eos_token_id=None, pad_token_id=99)
    logits_BTV = torch.stack(out.logits, dim=1)
    for prompt, ids, logits_TV in zip(PROMPTS, out.sequences, logits_BTV, strict=True):
        whole = torch.cat([torch.tensor(prompt), ids[-5:]])[None]
        expected = model(whole).logits[0, -6:-1]
        torch.testing.assert_close(logits_TV, expected, rtol=0, atol=1e-5, check_dtype=False)


def test_assisted_decoding_gives_the_same_text(dense: GPT2LMHeadModel, moe: GPT2MoEForCausalLM) -> None:
    for model, assistant in ((dense, moe), (moe, dense)):
        for inputs in alone():
            expected = new_tokens(model, inputs)
            assert new_tokens(model, inputs, assistant_model=assistant) == expected
            assert new_tokens(model, inputs, prompt_lookup_num_tokens=3) == expected


def test_pipelines_in_batches_give_the_same_text(
    dense: GPT2LMHeadModel,
    moe: GPT2MoEForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    texts = ["Goblin Guide", "red", "Creature Goblin, red, 3:"]
    for model in (dense, moe):
        generate = pipeline("text-generation", model, tokenizer=tokenizer)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert generate(texts, batch_size=3, **options) == [generate(text, **options) for text in texts]
