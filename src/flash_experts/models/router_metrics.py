"""Router metrics: load balance per expert, warnings about dead experts and routing collapse, loss-free balancing.

Shape suffixes: E experts, K experts per token.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.router import Router, routers_of

# Called with the block's number, its router, and the router's outputs: logits (T, E), gates and choices.
Listener = Callable[[int, Router, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Calls ``listener`` at each forward of each router."""

    def hook_of(block: int) -> Callable[[Router, object, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], None]:
        return lambda router, _, output: listener(block, router, *output)

    with ExitStack() as handles:
        for block, router in routers_of(model).items():
            handles.callback(router.register_forward_hook(hook_of(block)).remove)
        yield


def count_loads(model: nn.Module, forward: Callable[[], object]) -> dict[int, torch.Tensor]:
    """Loads (E,) float64 by block number while ``forward`` runs, padding included."""
    loads = {
        block: torch.zeros(router.num_experts, dtype=torch.float64, device=router.weight.device)
        for block, router in routers_of(model).items()
    }

    def count(block: int, router: Router, logits_TE: torch.Tensor, _: torch.Tensor, choices: torch.Tensor) -> None:
        loads[block] += router.count(choices, logits_TE.new_ones(len(logits_TE)))

    with listening(model, count):
        forward()
    return {block: load_E.cpu() for block, load_E in loads.items()}


DEAD_LOAD = 0.01  # an expert is dead when its load is under this share of the mean
# Routing has collapsed when the effective number of experts is under this share of the way from K to E: under 5 with
# 8 experts and 2 per token.
COLLAPSED = 0.5
READS_BEFORE_WARNING = 5  # logging windows in a row: routers start unbalanced and recover in the first steps
FEWEST_CHOICES = 100  # per expert; a logging window with fewer does not count
# Bad logging windows in a row of each router; it stays at the threshold once the warning was given.
_bad_reads: WeakKeyDictionary[Router, int] = WeakKeyDictionary()


@torch.no_grad()
def update_router_biases(model: nn.Module, skip: torch.Tensor | None = None) -> None:
    """Auxiliary-loss-free load balancing (Wang et al. 2024, algorithm 1): call once after each optimizer step.

    ``bias += rate * sign(mean load - load)``, then centred, with the loads of all processes. Resets the counts. Where
    ``skip`` (0-dimensional bool) is true the biases stay as they are.
    """
    for router in routers_of(model).values():
        if router.bias_update_rate > 0:
            load_E = router.step_counts_E
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            bias_E = router.selection_bias_E + router.bias_update_rate * torch.sign(load_E.mean() - load_E)
            bias_E -= bias_E.mean()
            router.selection_bias_E.copy_(
                bias_E if skip is None else torch.where(skip, router.selection_bias_E, bias_E)
            )
        router.step_counts_E.zero_()


@torch.no_grad()
def router_metrics(model: nn.Module) -> dict[str, float]:
    """Statistics of each MoE layer over this process's training forwards since the last call; resets them.

    Warns once per layer about dead experts or routing collapse.

    Returns:
        For block ``i``, under ``router/i/``: ``load/e`` (load of expert e over the mean), ``load_cv`` (coefficient of
        variation), ``max_load``, ``load_entropy`` and ``entropy`` (of loads and probabilities, over log E), ``top1``
        (mean probability of the best expert); with K > 1 and E > 2 the co-activation ``max_pair`` (most frequent pair
        over the mean) and ``pair_entropy``; ``drop_rate`` with a capacity, ``untaken_rate`` with expert choice.
    """
    metrics: dict[str, float] = {}
    for block, router in routers_of(model).items():
        # One copy to the host for each layer.
        counted = torch.cat([router.window_sums, router.window_counts_E, router.window_pairs_EE.flatten()])
        sums, load_E, pairs = counted.double().cpu().split([4, router.num_experts, router.num_experts**2])
        for buffer in (router.window_sums, router.window_counts_E, router.window_pairs_EE):
            buffer.zero_()
        tokens, entropy, top1, left_out = sums.tolist()
        if not tokens or router.num_experts == 1:
            continue
        values = load_metrics(load_E) | pair_metrics(pairs.view(router.num_experts, -1))
        values |= {"entropy": entropy / tokens / math.log(router.num_experts), "top1": top1 / tokens}
        values |= router.left_out_rate(left_out, tokens)
        values |= {f"load/{expert}": round(load, 4) for expert, load in enumerate(over_mean(load_E))}
        metrics |= {f"router/{block}/{name}": value for name, value in values.items()}
        _watch(model, block, router, load_E)
    return metrics


