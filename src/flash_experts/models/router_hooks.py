"""Listening to the routers of a model while it runs, and the loads that are counted so.

Letters in the shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from flash_experts.models.router import Router

# Called with the number of the block, its router, and what the router returned: logits (T, E), gates and choices.
Listener = Callable[[int, Router, torch.Tensor, torch.Tensor, torch.Tensor], None]


def modules_in_use(module: nn.Module, kind: type[nn.Module], name: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of a class that a forward runs, with their names: itself, or those inside.

    Other libraries wrap modules. PEFT's ``modules_to_save`` trains a copy beside the original: only the one that is
    active counts. Wrappers with one module inside (``target_parameters``, activation checkpointing, FSDP) are looked
    through.
    """
    if isinstance(module, kind):
        yield name, module
        return
    for child_name, child in _children_in_use(module):
        yield from modules_in_use(child, kind, f"{name}.{child_name}")


def in_use(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module of a class that a call of ``module`` runs: itself, or the one that it wraps."""
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
    """The routers in use of a model by the number of their block, from 0; a dense model has none.

    A router without a number in its name, or with one that is taken, gets the next free one.
    """
    routers: dict[int, Router] = {}
    for name, router in modules_in_use(model, Router):
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        while block in routers:
            block += 1
        routers[block] = router
    return routers


def counts_of_all_processes(routers: list[Router]) -> torch.Tensor:
    """(layers, E) choices since the last optimizer step, over all processes."""
    counts_LE = torch.stack([router.step_counts_E for router in routers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts_LE)
    return counts_LE


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
