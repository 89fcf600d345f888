"""Implementations in the MoE benchmark: our experts, transformers' implementations, and installed packages.

All but the packages compute the same function with the same weights (`flash_experts.models.moe_layer.Experts`). The
experts of the packages are gated (SwiGLU) without biases, of a hidden size for the same FLOPs.

Shape suffixes: T tokens, K experts per token, E experts, D width, F hidden units of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from flash_experts.benchmarks.timing import Lap
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import Experts

MEMORY_RETURNED = "fe_experts_memory_returned"  # ours, with freed memory returned to the system after each step
IMPLEMENTATIONS = ("fe_experts", MEMORY_RETURNED, "fe_experts_triton", "grouped_mm", "batched_mm", "eager")
PACKAGES = ("sonic_moe", "liger_kernel")
_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one MoE layer: width D, hidden F, num_experts E, top_k K."""

    name: str
    width: int
    hidden: int
    num_experts: int
    top_k: int

    def flops(self, tokens: int) -> float:
        """FLOPs of the forward; the backward has twice as many."""
        return 4 * tokens * self.top_k * self.width * self.hidden


class Layer(nn.Module):
    """Experts with fixed inputs: tokens, choices and gates."""

    def __init__(self, experts: nn.Module, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor):
        super().__init__()
        self.experts, self.choices_TK = experts, choices_TK
        self.x_TD = x_TD.detach().clone().requires_grad_()
        self.gates_TK = gates_TK.detach().clone().requires_grad_()
        rows = len(x_TD) * (experts.repeat if isinstance(experts, DenseMLP) else 1)
        self.dout_TD = torch.randn(rows, x_TD.shape[1], generator=torch.Generator().manual_seed(1)).to(x_TD)

    def run(self, lap: Lap) -> list[torch.Tensor]:
        """Runs forward and backward; returns the output and the gradients of tokens, gates and weights."""
        inputs = (self.x_TD, self.gates_TK, *self.experts.parameters())
        out_TD = self.experts(self.x_TD, self.choices_TK, self.gates_TK)
        lap()
        gradients = torch.autograd.grad(out_TD, inputs, self.dout_TD, allow_unused=True)  # the dense MLP has no gates
        lap()
        return [out_TD.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def decode(self, lap: Lap) -> torch.Tensor:
        with torch.no_grad():
            out_TD = self.experts(self.x_TD, self.choices_TK, self.gates_TK)
        lap()
        return out_TD

    def exact(self) -> list[torch.Tensor]:
        """Computes the results of `run` with a loop over experts in float64."""
        layer = copy.deepcopy(self).double()
        for name in ("x_TD", "gates_TK", "dout_TD"):
            setattr(layer, name, getattr(self, name).detach().double().requires_grad_(name != "dout_TD"))
        if isinstance(layer.experts, Experts):
            layer.experts = using(layer.experts, "eager")
        else:
            assert isinstance(layer.experts, GatedExperts)
            layer.experts.compute = _gated_loop
        return layer.run(lambda: None)


def routed(experts: nn.Module, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> Layer:
    """Makes a layer with random tokens and choices, all gates 1 / K."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, shape.width, generator=generator).to(device, dtype)
    choices_TK = torch.rand(tokens, shape.num_experts, generator=generator).topk(shape.top_k).indices.to(device)
    gates_TK = torch.full((tokens, shape.top_k), 1 / shape.top_k, device=device, dtype=dtype)
    return Layer(experts, x_TD, choices_TK, gates_TK)


def make_experts(shape: Shape, device: torch.device, dtype: torch.dtype) -> Experts:
    config = GPT2MoEConfig(
        n_embd=shape.width,
        n_head=1,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.hidden,
        activation_function="gelu_pytorch_tanh",
    )
    with torch.device(device):
        experts = Experts(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=_STD)
    return experts


def using(experts: Experts, implementation: str) -> Experts:
    """Returns experts with the same weights and another implementation."""
    other = copy.copy(experts)
    config = copy.copy(cast(GPT2MoEConfig, experts.config))
    config._experts_implementation = implementation
    object.__setattr__(other, "config", config)
    return other


def batched_bytes(shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    """Returns the memory of batched_mm: it copies both matrices of each token's experts."""
    return 2 * tokens * shape.top_k * shape.width * shape.hidden * dtype.itemsize


class DenseMLP(nn.Module):
    """A dense MLP with the interface of experts, which processes all tokens ``repeat`` times: the FLOPs of that many
    experts per token, without routing."""

    def __init__(self, width: int, hidden: int, repeat: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.repeat = repeat
        self.up, self.up_bias, self.down, self.down_bias = (
            nn.Parameter(_STD * torch.randn(shape, device=device, dtype=dtype))
            for shape in ((width, hidden), (hidden,), (hidden, width), (width,))
        )

    def forward(self, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """Maps (T, D) to (repeat * T, D)."""
        x = x_TD.repeat(self.repeat, 1) if self.repeat > 1 else x_TD
        hidden = F.gelu(torch.addmm(self.up_bias, x, self.up), approximate="tanh")
        return torch.addmm(self.down_bias, hidden, self.down)


Gated = Callable[["GatedExperts", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class GatedExperts(nn.Module):
    """E experts ``down(silu(gate(x)) * up(x))`` in the layout of both packages: (E, 2 F, D) and (E, D, F)."""

    def __init__(self, shape: Shape, compute: Gated, device: torch.device, dtype: torch.dtype):
        super().__init__()
        # Three matrices instead of two: two thirds of the hidden units give the same FLOPs.
        self.hidden = max(round(shape.hidden * 2 / 3 / 64), 1) * 64
        self.compute = compute
        sizes = (shape.num_experts, 2 * self.hidden, shape.width), (shape.num_experts, shape.width, self.hidden)
        self.gate_up, self.down = (nn.Parameter(_STD * torch.randn(s, device=device, dtype=dtype)) for s in sizes)

    def forward(self, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x_TD, choices_TK, gates_TK)


def _gated_loop(
    experts: GatedExperts, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """Loops over experts: the reference for the packages."""
    out_TD = torch.zeros_like(x_TD)
    for e in choices_TK.unique().tolist():
        token, k = torch.where(choices_TK == e)
        gate, up = (x_TD[token] @ experts.gate_up[e].T).chunk(2, -1)
        y = (F.silu(gate) * up) @ experts.down[e].T
        out_TD = out_TD.index_add(0, token, y * gates_TK[token, k, None])
    return out_TD


def _sonic(experts: GatedExperts, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    T, K = choices_TK.shape
    tokens = torch.arange(T, device=x_TD.device, dtype=torch.int32).repeat_interleave(K)
    out_TD, _ = moe_general_routing_inputs(
        x_TD,
        gates_TK.reshape(-1),
        tokens,
        choices_TK.reshape(-1).int(),
        experts.gate_up.permute(1, 2, 0),
        None,
        experts.down.permute(1, 2, 0),
        None,
        E=experts.down.shape[0],
        stream_id=torch.cuda.current_stream().cuda_stream,
        activation_type=ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
    )
    return out_TD


def _liger(experts: GatedExperts, x_TD: torch.Tensor, choices_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x_TD, experts.gate_up, experts.down, choices_TK.int(), gates_TK)


GATED: dict[str, tuple[str, Gated]] = {"sonic_moe": ("sonicmoe", _sonic), "liger_kernel": ("liger_kernel", _liger)}
