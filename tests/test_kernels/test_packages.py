"""Dao-AILab's packages get our options as they call them: modules with their signatures play them, on our reference."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from flash_experts.kernels import attention_packages, flash_attention_reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from tests.helpers.attention_cases import assert_same, cumulative
from tests.helpers.attention_oracle import oracle, oracle_varlen


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

    module = types.ModuleType(attention_packages.MODULES[version])
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
    out, lse = attention_packages.attention(version, q, k, v, options, needs_lse)
    expected, expected_lse = oracle(q, k, v, options)
    assert_same(out, expected, (q, k, v))
    assert (lse is not None) == needs_lse
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse)
    starts = cumulative([2, 0, 4])
    out, _ = attention_packages.attention_varlen(version, q[0], k[0], v[0], PackedLengths.of(starts, 4), options)
    assert_same(out, oracle_varlen(q[0], k[0], v[0], starts, starts, options)[0], (q, k, v))
