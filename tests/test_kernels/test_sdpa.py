"""PyTorch's SDPA under our options: equal to the definition, without masks and copies where none are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from flash_experts.kernels import attention_sdpa
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from tests.helpers.attention_cases import Batch, Packed, assert_same, batches, packed_rows
from tests.helpers.attention_oracle import oracle, oracle_varlen

CAUSAL = AttentionOptions(0.5, right=0)


@settings(max_examples=80, deadline=None)
@given(batch=batches(is_plain=True))
def test_sdpa_equals_the_definition(batch: Batch) -> None:
    out, lse = attention_sdpa.attention(*batch.qkv, batch.options, batch.k_lengths_B)
    assert lse is None
    assert_same(out, oracle(*batch.qkv, batch.options, batch.k_lengths_B)[0], batch.qkv)


@settings(max_examples=80, deadline=None)
@given(packed=packed_rows(is_plain=True))
def test_sdpa_of_packed_documents_equals_the_definition(packed: Packed) -> None:
    out, _ = attention_sdpa.attention_varlen(*packed.qkv, PackedLengths(*packed.varlen()), packed.options)
    assert_same(out, oracle_varlen(*packed.qkv, *packed.starts(), packed.options)[0], packed.qkv)


@pytest.mark.parametrize("options", [CAUSAL, AttentionOptions(0.5), AttentionOptions(0.5, left=3, right=1)])
@pytest.mark.parametrize("same_keys", [True, False])
def test_one_long_document_does_not_pad_the_short_ones(options: AttentionOptions, same_keys: bool) -> None:
    lengths_q = [1, 2, 0, 70, *[1, 3, 2, 1] * 6]
    lengths_k = lengths_q if same_keys else lengths_q[::-1]
    shapes = (sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2)
    qkv = tuple(torch.randn(T, heads, 4, dtype=torch.float64, requires_grad=True) for T, heads in shapes)
    packed = Packed(qkv, options, lengths_q, lengths_k)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            if func is F.scaled_dot_product_attention:
                largest = max(largest, args[0].shape[0] * args[0].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch():
        out, _ = attention_sdpa.attention_varlen(*qkv, PackedLengths(*packed.varlen()), options)
    assert_same(out, oracle_varlen(*qkv, *packed.starts(), options)[0], qkv)
    assert 0 < largest <= (70 if same_keys else 4 * 70)


@pytest.mark.parametrize(
    ("S_q", "S_k", "heads", "options", "lengths"),
    [
        (6, 6, (2, 2), CAUSAL, None),
        (6, 9, (2, 2), AttentionOptions(0.5), None),
        (1, 9, (2, 2), CAUSAL, None),
        (1, 9, (4, 2), CAUSAL, None),
        (1, 9, (4, 2), AttentionOptions(0.5, left=3, right=0), None),
        (1, 9, (4, 2), CAUSAL, [4, 4, 9]),
    ],
)
def test_sdpa_gets_no_mask_and_the_cache_itself(
    monkeypatch: pytest.MonkeyPatch,
    S_q: int,
    S_k: int,
    heads: tuple[int, int],
    options: AttentionOptions,
    lengths: list[int] | None,
) -> None:
    q, k, v = torch.randn(3, S_q, heads[0], 8), torch.randn(3, S_k, heads[1], 8), torch.randn(3, S_k, heads[1], 8)
    calls = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention_sdpa.attention(q, k, v, options, None if lengths is None else torch.tensor(lengths))
    assert len(calls) == (1 if lengths is None else 2), "rows of one length go together"
    for args, kwargs in calls:
        assert kwargs.get("attn_mask") is None
        assert args[1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert args[2].untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
