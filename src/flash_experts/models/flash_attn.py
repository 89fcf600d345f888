"""The API of the flash-attn package on our kernels: code written for that package runs after changing the import.

    from flash_experts.models.flash_attn import flash_attn_func, flash_attn_varlen_func

Names, argument order, layouts, defaults and semantics are those of ``flash_attn`` 2.8 (Dao-AILab). Ours also support
CPUs, float32 and float64, dropout with softcap, head dims from 1 to 256 and any strides. Unsupported arguments raise a
ValueError. `flash_experts.models.attention_backends` chooses the kernel.

- ``causal=True``, ``window_size`` (left, right) and ``alibi_slopes`` are aligned to the bottom right: query i stands at
  key i + S_k - S_q. A fully masked query gets zeros.
- Grouped-query attention: query head h uses key/value head h // (H / G).
- Dropout takes its seed from torch's generator of the device.

Shape suffixes: B batch, S length, H query heads, G key/value heads, C head dim, T packed tokens, N documents in them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from flash_experts.kernels.attention_options import PackedLengths
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
Forward = Callable[..., Result]


def _with_rest_of(
    target: Callable[..., Result], first: str
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Gives a function that forwards to ``target`` a signature with its parameters from ``first`` on."""

    def show(function: Forward) -> Forward:
        own = [each for each in signature(function).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
        names = [name for name in signature(target).parameters if name != "block_table"]
        rest = [signature(target).parameters[name] for name in names[names.index(first) :]]
        function.__signature__ = signature(target).replace(parameters=[*own, *rest])  # type: ignore[attr-defined]
        return function

    return show


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
        k: (B, S_k, G, C), as ``v``; H is a multiple of G.
        dropout_p: probability that a weight is dropped, in [0, 1); 0 in evaluation.
        softmax_scale: None is 1 / sqrt(C).
        causal: overrides the right side of the window.
        window_size: keys to the left and right of its position that a query attends to; negative is unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        alibi_slopes: (H,) or (B, H) float32; the scores get ``-slope * |i + S_k - S_q - j|``.
        deterministic: bitwise reproducible gradients.
        return_attn_probs: return the log-sum-exp as well, and None: the probabilities are never materialised.

    Returns:
        (B, S_q, H, C), dtype of q; with ``return_attn_probs`` (output, log-sum-exp (B, H, S_q), None).

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not match, or a forced backend without support.
    """
    check_qkv(q, k, v, "(batch, seqlen, heads, head_dim)", 4)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}: make them equal")
    options = make_options(q, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention(q, k, v, options, needs_lse=return_attn_probs, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


@_with_rest_of(flash_attn_func, "dropout_p")
def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with ``kv`` (B, S_k, 2, G, C)."""
    k, v = unpacked(kv, "kv", "(batch, seqlen, 2, heads_k, head_dim)", 5)
    return flash_attn_func(q, k, v, *args, **kwargs)


@_with_rest_of(flash_attn_func, "dropout_p")
def flash_attn_qkvpacked_func(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with ``qkv`` (B, S, 3, H, C)."""
    q, k, v = unpacked(qkv, "qkv", "(batch, seqlen, 3, heads, head_dim)", 5)
    return flash_attn_func(q, k, v, *args, **kwargs)


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
    """`flash_attn_func` of packed documents (variable length), each of which attends to itself only.

    Args:
        q: (T_q, H, C); ``k`` and ``v`` are (T_k, G, C).
        cu_seqlens_q: (N + 1,) int32 start of each document, and T_q. On a GPU its values are not checked, which would
            need a host synchronisation.
        cu_seqlens_k: likewise for the keys; passing the same tensor for equal lengths is faster.
        max_seqlen_q: length of the longest document, in queries.
        max_seqlen_k: likewise, in keys.
        alibi_slopes: (H,) or (N, H) float32.
        block_table: must be None (a paged KV cache is not supported).

    Returns:
        (T_q, H, C), dtype of q; with ``return_attn_probs`` (output, log-sum-exp (H, T_q), None).
    """
    refuse("flash_attn_varlen_func", block_table=block_table)
    check_qkv(q, k, v, "(total tokens, heads, head_dim)", 3)
    lengths = PackedLengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    documents = check_documents(q, k, lengths)
    options = make_options(q, documents, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention_varlen(q, k, v, lengths, options, needs_lse=return_attn_probs, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


@_with_rest_of(flash_attn_varlen_func, "cu_seqlens_q")
def flash_attn_varlen_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_varlen_func` with ``kv`` (T_k, 2, G, C)."""
    k, v = unpacked(kv, "kv", "(total tokens, 2, heads_k, head_dim)", 4)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


@_with_rest_of(flash_attn_varlen_func, "dropout_p")
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """`flash_attn_varlen_func` with ``qkv`` (T, 3, H, C)."""
    q, k, v = unpacked(qkv, "qkv", "(total tokens, 3, heads, head_dim)", 4)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


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
    """Appends new keys and values to the KV cache in place, and attends to it. For generation, without gradients.

    Rotary embeddings and ``cache_batch_idx``, ``cache_leftpad`` and ``block_table`` are not supported: leave them None.

    Args:
        q: (B, S_q, H, C); the last query stands at the last key in use.
        k_cache: (B, S_cache, G, C), as ``v_cache``.
        k: (B, S_new, G, C), as ``v``: written from ``cache_seqlens`` on. None writes nothing.
        cache_seqlens: tokens in the cache before the call: an int, or (B,) int32; None is all of it.
        num_splits: 0 or 1; the kernel chooses.

    Returns:
        (B, S_q, H, C), dtype of q; with ``return_softmax_lse`` (output, log-sum-exp (B, H, S_q)).

    Raises:
        ValueError: as `flash_attn_func`; an unsupported argument; new keys that do not fit the cache.
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
    """Returns the new lengths."""
    k, v, seqlens = check_new_keys(k_cache, k, v, seqlens)
    B, S_new = k.shape[:2]
    if isinstance(seqlens, int):
        k_cache[:, seqlens : seqlens + S_new], v_cache[:, seqlens : seqlens + S_new] = k, v
        return seqlens + S_new
    rows_B1 = torch.arange(B, device=k.device)[:, None]
    places_BS = seqlens[:, None] + torch.arange(S_new, device=k.device)
    k_cache[rows_B1, places_BS], v_cache[rows_B1, places_BS] = k, v
    return seqlens + S_new
