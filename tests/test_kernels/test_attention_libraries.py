"""Attention libraries under our options: SDPA equals the definition, without masks and copies where none are needed.

The flash-attn packages get our options as they call them: modules with their signatures play them, on our reference.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from flash_experts.kernels import attention_libraries, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from tests.helpers.attention_cases import Batch, Packed, assert_same, batches, cumulative, packed_rows
from tests.helpers.attention_oracle import oracle, oracle_varlen

CAUSAL = AttentionOptions(0.5, right=0)


@settings(max_examples=80, deadline=None)
@given(batch=batches(is_plain=True))
def test_sdpa_equals_the_definition(batch: Batch) -> None:
    out, lse = attention_libraries.sdpa(*batch.qkv, batch.options, batch.k_lengths_B)
    assert lse is None
    assert_same(out, oracle(*batch.qkv, batch.options, batch.k_lengths_B)[0], batch.qkv)


@settings(max_examples=80, deadline=None)
@given(packed=packed_rows(is_plain=True))
def test_sdpa_of_packed_documents_equals_the_definition(packed: Packed) -> None:
    out, _ = attention_libraries.sdpa_varlen(*packed.qkv, PackedLengths(*packed.varlen()), packed.options)
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
        out, _ = attention_libraries.sdpa_varlen(*qkv, PackedLengths(*packed.varlen()), options)
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
    attention_libraries.sdpa(q, k, v, options, None if lengths is None else torch.tensor(lengths))
    assert len(calls) == (1 if lengths is None else 2), "rows of one length go together"
    for args, kwargs in calls:
        assert kwargs.get("attn_mask") is None
        assert args[1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert args[2].untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("packed", [True, False])
def test_sdpa_drops_a_weight_or_scales_it(packed: bool, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """With one key per query, the output is 0, or the value divided by the share that is kept."""
    torch.manual_seed(0)
    options = AttentionOptions(0.5, right=0, dropout=0.75, seed=torch.tensor([1]))
    q, k, v = (torch.randn(200, 1, h, 8).to(dtype).requires_grad_() for h in (heads[0], heads[1], heads[1]))
    if packed:
        lengths = PackedLengths.of(torch.arange(201, dtype=torch.int32), 1)
        out = attention_libraries.sdpa_varlen(q[:, 0], k[:, 0], v[:, 0], lengths, options)[0][:, None]
    else:
        out, _ = attention_libraries.sdpa(q, k, v, options)
    is_kept = (out != 0).any(-1, keepdim=True)
    torch.testing.assert_close(out, 4 * v.repeat_interleave(heads[0] // heads[1], 2) * is_kept)
    assert 0.15 < is_kept.float().mean() < 0.35


def fake_package(version: int) -> types.ModuleType:
    def run(q: Any, k: Any, v: Any, options: AttentionOptions, cu: tuple[Any, ...]) -> Any:
        if cu:
            return flash_attention_reference.attention_varlen(q, k, v, PackedLengths(*cu), options)
        return flash_attention_reference.attention(q, k, v, options)

    def make(
        softmax_scale: float, causal: bool, window: tuple[Any, Any], softcap: float, slopes: Any = None
    ) -> AttentionOptions:
        left, right = (-1 if limit is None else limit for limit in window)
        return AttentionOptions(softmax_scale, left, 0 if causal else right, softcap, slopes)

    def v2(q: Any, k: Any, v: Any, *cu: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
           return_attn_probs: bool = False) -> Any:  # fmt: skip
        assert dropout_p == 0.0
        out, lse = run(q, k, v, make(softmax_scale, causal, window_size, softcap, alibi_slopes), cu)
        return (out, lse, None) if return_attn_probs else out

    def v3(q: Any, k: Any, v: Any, *cu: Any, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (-1, -1), softcap: float = 0.0, deterministic: bool = False) -> Any:  # fmt: skip
        return run(q, k, v, make(softmax_scale, causal, window_size, softcap), cu)[0]

    def v4(q: Any, k: Any, v: Any, *cu: Any, softmax_scale: Any = None, causal: bool = False,
           window_size: Any = (None, None), softcap: float = 0.0, deterministic: bool = False) -> Any:  # fmt: skip
        assert -1 not in window_size
        return run(q, k, v, make(softmax_scale, causal, window_size, softcap), cu)

    function = {2: v2, 3: v3, 4: v4}[version]

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
               **arguments: Any) -> Any:  # fmt: skip
        return function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **arguments)

    module = types.ModuleType(attention_libraries.FLASH_ATTN_MODULES[version])
    module.flash_attn_func = function  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("limits", [(-1, 0), (-1, -1), (2, 0), (2, 1)])
def test_the_packages_get_our_options(monkeypatch: pytest.MonkeyPatch, version: int, limits: tuple[int, int]) -> None:
    module = fake_package(version)
    if version == 4:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    slopes = torch.rand(4) if version == 2 else None
    options = AttentionOptions(0.4, *limits, softcap=2.0, alibi_slopes=slopes)
    needs_lse = version == 2
    out, lse = attention_libraries.flash_attn(version, q, k, v, options, needs_lse)
    expected, expected_lse = oracle(q, k, v, options)
    assert_same(out, expected, (q, k, v))
    assert (lse is not None) == needs_lse
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse)
    starts = cumulative([2, 0, 4])
    out, _ = attention_libraries.flash_attn_varlen(version, q[0], k[0], v[0], PackedLengths.of(starts, 4), options)
    assert_same(out, oracle_varlen(q[0], k[0], v[0], starts, starts, options)[0], (q, k, v))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_packages_get_dropout_and_determinism(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    given: list[dict[str, Any]] = []
    module = types.ModuleType(attention_libraries.FLASH_ATTN_MODULES[version])
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        setattr(module, name, lambda q, *_, **options: given.append(options) or q)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    dropout = {"dropout": 0.3, "seed": torch.tensor([1])} if version == 2 else {}
    options, q, starts = AttentionOptions(0.4, **dropout), torch.randn(2, 6, 4, 8), cumulative([2, 0, 4])
    for deterministic in (True, False):
        attention_libraries.flash_attn(version, q, q, q, options, deterministic=deterministic)
        attention_libraries.flash_attn_varlen(
            version, q[0], q[0], q[0], PackedLengths.of(starts, 4), options, deterministic=deterministic
        )
    assert [one["deterministic"] for one in given] == [True, True, False, False]
    assert {one.get("dropout_p") for one in given} == {options.dropout if version == 2 else None}
