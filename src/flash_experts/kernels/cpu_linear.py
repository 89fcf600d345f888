"""Matmuls with a weight matrix on a CPU, by the faster library: oneDNN with AVX-512, else MKL.

PyTorch uses MKL for float32, but its AVX-512 kernels run on Intel processors only.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_DTYPES = (torch.float32, torch.bfloat16)


def linear(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight + bias``, (N, F), any float dtype and device; not differentiable.

    ``weight_DF`` may be a transposed (F, D) matrix: neither layout is copied.
    """
    if uses_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "none", [], "")
        return out_NF
    return x_ND @ weight_DF if bias_F is None else torch.addmm(bias_F, x_ND, weight_DF)


def linear_gelu_tanh(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh(x @ weight + bias)``, (N, F); not differentiable. oneDNN fuses it."""
    if uses_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "gelu", [], "tanh")
        return out_NF
    return F.gelu(torch.addmm(bias_F, x_ND, weight_DF), approximate="tanh")


def uses_onednn(x_ND: torch.Tensor) -> bool:
    """Whether oneDNN multiplies these rows; it generates code for each new number of rows."""
    if torch.compiler.is_compiling():  # the compiler calls oneDNN itself, and cannot lower this operator
        return False
    is_float = x_ND.device.type == "cpu" and x_ND.dtype in _DTYPES
    return _ONEDNN and bool(torch.backends.mkldnn.enabled) and is_float and x_ND.numel() > 0
