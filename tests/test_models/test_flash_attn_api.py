"""Our functions are the flash-attn package's: the same arguments, layouts, semantics; unsupported arguments raise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.models import flash_attn
from flash_experts.models.attention_backends import attention_backend
from flash_experts.models.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from tests.helpers.attention_cases import Batch, Packed, assert_same, batches, cumulative, packed_rows
from tests.helpers.attention_oracle import oracle, oracle_varlen

# From flash_attn/flash_attn_interface.py, version 2.8.
OPTIONS = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None "
    "deterministic=False return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q k v {OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {OPTIONS}",
    "flash_attn_varlen_func": f"q k v {LENGTHS} {OPTIONS} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
        "cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
        "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_match_the_package(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    ours = [p.name if p.default is p.empty else f"{p.name}={str(p.default).replace(' ', '')}" for p in parameters]
    assert ours == SIGNATURES[name].split()


def arguments(options: AttentionOptions) -> dict[str, Any]:
    """Options as the package's keywords; dropout apart, whose seed is drawn inside."""
    return {
        "softmax_scale": options.scale,
        "causal": options.right == 0,
        "window_size": (options.left, options.right),
        "softcap": options.softcap,
        "alibi_slopes": options.alibi_slopes,
    }


def without_dropout(options: AttentionOptions) -> AttentionOptions:
    return AttentionOptions(options.scale, options.left, options.right, options.softcap, options.alibi_slopes)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), wants_lse=st.booleans())
def test_flash_attn_func(batch: Batch, wants_lse: bool) -> None:
    expected, expected_lse = oracle(*batch.qkv, without_dropout(batch.options))
    result = flash_attn_func(*batch.qkv, **arguments(batch.options), return_attn_probs=wants_lse)
    if wants_lse:
        result, lse, probabilities = result
        assert probabilities is None
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    assert_same(result, expected, batch.qkv)


@settings(max_examples=60, deadline=None)
@given(packed=packed_rows(), wants_lse=st.booleans())
def test_flash_attn_varlen_func(packed: Packed, wants_lse: bool) -> None:
    expected, expected_lse = oracle_varlen(*packed.qkv, *packed.starts(), without_dropout(packed.options))
    options = arguments(packed.options)
    result = flash_attn_varlen_func(*packed.qkv, *packed.varlen(), **options, return_attn_probs=wants_lse)
    if wants_lse:
        result, lse, _ = result
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    assert_same(result, expected, packed.qkv)


def test_the_picture_of_the_packages_documentation() -> None:
    """Causal, 2 queries and 5 keys: 1 1 1 1 0 / 1 1 1 1 1; 5 queries and 2 keys: three rows of nothing, 1 0, 1 1."""
    for S_q, S_k, seen in ((2, 5, [4, 5]), (5, 2, [0, 0, 0, 1, 2])):
        q, k = torch.zeros(1, S_q, 1, 8), torch.zeros(1, S_k, 1, 8)
        v = torch.arange(1.0, S_k + 1)[None, :, None, None].expand(1, S_k, 1, 8)
        out = flash_attn_func(q, k, v, causal=True)
        means = [(count + 1) / 2 if count else 0.0 for count in seen]
        torch.testing.assert_close(out[0, :, 0, 0], torch.tensor(means))


def test_packed_layouts_are_views_of_the_plain_ones() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(2)
    for ours in (
        flash_attn_qkvpacked_func(qkv, causal=True),
        flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True),
    ):
        assert_same(ours, flash_attn_func(q, k, v, causal=True), (qkv,))
    row, starts = qkv.flatten(0, 1), cumulative([5, 0, 7])
    q, k, v = row.unbind(1)
    for ours in (
        flash_attn_varlen_qkvpacked_func(row, starts, 7, causal=True),
        flash_attn_varlen_kvpacked_func(q, row[:, 1:], starts, starts, 7, 7, causal=True),
    ):
        assert_same(ours, flash_attn_varlen_func(q, k, v, starts, starts, 7, 7, causal=True), (qkv,))


