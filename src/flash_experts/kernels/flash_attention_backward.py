"""Flash attention in Triton: the backward kernels (Dao 2022, algorithm 4; Dao 2023, section 3.1).

The weights are recomputed from q, k and the log-sum-exp: p = exp(score - lse). With delta_i = sum_c out_ic * dout_ic,
the gradient of a score is ds = p * (dout . v - delta).

`keys_kernel` sums over queries into dk and dv, `queries_kernel` over keys into dq. Scores are computed twice (seven
matmuls instead of five), but without atomics, so gradients are bitwise reproducible.

Shape suffixes: M queries, N keys of a tile, C head dim. `keys_kernel` uses transposed tiles (N, M), the register layout
that the next matmul needs on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_experts.kernels.flash_attention_programs import (
    LOG2E,
    documents_of,
    kept,
    load_rows,
    matmul,
    ranges_of,
    scores_of,
    sequence_of,
    store_rows,
    visible_range,
)


@triton.jit
def delta_kernel(
    OUT, DOUT, DELTA, stride_ob, stride_os, stride_oh, stride_db, stride_ds, stride_dh, stride_lb, stride_lh, S, H,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DELTA, the sum over C of out * dout, for each query and head. Grid: (query tiles, B * H)."""
    b, h = tl.cast(tl.program_id(1) // H, tl.int64), tl.program_id(1) % H
    m, m_M = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M)
    out_MC = load_rows(OUT + b * stride_ob + h * stride_oh, m, m_M, stride_os, S, C, BLOCK_C, True)
    dout_MC = load_rows(DOUT + b * stride_db + h * stride_dh, m, m_M, stride_ds, S, C, BLOCK_C, True)
    delta_M = tl.sum(out_MC.to(tl.float32) * dout_MC.to(tl.float32), 1)
    tl.store(DELTA + b * stride_lb + h * stride_lh + m + m_M, delta_M, mask=m + m_M < S)


