"""Flash decoding in Triton (split-KV): a few queries against a long KV cache (Dao et al. 2023, "Flash-Decoding").

`decode_kernel` attends to a share of the keys, and `combine_kernel` merges the shares. The query heads of a key/value
head share a tile, so that the cache is read once.

Shape suffixes as in `attention_options`, but P splits, R rows of a tile (H / G heads of all queries), N keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from flash_experts.kernels.attention_options import AttentionOptions, within_int32
from flash_experts.kernels.flash_attention_programs import LN2, attend, load_rows, store_rows, visible_range

INTERPRETED: bool = triton.knobs.runtime.interpret
MAX_ROWS = 64  # queries times heads per key/value head in one tile
_BLOCK_N = 32 if INTERPRETED else 64


@triton.jit
def decode_kernel(
    Q, K, V, OUT, LSE, K_LENGTHS, SLOPES,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_slopes,
    S_q, S_k, H, GROUP, scale, softcap, left, right,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT (B, G, P, R, C) and LSE (B, G, P, R), float32, of one share of the keys. Grid: (P, B * G)."""
    b, g = tl.program_id(1) // (H // GROUP), tl.program_id(1) % (H // GROUP)
    split, splits = tl.program_id(0), tl.num_programs(0)
    num_k = S_k
    if K_LENGTHS is not None:
        num_k = tl.load(K_LENGTHS + b)
    share = tl.cdiv(tl.cdiv(num_k, splits), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, num_k)

    rows = S_q * GROUP
    r_R = tl.arange(0, BLOCK_R)
    row_R = tl.minimum(r_R, rows - 1)
    i_R, h_R = row_R // GROUP, g * GROUP + row_R % GROUP
    b = tl.cast(b, tl.int64)
    c_C = tl.arange(0, BLOCK_C)
    q_RC = tl.load(
        Q + b * stride_qb + i_R[:, None] * stride_qs + h_R[:, None] * stride_qh + c_C[None, :],
        mask=(c_C < C)[None, :],
        other=0.0,
    )
    start_R = tl.zeros_like(i_R)
    shift = num_k - S_q
    low_R, high_R = visible_range(i_R, start_R, start_R + num_k, shift, left, right, False)
    slope_R = tl.load(SLOPES + b * stride_slopes + h_R) if ALIBI else tl.zeros([BLOCK_R], tl.float32)
    # Keys before every window are skipped, in whole tiles, so that shares do not overlap.
    begin += tl.maximum(tl.min(low_R, 0) - begin, 0) // BLOCK_N * BLOCK_N
    acc_RC, sum_R, max_R = attend(
        tl.zeros([BLOCK_R, BLOCK_C], tl.float32), tl.zeros([BLOCK_R], tl.float32),
        tl.full([BLOCK_R], float("-inf"), tl.float32), q_RC,
        K + b * stride_kb + g * stride_kh, V + b * stride_vb + g * stride_vh, stride_ks, stride_vs, begin, end, end,
        i_R, h_R, start_R, low_R, tl.minimum(high_R, end), shift, slope_R, None, scale, softcap, 0.0,
        C, BLOCK_C, BLOCK_N, True, SOFTCAP, ALIBI, False, UPCAST,
    )  # fmt: skip
    seen_R = sum_R > 0
    safe_sum_R = tl.where(seen_R, sum_R, 1.0)
    place = (tl.cast(tl.program_id(1), tl.int64) * splits + split) * rows
    store_rows(OUT + place * C, 0, r_R, C, rows, acc_RC / safe_sum_R[:, None], C, BLOCK_C)
    lse_R = tl.where(seen_R, max_R * LN2 + tl.log(safe_sum_R), float("-inf"))
    tl.store(LSE + place + r_R, lse_R, mask=r_R < rows)


