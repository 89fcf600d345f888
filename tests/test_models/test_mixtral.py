"""Our experts against transformers' own Mixtral block, fed with the same weights; and every routing compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from flash_experts import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer

D, F, E, K, T = 12, 20, 5, 2, 23


def _layer(implementation: str = "eager", **fields: Any) -> MoELayer:
    sizes = {"n_embd": D, "n_head": 2, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    config = GPT2MoEConfig(**(sizes | fields), resid_pdrop=0.0, activation_function="gelu_pytorch_tanh")
    config._experts_implementation = implementation
    layer = MoELayer(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def _as_mixtral(layer: MoELayer) -> MixtralSparseMoeBlock:
    """The same function as a Mixtral block, whose experts are gated and have no biases.

    A constant 1 next to each token carries the first biases and holds the gated branch at 1; one more hidden unit,
    whose output is 1 for every token, carries the second biases.
    """
    config = MixtralConfig(
        hidden_size=D + 1, intermediate_size=F + 1, num_local_experts=E, num_experts_per_tok=K,
        hidden_act="gelu_pytorch_tanh", router_jitter_noise=0.0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).double().eval()
    one = torch.nn.functional.gelu(torch.tensor(1.0, dtype=torch.float64), approximate="tanh")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.gate.weight[:, :D] = layer.router.weight
        experts = layer.experts
        gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
        gate_up[:, :F, :D] = experts.up_proj.transpose(1, 2)
        gate_up[:, :F, D] = experts.up_proj_bias
        gate_up[:, F, D] = 1
        gate_up[:, F + 1 : 2 * F + 1, D] = 1
        gate_up[:, 2 * F + 1, D] = 1 / one
        down[:, :D, :F] = experts.down_proj.transpose(1, 2)
        down[:, :D, F] = experts.down_proj_bias
    return block


@pytest.mark.parametrize("implementation", ["eager", "fe_experts"])
def test_the_layer_is_mixtrals_with_the_same_weights(implementation: str) -> None:
    torch.manual_seed(0)
    layer = _layer(implementation).eval()
    block = _as_mixtral(layer)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    wide_1TD = torch.cat([x_TD, torch.ones(T, 1, dtype=torch.float64)], dim=1)[None]
    theirs = block(wide_1TD)
    theirs_TD = (theirs[0] if isinstance(theirs, tuple) else theirs).view(T, D + 1)[:, :D]
    ours_TD = layer(x_TD)
    # Both routers compute in float32.
    torch.testing.assert_close(ours_TD, theirs_TD, rtol=0, atol=1e-5)
    assert ours_TD.abs().max() > 1

    dout_TD = torch.randn(T, D, dtype=torch.float64)
    ours = torch.autograd.grad(ours_TD, list(layer.experts.parameters()), dout_TD)
    dgate_up, ddown = torch.autograd.grad(theirs_TD, list(block.experts.parameters()), dout_TD)
    named = dict(zip((name for name, _ in layer.experts.named_parameters()), ours, strict=True))
    expected = {
        "up_proj": dgate_up[:, :F, :D].transpose(1, 2),
        "up_proj_bias": dgate_up[:, :F, D],
        "down_proj": ddown[:, :D, :F].transpose(1, 2),
        "down_proj_bias": ddown[:, :D, F],
    }
    assert named.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(named[name], gradient, rtol=0, atol=1e-4, msg=name)


ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax over the chosen": {"scoring_func": "topk_softmax"},
    "sigmoid, loss-free bias": {"scoring_func": "sigmoid", "router_bias_update_rate": 1e-3},
    "expert choice": {"routing": "expert_choice"},
    "shared, fine-grained": {"num_shared_experts": 1, "num_experts": 10, "num_experts_per_tok": 4},
    "capacity": {"capacity_factor": 0.5},
}


@pytest.mark.skipif(
    not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"),
    reason="transformers before 5.23 cannot compile the backward of its own grouped_mm in float32",
)
@pytest.mark.parametrize("fields", ROUTINGS.values(), ids=ROUTINGS)
def test_a_compiled_layer_computes_the_same(fields: dict[str, Any]) -> None:
    """One graph without a break, values and gradients, for every routing."""
    torch.manual_seed(0)
    layer = _layer("fe_experts", **fields).float().train()
    x_TD = torch.randn(T, D, requires_grad=True)
    plain = layer(x_TD)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x_TD)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    inputs = [x_TD, *layer.parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (compiled, plain)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