@triton.jit
def sum_over_queries(
    dk_NC, dv_NC, k_NC, v_NC, Q, DOUT, LSE, DELTA, stride_qs, stride_ds, begin, end, last,
    j_N, doc_head_N, start_N, low_N, high_N, shift, slope_N, SEED, scale, softcap, dropout,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the queries [begin, end) to dk (unscaled) and dv of a tile of keys."""
    m_M = tl.arange(0, BLOCK_M)
    for m in tl.range(begin, end, BLOCK_M):
        q_MC = load_rows(Q, m, m_M, stride_qs, last, C, BLOCK_C, MASKED)
        i_M = m + m_M
        inside_M = i_M < last
        lse_M = tl.load(LSE + i_M, mask=inside_M, other=0.0) * LOG2E
        qk_NM = matmul(k_NC, tl.trans(q_MC), UPCAST)
        distance_NM = i_M[None, :] + shift - j_N[:, None]
        score_NM, factor, derivative = scores_of(qk_NM, distance_NM, slope_N[:, None], scale, softcap, SOFTCAP, ALIBI)
        p_NM = tl.exp2(score_NM * factor - lse_M[None, :])
        if MASKED:
            visible_NM = (i_M[None, :] >= low_N[:, None]) & (i_M[None, :] < high_N[:, None])
            p_NM = tl.where(visible_NM, p_NM, 0.0)
        dout_MC = load_rows(DOUT, m, m_M, stride_ds, last, C, BLOCK_C, MASKED)
        dp_NM = matmul(v_NC, tl.trans(dout_MC), UPCAST)
        used_NM = p_NM
        if DROPOUT:
            i_in_doc, j_in_doc = i_M[None, :] - start_N[:, None], (j_N - start_N)[:, None]
            keep_NM = kept(SEED, doc_head_N[:, None], i_in_doc, j_in_doc, dropout)
            used_NM = tl.where(keep_NM, p_NM / (1.0 - dropout), 0.0)
            dp_NM = tl.where(keep_NM, dp_NM / (1.0 - dropout), 0.0)
        dv_NC += matmul(used_NM.to(dout_MC.dtype), dout_MC, UPCAST)
        delta_M = tl.load(DELTA + i_M, mask=inside_M, other=0.0)
        ds_NM = p_NM * (dp_NM - delta_M[None, :]) * derivative
        dk_NC += matmul(ds_NM.to(q_MC.dtype), q_MC, UPCAST)
    return dk_NC, dv_NC


@triton.jit
def keys_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, CU_Q, CU_K, K_LENGTHS, DOC, SLOPES, SEED,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh, stride_dkb, stride_dks, stride_dkh, stride_lb, stride_lh, stride_slopes,
    S_q, S_k, H, GROUP, scale, softcap, left, right, dropout, LENGTH_BUCKET,
    C: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DK and DV of BLOCK_N keys of key/value head g of document b. Grid: (key tiles, B * H / GROUP)."""
    b, g = tl.program_id(1) // (H // GROUP), tl.program_id(1) % (H // GROUP)
    q_start, k_start, num_q, num_k = sequence_of(b, CU_Q, CU_K, K_LENGTHS, S_q, S_k, RAGGED)
    n = tl.program_id(0) * BLOCK_N
    if n >= num_k:
        return
    b, q_start, k_start = tl.cast(b, tl.int64), tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    K += b * stride_kb + k_start * stride_ks + g * stride_kh
    V += b * stride_vb + k_start * stride_vs + g * stride_vh
    n_N = tl.arange(0, BLOCK_N)
    j_N = tl.minimum(n + n_N, num_k - 1)
    doc_N, start_N, end_N = documents_of(j_N, tl.cast(b, tl.int32), num_q, CU_Q, DOC, PACKED)
    shift = num_k - num_q
    low_N, high_N = visible_range(j_N, start_N, end_N, -shift, right, left, PACKED)
    first, whole_from, whole_to, last = ranges_of(low_N, high_N, BLOCK_M, LEFT_EDGE)

    k_NC = load_rows(K, n, n_N, stride_ks, num_k, C, BLOCK_C, True)
    v_NC = load_rows(V, n, n_N, stride_vs, num_k, C, BLOCK_C, True)
    dk_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dv_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for head in range(GROUP):  # the query heads that share this key/value head
        h = g * GROUP + head
        q_rows = Q + b * stride_qb + q_start * stride_qs + h * stride_qh
        dout_rows = DOUT + b * stride_db + q_start * stride_ds + h * stride_dh
        place = b * stride_lb + q_start + h * stride_lh
        slope_N = tl.load(SLOPES + doc_N * stride_slopes + h) if ALIBI else tl.zeros([BLOCK_N], tl.float32)
        for edge in tl.static_range(3):
            if edge != 0 or LEFT_EDGE:
                begin = first if edge == 0 else (whole_from if edge == 1 else whole_to)
                end = whole_from if edge == 0 else (whole_to if edge == 1 else last)
                dk_NC, dv_NC = sum_over_queries(
                    dk_NC, dv_NC, k_NC, v_NC, q_rows, dout_rows, LSE + place, DELTA + place, stride_qs, stride_ds,
                    begin, end, last, j_N, doc_N * H + h, start_N, low_N, high_N, shift, slope_N, SEED,
                    scale, softcap, dropout, C, BLOCK_C, BLOCK_M, edge != 1, SOFTCAP, ALIBI, DROPOUT, UPCAST,
                )  # fmt: skip
    place = b * stride_dkb + k_start * stride_dks + g * stride_dkh
    store_rows(DK + place, n, n_N, stride_dks, num_k, dk_NC * scale, C, BLOCK_C)
    store_rows(DV + place, n, n_N, stride_dks, num_k, dv_NC, C, BLOCK_C)


@triton.jit
def sum_over_keys(
    dq_MC, q_MC, dout_MC, lse_M, delta_M, K, V, stride_ks, stride_vs, begin, end, last,
    i_M, doc_head_M, start_M, low_M, high_M, shift, slope_M, SEED, scale, softcap, dropout,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end) to dq (unscaled) of a tile of queries."""
    n_N = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        k_NC = load_rows(K, n, n_N, stride_ks, last, C, BLOCK_C, MASKED)
        v_NC = load_rows(V, n, n_N, stride_vs, last, C, BLOCK_C, MASKED)
        j_N = n + n_N
        qk_MN = matmul(q_MC, tl.trans(k_NC), UPCAST)
        distance_MN = (i_M + shift)[:, None] - j_N[None, :]
        score_MN, factor, derivative = scores_of(qk_MN, distance_MN, slope_M[:, None], scale, softcap, SOFTCAP, ALIBI)
        p_MN = tl.exp2(score_MN * factor - lse_M[:, None])
        if MASKED:
            visible_MN = (j_N[None, :] >= low_M[:, None]) & (j_N[None, :] < high_M[:, None])
            p_MN = tl.where(visible_MN, p_MN, 0.0)
        dp_MN = matmul(dout_MC, tl.trans(v_NC), UPCAST)
        if DROPOUT:
            i_in_doc, j_in_doc = (i_M - start_M)[:, None], j_N[None, :] - start_M[:, None]
            keep_MN = kept(SEED, doc_head_M[:, None], i_in_doc, j_in_doc, dropout)
            dp_MN = tl.where(keep_MN, dp_MN / (1.0 - dropout), 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * derivative
        dq_MC += matmul(ds_MN.to(k_NC.dtype), k_NC, UPCAST)
    return dq_MC


@triton.jit
def queries_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, CU_Q, CU_K, K_LENGTHS, DOC, SLOPES, SEED,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh, stride_dqb, stride_dqs, stride_dqh, stride_lb, stride_lh, stride_slopes,
    S_q, S_k, H, GROUP, scale, softcap, left, right, dropout, LENGTH_BUCKET,
    C: tl.constexpr, BLOCK_C: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DQ of BLOCK_M queries of head h of document b. Grid: (query tiles, B * H)."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    tile = tl.program_id(0)
    if CAUSAL and not PACKED:
        tile = tl.num_programs(0) - 1 - tile
    q_start, k_start, num_q, num_k = sequence_of(b, CU_Q, CU_K, K_LENGTHS, S_q, S_k, RAGGED)
    m = tile * BLOCK_M
    if m >= num_q:
        return
    b, q_start, k_start = tl.cast(b, tl.int64), tl.cast(q_start, tl.int64), tl.cast(k_start, tl.int64)
    Q += b * stride_qb + q_start * stride_qs + h * stride_qh
    K += b * stride_kb + k_start * stride_ks + (h // GROUP) * stride_kh
    V += b * stride_vb + k_start * stride_vs + (h // GROUP) * stride_vh
    DOUT += b * stride_db + q_start * stride_ds + h * stride_dh
    DQ += b * stride_dqb + q_start * stride_dqs + h * stride_dqh
    place = b * stride_lb + q_start + h * stride_lh

    m_M = tl.arange(0, BLOCK_M)
    i_M = tl.minimum(m + m_M, num_q - 1)
    doc_M, start_M, end_M = documents_of(i_M, tl.cast(b, tl.int32), num_k, CU_K, DOC, PACKED)
    shift = num_k - num_q
    low_M, high_M = visible_range(i_M, start_M, end_M, shift, left, right, PACKED)
    first, whole_from, whole_to, last = ranges_of(low_M, high_M, BLOCK_N, LEFT_EDGE)
    slope_M = tl.load(SLOPES + doc_M * stride_slopes + h) if ALIBI else tl.zeros([BLOCK_M], tl.float32)

    q_MC = load_rows(Q, m, m_M, stride_qs, num_q, C, BLOCK_C, True)
    dout_MC = load_rows(DOUT, m, m_M, stride_ds, num_q, C, BLOCK_C, True)
    lse_M = tl.load(LSE + place + i_M) * LOG2E
    delta_M = tl.load(DELTA + place + i_M)
    dq_MC = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for edge in tl.static_range(3):
        if edge != 0 or LEFT_EDGE:
            begin = first if edge == 0 else (whole_from if edge == 1 else whole_to)
            end = whole_from if edge == 0 else (whole_to if edge == 1 else last)
            dq_MC = sum_over_keys(
                dq_MC, q_MC, dout_MC, lse_M, delta_M, K, V, stride_ks, stride_vs, begin, end, last,
                i_M, doc_M * H + h, start_M, low_M, high_M, shift, slope_M, SEED, scale, softcap, dropout,
                C, BLOCK_C, BLOCK_N, edge != 1, SOFTCAP, ALIBI, DROPOUT, UPCAST,
            )  # fmt: skip
    store_rows(DQ, m, m_M, stride_dqs, num_q, dq_MC * scale, C, BLOCK_C)
