"""Tensors of which each process holds a part: what the rest of the training needs of them, in four functions.

PyTorch calls such a tensor a DTensor. It has the name, shape and value of the whole; an ordinary tensor is whole
already, and passes through each function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of this process, sharing the memory of the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def gather_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole, on every process. All of them must call it, in the same order."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``whole``, which every process has, spread as ``like`` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return distribute_tensor(whole.to(like.device), mesh, like.placements, src_data_rank=None)


def holds_whole_matrices(tensor: torch.Tensor) -> bool:
    """Whether each process holds whole matrices of a stack (experts'), (N, R, C), or all of an ordinary tensor."""
    if not isinstance(tensor, DTensor):
        return True
    shards = [placement for placement in tensor.placements if not placement.is_replicate()]
    return tensor.ndim == 3 and all(isinstance(shard, Shard) and shard.dim == 0 for shard in shards)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """The norm of the whole gradient, as a 0-dimensional tensor; scales the gradient down if it is over ``limit``.

    Each part of a gradient is on one process alone, or on several that hold the same: a sum of what each process has
    would miss the first or count the second twice. DTensors know which it is. Those of one mesh are added up at once.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for parameter in trained:
        gradient = cast(torch.Tensor, parameter.grad)
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [gather_whole(torch.nn.utils.get_total_norm(gradients)) for gradients in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if math.isfinite(limit):
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_part(cast(torch.Tensor, parameter.grad)) for parameter in trained], scale)
    return norm
