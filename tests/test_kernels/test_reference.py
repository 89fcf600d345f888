"""The readable flash attention equals attention by its definition, and never forms the matrix of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.kernels.flash_attention_reference import attention, attention_varlen
from tests.helpers.attention_cases import (
    Batch,
    Packed,
    assert_low_precision_rule,
    assert_same,
    batches,
    cumulative,
    packed_rows,
)
from tests.helpers.attention_oracle import oracle, oracle_varlen

BLOCKS = st.sampled_from([1, 2, 3, 5, 64])


@settings(max_examples=80, deadline=None)
@given(batch=batches(), block_q=BLOCKS, block_k=BLOCKS)
def test_a_batch_equals_the_definition(batch: Batch, block_q: int, block_k: int) -> None:
    out, lse = attention(*batch.qkv, batch.options, batch.k_lengths_B, block_q=block_q, block_k=block_k)
    expected, expected_lse = oracle(*batch.qkv, batch.options, batch.k_lengths_B)
    assert_same(out, expected, batch.qkv)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    assert not lse.requires_grad


@settings(max_examples=80, deadline=None)
@given(packed=packed_rows(), block_q=BLOCKS, block_k=BLOCKS)
def test_packed_documents_equal_the_definition(packed: Packed, block_q: int, block_k: int) -> None:
    out, lse = attention_varlen(
        *packed.qkv, PackedLengths(*packed.varlen()), packed.options, block_q=block_q, block_k=block_k
    )
    expected, expected_lse = oracle_varlen(*packed.qkv, *packed.starts(), packed.options)
    assert_same(out, expected, packed.qkv)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("S_q", "S_k"), [(63, 63), (64, 64), (65, 65), (64, 129), (129, 64), (1, 128), (128, 1)])
@pytest.mark.parametrize("left", [-1, 63, 64])
def test_lengths_around_the_edges_of_the_default_tiles(S_q: int, S_k: int, left: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, S, 2, 4, dtype=torch.float64, requires_grad=True) for S in (S_q, S_k, S_k))
    options = AttentionOptions(0.5, left=left, right=0)
    assert_same(attention(q, k, v, options)[0], oracle(q, k, v, options)[0], (q, k, v))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    torch.manual_seed(0)
    seed = torch.tensor([11]) if dropout else None
    options = AttentionOptions(
        0.7, left=4, right=1, softcap=2.0, alibi_slopes=torch.rand(4), dropout=dropout, seed=seed
    )
    q, k, v = (torch.randn(2, S, h, 2, dtype=torch.float64, requires_grad=True) for S, h in ((3, 4), (5, 2), (5, 2)))
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, options, block_q=2, block_k=3)[0], (q, k, v))
    starts = cumulative([2, 0, 1]), cumulative([3, 1, 1])
    packed = tuple(x.detach()[0].requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *qkv: attention_varlen(*qkv, PackedLengths(*starts, 2, 3), options, block_q=2, block_k=3)[0], packed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(dtype: torch.dtype, sign: int) -> None:
    """Scores of 10,000: exp of one is infinite in both dtypes."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 1, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    options = AttentionOptions(sign * 1e4, right=0)
    out, lse = attention(q, k, v, options, block_q=2, block_k=2)
    expected, expected_lse = oracle(q, k, v, options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_fully_masked_query_gets_zeros() -> None:
    q, k, v = (torch.randn(1, S, 2, 4, requires_grad=True) for S in (5, 2, 2))
    out, lse = attention(q, k, v, AttentionOptions(0.5, right=0), block_q=2, block_k=2)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:, :3] == 0).all() and all(x.isfinite().all() for x in (dq, dk, dv))
    nothing, lse = attention(q, k, v, AttentionOptions(0.5), torch.tensor([0]))
    assert (nothing == 0).all() and (lse == -torch.inf).all()
    assert all((x == 0).all() for x in torch.autograd.grad(nothing.sum(), (q, k, v)))


def test_slices_of_a_fused_projection() -> None:
    qkv = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    options = AttentionOptions(0.5, right=0)
    out, _ = attention(*qkv.unbind(2), options, block_q=3, block_k=2)
    assert_same(out, oracle(*qkv.unbind(2), options)[0], (qkv,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_errs_no_more_than_plain_mathematics(dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    options = AttentionOptions(32**-0.5, right=0 if causal else -1)

    def plain(qkv: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            q, k, v = (x.transpose(1, 2) for x in qkv)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    assert_low_precision_rule(
        lambda qkv: attention(*qkv, options)[0],
        lambda qkv: oracle(*qkv, options)[0],
        plain,
        tuple(torch.randn(2, 97, 2, 32) for _ in range(3)),
        dtype,
    )


def test_gradients_in_bfloat16_are_rounded_once_and_not_at_each_tile() -> None:
    """So a sum over 64 tiles is that of one, but for the last digit."""
    torch.manual_seed(0)
    options = AttentionOptions(0.3, right=0)
    qkv = tuple(torch.randn(1, 128, 1, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 128, 1, 8, dtype=torch.bfloat16)
    many, one = (
        torch.autograd.grad(attention(*qkv, options, block_q=block, block_k=block)[0], qkv, weight)
        for block in (2, 128)
    )
    for mine, other in zip(many, one, strict=True):
        torch.testing.assert_close(mine, other, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_dropout_follows_its_seed() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 4, 8) for _ in range(3))
    options = AttentionOptions(0.3, dropout=0.5, seed=torch.tensor([1]))
    first, lse = attention(q, k, v, options)
    assert torch.equal(first, attention(q, k, v, options)[0])
    assert not torch.equal(first, attention(q, k, v, replace(options, seed=torch.tensor([2])))[0])
    kept, plain_lse = attention(q, k, v, AttentionOptions(0.3))
    torch.testing.assert_close(lse, plain_lse)  # it knows nothing of dropout
    draws = [attention(q, k, v, replace(options, seed=torch.tensor([seed])))[0] for seed in range(200)]
    error = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((torch.stack(draws).mean(0) - kept).abs() < 6 * error + 1e-6).all(), "in the mean it changes nothing"


class _Watch(TorchDispatchMode):
    """Counts matmuls, and the elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket is torch.ops.aten.bmm
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def watched(attend: Any, S: int, options: AttentionOptions) -> _Watch:
    q, k, v = (torch.randn(1, S, 1, 8, requires_grad=True) for _ in range(3))
    with _Watch() as watch:
        attend(q, k, v, options)[0].sum().backward()
    return watch


def test_memory_grows_linearly_with_length() -> None:
    """Forward and backward: nothing is larger than q itself, while the definition makes a matrix of all weights."""
    options = AttentionOptions(0.3, right=0, dropout=0.1, seed=torch.tensor([1]))
    for S in (512, 1024):
        assert watched(attention, S, options).largest == S * 8
        assert watched(oracle, S, options).largest >= S * S


def test_tiles_outside_the_mask_are_not_computed() -> None:
    """Of n x n tiles, n (n + 1) / 2 under a causal mask, 2 n - 1 under a window of one tile; 7 matmuls each."""
    n, S = 8, 8 * 64
    assert watched(attention, S, AttentionOptions(0.3)).matmuls == 7 * n * n
    assert watched(attention, S, AttentionOptions(0.3, right=0)).matmuls == 7 * n * (n + 1) // 2
    assert watched(attention, S, AttentionOptions(0.3, left=64, right=0)).matmuls == 7 * (2 * n - 1)