def test_compiled_for_any_size_without_a_graph_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(flash_attn_func, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 7):
        q, k, v = (torch.randn(2, length, heads, 8) for heads in (4, 2, 2))
        torch.testing.assert_close(compiled(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"return_attn_probs": True}])
def test_under_autocast_every_backend_gives_its_dtype(options: dict[str, Any]) -> None:
    q = torch.randn(2, 5, 2, 16, requires_grad=True)
    starts = cumulative([5])
    with torch.autocast("cpu", torch.bfloat16):
        results = [
            flash_attn_func(q, q, q, **options),
            flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, 5, 5, **options),
        ]
        exact = flash_attn_func(*[q.double()] * 3, **options)
    outputs = [result[0] if isinstance(result, tuple) else result for result in (*results, exact)]
    assert [out.dtype for out in outputs] == [torch.bfloat16, torch.bfloat16, torch.float64]
    (gradient,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), q)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_is_replayed_by_the_generator(backend: str) -> None:
    q = torch.randn(2, 9, 2, 8)
    starts = cumulative([4, 14])
    calls: list[Callable[[], Any]] = [
        lambda: flash_attn_func(q, q, q, 0.5, causal=True),
        lambda: flash_attn_varlen_qkvpacked_func(q.flatten(0, 1)[:, None].expand(18, 3, 2, 8), starts, 14, 0.5),
    ]
    with attention_backend(backend):
        for call in calls:
            torch.manual_seed(0)
            first, second = call(), call()
            torch.manual_seed(0)
            assert torch.equal(call(), first) and not torch.equal(first, second)


# The cache.


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (2, -1)])
def test_decoding_step_by_step_equals_one_pass(by_row: bool, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    B, S, H, G, C = 2, 9, 4, 2, 8
    q, k, v = (torch.randn(B, S, heads, C, dtype=torch.float64) for heads in (H, G, G))
    slopes = torch.rand(B, H)
    options: dict[str, Any] = {"causal": True, "window_size": window, "alibi_slopes": slopes, "softmax_scale": 0.4}
    expected, expected_lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    k_cache, v_cache = torch.full((B, 16, G, C), torch.nan, dtype=torch.float64), torch.zeros(B, 16, G, C).double()
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        held: Any = torch.full((B,), start, dtype=torch.int32) if by_row else start
        new = slice(start, stop)
        out, lse = flash_attn_with_kvcache(
            q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=held, **options, return_softmax_lse=True
        )
        torch.testing.assert_close(out, expected[:, new], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse[:, :, new], rtol=0, atol=1e-12)
    assert torch.equal(k_cache[:, :S], k) and torch.equal(v_cache[:, :S], v)
    assert k_cache[:, S:].isnan().all() and (v_cache[:, S:] == 0).all()


def test_rows_of_a_cache_have_their_own_lengths() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
    q, new = torch.randn(3, 2, 4, 8).double(), torch.randn(3, 2, 2, 8).double()
    cache = torch.randn(3, 8, 2, 8).double()
    rows = [torch.cat([cache[b, : lengths[b]], new[b]])[None] for b in range(3)]
    k_cache, v_cache = cache.clone(), cache.clone()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths, causal=True)
    for b, row in enumerate(rows):
        torch.testing.assert_close(out[b : b + 1], flash_attn_func(q[b : b + 1], row, row, causal=True))
    assert lengths.tolist() == [0, 3, 6], "the caller's tensor stays as it is"
    again = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths + 2, causal=True)
    assert torch.equal(again, out)
    whole = flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(whole, flash_attn_func(q, k_cache, v_cache))


