"""Scaling plan: its counts equal those of the models. test_distributed.py measures real processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.expert_parallel import expert_group_size
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from scripts.scaling_plan import (
    MODELS,
    NETWORK,
    NVLINK,
    activation_bytes_per_token,
    all_to_all_bytes_per_token,
    flops_per_token,
    memory_per_gpu,
    parameter_counts,
    plan_table,
    tokens_to_hide_traffic,
    traffic_per_gpu,
)

CONFIGS = [
    GPT2Config(),
    GPT2Config(n_layer=3, n_embd=48, n_head=4, n_inner=100, vocab_size=301),
    GPT2MoEConfig(),
    GPT2MoEConfig(n_layer=5, moe_layer_freq=2, num_shared_experts=2, moe_intermediate_size=300, vocab_size=1000),
    GPT2MoEConfig(n_layer=48, n_embd=1600, n_head=25, num_experts=64),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_counted_exactly(config: GPT2Config) -> None:
    with torch.device("meta"):
        model = GPT2MoEForCausalLM(config) if isinstance(config, GPT2MoEConfig) else GPT2LMHeadModel(config)
    counts = parameter_counts(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    experts = [parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name]
    assert counts.experts == sum(experts)
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer.h]
    assert counts.largest_block == max(blocks)
    assert counts.blocks + counts.experts == sum(blocks)


def test_sixteen_bytes_per_parameter_and_less_where_it_is_sharded() -> None:
    config = MODELS["GPT-2 small x 8"]
    total = parameter_counts(config).total
    for parallel in ("ddp", "fsdp", "expert"):
        assert memory_per_gpu(config, parallel, 1).total == 16 * total
    assert memory_per_gpu(config, "ddp", 8).total == 16 * total
    for parallel in ("fsdp", "expert"):
        memory = memory_per_gpu(config, parallel, 8)
        assert memory.parameters + memory.gradients + memory.optimizer == pytest.approx(2 * total, abs=16)
        assert memory_per_gpu(config, parallel, 8, rows=2).total > memory.total
    # With more processes than experts, each group of eight has all of them.
    assert expert_group_size(config, 12) == 4 and expert_group_size(config, 16) == 8
    assert memory_per_gpu(config, "expert", 16).parameters > memory_per_gpu(config, "fsdp", 16).parameters


def test_tokens_travel_to_their_experts_and_back_twice() -> None:
    config = GPT2MoEConfig(n_layer=4, n_embd=100, n_head=4, num_experts=4, num_experts_per_tok=2, moe_layer_freq=2)
    # 2 layers, 2 experts, 100 numbers of 2 bytes, 4 transfers, 3 of 4 experts on other devices.
    assert all_to_all_bytes_per_token(config, 4) == 2 * 2 * 100 * 2 * 4 * 3 / 4
    assert all_to_all_bytes_per_token(config, 1) == all_to_all_bytes_per_token(GPT2Config(), 8) == 0
    assert traffic_per_gpu(config, "expert", 4).per_token == all_to_all_bytes_per_token(config, 4)
    assert traffic_per_gpu(config, "fsdp", 4).of_step(10, rows=2) == 5 * 4 * parameter_counts(config).total * 3 / 4


def test_where_computation_hides_traffic() -> None:
    config = MODELS["GPT-2 xl x 64"]
    tokens = tokens_to_hide_traffic(config, "ddp", 8)
    traffic = traffic_per_gpu(config, "ddp", 8).of_step(0) / NVLINK.bandwidth
    assert NVLINK.compute_seconds(config, 1) * tokens == pytest.approx(traffic)
    assert tokens_to_hide_traffic(config, "ddp", 8, NETWORK) == pytest.approx(9 * tokens)
    # Experts are not sent: none of 31 billion parameters.
    assert tokens_to_hide_traffic(config, "expert", 8) < tokens_to_hide_traffic(config, "fsdp", 8) / 10
    narrow = GPT2MoEConfig(n_layer=2, n_embd=64, n_head=4, moe_layer_freq=1, moe_intermediate_size=8, vocab_size=300)
    assert tokens_to_hide_traffic(narrow, "expert", 8) == math.inf
    assert flops_per_token(GPT2Config(), labelled_share=1.0) == pytest.approx(6 * 123.6e6, rel=0.01)


def test_the_tables_in_the_docs_are_those_of_the_formulas() -> None:
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text("utf-8")
    for config in MODELS.values():
        assert plan_table(config) in text


@pytest.mark.parametrize("freq", [0, 1, 2])
def test_the_estimate_of_activations_is_near(freq: int) -> None:
    """Against what autograd saves for a packed sequence, half of whose tokens have labels."""
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 500, "activation_function": "gelu_pytorch_tanh"}
    tokens, kept, length = 2_048, 1_024, 8  # enough that the rows which fill up experts hardly count
    config = GPT2MoEConfig(**shape, moe_layer_freq=freq) if freq else GPT2Config(**shape)
    config._attn_implementation = ATTENTION_IMPLEMENTATION
    model = GPT2MoEForCausalLM(config) if isinstance(config, GPT2MoEConfig) else GPT2LMHeadModel(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    labels = torch.randint(500, (1, kept))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(
            input_ids=torch.randint(500, (1, tokens)),
            position_ids=torch.arange(tokens)[None] % length,
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts),
            **dict.fromkeys(("max_length_q", "max_length_k"), length),
            logits_to_keep=torch.arange(0, tokens, 2),
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=kept,
            use_cache=False,
        )
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert held == pytest.approx(tokens * activation_bytes_per_token(config, bytes_per_number=4), rel=0.1)
