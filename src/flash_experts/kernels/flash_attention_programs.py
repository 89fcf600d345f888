"""Flash attention in Triton: the forward kernel.

A program instance iterates over the keys that its queries see with the online softmax (Dao 2022, algorithm 1; Dao
2023, section 3.1). Each query sees one range of keys, [low, high), which moves right from query to query. So the keys
of a tile fall into a masked left edge, fully visible tiles that need no mask, and a masked right edge.

Three layouts share the kernels:

- dense: (B, S, H, C), sequences of equal length, or with keys cut to ``K_LENGTHS``;
- ragged: documents in one (T, H, C), each with program instances of its own (``CU_Q``, ``CU_K``);
- packed: the same for self-attention, with tiles that span many short documents (``DOC``).

Shape suffixes: M queries of a tile, N keys of a tile, C head dim (BLOCK_C: the next power of two).
Scores are in units of log 2, since the hardware has exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, first, rows_R, stride, last, C: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr):
    """(R, BLOCK_C) rows ``first + rows_R``; with MASKED, those from ``last`` on are zero."""
    c_C = tl.arange(0, BLOCK_C)
    pointers = base + tl.cast(first, tl.int64) * stride + rows_R[:, None] * stride + c_C[None, :]
    if MASKED:
        inside = (first + rows_R < last)[:, None]
        if C != BLOCK_C:
            inside = inside & (c_C < C)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if C != BLOCK_C:
        return tl.load(pointers, mask=(c_C < C)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, first, rows_R, stride, last, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Writes (R, BLOCK_C) to the rows ``first + rows_R`` before ``last``."""
    c_C = tl.arange(0, BLOCK_C)
    pointers = base + tl.cast(first, tl.int64) * stride + rows_R[:, None] * stride + c_C[None, :]
    inside = (first + rows_R < last)[:, None] & (c_C < C)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def matmul(a, b, UPCAST: tl.constexpr):
    """``a @ b`` accumulated in float32. UPCAST: Triton's interpreter multiplies bfloat16 wrongly."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sequence_of(b, CU_Q, CU_K, K_LENGTHS, S_q, S_k, RAGGED: tl.constexpr):
    """First query, first key, and numbers of queries and keys of document b."""
    q_start, k_start, num_q, num_k = 0, 0, S_q, S_k
    if RAGGED:
        q_start = tl.load(CU_Q + b)
        k_start = tl.load(CU_K + b)
        num_q = tl.load(CU_Q + b + 1) - q_start
        num_k = tl.load(CU_K + b + 1) - k_start
    elif K_LENGTHS is not None:
        num_k = tl.load(K_LENGTHS + b)
    return q_start, k_start, num_q, num_k


@triton.jit
def documents_of(rows_R, b, num_others, CU, DOC, PACKED: tl.constexpr):
    """Each row's document, and the rows [start, end) of that document on the other side."""
    if PACKED:
        doc_R = tl.load(DOC + rows_R)
        start_R = tl.load(CU + doc_R)
        end_R = tl.load(CU + doc_R + 1)
    else:
        start_R = tl.zeros_like(rows_R)
        doc_R = start_R + b
        end_R = start_R + num_others
    return doc_R, start_R, end_R


@triton.jit
def visible_range(rows_R, start_R, end_R, shift, before, after, PACKED: tl.constexpr):
    """The range [low, high) on the other side that each row sees (or is seen by), around ``row + shift``."""
    low_R = tl.maximum(rows_R + shift - before, start_R)
    high_R = tl.minimum(rows_R + shift + after + 1, end_R)
    if PACKED:  # rows after the last document have an empty range
        high_R = tl.where(rows_R < end_R, high_R, low_R)
    return low_R, high_R


@triton.jit
def ranges_of(low_R, high_R, BLOCK: tl.constexpr, LEFT_EDGE: tl.constexpr):
    """first, whole_from, whole_to, last: only [first, last) is visible, and [whole_from, whole_to) needs no mask."""
    first = tl.min(low_R, 0)
    last = tl.max(high_R, 0)
    whole_from = first
    if LEFT_EDGE:
        whole_from = tl.minimum(first + tl.cdiv(tl.max(low_R, 0) - first, BLOCK) * BLOCK, tl.maximum(first, last))
    whole_to = whole_from + tl.maximum(tl.min(high_R, 0) - whole_from, 0) // BLOCK * BLOCK
    return first, whole_from, whole_to, last


@triton.jit
def capped(x, softcap):
    """tanh(x / softcap), in [-1, 1] for every x."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E / softcap)) + 1.0)


@triton.jit
def scores_of(qk, distance, slope, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores, their factor to units of log 2 (fused into the exponent), and the derivative of the softcap."""
    derivative = 1.0
    factor = scale * LOG2E
    if SOFTCAP:
        tanh = capped(qk * scale, softcap)
        derivative = 1.0 - tanh * tanh
        qk = tanh * (softcap * LOG2E)
        factor = 1.0
    if ALIBI:
        if not SOFTCAP:
            qk = qk * factor
            factor = 1.0
        qk -= (slope * LOG2E) * tl.abs(distance).to(tl.float32)
    return qk, factor, derivative


