"""The same bits in every run, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Has PyTorch take only operations that give the same bits every time, and fail where it has none.

    On a CPU they do anyway, for one number of threads. On CUDA sums by atomic additions are the usual culprit, and
    cuBLAS, which needs a fixed workspace (``CUBLAS_WORKSPACE_CONFIG``, read when CUDA starts). Attention goes to a
    backend whose gradients are deterministic: see `flash_experts.models.flash_attention`.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
