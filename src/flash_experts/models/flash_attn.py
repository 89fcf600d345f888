"""The API of the flash-attn package on our kernels: code written for that package runs after changing the import.

Signatures, layouts and semantics are those of ``flash_attn`` 2.8 (Dao-AILab). Ours also support CPUs, float32 and
float64, dropout with softcap, head dims from 1 to 256 and any strides. Unsupported arguments raise a ValueError.

``causal``, ``window_size`` (left, right) and ``alibi_slopes`` are aligned to the bottom right: query i stands at key
i + S_k - S_q. A fully masked query gets zeros. Dropout takes its seed from torch's generator of the device.

Shape suffixes as in `flash_experts.kernels.attention_options`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, SupportsIndex

import torch

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.models.attention_backends import attention, attention_varlen

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEAD_DIM = 256
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
        q: (B, S_q, H, C).
        k: (B, S_k, G, C), as ``v``.
        dropout_p: probability that a weight is dropped, in [0, 1).
        softmax_scale: by default 1 / sqrt(C).
        causal: overrides the right side of the window.
        window_size: keys to the left and right of its position that a query attends to; negative is unlimited.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        alibi_slopes: (H,) or (B, H) float32; the scores get ``-slope * |i + S_k - S_q - j|``.
        deterministic: bitwise reproducible gradients.

    Returns:
        (B, S_q, H, C), dtype of q, or autocast's where it is on; with ``return_attn_probs`` (output, log-sum-exp
        (B, H, S_q), None).
    """
    _check_qkv(q, k, v, "(batch, seqlen, heads, head_dim)", 4)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]}, k and v have {k.shape[0]}: make them equal")
    options = _make_options(q, q.shape[0], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention(q, k, v, options, needs_lse=return_attn_probs, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


@_with_rest_of(flash_attn_func, "dropout_p")
def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with ``kv`` (B, S_k, 2, G, C)."""
    k, v = _unpacked(kv, "kv", "(batch, seqlen, 2, heads_k, head_dim)", 5)
    return flash_attn_func(q, k, v, *args, **kwargs)


@_with_rest_of(flash_attn_func, "dropout_p")
def flash_attn_qkvpacked_func(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with ``qkv`` (B, S, 3, H, C)."""
    q, k, v = _unpacked(qkv, "qkv", "(batch, seqlen, 3, heads, head_dim)", 5)
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

    ``q`` is (T_q, H, C), ``k`` and ``v`` are (T_k, G, C), ``alibi_slopes`` (H,) or (N, H), the log-sum-exp (H, T_q).
    `PackedLengths` describes the lengths, whose values are not checked on a GPU. ``block_table`` must be None.
    """
    _refuse("flash_attn_varlen_func", block_table=block_table)
    _check_qkv(q, k, v, "(total tokens, heads, head_dim)", 3)
    lengths = PackedLengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    documents = _check_documents(q, k, lengths)
    options = _make_options(q, documents, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = attention_varlen(q, k, v, lengths, options, needs_lse=return_attn_probs, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


@_with_rest_of(flash_attn_varlen_func, "cu_seqlens_q")
def flash_attn_varlen_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_varlen_func` with ``kv`` (T_k, 2, G, C)."""
    k, v = _unpacked(kv, "kv", "(total tokens, 2, heads_k, head_dim)", 4)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


@_with_rest_of(flash_attn_varlen_func, "dropout_p")
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """`flash_attn_varlen_func` with ``qkv`` (T, 3, H, C)."""
    q, k, v = _unpacked(qkv, "qkv", "(total tokens, 3, heads, head_dim)", 4)
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

    Args:
        q: (B, S_q, H, C); the last query stands at the last key in use.
        k_cache: (B, S_cache, G, C), as ``v_cache``.
        k: (B, S_new, G, C), as ``v``: written from ``cache_seqlens`` on.
        cache_seqlens: tokens in the cache before the call: an int, or (B,) int32; None is all of it.
        num_splits: 0 or 1. Rotary embeddings, ``cache_batch_idx``, ``cache_leftpad``, ``block_table`` must be None.

    Returns:
        (B, S_q, H, C), dtype of q, or autocast's where it is on; with ``return_softmax_lse`` (output, log-sum-exp
        (B, H, S_q)).
    """
    _refuse(
        "flash_attn_with_kvcache",
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    if cache_seqlens is not None and not isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = operator.index(cache_seqlens)
    _check_cache(q, k_cache, v_cache, cache_seqlens, num_splits)
    options = _make_options(q, q.shape[0], 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
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
    """Writes new keys and values into the cache; returns the new lengths."""
    if k is None or v is None:
        raise ValueError("new keys and new values come together: give both k and v, or neither")
    if k.ndim != 4 or k.shape != v.shape or k.shape[0] != k_cache.shape[0] or k.shape[2:] != k_cache.shape[2:]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the cache {tuple(k_cache.shape)}: only the second "
            "dimension may differ"
        )
    if any(x.dtype != k_cache.dtype or x.device != k_cache.device for x in (k, v)):
        raise ValueError("k and v must have the cache's dtype and device: convert them with .to(k_cache)")
    if seqlens is None:
        raise ValueError("new keys need a position: give cache_seqlens, the number of tokens already in the cache")
    (B, S_new), S_cache = k.shape[:2], k_cache.shape[1]
    for length in _known_lengths(seqlens):
        if length + S_new > S_cache:
            raise ValueError(f"{S_new} new keys after {length} do not fit into a cache of {S_cache}: allocate more")
    if isinstance(seqlens, int):
        k_cache[:, seqlens : seqlens + S_new], v_cache[:, seqlens : seqlens + S_new] = k, v
        return seqlens + S_new
    rows_B1 = torch.arange(B, device=k.device)[:, None]
    places_BS = seqlens[:, None] + torch.arange(S_new, device=k.device)
    k_cache[rows_B1, places_BS], v_cache[rows_B1, places_BS] = k, v
    return seqlens + S_new


# ------------------------------------------------------- checks of arguments, without a host synchronisation
def _check_cache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, seqlens: int | torch.Tensor | None, num_splits: int
) -> None:
    if num_splits not in (0, 1):
        raise ValueError(f"num_splits is {num_splits}: 0 and 1 are supported")
    _check_qkv(q, k_cache, v_cache, "(batch, seqlen, heads, head_dim)", 4)
    B, S_cache = k_cache.shape[:2]
    if q.shape[0] != B:
        raise ValueError(f"q has batch size {q.shape[0]}, the cache has {B}: make them equal")
    if isinstance(seqlens, torch.Tensor) and (
        seqlens.dtype != torch.int32 or seqlens.shape != (B,) or seqlens.device != k_cache.device
    ):
        raise ValueError(
            f"cache_seqlens must be an int or an int32 tensor of shape ({B},) on {k_cache.device}, not "
            f"{seqlens.dtype} {tuple(seqlens.shape)} on {seqlens.device}"
        )
    for length in _known_lengths(seqlens):
        if not 0 <= length <= S_cache:
            raise ValueError(f"cache_seqlens is {length}, but the cache has room for 0 to {S_cache} tokens")


def _known_lengths(seqlens: int | torch.Tensor | None) -> list[int]:
    """Lengths that the host knows without a synchronisation."""
    if not isinstance(seqlens, torch.Tensor):
        return [] if seqlens is None else [seqlens]
    return [] if seqlens.device.type != "cpu" or torch.compiler.is_compiling() else seqlens.tolist()


def _refuse(function: str, **arguments: torch.Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{function} does not support {name}: leave it None")


def _unpacked(packed: torch.Tensor, name: str, layout: str, ndim: int) -> tuple[torch.Tensor, ...]:
    if packed.ndim != ndim or packed.shape[-3] != len(name):
        raise ValueError(f"{name} must be {layout}, not {tuple(packed.shape)}")
    return packed.unbind(-3)


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, ndim: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim:
            raise ValueError(f"{name} must be {layout}, not {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}: convert it to float16, bfloat16, float32 or float64")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: convert them to one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: move them to one device")
    if k.shape != v.shape:
        raise ValueError(f"k is {tuple(k.shape)} and v is {tuple(v.shape)}: make them equal")
    if q.shape[-1] != k.shape[-1] or not 1 <= q.shape[-1] <= _MAX_HEAD_DIM:
        raise ValueError(
            f"q has head dim {q.shape[-1]}, k and v have {k.shape[-1]}: they must be equal, from 1 to {_MAX_HEAD_DIM}"
        )
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[-2]} heads and k has {k.shape[-2]}: the heads of q must be a multiple of those of k"
        )


def _check_documents(q: torch.Tensor, k: torch.Tensor, lengths: PackedLengths) -> int:
    """Returns the number of documents."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    for name, max_seqlen in (("q", max_seqlen_q), ("k", max_seqlen_k)):
        if isinstance(max_seqlen, torch.Tensor):
            raise ValueError(f"max_seqlen_{name} is a tensor: pass a number (int(max_seqlen), once per batch)")
    _check_lengths(cu_seqlens_q, q, max_seqlen_q, "q")
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0] or max_seqlen_k != max_seqlen_q:
        _check_lengths(cu_seqlens_k, k, max_seqlen_k, "k")
    if cu_seqlens_k is cu_seqlens_q and k.shape[0] != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens and k {k.shape[0]}: they cannot share one cu_seqlens")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.numel() - 1} documents and cu_seqlens_k has "
            f"{cu_seqlens_k.numel() - 1}: give both an entry for each document, even for an empty one"
        )
    return cu_seqlens_q.numel() - 1