def over_mean(load_E: torch.Tensor) -> tuple[float, ...]:
    """Each expert's load over the mean load; all 0 where nothing was chosen."""
    return tuple((load_E / load_E.mean().clamp(min=1e-12)).tolist())


def load_metrics(load_E: torch.Tensor) -> dict[str, float]:
    """``load_cv``, ``max_load`` and ``load_entropy`` of `router_metrics`; E > 1, loads not all zero."""
    share_E = load_E.double() / load_E.sum()
    return {
        "load_cv": float(share_E.std(correction=0) / share_E.mean()),
        "max_load": float(share_E.max() / share_E.mean()),
        "load_entropy": float(torch.special.entr(share_E).sum()) / math.log(len(share_E)),
    }


def pair_metrics(pairs_EE: torch.Tensor) -> dict[str, float]:
    """``max_pair`` and ``pair_entropy`` of `router_metrics`; empty with fewer than two pairs."""
    above = torch.ones_like(pairs_EE, dtype=torch.bool).triu(1)
    pairs_P = pairs_EE[above].double()
    if len(pairs_P) < 2 or not pairs_P.any():
        return {}
    share_P = pairs_P / pairs_P.sum()
    return {
        "max_pair": float(share_P.max() / share_P.mean()),
        "pair_entropy": float(torch.special.entr(share_P).sum()) / math.log(len(share_P)),
    }


def diagnose_loads(load_E: torch.Tensor, top_k: int) -> str | None:
    """Describes routing collapse (effective number of experts, Hill 1973) or dead experts; None without."""
    share_E = load_E.double() / load_E.sum()
    E = len(share_E)
    used = math.exp(float(torch.special.entr(share_E).sum()))
    # With k = E no load can be skewed, and perfect balance is E up to rounding.
    if top_k < E and used < top_k + COLLAPSED * (E - top_k):
        return f"its router has collapsed, {E} experts have the load of {used:.1f}"
    dead = (share_E * E < DEAD_LOAD).nonzero()[:, 0].tolist()
    if dead:
        named = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        subject = f"experts {named} of {E} are" if len(dead) > 1 else f"expert {named} of {E} is"
        return f"{subject} dead (under {DEAD_LOAD:.0%} of the mean load)"
    return None


def advice(config: GPT2MoEConfig) -> str:
    """The setting to change where experts die."""
    coefficient, rate = config.router_aux_loss_coef, config.router_bias_update_rate
    if rate > 0:
        return f"raise router_bias_update_rate (now {rate:g}) or router_aux_loss_coef (now {coefficient:g})"
    if coefficient == 0:
        return "set router_aux_loss_coef (now 0) to 0.01, or router_bias_update_rate (now 0) to 0.001"
    return f"raise router_aux_loss_coef (now {coefficient:g}), or set router_bias_update_rate (now 0) to 0.001"


def _watch(model: nn.Module, block: int, router: Router, load_E: torch.Tensor) -> None:
    if load_E.mean() < FEWEST_CHOICES or _bad_reads.get(router, 0) >= READS_BEFORE_WARNING:
        return
    trouble = diagnose_loads(load_E, router.top_k)
    _bad_reads[router] = _bad_reads.get(router, 0) + 1 if trouble else 0
    if trouble is None or _bad_reads[router] < READS_BEFORE_WARNING or not _is_first_process():
        return
    hint = "raise router_aux_loss_coef or router_bias_update_rate"
    config = getattr(model, "config", None)
    if isinstance(config, GPT2MoEConfig):
        hint = advice(config)
    warnings.warn(f"block {block}: {trouble}: {hint}", stacklevel=3)


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