@triton.jit
def kept(SEED, head, i, j, dropout):
    """Dropout mask of query i and key j: a pure function of seed and position."""
    i, j, head = tl.broadcast(i, j)[0], tl.broadcast(i, j)[1], tl.broadcast(head, j)[0]
    bits, _, _, _ = tl.philox(tl.load(SEED), j, i, head, j * 0)
    return tl.uint_to_uniform_float(bits) > dropout


@triton.jit
def attend(
    acc_MC, sum_M, max_M, q_MC, K, V, stride_ks, stride_vs, begin, end, last,
    i_M, doc_head_M, start_M, low_M, high_M, shift, slope_M, SEED, scale, softcap, dropout,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax over the keys [begin, end)."""
    n_N = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        k_NC = load_rows(K, n, n_N, stride_ks, last, C, BLOCK_C, MASKED)
        j_N = n + n_N
        qk_MN = matmul(q_MC, tl.trans(k_NC), UPCAST)
        distance_MN = (i_M + shift)[:, None] - j_N[None, :]
        score_MN, factor, _ = scores_of(qk_MN, distance_MN, slope_M[:, None], scale, softcap, SOFTCAP, ALIBI)
        if MASKED:
            visible_MN = (j_N[None, :] >= low_M[:, None]) & (j_N[None, :] < high_M[:, None])
            score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * factor)
        safe_max_M = new_max_M
        if MASKED:  # no visible key so far: exp2(-inf - 0) is 0, but exp2(-inf + inf) is NaN
            safe_max_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        p_MN = tl.exp2(score_MN * factor - safe_max_M[:, None])
        rescale_M = tl.exp2(max_M - safe_max_M)
        sum_M = sum_M * rescale_M + tl.sum(p_MN, 1)
        if DROPOUT:
            i_in_doc, j_in_doc = (i_M - start_M)[:, None], j_N[None, :] - start_M[:, None]
            p_MN = tl.where(kept(SEED, doc_head_M[:, None], i_in_doc, j_in_doc, dropout), p_MN, 0.0)
        v_NC = load_rows(V, n, n_N, stride_vs, last, C, BLOCK_C, MASKED)
        acc_MC = acc_MC * rescale_M[:, None] + matmul(p_MN.to(v_NC.dtype), v_NC, UPCAST)
        max_M = new_max_M
    return acc_MC, sum_M, max_M


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, CU_Q, CU_K, K_LENGTHS, DOC, SLOPES, SEED,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_slopes,
    S_q, S_k, H, GROUP, scale, softcap, left, right, dropout, LENGTH_BUCKET,
    C: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT and LSE of BLOCK_M queries of head h of document b. Grid: (query tiles, B * H)."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tile = tl.program_id(0)
    if CAUSAL and not PACKED:  # the last queries see the most keys: start with the longest work
        tile = tl.num_programs(0) - 1 - tile
    q_start, k_start, num_q, num_k = sequence_of(b, CU_Q, CU_K, K_LENGTHS, S_q, S_k, RAGGED)
    m = tile * BLOCK_M
    if m >= num_q:
        return
    b, q_start, k_start = tl.cast(b, tl.int64), tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    Q += b * stride_qb + q_start * stride_qs + h * stride_qh
    K += b * stride_kb + k_start * stride_ks + (h // GROUP) * stride_kh
    V += b * stride_vb + k_start * stride_vs + (h // GROUP) * stride_vh
    OUT += b * stride_ob + q_start * stride_os + h * stride_oh
    LSE += b * stride_lb + q_start + h * stride_lh

    m_M = tl.arange(0, BLOCK_M)
    i_M = tl.minimum(m + m_M, num_q - 1)  # rows past the end repeat the last one, and are not stored
    doc_M, start_M, end_M = documents_of(i_M, tl.cast(b, tl.int32), num_k, CU_K, DOC, PACKED)
    shift = num_k - num_q
    low_M, high_M = visible_range(i_M, start_M, end_M, shift, left, right, PACKED)
    first, whole_from, whole_to, last = ranges_of(low_M, high_M, BLOCK_N, LEFT_EDGE)
    slope_M = tl.load(SLOPES + doc_M * stride_slopes + h) if ALIBI else tl.zeros([BLOCK_M], tl.float32)

    q_MC = load_rows(Q, m, m_M, stride_qs, num_q, C, BLOCK_C, True)
    acc_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for edge in tl.static_range(3):
        if edge != 0 or LEFT_EDGE:
            begin = first if edge == 0 else (whole_from if edge == 1 else whole_to)
            end = whole_from if edge == 0 else (whole_to if edge == 1 else last)
            acc_MC, sum_M, max_M = attend(
                acc_MC, sum_M, max_M, q_MC, K, V, stride_ks, stride_vs, begin, end, last,
                i_M, doc_M * H + h, start_M, low_M, high_M, shift, slope_M, SEED, scale, softcap, dropout,
                C, BLOCK_C, BLOCK_N, edge != 1, SOFTCAP, ALIBI, DROPOUT, UPCAST,
            )  # fmt: skip

    seen_M = sum_M > 0
    safe_sum_M = tl.where(seen_M, sum_M, 1.0)
    out_MC = acc_MC / (safe_sum_M * (1.0 - dropout))[:, None]
    store_rows(OUT, m, m_M, stride_os, num_q, out_MC, C, BLOCK_C)
    lse_M = tl.where(seen_M, max_M * LN2 + tl.log(safe_sum_M), float("-inf"))
    tl.store(LSE + m + m_M, lse_M, mask=m + m_M < num_q)
