"""Autocast for our own operators: as for those of PyTorch."""

from __future__ import annotations

import torch

from flash_experts import GPT2MoEConfig
from flash_experts.kernels.autocast import autocast_inputs
from flash_experts.models.moe_layer import Experts


def test_only_autocast_changes_the_dtype_and_float64_stays() -> None:
    tensors = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float64)]
    assert [x.dtype for x in autocast_inputs(*tensors)] == [torch.float32, torch.float16, torch.float64]
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in autocast_inputs(*tensors)] == [torch.bfloat16, torch.bfloat16, torch.float64]
    (meta,) = autocast_inputs(torch.ones(2, device="meta"))  # a device that autocast does not have
    assert meta.dtype == torch.float32


def test_experts_in_float64_stay_exact_under_autocast() -> None:
    experts = Experts(GPT2MoEConfig(n_embd=8, n_head=2, n_layer=2, num_experts=4)).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, chosen_TK = torch.randn(5, 8, dtype=torch.float64), torch.tensor([[0, 1]] * 5)
    gates_TK = torch.full((5, 2), 0.5, dtype=torch.float64)
    exact = experts(x_TD, chosen_TK, gates_TK)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts(x_TD, chosen_TK, gates_TK), exact, rtol=0, atol=0)
