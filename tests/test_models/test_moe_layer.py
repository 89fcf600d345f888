"""What a MoE layer takes from GPT-2's configuration: activation, dropout, the size of new weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.moe_layer import MoELayer


def make_layer(**fields: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(GPT2MoEConfig(n_embd=12, n_head=2, n_layer=2, num_experts=4, **fields))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu), ("tanh", torch.tanh)]
)
@pytest.mark.parametrize("tokens", [1, 9])  # one token decodes in a way of its own
def test_experts_have_the_configured_activation(activation: str, function: Any, tokens: int) -> None:
    layer = make_layer(activation_function=activation, num_experts_per_tok=4).eval()
    x_TD = torch.randn(tokens, 12, dtype=torch.float64)
    with torch.no_grad():
        hidden_ETF = function(x_TD @ layer.experts.up_proj + layer.experts.up_proj_bias[:, None])
        y_ETD = hidden_ETF @ layer.experts.down_proj + layer.experts.down_proj_bias[:, None]
        p_TE = (x_TD @ layer.router.weight.T).softmax(-1)
        expected = torch.einsum("te,etd->td", p_TE, y_ETD)
        torch.testing.assert_close(layer(x_TD), expected, rtol=0, atol=1e-10)


def test_dropout_is_on_the_whole_output() -> None:
    layer = make_layer(resid_pdrop=0.5, num_shared_experts=1)
    x_TD = torch.randn(40, 12, dtype=torch.float64)
    with torch.no_grad():
        whole, dropped = layer.eval()(x_TD), layer.train()(x_TD)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("in_training", [False, True])
def test_gradients_of_each_sample_by_functional_transforms(in_training: bool) -> None:
    layer = make_layer(resid_pdrop=0.0).train(in_training)
    weights, x_BTD = dict(layer.named_parameters()), torch.randn(3, 5, 12, dtype=torch.float64)

    def loss(weights: Any, x_TD: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, weights, x_TD).square().sum()

    of_each = vmap(grad(loss), in_dims=(None, 0))(weights, x_BTD)
    for number, x_TD in enumerate(x_BTD):
        layer.zero_grad()
        layer(x_TD).square().sum().backward()
        for name, weight in weights.items():
            torch.testing.assert_close(of_each[name][number], weight.grad, rtol=0, atol=1e-10)


def test_new_weights_are_as_large_as_gpt2s() -> None:
    """Of the projections onto the residual stream there are two in each of 8 blocks: 1 / sqrt(16) of the others."""
    torch.manual_seed(0)
    config = GPT2MoEConfig(
        n_embd=32, n_head=2, n_layer=8, vocab_size=300, num_experts=8, num_shared_experts=4, initializer_range=0.1
    )
    dense, moe = GPT2MoEForCausalLM(config).transformer.h[:2]
    experts, shared = moe.mlp.experts, moe.mlp.shared_experts
    inner = [moe.attn.c_attn.weight, dense.mlp.c_fc.weight, moe.mlp.router.weight, experts.up_proj, shared.c_fc.weight]
    outer = [moe.attn.c_proj.weight, dense.mlp.c_proj.weight, experts.down_proj, shared.c_proj.weight]
    assert [weight.std().item() for weight in inner] == pytest.approx([0.1] * 5, rel=0.15)
    assert [weight.std().item() for weight in outer] == pytest.approx([0.1 / math.sqrt(16)] * 4, rel=0.1)
    assert not any(bias.any() for bias in (experts.up_proj_bias, experts.down_proj_bias, shared.c_proj.bias))
