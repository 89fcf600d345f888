"""The flash-attn package's functions on our kernels: code written for that package runs by changing the import.

    from flash_experts.models.flash_attn import flash_attn_func, flash_attn_varlen_func

Names, argument order, layouts, defaults and semantics are those of ``flash_attn`` 2.8 (Dao-AILab). Where ours do more
(CPUs, float32 and float64, dropout together with softcap, any head dim from 1 to 256, strides as they come) that is no
error; what ours do not support raises a ValueError. Which kernel runs is `flash_experts.models.attention_backends`'
choice. With ``return_attn_probs=True`` the third element, the package's matrix of probabilities for its own tests, is
always None: that matrix is never formed.

- ``causal=True`` is aligned to the bottom right: query i sees the keys up to i + S_k - S_q. So are ``window_size``
  (left, right) and ``alibi_slopes``. A query that sees no key gets zeros.
- Fewer key/value heads than query heads: query head h uses key/value head h // (H / G).
- Dropout takes its seed from torch's generator of the device.

Letters in the shapes: B batch, S length, H query heads, G key/value heads, C head dim, T tokens of a packed row, N
documents in it.
"""

from __future__ import annotations

import operator

import torch

from flash_experts.models.attention_backends import attention, attention_varlen
from flash_experts.models.attention_checks import (
    check_cache,
    check_documents,
    check_new_keys,
    check_qkv,
    make_options,
    refuse,
    unpacked,
)

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None, None]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``softmax(softmax_scale * q k^T) v``, differentiable in q, k and v.

    Args:
        q: (B, S_q, H, C) float16, bfloat16, float32 or float64.
        k: (B, S_k, G, C); H is a multiple of G.
        v: (B, S_k, G, C).
        dropout_p: probability that a weight is dropped, in [0, 1); 0 in evaluation.
        softmax_scale: factor of the scores; None is 1 / sqrt(C).
        causal: no query sees past its own place. It overrides the right side of the window.
        window_size: keys to the left and to the right of its place that a query sees; negative is all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        alibi_slopes: (H,) or (B, H) float32; the scores get ``-slope * |i + S_k - S_q - j|``.
        deterministic: the gradients are the same, bit for bit, every time.
        return_attn_probs: return the log-sum-exp as well.

    Returns:
        (B, S_q, H, C), dtype of q; with ``return_attn_probs`` (output, log-sum-exp (B, H, S_q), None).

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, or a forced backend that cannot do it.
    """
    check_qkv(q, k, v, "(batch, seqlen, heads, head_dim)", 4)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}: make them equal")
    options = make_options(q, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention(q, k, v, options, needs_lse=return_attn_probs, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of keys and values in one tensor ``kv``, (B, S_k, 2, G, C)."""
    k, v = unpacked(kv, "kv", "(batch, seqlen, 2, heads_k, head_dim)", 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of queries, keys and values in one tensor ``qkv``, (B, S, 3, H, C)."""
    q, k, v = unpacked(qkv, "qkv", "(batch, seqlen, 3, heads, head_dim)", 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Result:
    """`flash_attn_func` of documents packed one after the other, each seeing itself alone.

    Args:
        q: (T_q, H, C), the queries of all documents.
        k: (T_k, G, C).
        v: (T_k, G, C).
        cu_seqlens_q: (N + 1,) int32 on the device of q: 0, where each next document starts, and T_q. On a GPU its
            values are trusted, since reading them would wait for the device.
        cu_seqlens_k: likewise for the keys; the same tensor where the lengths are the same, which is quicker.
        max_seqlen_q: the most queries that a document has.
        max_seqlen_k: the most keys.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs: see `flash_attn_func`;
            each document is aligned at its end.
        alibi_slopes: (H,) or (N, H) float32.
        block_table: paged keys and values are not supported: None.

    Returns:
        (T_q, H, C), dtype of q; with ``return_attn_probs`` (output, log-sum-exp (H, T_q), None).

    Raises:
        ValueError: as `flash_attn_func`.
    """
    refuse("flash_attn_varlen_func", block_table=block_table)
    check_qkv(q, k, v, "(total tokens, heads, head_dim)", 3)
    documents = check_documents(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = make_options(q, documents, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        options,
        needs_lse=return_attn_probs,
        deterministic=deterministic,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of keys and values in one tensor ``kv``, (T_k, 2, G, C)."""
    k, v = unpacked(kv, "kv", "(total tokens, 2, heads_k, head_dim)", 4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor ``qkv``, (T, 3, H, C)."""
    q, k, v = unpacked(qkv, "qkv", "(total tokens, 3, heads, head_dim)", 4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
    """Writes new keys and values into the cache, in place, and attends to all of it. For generation: no gradients.

    Args:
        q: (B, S_q, H, C).
        k_cache, v_cache: (B, S_cache, G, C).
        k: (B, S_new, G, C) to be written from ``cache_seqlens`` on, or None. The cache must have room for them.
        v: likewise.
        rotary_cos, rotary_sin: not supported: None (rotate q and k before); ``rotary_interleaved`` has no effect then.
        cache_seqlens: tokens that the cache holds before the call: a number, or (B,) int32; None is all of it.
        cache_batch_idx, cache_leftpad, block_table: not supported: None (index the cache before).
        softmax_scale, causal, window_size, softcap, alibi_slopes: see `flash_attn_func`; the last query meets the last
            key in use.
        num_splits: 0 or 1; how a kernel divides the keys is its own business.
        return_softmax_lse: return the log-sum-exp as well.

    Returns:
        (B, S_q, H, C), dtype of q; with ``return_softmax_lse`` (output, log-sum-exp (B, H, S_q)).

    Raises:
        ValueError: as `flash_attn_func`; an argument that is not supported; new keys without room or place for them.
    """
    refuse(
        "flash_attn_with_kvcache",
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    if cache_seqlens is not None and not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = operator.index(cache_seqlens)
    check_cache(q, k_cache, v_cache, cache_seqlens, num_splits)
    options = make_options(q, q.shape[0], 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if k is not None or v is not None:
        cache_seqlens = _append(k_cache, v_cache, k, v, cache_seqlens)
    k_lengths_B = cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else None
    if isinstance(cache_seqlens, int):
        k_cache, v_cache = k_cache[:, :cache_seqlens], v_cache[:, :cache_seqlens]
    out, lse = attention(q, k_cache, v_cache, options, k_lengths_B, needs_lse=return_softmax_lse)
    return (out, lse) if return_softmax_lse else out


def _append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    seqlens: int | torch.Tensor | None,
) -> int | torch.Tensor:
    """Writes k and v behind what the cache holds; returns what it holds now."""
    k, v, seqlens = check_new_keys(k_cache, k, v, seqlens)
    B, S_new = k.shape[:2]
    if isinstance(seqlens, int):
        k_cache[:, seqlens : seqlens + S_new], v_cache[:, seqlens : seqlens + S_new] = k, v
        return seqlens + S_new
    rows_B1 = torch.arange(B, device=k.device)[:, None]
    places_BS = seqlens[:, None] + torch.arange(S_new, device=k.device)
    k_cache[rows_B1, places_BS], v_cache[rows_B1, places_BS] = k, v
    return seqlens + S_new
