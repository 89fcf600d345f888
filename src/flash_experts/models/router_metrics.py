"""What the routers did since the last look, a warning where experts die, and the balancing bias that is moved by it.

A router counts in tensors on its own device (`Router.record`): nothing waits for it until `router_metrics` reads.

Letters in the shapes: E experts, K experts per token.
"""

from __future__ import annotations

import math
import warnings
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.router import ExpertChoiceRouter, Router
from flash_experts.models.router_hooks import routers_of

# An expert is dead when its load is under this share of the mean: even 64 experts badly balanced stay above it.
DEAD_LOAD = 0.01
# A router has collapsed when its load is that of no more experts than this share of the way from K, the fewest that
# there can be, to E. Halfway, with 8 experts and 2 per token, is the load of 5.
COLLAPSED = 0.5
# Both must be so at this many reads in a row, since routers begin unbalanced and mend in the first steps; a read
# with fewer choices per expert than `FEWEST_CHOICES` says nothing, and is not counted.
PATIENCE = 5
FEWEST_CHOICES = 100

# Reads in a row at which a router was in trouble, and whether that was said. Of no use to the model, so not in it.
_troubles: WeakKeyDictionary[Router, int] = WeakKeyDictionary()


@torch.no_grad()
def update_router_biases(model: nn.Module) -> None:
    """Loss-free balancing (Wang et al. 2024, algorithm 1): call once after each optimizer step in training.

    ``bias += rate * sign(mean load - load)``, then centred. The bias takes part in the choice of experts alone, never
    in their gates, so it does not change what the loss pulls at. Models without a rate are left as they are. The
    loads of all processes count, so every process moves its copy alike. The counts of the step begin anew, which the
    global-batch balancing loss relies on too.
    """
    for router in routers_of(model).values():
        if router.bias_update_rate > 0:
            load_E = router.step_counts_E
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            router.selection_bias_E += router.bias_update_rate * torch.sign(load_E.mean() - load_E)
            router.selection_bias_E -= router.selection_bias_E.mean()
        router.step_counts_E.zero_()


@torch.no_grad()
def router_metrics(model: nn.Module) -> dict[str, float]:
    """Statistics of each MoE layer over this process's training forwards since the last call. A dense model has none.

    Warns (`UserWarning`, once for each layer of a model) where experts have died or a router has collapsed: see
    `DEAD_LOAD`, `COLLAPSED` and `PATIENCE`.

    Returns:
        For block ``i``, ``router/i/...``: ``load/e`` (load of expert e over the mean, 1 is balanced), ``load_cv``
        (standard deviation over mean of the loads, 0 is balanced), ``max_load`` (the largest of ``load/e``),
        ``load_entropy`` (of the loads, as a share of log E, 1 is balanced), ``entropy`` (mean entropy of a token's
        probabilities, as a share of log E), ``top1`` (mean probability of a token's best expert). Where tokens have
        several of three or more experts ``max_pair`` (tokens of the pair of experts most often chosen together, over
        the mean of all pairs) and ``pair_entropy`` (of all pairs, as a share of its largest; 1: all alike). With a
        capacity ``drop_rate`` (share of the choices that were dropped), with expert choice ``untaken_rate`` (share of
        the tokens that no expert took). Loads and pairs count a dropped choice.
    """
    metrics: dict[str, float] = {}
    for block, router in routers_of(model).items():
        # One copy to the host for each layer.
        counted = torch.cat([router.interval_sums, router.interval_counts_E, router.interval_pairs_EE.flatten()])
        sums, load_E, pairs = counted.double().cpu().split([4, router.num_experts, router.num_experts**2])
        for buffer in (router.interval_sums, router.interval_counts_E, router.interval_pairs_EE):
            buffer.zero_()
        tokens, entropy, top1, left_out = sums.tolist()
        if not tokens or router.num_experts == 1:
            continue
        values = load_metrics(load_E) | pair_metrics(pairs.view(router.num_experts, -1))
        values |= {"entropy": entropy / tokens / math.log(router.num_experts), "top1": top1 / tokens}
        if isinstance(router, ExpertChoiceRouter):
            values["untaken_rate"] = left_out / tokens
        elif router.capacity_factor is not None:
            values["drop_rate"] = left_out / (tokens * router.top_k)
        values |= {f"load/{expert}": round(load, 4) for expert, load in enumerate(over_mean(load_E))}
        metrics |= {f"router/{block}/{name}": value for name, value in values.items()}
        _watch(model, block, router, load_E)
    return metrics


