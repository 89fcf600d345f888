"""The mixture-of-experts (MoE) layer: router, experts, and the load-balancing losses that prevent routing collapse.

Shape suffixes: T tokens (batch and sequence flattened), D width, E experts, K experts per token, F hidden
units of an expert, C tokens per expert, S (token, expert) pairs, N sequences.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.pytorch_utils import Conv1D

from flash_experts.kernels.autocast import autocast_inputs
from flash_experts.kernels.cpu import gelu_tanh, grouped_mlp
from flash_experts.kernels.cpu_memory import keep_freed_memory_once
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.router import ExpertChoiceRouter, Router, TopKRouter, count_choices, in_use, make_router

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "ExpertChoiceRouter",
    "Experts",
    "MoELayer",
    "Router",
    "SharedExperts",
    "TopKRouter",
    "load_balancing_loss",
    "router_z_loss",
    "sequence_balancing_loss",
]

EXPERTS_IMPLEMENTATION = "fe_experts"
TRITON_EXPERTS_IMPLEMENTATION = "fe_experts_triton"
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh")  # transformers' names of one function


@use_experts_implementation(is_transposed=True, has_bias=True, has_gate=False)
class Experts(nn.Module):
    """E two-layer MLPs. Weights are stored as in GPT-2's Conv1D, (in, out), stacked over experts.

    ``config._experts_implementation`` is ``eager`` (the loop below), transformers' ``batched_mm`` or ``grouped_mm``,
    ``fe_experts`` (the default) or ``fe_experts_triton``.
    """

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        if config._experts_implementation is None:  # a layer outside of a model: the same default
            config._experts_implementation = EXPERTS_IMPLEMENTATION
        E, D, F_ = config.num_experts, config.n_embd, config.expert_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, D, F_))
        self.up_proj_bias = nn.Parameter(torch.empty(E, F_))
        self.down_proj = nn.Parameter(torch.empty(E, F_, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.activation = config.activation_function
        self.act_fn = ACT2FN[self.activation]

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """``out[t] = sum_k gates[t, k] * MLP_{experts[t, k]}(x[t])``, (T, D)."""
        out_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            token, k = torch.where(experts_TK == expert)
            hidden = self.act_fn(x_TD[token] @ self.up_proj[expert] + self.up_proj_bias[expert])
            y = hidden @ self.down_proj[expert] + self.down_proj_bias[expert]
            out_TD = out_TD.index_add(0, token, y * gates_TK[token, k, None])
        return out_TD


def fe_experts_forward(
    self: Experts, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """One fused operation on a CPU; transformers' grouped_mm elsewhere and in compiled graphs (no graph break).

    Under ``torch.func``'s transforms (per-sample gradients), which it does not support, transformers' batched_mm.
    """
    if torch._C._are_functorch_transforms_active():
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, x_TD, experts_TK, gates_TK)
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, experts_TK, gates_TK)
    if torch.is_grad_enabled():
        keep_freed_memory_once()
    x_TD, gates_TK, up, up_bias, down, down_bias = _autocast(self, x_TD, gates_TK)
    activation = gelu_tanh if self.activation in TANH_GELUS else self.act_fn
    return grouped_mlp(x_TD, experts_TK, gates_TK, up, up_bias, down, down_bias, activation)


def fe_experts_triton_forward(
    self: Experts, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """`Experts` by our Triton kernels; ValueError for an activation that they do not fuse, or without a GPU."""
    from flash_experts.kernels import grouped_mlp_triton

    if x_TD.device.type != "cuda" and not grouped_mlp_triton.INTERPRETED:
        raise ValueError(
            f"{TRITON_EXPERTS_IMPLEMENTATION} runs on CUDA, and on a CPU only in Triton's interpreter "
            f"(TRITON_INTERPRET=1): use experts_implementation={EXPERTS_IMPLEMENTATION!r}"
        )
    activation = self.activation
    if activation not in grouped_mlp_triton.ACTIVATIONS:
        raise ValueError(
            f"{TRITON_EXPERTS_IMPLEMENTATION} fuses the activations {', '.join(grouped_mlp_triton.ACTIVATIONS)}, not "
            f"{activation!r}: use experts_implementation={EXPERTS_IMPLEMENTATION!r}"
        )
    x_TD, gates_TK, up, up_bias, down, down_bias = _autocast(self, x_TD, gates_TK)
    return grouped_mlp_triton.grouped_mlp(x_TD, experts_TK, gates_TK, up, up_bias, down, down_bias, activation)


def _autocast(experts: Experts, x_TD: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    return autocast_inputs(x_TD, gates_TK, *weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, fe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(TRITON_EXPERTS_IMPLEMENTATION, fe_experts_triton_forward)


class SharedExperts(nn.Module):
    """The shared experts, which every token goes through (Dai et al. 2024, DeepSeekMoE, section 3.2), as one MLP."""

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        hidden_units = config.num_shared_experts * config.expert_size
        self.c_fc = Conv1D(hidden_units, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, hidden_units)
        self.act = ACT2FN[config.activation_function]

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x_TD)))


class MoELayer(nn.Module):
    """A block's mixture of experts (Shazeer et al. 2017): ``dropout(shared(x) + sum_e g_e(x) MLP_e(x))``."""

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        self.router = make_router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.num_shared_experts else None
        self.dropout = nn.Dropout(config.resid_pdrop)
        # Padding mask, (T,), true at real tokens. The block sets it, and only where tokens compete for experts.
        self.mask_T: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        _, gates, choices = self.router(x_TD, self.mask_T)
        router: Router = in_use(self.router, Router)
        drops = self.training and router.capacity_factor is not None
        if isinstance(router, ExpertChoiceRouter):  # a token may have any number of experts
            experts_EC = torch.arange(len(choices), device=x.device)[:, None].expand_as(choices)
            out_TD = self._combine_pairs(x_TD, choices.reshape(-1), experts_EC.reshape(-1), gates.reshape(-1))
        elif drops and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # Leaves out dropped choices, whose gate is zero. Elsewhere that would be a host synchronisation.
            token_S, k_S = gates.nonzero(as_tuple=True)
            out_TD = self._combine_pairs(x_TD, token_S, choices[token_S, k_S], gates[token_S, k_S])
        else:
            out_TD = self.experts(x_TD, choices, gates)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return self.dropout(out_TD.view(x.shape))

    def _combine_pairs(
        self, x_TD: torch.Tensor, token_S: torch.Tensor, expert_S: torch.Tensor, gate_S: torch.Tensor
    ) -> torch.Tensor:
        """Sums each token's weighted expert outputs; each pair is a token with K = 1 to the experts."""
        y_SD = self.experts(x_TD[token_S], expert_S[:, None], gate_S[:, None])
        return torch.zeros_like(x_TD, dtype=y_SD.dtype).index_add(0, token_S, y_SD)


