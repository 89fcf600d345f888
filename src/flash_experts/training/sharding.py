"""Sharded tensors (PyTorch DTensors) for optimizer, clipping and checkpoints.

Each process holds a shard of a tensor that has the name, shape and value of the full one. Every function also takes
ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, in the tensor's memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every process (all-gather). All must call it, in the same order."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards ``full``, which every process has, as ``like``. Nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    return distribute_tensor(full.to(like.device), mesh, like.placements, src_data_rank=None)


def holds_whole_matrices(tensor: torch.Tensor) -> bool:
    """Whether no matrix is cut: an ordinary tensor, or experts' matrices (N, R, C) sharded over N alone."""
    if not isinstance(tensor, DTensor):
        return True
    shards = [placement for placement in tensor.placements if not placement.is_replicate()]
    return tensor.ndim == 3 and all(isinstance(shard, Shard) and shard.dim == 0 for shard in shards)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scales the full gradient down to the norm ``limit``; returns the norm before, 0-dimensional."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # A shard may be on one process alone or replicated on several: DTensors know which, and count each one once.
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for parameter in trained:
        gradient = cast(torch.Tensor, parameter.grad)
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [gather_full(torch.nn.utils.get_total_norm(gradients)) for gradients in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if math.isfinite(limit):
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_shard(cast(torch.Tensor, parameter.grad)) for parameter in trained], scale)
    return norm
