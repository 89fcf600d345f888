"""Listening to the routers of a model while it runs, and the loads that are counted so.

Letters in the shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from flash_experts.models.router import Router

# Called with the number of the block, its router, and what the router returned: logits (T, E), gates and choices.
Listener = Callable[[int, Router, torch.Tensor, torch.Tensor, torch.Tensor], None]


def routers_of(model: nn.Module) -> dict[int, Router]:
    """The routers of a model by the number of their block, from 0; a dense model has none."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    return {int(next(part for part in name.split(".") if part.isdigit())): router for name, router in named}


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """While it is open, the listener hears of every forward of every router, before the experts compute."""

    def hook_of(block: int) -> Callable[[Router, object, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], None]:
        return lambda router, _, output: listener(block, router, *output)

    with ExitStack() as handles:
        for block, router in routers_of(model).items():
            handles.callback(router.register_forward_hook(hook_of(block)).remove)
        yield


def count_loads(model: nn.Module, forward: Callable[[], object]) -> dict[int, torch.Tensor]:
    """Runs something on a model and counts what its routers choose meanwhile.

    Args:
        model: in any mode; without padding, since every token counts.
        forward: what is run.

    Returns:
        For each block with experts, by its number from 0: how many tokens each expert was chosen for, (E,) float64 on
        the CPU. Empty for a dense model.
    """
    loads = {
        block: torch.zeros(router.num_experts, dtype=torch.float64, device=router.weight.device)
        for block, router in routers_of(model).items()
    }

    def count(block: int, router: Router, logits_TE: torch.Tensor, _: torch.Tensor, choices: torch.Tensor) -> None:
        loads[block] += router.count(choices, logits_TE.new_ones(len(logits_TE)))

    with listening(model, count):
        forward()
    return {block: load_E.cpu() for block, load_E in loads.items()}