@pytest.mark.parametrize(
    "window",
    [[3, 2], torch.tensor([3, 2]), np.array([3, 2]), (np.int64(3), 2), (torch.tensor(3), torch.tensor(2))],
    ids=["list", "tensor", "array", "numpy", "tensors"],
)
def test_a_window_is_any_two_integers(window: Any) -> None:
    """As in the flash-attn package, whose own tests pass a tensor."""
    assert torch.equal(flash_attn_func(Q, Q, Q, window_size=window), flash_attn_func(Q, Q, Q, window_size=(3, 2)))


def test_the_length_of_a_cache_is_any_integer() -> None:
    assert torch.equal(
        flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=np.int64(3)), flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=3)
    )


# What is refused.

Q = torch.randn(2, 5, 4, 16)
ROW = Q.flatten(0, 1)
STARTS = cumulative([4, 6])


def varlen(q: torch.Tensor = ROW, k: torch.Tensor = ROW, **changes: Any) -> Any:
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 6, "max_seqlen_k": 6}
    return flash_attn_varlen_func(q, k, k, **(lengths | changes))


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    (r"q must be \(batch, seqlen, heads, head_dim\), not \(10, 4, 16\)", lambda: flash_attn_func(ROW, Q, Q)),
    (r"q must be \(total tokens, heads, head_dim\)", lambda: varlen(Q)),
    ("batch size 1, k and v have 2", lambda: flash_attn_func(Q[:1], Q, Q)),
    ("make them equal", lambda: flash_attn_func(Q, Q, Q[:, :3])),
    ("heads of q must be a multiple", lambda: flash_attn_func(Q, Q[:, :, :3], Q[:, :, :3])),
    ("heads of q must be a multiple", lambda: flash_attn_func(Q, Q[:, :, :0], Q[:, :, :0])),
    ("head dim 16, k and v have 8: they must be equal, from 1 to 256", lambda: flash_attn_func(Q, *[Q[..., :8]] * 2)),
    ("they must be equal, from 1 to 256", lambda: flash_attn_func(*[torch.zeros(1, 2, 1, 264)] * 3)),
    ("convert them to one dtype", lambda: flash_attn_func(Q, Q.half(), Q.half())),
    ("q is torch.int64: convert it to float16", lambda: flash_attn_func(*[Q.long()] * 3)),
    ("move them to one device", lambda: flash_attn_func(Q, *[Q.to("meta")] * 2)),
    ("dropout_p is 1.0: give a probability of at least 0 and under 1", lambda: flash_attn_func(Q, Q, Q, 1.0)),
    ("dropout_p is -0.1", lambda: flash_attn_func(Q, Q, Q, -0.1)),
    ("softcap is -1.0", lambda: flash_attn_func(Q, Q, Q, softcap=-1.0)),
    (r"give two integers \(left, right\)", lambda: flash_attn_func(Q, Q, Q, window_size=(1, 2, 3))),  # type: ignore[arg-type]
    (r"give two integers \(left, right\)", lambda: flash_attn_func(Q, Q, Q, window_size=(1.5, 2))),  # type: ignore[arg-type]
    (r"give two integers \(left, right\)", lambda: flash_attn_func(Q, Q, Q, window_size=3)),  # type: ignore[arg-type]
    (r"float32 of shape \(4,\) or \(2, 4\)", lambda: flash_attn_func(Q, Q, Q, alibi_slopes=torch.rand(2))),
    (r"float32 of shape", lambda: flash_attn_func(Q, Q, Q, alibi_slopes=torch.rand(4).double())),
    ("alibi_slopes is on meta", lambda: flash_attn_func(Q, Q, Q, alibi_slopes=torch.rand(4, device="meta"))),
    (r"pass .to\(torch.int32\)", lambda: varlen(cu_seqlens_q=STARTS.long())),
    (r"cu_seqlens_k must be an int32 tensor .*, not a list", lambda: varlen(cu_seqlens_k=[0, 4, 10])),
    ("cu_seqlens_k is on meta", lambda: varlen(cu_seqlens_k=STARTS.to("meta"))),
    ("must go from 0 to the 10 tokens of q", lambda: varlen(cu_seqlens_q=cumulative([4, 5]))),
    ("never decrease", lambda: varlen(cu_seqlens_k=torch.tensor([0, 12, 10], dtype=torch.int32))),
    ("max_seqlen_q is 5, but a document has 6", lambda: varlen(max_seqlen_q=5)),
    (r"pass a number \(int\(max_seqlen\)", lambda: varlen(max_seqlen_k=torch.tensor(6))),
    ("2 documents and cu_seqlens_k has 3", lambda: varlen(cu_seqlens_k=cumulative([4, 3, 3]))),
    ("does not support block_table", lambda: varlen(block_table=torch.zeros(1))),
    (r"qkv must be \(batch, seqlen, 3, heads", lambda: flash_attn_qkvpacked_func(torch.zeros(1, 2, 2, 1, 8))),
    (r"kv must be \(total tokens, 2", lambda: flash_attn_varlen_kvpacked_func(ROW, ROW, STARTS, STARTS, 6, 6)),
    ("does not support rotary_cos", lambda: flash_attn_with_kvcache(Q, Q, Q, rotary_cos=torch.zeros(1))),
    ("does not support block_table", lambda: flash_attn_with_kvcache(Q, Q, Q, block_table=torch.zeros(1))),
    ("does not support cache_batch_idx", lambda: flash_attn_with_kvcache(Q, Q, Q, cache_batch_idx=torch.zeros(1))),
    ("does not support cache_leftpad", lambda: flash_attn_with_kvcache(Q, Q, Q, cache_leftpad=torch.zeros(1))),
    ("num_splits is 4: 0 and 1 are supported", lambda: flash_attn_with_kvcache(Q, Q, Q, num_splits=4)),
    ("give both k and v", lambda: flash_attn_with_kvcache(Q, Q, Q, k=Q, cache_seqlens=0)),
    ("new keys need a position", lambda: flash_attn_with_kvcache(Q, Q, Q, Q, Q)),
    ("1 new keys after 5 do not fit into a cache of 5", lambda: flash_attn_with_kvcache(
        Q, Q, Q, Q[:, :1], Q[:, :1], cache_seqlens=5)),
    ("1 new keys after 5 do not fit into a cache of 5", lambda: flash_attn_with_kvcache(
        Q, Q, Q, Q[:, :1], Q[:, :1], cache_seqlens=torch.tensor([0, 5], dtype=torch.int32))),
    ("cache_seqlens is 6, but the cache has room", lambda: flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=6)),
    ("cache_seqlens is -1, but the cache has room", lambda: flash_attn_with_kvcache(
        Q, Q, Q, cache_seqlens=torch.tensor([3, -1], dtype=torch.int32))),
    (r"int32 tensor of shape \(2,\)", lambda: flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=torch.tensor([1, 2]))),
    ("only the second dimension may differ", lambda: flash_attn_with_kvcache(
        Q, Q, Q, Q[:, :, :2], Q[:, :, :2], cache_seqlens=0)),
    ("must have the cache's dtype", lambda: flash_attn_with_kvcache(Q, Q, Q, Q.half(), Q.half(), cache_seqlens=0)),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_invalid_arguments_are_reported_in_one_line(case: int) -> None:
    message, call = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 240


def test_the_checks_read_no_values() -> None:
    """A tensor on the meta device has none: reading one, which on a GPU would wait for it, raises."""
    q, row = (x.to("meta") for x in (Q, ROW))
    starts = STARTS.to("meta")
    flash_attn._check_qkv(q, q, q, "", 4)
    assert flash_attn._check_documents(row, row, PackedLengths(starts, starts.clone(), 6, 6)) == 2
    options = flash_attn._make_options(q, 2, 0.1, None, True, (3, 3), 1.0, torch.rand(2, 4, device="meta"))
    assert (options.left, options.right, options.scale) == (3, 0, 0.25)
