"""How evenly a mixture of experts works: the load of each expert in each layer on held-out names.

Letters in the shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from flash_experts.models.router import Router


def expert_loads(model: nn.Module, forward: Callable[[], object]) -> dict[str, tuple[float, ...]]:
    """Runs something on a model and counts what its routers choose meanwhile.

    Args:
        model: any mode.
        forward: what is run.

    Returns:
        For each MoE layer, by the number of its block, each expert's load over the mean: 1 everywhere is balanced.
        Empty for a dense model.
    """
    counts: dict[str, torch.Tensor] = {}

    def hook_for(block: str) -> Callable[[Router, tuple[Any, ...], tuple[torch.Tensor, ...]], None]:
        def hook(router: Router, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            logits_TE, _, choices = output
            load_E = router.count(choices, torch.ones_like(logits_TE[:, 0])).double()
            counts[block] = counts.get(block, 0.0) + load_E

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Router):
                block = next(part for part in name.split(".") if part.isdigit())
                hooks.callback(module.register_forward_hook(hook_for(block)).remove)
        forward()
    return {block: _over_mean(load_E) for block, load_E in counts.items()}


def _over_mean(load_E: torch.Tensor) -> tuple[float, ...]:
    return tuple((load_E / load_E.mean()).tolist())
