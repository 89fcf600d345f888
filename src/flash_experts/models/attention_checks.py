"""Argument checks of `flash_experts.models.flash_attn`, without a host synchronisation; each raises a ValueError."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEAD_DIM = 256


def check_cache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, seqlens: int | torch.Tensor | None, num_splits: int
) -> None:
    if num_splits not in (0, 1):
        raise ValueError(f"num_splits is {num_splits}: 0 and 1 are supported")
    check_qkv(q, k_cache, v_cache, "(batch, seqlen, heads, head_dim)", 4)
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


def check_new_keys(
    k_cache: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, seqlens: int | torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Checks that new keys and values fit the cache; returns them and the lengths."""
    if k is None or v is None:
        raise ValueError("new keys and new values come together: give both k and v, or neither")
    B, S_cache = k_cache.shape[:2]
    if k.ndim != 4 or k.shape != v.shape or k.shape[0] != B or k.shape[2:] != k_cache.shape[2:]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the cache {tuple(k_cache.shape)}: only the second "
            "dimension may differ"
        )
    if any(x.dtype != k_cache.dtype or x.device != k_cache.device for x in (k, v)):
        raise ValueError("k and v must have the cache's dtype and device: convert them with .to(k_cache)")
    if seqlens is None:
        raise ValueError("new keys need a position: give cache_seqlens, the number of tokens already in the cache")
    for length in _known_lengths(seqlens):
        if length + k.shape[1] > S_cache:
            raise ValueError(
                f"{k.shape[1]} new keys after {length} do not fit into a cache of {S_cache}: allocate more"
            )
    return k, v, seqlens


def _known_lengths(seqlens: int | torch.Tensor | None) -> list[int]:
    """Lengths that the host knows without a synchronisation."""
    if not isinstance(seqlens, torch.Tensor):
        return [] if seqlens is None else [seqlens]
    return [] if seqlens.device.type != "cpu" or torch.compiler.is_compiling() else seqlens.tolist()


def refuse(function: str, **arguments: torch.Tensor | None) -> None:
    """Raises a ValueError for unsupported arguments that are not None."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{function} does not support {name}: leave it None")


def unpacked(packed: torch.Tensor, name: str, layout: str, ndim: int) -> tuple[torch.Tensor, ...]:
    """Views of packed queries, keys and values, along the third axis from the end."""
    if packed.ndim != ndim or packed.shape[-3] != len(name):
        raise ValueError(f"{name} must be {layout}, not {tuple(packed.shape)}")
    return packed.unbind(-3)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, ndim: int) -> None:
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


def check_documents(q: torch.Tensor, k: torch.Tensor, lengths: PackedLengths) -> int:
    """Checks the ``cu_seqlens`` of packed documents; returns their number N."""
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


def _window(window_size: Sequence[SupportsIndex] | torch.Tensor) -> tuple[int, int]:
    try:
        left, right = (max(operator.index(limit), -1) for limit in window_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"window_size is {window_size}: give two integers (left, right), -1 for no limit") from error
    return left, right


def make_options(
    q: torch.Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[SupportsIndex] | torch.Tensor,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> AttentionOptions:
    """Checks and collects the arguments that all functions share."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: give a probability of at least 0 and under 1")
    if softcap < 0 or not math.isfinite(softcap):
        raise ValueError(f"softcap is {softcap}: give 0 (off) or a positive number")
    left, right = _window(window_size)
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