@triton.jit
def combine_kernel(
    PARTS, LSES, OUT, LSE, splits, rows, S_q, H, GROUP,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merges the shares into OUT (B, S, H, C) and LSE (B, H, S), one query and head each. Grid: (R, B * G)."""
    row, pair = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    p_P = tl.arange(0, BLOCK_P)
    lse_P = tl.load(LSES + (pair * splits + p_P) * rows + row, mask=p_P < splits, other=float("-inf"))
    largest = tl.max(lse_P, 0)
    safe_largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight_P = tl.exp(lse_P - safe_largest)
    total = tl.sum(weight_P, 0)
    safe_total = tl.where(total > 0, total, 1.0)
    parts_PC = load_rows(PARTS + (pair * splits * rows + row) * C, 0, p_P, rows * C, splits, C, BLOCK_C, True)
    out_C = tl.sum(parts_PC * weight_P[:, None], 0) / safe_total
    key_heads = H // GROUP
    b, h, i = pair // key_heads, (pair % key_heads) * GROUP + row % GROUP, row // GROUP
    c_C = tl.arange(0, BLOCK_C)
    tl.store(OUT + ((b * S_q + i) * H + h) * C + c_C, out_C.to(OUT.dtype.element_ty), mask=c_C < C)
    tl.store(LSE + (b * H + h) * S_q + i, tl.where(total > 0, safe_largest + tl.log(safe_total), float("-inf")))


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_lengths, Tensor? slopes, float scale, SymInt left, SymInt right, "
    "float softcap, SymInt splits"
)


@torch.library.custom_op(
    "flash_experts::attention_decode", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _decode(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, k_lengths, slopes, scale, left, right, softcap, splits = arguments
    B, S_q, H, C = q.shape
    S_k, G = k.shape[1:3]
    rows, block_c = S_q * (H // G), triton.next_power_of_2(C)
    out, lse = _empty_outputs(q)
    if out.numel() == 0:
        return out, lse
    parts = q.new_empty(B, G, splits, rows, C, dtype=torch.float32)
    lses = q.new_empty(B, G, splits, rows, dtype=torch.float32)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    limits = within_int32(left), within_int32(right)
    decode_kernel[(splits, B * G)](
        q, k, v, parts, lses, k_lengths, slopes, *strides,
        slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
        S_q, S_k, H, H // G, scale, softcap, *limits,
        C=C, BLOCK_C=block_c, SOFTCAP=softcap > 0, ALIBI=slopes is not None,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        BLOCK_R=max(triton.next_power_of_2(rows), 16), BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    combine_kernel[(rows, B * G)](
        parts, lses, out, lse, splits, rows, S_q, H, H // G,
        C=C, BLOCK_C=block_c, BLOCK_P=max(triton.next_power_of_2(splits), 2),
    )  # fmt: skip
    return out, lse


@_decode.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(q)


def _empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, S_q, H, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(B, H, S_q, dtype=torch.float32)


def suits(q_BSHC: torch.Tensor, k_BSGC: torch.Tensor, v_BSGC: torch.Tensor, options: AttentionOptions) -> bool:
    """Whether to use flash decoding: few queries, many keys, no dropout and no gradient."""
    rows = q_BSHC.shape[1] * (q_BSHC.shape[2] // k_BSGC.shape[2])
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BSHC, k_BSGC, v_BSGC))
    return 0 < rows <= MAX_ROWS and k_BSGC.shape[1] > 4 * _BLOCK_N and options.dropout == 0 and not wanted


def decode(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `flash_attention_triton.attention`, for few queries (S_q * H / G up to `MAX_ROWS`), forward only.

    ``splits`` None gives every multiprocessor two program instances.
    """
    assert options.dropout == 0, "decoding has no dropout"
    if splits is None:
        programs = q_BSHC.shape[0] * k_BSGC.shape[2]
        splits = max(1, min(2 * _multiprocessors(q_BSHC.device) // max(programs, 1), k_BSGC.shape[1] // _BLOCK_N))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BSHC, k_BSGC, v_BSGC))
    numbers = (options.scale, options.left, options.right, options.softcap)
    return _decode(q, k, v, k_lengths_B, options.alibi_slopes, *numbers, splits)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
