"""PEFT trains routers and experts: copies (``modules_to_save``), or LoRA on a parameter (``target_parameters``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.evaluation.scorers import parameter_counts
from flash_experts.models import decode_step
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router import Router, in_use, routers_of
from flash_experts.models.router_metrics import count_loads, router_metrics, update_router_biases

WAYS: dict[str, dict[str, Any]] = {
    "router copied": {"target_modules": ["c_attn"], "modules_to_save": ["router"]},
    "layer copied": {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]},
    "LoRA on the router": {"target_modules": [], "target_parameters": ["mlp.router.weight"]},
    # Not c_attn in target_modules: PEFT 0.21 refuses target_parameters next to a Conv1D there.
    "LoRA on all": {
        "target_modules": [],
        "target_parameters": ["c_attn.weight", "router.weight", "experts.up_proj", "experts.down_proj"],
    },
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "token choice": {"router_bias_update_rate": 0.1},
    "capacity": {"capacity_factor": 1.0},
    "expert choice": {"routing": "expert_choice"},
}
IDS = torch.arange(40).reshape(2, 20)
MASK = torch.ones_like(IDS)
MASK[1, 12:] = 0


def make_model(**fields: Any) -> GPT2MoEForCausalLM:
    """Two blocks, the second with experts; no dropout, so that forwards are alike."""
    torch.manual_seed(0)
    config = GPT2MoEConfig(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_experts=4, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **fields,
    )  # fmt: skip
    return GPT2MoEForCausalLM(config)


def lora(way: str) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, **WAYS[way])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_the_router_trains_and_is_saved(way: str, routing: str, tmp_path: Path) -> None:
    plain = make_model(**ROUTINGS[routing])
    before, at_first = logits(plain), plain.train()(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    model = get_peft_model(make_model(**ROUTINGS[routing]), lora(way))
    torch.testing.assert_close(logits(model), before, msg="an adapter begins as nothing")

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    started = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    for step in range(2):  # LoRA's first matrix has no gradient until the second has moved
        optimizer.zero_grad()
        output = model.train()(input_ids=IDS, attention_mask=MASK, labels=IDS)
        output.loss.backward()
        optimizer.step()
        if not step:
            torch.testing.assert_close(output.loss, at_first)
    still = [name for name, weight in trained.items() if torch.equal(weight, started[name])]
    assert not [name for name in still if "router" in name], still

    router = routers_of(model)[1]
    assert list(routers_of(model)) == [1] and router is in_use(model, Router)
    assert router.window_sums[0] == 2 * MASK.sum(), "counted in the copy that ran"
    assert router_metrics(model)["router/1/top1"] > 0
    update_router_biases(model)
    assert bool(router.selection_bias_E.any()) == (routing == "token choice")
    assert sum(count_loads(model, lambda: logits(model))[1]) >= MASK.sum()
    assert parameter_counts(model).total == sum(weight.numel() for weight in model.parameters())

    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(make_model(**ROUTINGS[routing]), tmp_path)
    # LoRA's base keeps the balancing bias: PEFT saves it with a copied router alone.
    in_use(again, Router).selection_bias_E.copy_(router.selection_bias_E)
    torch.testing.assert_close(logits(again), expected)
    with model.disable_adapter():
        original = in_use(model, Router)
        assert (original is router) == ("LoRA" in way)
        assert "LoRA" in way or not original.selection_bias_E.any()
    merged = model.merge_and_unload()
    assert type(merged) is GPT2MoEForCausalLM and type(merged.transformer.h[1].mlp) is MoELayer
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", ["wte", "lm_head"])
def test_the_short_way_of_decoding_sees_adapters_outside_of_blocks(part: str) -> None:
    model = make_model().eval()
    model.add_adapter(LoraConfig(r=2, target_modules=[part]))
    assert not decode_step.supports(model)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_adapters_of_transformers_itself(way: str) -> None:
    """``add_adapter`` keeps the class of the model; the short way of decoding must see the wrappers all the same."""
    model = make_model().eval()
    assert decode_step.supports(model)
    model.add_adapter(lora(way))
    assert not decode_step.supports(model)
    assert model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=1).shape == (1, 9)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if weight.requires_grad), way
