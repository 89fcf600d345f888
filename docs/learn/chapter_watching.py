"""What chapters 2, 2b, 2c and 8 share: three ways to compute attention, the tiles, the bytes that are kept and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions

CAUSAL = AttentionOptions(scale=64**-0.5, right=0)  # head dim 64; a query sees no key to the right of its own place


def standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as in chapter 1: (B, S, H, C), causal, with the whole matrix of scores."""
    S = q.shape[1]
    scores = torch.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhc->bihc", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The package's reference, tile by tile."""
    return reference.attention(q, k, v, CAUSAL)[0]


def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's own kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


ATTENTIONS = {"standard": standard, "tiled (ours)": tiled, "PyTorch's kernel": pytorch}


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


def bytes_kept(function: Callable[[], object], but: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the tensors that autograd keeps for the backward of what is computed, each once.

    Args:
        function: the forward.
        but: tensors to leave out, such as the model's parameters.
    """
    storages: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    for x in but:
        storages.pop(x.untyped_storage().data_ptr(), None)
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


def tiled_bytes(S: int, C: int, block: int, itemsize: int) -> int:
    """What one head's forward reads and writes with square tiles of the package's reference, scores left out."""
    q, k, v = torch.zeros(3, 1, S, 1, C)
    with watched_tiles() as visited:
        reference.attention(q, k, v, CAUSAL, block_q=block, block_k=block)
    of_keys = sum(2 * len(keys) * C for _, keys, _ in visited)
    return itemsize * (S * C + of_keys + S * C + S)