def over_mean(load_E: torch.Tensor) -> tuple[float, ...]:
    """Each expert's load over the mean load: 1 everywhere is balanced; all 0 where nothing was chosen."""
    return tuple((load_E / load_E.mean().clamp(min=1e-12)).tolist())


def load_metrics(load_E: torch.Tensor) -> dict[str, float]:
    """``load_cv``, ``max_load`` and ``load_entropy`` of loads, (E,) with E > 1 and not all zero. See
    `router_metrics`."""
    share_E = load_E.double() / load_E.sum()
    return {
        "load_cv": float(share_E.std(correction=0) / share_E.mean()),
        "max_load": float(share_E.max() / share_E.mean()),
        "load_entropy": float(torch.special.entr(share_E).sum()) / math.log(len(share_E)),
    }


def pair_metrics(pairs_EE: torch.Tensor) -> dict[str, float]:
    """``max_pair`` and ``pair_entropy`` of counted pairs, (E, E); {} without pairs, or with one at most. See
    `router_metrics`."""
    above = torch.ones_like(pairs_EE, dtype=torch.bool).triu(1)
    pairs_P = pairs_EE[above].double()
    if len(pairs_P) < 2 or not pairs_P.any():
        return {}
    share_P = pairs_P / pairs_P.sum()
    return {
        "max_pair": float(share_P.max() / share_P.mean()),
        "pair_entropy": float(torch.special.entr(share_P).sum()) / math.log(len(share_P)),
    }


def coactivation(model: nn.Module) -> dict[str, torch.Tensor]:
    """How many tokens of the training forwards since the last `router_metrics` went to both of two experts.

    Returns:
        For each block, by its number: (E, E) float32 on the model's device, the loads on the diagonal. Copies; nothing
        is reset, and nothing waits for the device.
    """
    return {str(block): router.interval_pairs_EE.clone() for block, router in routers_of(model).items()}


# ------------------------------------------------------------------------------------------------- dead and collapsed


def find_trouble(load_E: torch.Tensor, top_k: int) -> str | None:
    """What is wrong with the loads of a router, in words; None if nothing is.

    Collapsed is told by the number of experts that the load is that of, ``exp(entropy of the shares)`` (Hill 1973): E
    when all have the same, K when every token goes to the same K.

    Args:
        load_E: (E,) choices of each expert, of any number of tokens; not all zero.
        top_k: K, experts per token (with expert choice: on average).
    """
    share_E = load_E.double() / load_E.sum()
    E = len(share_E)
    used = math.exp(float(torch.special.entr(share_E).sum()))
    if used < top_k + COLLAPSED * (E - top_k):
        return f"its router has collapsed, {E} experts have the load of {used:.1f}"
    dead = (share_E * E < DEAD_LOAD).nonzero()[:, 0].tolist()
    if dead:
        named = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        subject = f"experts {named} of {E} are" if len(dead) > 1 else f"expert {named} of {E} is"
        return f"{subject} dead (under {DEAD_LOAD:.0%} of the mean load)"
    return None


def advice(config: GPT2MoEConfig) -> str:
    """The setting to change where experts die, with the value that it has."""
    coefficient, rate = config.router_aux_loss_coef, config.router_bias_update_rate
    if rate > 0:
        return f"raise router_bias_update_rate (now {rate:g}) or router_aux_loss_coef (now {coefficient:g})"
    if coefficient == 0:
        return "set router_aux_loss_coef (now 0) to 0.01, or router_bias_update_rate (now 0) to 0.001"
    return f"raise router_aux_loss_coef (now {coefficient:g}), or set router_bias_update_rate (now 0) to 0.001"


def _watch(model: nn.Module, block: int, router: Router, load_E: torch.Tensor) -> None:
    """Warns the first time that a router has been in trouble at `PATIENCE` reads in a row."""
    if load_E.mean() < FEWEST_CHOICES or _troubles.get(router, 0) >= PATIENCE:
        return
    trouble = find_trouble(load_E, router.top_k)
    _troubles[router] = _troubles.get(router, 0) + 1 if trouble else 0
    if trouble is None or _troubles[router] < PATIENCE or not _is_first_process():
        return
    hint = "raise router_aux_loss_coef or router_bias_update_rate"
    config = getattr(model, "config", None)
    if isinstance(config, GPT2MoEConfig):
        hint = advice(config)
    warnings.warn(f"block {block}: {trouble}: {hint}", stacklevel=3)


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