def _check_lengths(cu_seqlens: torch.Tensor, x: torch.Tensor, max_seqlen: int, name: str) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(
            f"cu_seqlens_{name} must be an int32 tensor of shape (documents + 1,), not a {type(cu_seqlens).__name__}: "
            "pass torch.tensor(..., dtype=torch.int32)"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        raise ValueError(
            f"cu_seqlens_{name} must be int32 of shape (documents + 1,), not {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}: pass .to(torch.int32)"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens_{name} is on {cu_seqlens.device}, {name} on {x.device}: move it there")
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = cu_seqlens.tolist()
    lengths = [after - before for before, after in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != x.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{name} must go from 0 to the {x.shape[0]} tokens of {name} and never decrease, but it starts "
            f"with {starts[0]} and ends with {starts[-1]}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen_{name} is {max_seqlen}, but a document has {max(lengths)} tokens: pass that")


def _make_options(
    q: torch.Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[SupportsIndex] | torch.Tensor,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> AttentionOptions:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: give a probability of at least 0 and under 1")
    if not 0 <= softcap < math.inf:  # math.isfinite cannot be compiled with dynamic=True
        raise ValueError(f"softcap is {softcap}: give 0 (off) or a positive number")
    try:
        left, right = (max(operator.index(limit), -1) for limit in window_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"window_size is {window_size}: give two integers (left, right), -1 for no limit") from error
    if alibi_slopes is not None:
        H = q.shape[-2]
        if alibi_slopes.shape not in ((H,), (batch, H)) or alibi_slopes.dtype != torch.float32:
            raise ValueError(
                f"alibi_slopes must be float32 of shape ({H},) or ({batch}, {H}), not {alibi_slopes.dtype} "
                f"{tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.device != q.device:
            raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {q.device}: move it there")
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
    return AttentionOptions(
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        left=left,
        right=0 if causal else right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout=dropout_p,
        seed=seed,
    )
