"""What chapter 2 and its solutions see of attention at work: the tiles that are made, the bytes that are moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_experts.kernels import flash_attention_reference as reference


@contextmanager
def watched_tiles() -> Iterator[list[tuple[range, range, bool]]]:
    """Notes the tiles of scores that the package's reference makes: queries, keys, and whether all may see all."""
    visited: list[tuple[range, range, bool]] = []
    make_tile = reference._Scores.tile

    def watched(self: reference._Scores, q: torch.Tensor, k: torch.Tensor, queries: range, keys: range):
        visited.append((queries, keys, self.mask.is_full(queries, keys)))
        return make_tile(self, q, k, queries, keys)

    reference._Scores.tile = watched
    try:
        yield visited
    finally:
        reference._Scores.tile = make_tile


def bytes_kept(function: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps for the backward of what is computed, each once."""
    storages: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return sum(storages.values())


class Traffic(TorchDispatchMode):
    """Counts, while it is open, the bytes that operations read and write, and the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        places = {x.untyped_storage().data_ptr() for x in read}
        if all(x.untyped_storage().data_ptr() in places for x in made):
            return result  # a view moves nothing
        self.bytes += sum(x.numel() * x.element_size() for x in (*read, *made))
        self.largest = max(self.largest, *(x.numel() for x in made), 0)
        return result
