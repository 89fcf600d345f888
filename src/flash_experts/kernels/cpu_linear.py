"""Products with a weight matrix on a CPU, by the faster of the two libraries that PyTorch carries.

PyTorch multiplies float32 matrices with MKL, which gives its AVX-512 kernels to Intel's processors only. oneDNN
generates them for any processor that has the instructions: on Zen 4 its products with weights take 5 to 10% less time
than MKL's. Without AVX-512 oneDNN is far behind (40 ms against 27), so those processors stay with MKL.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_DTYPES = (torch.float32, torch.bfloat16)


def linear(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight + bias``, (N, F); not differentiable.

    Args:
        x_ND: rows, (N, D), any float dtype, any device.
        weight_DF: as GPT-2 stores it, (D, F), or the transposed view of an (F, D) matrix: both are read as they lie.
        bias_F: (F,), or nothing to add.
    """
    if takes_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "none", [], "")
        return out_NF
    return x_ND @ weight_DF if bias_F is None else torch.addmm(bias_F, x_ND, weight_DF)


def linear_gelu_tanh(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
    """The tanh form of GELU of ``x @ weight + bias``, (N, F); not differentiable. oneDNN does it before the numbers
    leave the cache."""
    if takes_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "gelu", [], "tanh")
        return out_NF
    return F.gelu(torch.addmm(bias_F, x_ND, weight_DF), approximate="tanh")


def takes_onednn(x_ND: torch.Tensor) -> bool:
    """Whether oneDNN multiplies these rows. It generates code for each new number of them (0.2 to 0.5 ms)."""
    if torch.compiler.is_compiling():  # the compiler has its own way to oneDNN, and cannot lower a call of this one
        return False
    is_float = x_ND.device.type == "cpu" and x_ND.dtype in _DTYPES
    return _ONEDNN and bool(torch.backends.mkldnn.enabled) and is_float and x_ND.numel() > 0
