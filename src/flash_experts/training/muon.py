"""The Muon optimizer (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/): orthogonalized momentum.

Unlike torch.optim.Muon it orthogonalizes each matrix of a stack: experts' weights, (E, D, F), and GPT-2's c_attn,
(D, 3 D), which is query, key and value side by side.

Shape suffixes: N matrices of a batch, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flash_experts.training.sharding import gather_full, holds_whole_matrices, local_shard, shard_like

# Coefficients of the quintic polynomial a x + b x^3 + c x^5, chosen for a steep slope at 0. Singular values end between
# about 0.7 and 1.2 instead of at 1, which does no harm.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_NRC: torch.Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Newton-Schulz iteration: singular vectors stay, singular values go to about 1.

    The result has the input's dtype; ``dtype`` is that of the matmuls (None for the same), which may be bfloat16: the
    iteration tolerates its rounding.
    """
    first, third, fifth = _COEFFICIENTS
    x = matrices_NRC.to(dtype or matrices_NRC.dtype)
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x  # Gram matrices of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is over 1
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """``m = momentum m + g``, ``u = orthogonalize(g + momentum m)`` (Nesterov), ``w = (1 - lr decay) w - lr s u``.

    ``s = 0.2 sqrt(max(R, C))`` makes updates as large as AdamW's, so both use the same learning rate and weight decay
    (Liu et al. 2025, Muon is scalable for LLM training, section 2.2).

    Args:
        groups: ``blocks`` is the number of matrices side by side in a parameter of two dimensions.
        dtype: of the matmuls in `orthogonalize`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": 1})
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.ndim in (2, 3) and parameter.size(-1) % group["blocks"] == 0, parameter.shape

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves each parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            rate, momentum, blocks = group["lr"], group["momentum"], group["blocks"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                total = state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
                update, longest = _direction(parameter.grad.add(total, alpha=momentum), blocks, self._dtype)
                size = 0.2 * math.sqrt(longest)
                local_shard(parameter).mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * size)


def _direction(gradient: torch.Tensor, blocks: int, dtype: torch.dtype | None) -> tuple[torch.Tensor, int]:
    """This process's shard of the update, and its matrices' longer side."""
    is_whole = holds_whole_matrices(gradient)  # a shard of a matrix cannot be orthogonalized by itself
    matrices = local_shard(gradient) if is_whole else gather_full(gradient)
    matrices_NRC = as_matrices(matrices, blocks)
    update = from_matrices(orthogonalize(matrices_NRC, dtype=dtype), matrices)
    return update if is_whole else local_shard(shard_like(update, gradient)), max(matrices_NRC.shape[-2:])


def as_matrices(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """Views (R, blocks C) or (N, R, C) as matrices (N, R, C)."""
    if tensor.ndim == 3:
        return tensor
    return tensor.unflatten(-1, (blocks, -1)).transpose(0, 1)


def from_matrices(matrices_NRC: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrices`."""
    if like.ndim == 3:
        return matrices_NRC
    return matrices_NRC.transpose(0, 1).flatten(-2)
