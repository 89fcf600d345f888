"""The mixture-of-experts layer: a router that chooses experts for each token, the experts, and their balance.

Read top to bottom: `TopKRouter` chooses, `Experts` compute, `MoELayer` joins them, and the losses at the end keep
the router from sending everything to one expert.

Letters in the shapes: T tokens (batch and sequence flattened), D width, E experts, K experts per token, F hidden
units of an expert.

Sources: Shazeer et al. 2017 (sparsely gated experts), Fedus et al. 2021 (Switch Transformer), Zoph et al. 2022
(ST-MoE), Komatsuzaki et al. 2022 (sparse upcycling), Wang et al. 2024 (loss-free balancing).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from flash_experts.kernels.grouped_mlp import grouped_mlp
from flash_experts.models.moe_config import GPT2MoEConfig

EXPERTS_IMPLEMENTATION = "fe_experts"


class TopKRouter(nn.Module):
    """Sends each token to the K experts whose scores are highest.

    ``p = softmax(W x)`` in float32; the K largest (by ``p + bias``, when a balancing bias is kept) are chosen; their
    gates are the p of the chosen divided by their sum (``norm_topk_prob``).

    Normalised gates of identical experts add up to the same output whatever the router says, so right after
    upcycling the router would get no gradient. The gate therefore passes the gradient of p straight through:
    ``g = p / sum(p) + (p - stop_gradient(p))``, which has the value of the first term alone.
    """

    selection_bias_E: torch.Tensor
    step_counts_E: torch.Tensor
    interval_counts_E: torch.Tensor
    interval_sums: torch.Tensor

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.bias_update_rate = config.router_bias_update_rate
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.n_embd))
        # The balancing bias is learned (not by gradient), so it is saved; the counts are measurements of a run.
        self.register_buffer("selection_bias_E", torch.zeros(config.num_experts))
        self.register_buffer("step_counts_E", torch.zeros(config.num_experts), persistent=False)
        self.register_buffer("interval_counts_E", torch.zeros(config.num_experts), persistent=False)
        # Sums over tokens of: one, the entropy of p, the largest p.
        self.register_buffer("interval_sums", torch.zeros(3), persistent=False)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes tokens.

        Args:
            x_TD: (T, D), any float dtype.

        Returns:
            logits (T, E) float32; gates (T, K) in the dtype of ``x_TD``; chosen experts (T, K) int64, best first.
        """
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        experts_TK = (probs_TE + self.selection_bias_E.to(probs_TE.dtype)).topk(self.top_k, dim=-1).indices
        probs_TK = probs_TE.gather(-1, experts_TK)
        gates_TK = probs_TK
        if self.norm_topk_prob:
            gates_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
            if self.training:
                gates_TK = gates_TK + (probs_TK - probs_TK.detach())
        return logits_TE, gates_TK.to(x_TD.dtype), experts_TK

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E) scores. In float32 (or float64), autocast or not: near ties must not turn on bfloat16's rounding."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
            x_TD = x_TD.to(dtype)
            if self.training and self.jitter_noise > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            return F.linear(x_TD, self.weight.to(dtype))

    @torch.no_grad()
    def record(self, logits_TE: torch.Tensor, experts_TK: torch.Tensor, mask_T: torch.Tensor | None) -> None:
        """Adds a forward's routing to the counts that metrics and the balancing bias read."""
        logprobs_TE = logits_TE.log_softmax(-1)
        probs_TE = logprobs_TE.exp()
        weight_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
        entropy_T = -(probs_TE * logprobs_TE).sum(-1)
        sums = torch.stack([weight_T, entropy_T * weight_T, probs_TE.amax(-1) * weight_T]).sum(-1)
        self.interval_sums += sums.to(self.interval_sums.dtype)
        counts_E = _count(experts_TK, weight_T, self.num_experts).to(self.step_counts_E.dtype)
        self.step_counts_E += counts_E
        self.interval_counts_E += counts_E


@use_experts_implementation(is_transposed=True, has_bias=True, has_gate=False)
class Experts(nn.Module):
    """E two-layer MLPs. The weights lie as in GPT-2's Conv1D, (in, out), stacked over experts.

    The decorator lets ``config._experts_implementation`` choose how they are computed: ``eager`` is the loop below,
    for reading; ``batched_mm`` and ``grouped_mm`` are transformers'; ``fe_experts`` is `fe_experts_forward`.
    """

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        E, D, F_ = config.num_experts, config.n_embd, config.expert_size
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, D, F_))
        self.up_proj_bias = nn.Parameter(torch.empty(E, F_))
        self.down_proj = nn.Parameter(torch.empty(E, F_, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.act_fn = ACT2FN[config.activation_function]

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
    """Our default for `Experts`: one fused operation on a CPU, transformers' grouped_mm elsewhere and in compiled
    graphs (its operator has no graph break there)."""
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, experts_TK, gates_TK)
    weights = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
    if torch.is_autocast_enabled("cpu"):  # a custom autograd function is not cast by autocast
        dtype = torch.get_autocast_dtype("cpu")
        x_TD, gates_TK = x_TD.to(dtype), gates_TK.to(dtype)
        weights = tuple(weight.to(dtype) for weight in weights)  # type: ignore[assignment]
    return grouped_mlp(x_TD, experts_TK, gates_TK, *weights, self.act_fn)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, fe_experts_forward)


class MoELayer(nn.Module):
    """The feed-forward part of a block as a mixture of experts: route, compute, one dropout after the combination
    (where GPT-2's MLP has it)."""

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        self.router = TopKRouter(config)
        self.experts = Experts(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        _, gates_TK, experts_TK = self.router(x_TD)
        return self.dropout(self.experts(x_TD, experts_TK, gates_TK).view(x.shape))


def _count(experts_TK: torch.Tensor, weight_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E,) how often each expert was chosen, by tokens of the given weights. No host synchronisation."""
    counts_E = weight_T.new_zeros(num_experts)
    return counts_E.scatter_add_(0, experts_TK.reshape(-1), weight_T.repeat_interleave(experts_TK.shape[1]))


def load_balancing_loss(
    logits_TE: torch.Tensor, experts_TK: torch.Tensor, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """``E * sum_e f_e * P_e`` of one layer (Fedus et al. 2021, eq. 4-6), 1 at perfect balance.

    f_e is the share of the choices that went to expert e (so that the f_e sum to one for every K), P_e the mean
    probability of e. Only P carries a gradient.

    Args:
        logits_TE: router logits, (T, E) float32.
        experts_TK: chosen experts, (T, K).
        mask_T: (T,) true where a token counts; None counts all. Padding must not.

    Returns:
        Scalar float32.
    """
    num_experts = logits_TE.shape[-1]
    probs_TE = logits_TE.softmax(-1)
    weight_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
    tokens = weight_T.sum().clamp(min=1)
    share_E = _count(experts_TK, weight_T, num_experts) / (tokens * experts_TK.shape[1])
    probability_E = weight_T @ probs_TE / tokens
    return num_experts * (share_E * probability_E).sum()


def router_z_loss(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (Zoph et al. 2022, eq. 5): keeps logits small, so exact.

    Args:
        logits_TE: router logits, (T, E) float32.
        mask_T: (T,) true where a token counts; None counts all.

    Returns:
        Scalar float32.
    """
    z_T = logits_TE.logsumexp(-1).square()
    if mask_T is None:
        return z_T.mean()
    weight_T = mask_T.to(z_T.dtype)
    return weight_T @ z_T / weight_T.sum().clamp(min=1)
