"""What the routers did since the last look, and the balancing bias that is moved by it."""

from __future__ import annotations

import math

import torch
from torch import nn

from flash_experts.models.router import ExpertChoiceRouter, Router


def _routers(model: nn.Module) -> list[tuple[str, Router]]:
    """The routers of a model, named by the number of their block."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    return [(next(part for part in name.split(".") if part.isdigit()), router) for name, router in named]


@torch.no_grad()
def update_router_biases(model: nn.Module) -> None:
    """Loss-free balancing (Wang et al. 2024, algorithm 1): call once after each optimizer step in training.

    ``bias += rate * sign(mean load - load)``, then centred. The bias takes part in the choice of experts alone, never
    in their gates, so it does not change what the loss pulls at. Models without a rate are left as they are. The
    loads of all processes count, so every process moves its copy alike. The counts of the step begin anew, which the
    global-batch balancing loss relies on too.
    """
    for _, router in _routers(model):
        if router.bias_update_rate > 0:
            load_E = router.step_counts_E
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            router.selection_bias_E += router.bias_update_rate * torch.sign(load_E.mean() - load_E)
            router.selection_bias_E -= router.selection_bias_E.mean()
        router.step_counts_E.zero_()


@torch.no_grad()
def router_metrics(model: nn.Module) -> dict[str, float]:
    """Statistics of each MoE layer over the training forwards since the last call. A dense model has none.

    Returns:
        For block ``i``, ``router/i/...``: ``load_cv`` (standard deviation over mean of the experts' loads, 0 is
        balanced), ``max_load`` (largest load over the mean, 1 is balanced), ``load_entropy`` (of the loads, 1 is
        balanced), ``entropy`` (mean entropy of a token's probabilities, as a share of log E), ``top1`` (mean
        probability of a token's best expert); with a capacity ``drop_rate`` (share of the choices that were dropped),
        with expert choice ``untaken_rate`` (share of the tokens that no expert took). Loads count a dropped choice.
    """
    metrics: dict[str, float] = {}
    for block, router in _routers(model):
        load_E = router.interval_counts_E.double()
        tokens, entropy, top1, left_out = router.interval_sums.tolist()
        router.interval_counts_E.zero_()
        router.interval_sums.zero_()
        if not tokens or router.num_experts == 1:
            continue
        share_E = load_E / load_E.sum()
        metrics |= {
            f"router/{block}/load_cv": float(load_E.std(correction=0) / load_E.mean()),
            f"router/{block}/max_load": float(load_E.max() / load_E.mean()),
            f"router/{block}/load_entropy": float(torch.special.entr(share_E).sum()) / math.log(router.num_experts),
            f"router/{block}/entropy": entropy / tokens / math.log(router.num_experts),
            f"router/{block}/top1": top1 / tokens,
        }
        if isinstance(router, ExpertChoiceRouter):
            metrics[f"router/{block}/untaken_rate"] = left_out / tokens
        elif router.capacity_factor is not None:
            metrics[f"router/{block}/drop_rate"] = left_out / (tokens * router.top_k)
    return metrics
