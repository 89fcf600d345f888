"""Short packed names in bfloat16 on a CPU: plain matmuls, since the fused kernel's backward is slow there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flash_experts.kernels import attention_libraries
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from tests.helpers.attention_cases import Tensors, assert_low_precision_rule, cumulative
from tests.helpers.attention_oracle import oracle_varlen

LENGTHS = [3, 1, 0, 17, 32, 1, 9]
CAUSAL = AttentionOptions(0.125, right=0)


def packed(lengths: list[int]) -> Tensors:
    torch.manual_seed(0)
    return tuple(torch.randn(sum(lengths), 2, 64) for _ in range(3))


def test_it_is_as_exact_as_pytorch_in_bfloat16() -> None:
    cu = cumulative(LENGTHS)

    def attend(qkv: Tensors) -> torch.Tensor:
        return attention_libraries.sdpa_varlen(*qkv, PackedLengths.of(cu, max(LENGTHS)), CAUSAL)[0]

    def exact(qkv: Tensors) -> torch.Tensor:
        return oracle_varlen(*qkv, cu, cu, CAUSAL)[0]

    assert_low_precision_rule(attend, exact, exact, packed(LENGTHS), torch.bfloat16)


@pytest.mark.parametrize(
    ("longest", "dtype", "needs_grad", "is_fused"),
    [
        (32, torch.bfloat16, True, False),
        (32, torch.bfloat16, False, True),
        (32, torch.float32, True, True),
        (200, torch.bfloat16, True, True),
    ],
)
def test_the_fused_kernel_has_the_rest(longest: int, dtype: torch.dtype, needs_grad: bool, is_fused: bool) -> None:
    lengths = [longest, longest - 1]
    qkv = tuple(x.to(dtype).requires_grad_(needs_grad) for x in packed(lengths))
    calls = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += func is F.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    cu = cumulative(lengths)
    with Watch(), torch.set_grad_enabled(needs_grad):
        attention_libraries.sdpa_varlen(*qkv, PackedLengths.of(cu, longest), CAUSAL)
    assert bool(calls) == is_fused