def _probabilities(logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """(T, E) normalised scores: the softmax, or sigmoids divided by their sum (DeepSeek-V3, eq. 19)."""
    return (F.logsigmoid(logits_TE) if scoring_func == "sigmoid" else logits_TE).softmax(-1)


def load_balancing_loss(
    logits_TE: torch.Tensor,
    experts_TK: torch.Tensor,
    mask_T: torch.Tensor | None = None,
    scoring_func: str = "softmax",
    counts_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """The load-balancing auxiliary loss, ``E * sum_e f_e * P_e`` (Fedus et al. 2021, Switch Transformer, eq. 4-6).

    f_e is the share of the choices that went to expert e, dropped ones included; P_e, which alone carries a gradient,
    is its mean probability. It is 1 at perfect balance. ``mask_T`` is true where a token counts. ``counts_E`` are the
    choices of all processes and micro-batches of the step so far, to balance the global batch (Qiu et al. 2025).
    """
    num_experts = logits_TE.shape[-1]
    probs_TE = _probabilities(logits_TE, scoring_func)
    weight_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
    if counts_E is None:
        counts_E = count_choices(experts_TK, weight_T, num_experts)
    share_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    probability_E = weight_T @ probs_TE / weight_T.sum().clamp(min=1)
    return num_experts * (share_E * probability_E).sum()


def sequence_balancing_loss(
    logits_TE: torch.Tensor,
    experts_TK: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
    mask_T: torch.Tensor | None = None,
    scoring_func: str = "softmax",
) -> torch.Tensor:
    """The sequence-wise load-balancing loss (DeepSeek-V3 2024, eq. 17-20): the mean of each sequence's loss.

    ``sequence_T`` numbers each token's sequence from 0.
    """
    num_experts, top_k = logits_TE.shape[-1], experts_TK.shape[1]
    probs_TE = _probabilities(logits_TE, scoring_func)
    weight_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
    tokens_N = weight_T.new_zeros(num_sequences).index_add_(0, sequence_T, weight_T)
    cells = (sequence_T[:, None] * num_experts + experts_TK).reshape(-1)
    counts_NE = weight_T.new_zeros(num_sequences * num_experts)
    counts_NE = counts_NE.index_add_(0, cells, weight_T.repeat_interleave(top_k)).view(num_sequences, num_experts)
    sums_NE = torch.zeros_like(counts_NE).index_add(0, sequence_T, probs_TE * weight_T[:, None])
    loss_N = num_experts * (counts_NE * sums_NE).sum(-1) / (top_k * tokens_N.square()).clamp(min=1)
    return loss_N.sum() / (tokens_N > 0).sum().clamp(min=1)


def router_z_loss(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The router z-loss, the mean of ``logsumexp(logits)^2`` (Zoph et al. 2022, ST-MoE, eq. 5)."""
    z_T = logits_TE.logsumexp(-1).square()
    if mask_T is None:
        return z_T.mean()
    weight_T = mask_T.to(z_T.dtype)
    return weight_T @ z_T / weight_T.sum().clamp(min=1)
