"""Routers: token choice (top-k routing) and expert choice.

Both score every (token, expert) pair in float32, ``logits = W x``, then by ``scoring_func``

    softmax       s = softmax(logits) over the experts, then the K largest (Shazeer et al. 2017, Fedus et al. 2021)
    topk_softmax  the K largest logits, then a softmax over those K (Mixtral: Jiang et al. 2024, section 2.1)
    sigmoid       s = sigmoid(logits), each expert by itself (DeepSeek-V3, 2024, eq. 13-16)

With ``norm_topk_prob``, ``softmax`` and ``topk_softmax`` differ only in the bias of loss-free balancing, which is added
to s, but in ``topk_softmax`` to the logits.

Shape suffixes: T tokens, D width, E experts, K experts per token, C tokens per expert, S = T * K choices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from flash_experts.models.moe_config import GPT2MoEConfig


class Router(nn.Module, ABC):
    """Base class: scores, the load-balancing bias, and the counts that metrics read."""

    selection_bias_E: torch.Tensor  # part of the model, so it is saved; the counts are measurements of a run
    step_counts_E: torch.Tensor
    window_counts_E: torch.Tensor
    window_pairs_EE: torch.Tensor  # co-activation: tokens that went to both experts; the diagonal is the load
    window_sums: torch.Tensor  # over tokens: 1, entropy of p, largest p, dropped choices (`left_out`)

    def __init__(self, config: GPT2MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.capacity_factor = config.capacity_factor
        self.jitter_noise = config.router_jitter_noise
        self.bias_update_rate = config.router_bias_update_rate
        E = config.num_experts
        self.weight = nn.Parameter(torch.empty(E, config.n_embd))
        self.register_buffer("selection_bias_E", torch.zeros(E, dtype=torch.float32))
        counts = {"step_counts_E": (E,), "window_counts_E": (E,), "window_pairs_EE": (E, E), "window_sums": (4,)}
        for name, size in counts.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        before = dict(self._buffers)  # which stay float32: bfloat16 cannot count beyond 256
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E), float32 or float64."""
        # Even under autocast: bfloat16 rounding would decide near ties.
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
            x_TD = x_TD.to(dtype)
            if self.training and self.jitter_noise > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            return F.linear(x_TD, self.weight.to(dtype))

    def log_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """log s, up to a constant per token that cancels in normalised gates."""
        return F.logsigmoid(logits_TE) if self.scoring_func == "sigmoid" else logits_TE

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """s: the softmax over all experts, or the sigmoids."""
        return logits_TE.sigmoid() if self.scoring_func == "sigmoid" else logits_TE.softmax(-1)

    def capacity(self, tokens: int) -> int:
        """Expert capacity, ``ceil(capacity_factor * tokens * K / E)`` (Fedus et al. 2021, eq. 3)."""
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        # Rounded: 1.1 * 100 / 10 is 11.000000000000002, which must not become 12.
        return min(tokens, math.ceil(round(factor * tokens * self.top_k / self.num_experts, 6)))

    @abstractmethod
    def count(self, choices: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        """(E,) load, tokens counted by their weight (0 for padding)."""

    @abstractmethod
    def left_out(self, logits_TE: torch.Tensor, choices: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        """Choices dropped over capacity, or tokens without an expert (expert choice)."""

    @abstractmethod
    def left_out_rate(self, left_out: float, tokens: float) -> dict[str, float]:
        """The metric of summed `left_out`, by its name; empty if nothing can be left out."""

    @abstractmethod
    def dense_gates(self, gates: torch.Tensor, choices: torch.Tensor, tokens: int) -> torch.Tensor:
        """(T, E) float32 gates, 0 where the token is not assigned."""

    def membership(self, choices: torch.Tensor, tokens: int) -> torch.Tensor:
        """(T, E) float32, 1 where the token is assigned."""
        return self.dense_gates(torch.ones_like(choices), choices, tokens)

    @torch.no_grad()
    def record(self, logits_TE: torch.Tensor, choices: torch.Tensor, mask_T: torch.Tensor | None) -> None:
        """Adds the routing of a training forward to the counts."""
        # Activation checkpointing runs a forward again within the backward: that one is counted already.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        for buffer in self.buffers():
            # DeepSpeed's zero.Init casts buffers, load_state_dict(assign=True) keeps the saved dtype.
            if buffer.dtype != torch.float32:
                buffer.data = buffer.data.float()
        logprobs_TE = self.log_scores(logits_TE).log_softmax(-1)
        probs_TE = logprobs_TE.exp()
        weight_T = torch.ones_like(probs_TE[:, 0]) if mask_T is None else mask_T.to(probs_TE.dtype)
        entropy_T = -(probs_TE * logprobs_TE).sum(-1)
        sums = torch.stack([weight_T, entropy_T * weight_T, probs_TE.amax(-1) * weight_T]).sum(-1)
        left_out = self.left_out(logits_TE, choices, mask_T).to(sums.dtype)
        self.window_sums += torch.cat([sums, left_out[None]]).to(self.window_sums.dtype)
        counts_E = self.count(choices, weight_T).to(self.step_counts_E.dtype)
        self.step_counts_E += counts_E
        self.window_counts_E += counts_E
        member_TE = self.membership(choices, len(logits_TE))
        with torch.autocast(logits_TE.device.type, enabled=False):  # bfloat16 cannot count beyond 256
            self.window_pairs_EE += (member_TE * weight_T[:, None].to(member_TE.dtype)).T @ member_TE


class TopKRouter(Router):
    """Token choice, or top-k routing: each token goes to the K experts with the highest scores (Shazeer et al. 2017).

    The K largest ``s + bias`` are chosen. Their gates are s, with ``norm_topk_prob`` divided by its sum over the
    chosen. Normalised gates of identical experts, as right after upcycling, give the router no gradient, so the gate is
    straight-through: ``g = s / sum(s) + (s - stop_gradient(s))``.

    In training an expert takes choices up to its `capacity`: the highest s first (batch-prioritised routing, Riquelme
    et al. 2021, section 4.1), then earlier tokens. Token dropping sets the other gates to zero.
    """

    def forward(
        self, x_TD: torch.Tensor, mask_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mask_T`` is false at padding, which takes no capacity.

        Returns:
            logits (T, E) float32; gates (T, K), zero if dropped; experts (T, K) int64, best first, dropped ones too.
        """
        logits_TE = self.logits(x_TD)
        scores_TE = self.scores(logits_TE)
        selection_TE = logits_TE if self.scoring_func == "topk_softmax" else scores_TE
        experts_TK = (selection_TE + self.selection_bias_E.to(scores_TE.dtype)).topk(self.top_k, dim=-1).indices
        scores_TK = scores_TE.gather(-1, experts_TK)
        gates_TK = scores_TK
        if self.norm_topk_prob:
            # s divided by its sum, computed from log s: sigmoids that all underflow to zero still divide.
            gates_TK = self.log_scores(logits_TE).gather(-1, experts_TK).softmax(-1)
            if self.training:
                gates_TK = gates_TK + (scores_TK - scores_TK.detach())
        if self.training and self.capacity_factor is not None:
            gates_TK = gates_TK * self.within_capacity(scores_TK, experts_TK, mask_T)
        return logits_TE, gates_TK.to(x_TD.dtype), experts_TK

    def within_capacity(
        self, scores_TK: torch.Tensor, experts_TK: torch.Tensor, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        """(T, K) true where a choice is within its expert's capacity."""
        T, K = experts_TK.shape
        expert_S = experts_TK.reshape(-1)
        if mask_T is not None:
            expert_S = expert_S.masked_fill(~mask_T.repeat_interleave(K), self.num_experts)
        best_S = scores_TK.reshape(-1).argsort(descending=True, stable=True)
        order_S = best_S[expert_S[best_S].argsort(stable=True)]  # by expert, and within an expert by score
        counts = expert_S.new_zeros(self.num_experts + 1).scatter_add_(0, expert_S, torch.ones_like(expert_S))
        starts = counts.cumsum(0) - counts
        place_S = torch.arange(T * K, device=expert_S.device) - starts[expert_S[order_S]]
        tokens = T if mask_T is None else int(mask_T.sum())
        fits_S = torch.empty_like(expert_S, dtype=torch.bool)
        fits_S[order_S] = place_S < self.capacity(tokens)
        return fits_S.view(T, K)

    def count(self, choices: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        return count_choices(choices, weight_T, self.num_experts)

    def left_out(self, logits_TE: torch.Tensor, choices: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        if self.capacity_factor is None:
            return logits_TE.new_zeros(())
        dropped_TK = ~self.within_capacity(self.scores(logits_TE).gather(-1, choices), choices, mask_T)
        return (dropped_TK if mask_T is None else dropped_TK & mask_T[:, None]).sum()

    def left_out_rate(self, left_out: float, tokens: float) -> dict[str, float]:
        return {} if self.capacity_factor is None else {"drop_rate": left_out / (tokens * self.top_k)}

    def dense_gates(self, gates: torch.Tensor, choices: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.zeros(tokens, self.num_experts, device=gates.device).scatter_(1, choices, gates.float())


class ExpertChoiceRouter(Router):
    """Expert choice: each expert takes the C tokens that score highest for it (Zhou et al. 2022, section 3.2).

    C is the `capacity`: a token has K experts on average. Gates are as in `TopKRouter`, normalised over the token's
    experts. This is **not causal**: an expert's choice depends on later tokens too, so such a model scores names too
    well, and cannot generate as it was trained.
    """

    def forward(
        self, x_TD: torch.Tensor, mask_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mask_T`` is false at padding, which no expert takes.

        Returns:
            logits (T, E) float32; gates (E, C); tokens (E, C) int64, best first.
        """
        logits_TE = self.logits(x_TD)
        scores_TE = self.scores(logits_TE)
        offered_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T[:, None], -math.inf)
        tokens = len(x_TD) if mask_T is None else int(mask_T.sum())
        tokens_EC = offered_TE.T.topk(self.capacity(tokens), dim=-1).indices
        scores_EC = scores_TE.T.gather(-1, tokens_EC)
        gates_EC = scores_EC
        if self.norm_topk_prob:
            taken_T = torch.zeros_like(scores_TE[:, 0]).index_add(0, tokens_EC.reshape(-1), scores_EC.reshape(-1))
            gates_EC = scores_EC / taken_T.clamp(min=torch.finfo(taken_T.dtype).tiny)[tokens_EC]
            if self.training:
                gates_EC = gates_EC + (scores_EC - scores_EC.detach())
        return logits_TE, gates_EC.to(x_TD.dtype), tokens_EC

    def count(self, choices: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        return weight_T[choices].sum(-1)

    def left_out(self, logits_TE: torch.Tensor, choices: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        untaken_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if mask_T is None else mask_T.clone()
        untaken_T[choices.reshape(-1)] = False
        return untaken_T.sum()

    def left_out_rate(self, left_out: float, tokens: float) -> dict[str, float]:
        return {"untaken_rate": left_out / tokens}

    def dense_gates(self, gates: torch.Tensor, choices: torch.Tensor, tokens: int) -> torch.Tensor:
        return torch.zeros(self.num_experts, tokens, device=gates.device).scatter_(1, choices, gates.float()).T


def make_router(config: GPT2MoEConfig) -> Router:
    """The router that ``config.routing`` names."""
    return ExpertChoiceRouter(config) if config.routing == "expert_choice" else TopKRouter(config)


def count_choices(experts_TK: torch.Tensor, weight_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E,) choices of each expert, weighted by token."""
    counts_E = weight_T.new_zeros(num_experts)
    return counts_E.scatter_add_(0, experts_TK.reshape(-1), weight_T.repeat_interleave(experts_TK.shape[1]))


def modules_in_use(module: nn.Module, kind: type[nn.Module], name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and modules of a class that a forward runs: of PEFT's two copies, the active one."""
    if isinstance(module, kind):
        yield name, module
        return
    for child_name, child in _children_in_use(module):
        yield from modules_in_use(child, kind, f"{name}.{child_name}")


def in_use(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module itself, or the one of this class that it wraps."""
    return module if isinstance(module, kind) else next(found for _, found in modules_in_use(module, kind))


def _children_in_use(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    copies: Any = module._modules.get("modules_to_save")
    if copies is None or "original_module" not in module._modules:
        yield from module.named_children()
        return
    wrapper: Any = module
    adapters = wrapper.active_adapters
    has_copy = adapters and not wrapper.disable_adapters and all(adapter in copies for adapter in adapters)
    yield "", copies[adapters[0]] if has_copy else wrapper.original_module


def routers_of(model: nn.Module) -> dict[int, Router]:
    """The active routers by block number, from 0."""
    routers: dict[int, Router] = {}
    for name, router in modules_in_use(model, Router):
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        while block in routers:
            block += 1
        routers[block] = router
    return routers


def counts_of_all_processes(routers: list[Router]) -> torch.Tensor:
    """(layers, E) choices of all processes since the last optimizer step."""
    counts_LE = torch.stack([router.step_counts_E for router in routers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts_LE)
    return counts_LE
