"""Grouped GEMM in Triton: the matmuls of the experts, rows sorted by expert, each group times its expert's matrix.

Passes over HBM are fused into the matmuls: the first gathers the tokens and applies bias and activation, the second
applies the gates and scatters back to token order. The number of rows per expert stays on the GPU: the grid covers the
largest possible number of tiles, and a program instance finds its expert by counting (MegaBlocks, Gale et al. 2022;
ScatterMoE, Tan et al. 2024).

Shape suffixes: T tokens, K experts per token, S = T * K pairs of them sorted by expert, E experts, D width,
F hidden units of an expert; a tile has M rows, N columns and the inner dimension I.
"""

from __future__ import annotations

import triton
import triton.language as tl

GELU_TANH: tl.constexpr = tl.constexpr(0)
GELU_ERF: tl.constexpr = tl.constexpr(1)
RELU: tl.constexpr = tl.constexpr(2)
SILU: tl.constexpr = tl.constexpr(3)


@triton.jit
def matmul(a, b, acc, UPCAST: tl.constexpr):
    """``acc + a @ b`` in float32. UPCAST: Triton's interpreter multiplies bfloat16 wrongly."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == GELU_TANH:  # x * sigmoid(2u) is x / 2 * (1 + tanh(u))
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        gate = sigmoid(u)
        value = x * gate
        slope = gate + value * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == GELU_ERF:
        gate = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * gate
        slope = gate + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == RELU:
        slope = tl.where(x > 0, 1.0, 0.0)
        value = x * slope
    else:
        gate = sigmoid(x)
        value = x * gate
        slope = gate + value * (1.0 - gate)
    return value, slope


@triton.jit
def place_of(pid, OFFSETS, E, num_n, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert (E if there is no work), first row, end of the expert's rows and column tile of a program instance."""
    # Consecutive instances share an expert's columns, so its weights come from the L2 cache.
    e_E = tl.arange(0, BLOCK_E)
    start_E = tl.load(OFFSETS + e_E, mask=e_E < E, other=0)
    end_E = tl.load(OFFSETS + e_E + 1, mask=e_E < E, other=0)
    tiles_E = tl.cdiv(end_E - start_E, BLOCK_M)
    last_E = tl.cumsum(tiles_E, 0)  # tiles of all experts up to this one
    m = pid // num_n
    e = tl.sum((last_E <= m).to(tl.int32), 0)
    mine_E = e_E == e
    tiles, before = tl.sum(tl.where(mine_E, tiles_E, 0), 0), tl.sum(tl.where(mine_E, last_E - tiles_E, 0), 0)
    within = pid - before * num_n  # number among the instances of this expert, column by column
    tiles = tl.maximum(tiles, 1)
    row = tl.sum(tl.where(mine_E, start_E, 0), 0) + (within % tiles) * BLOCK_M
    return tl.where(e < E, e, E), row, tl.sum(tl.where(mine_E, end_E, 0), 0), within // tiles


@triton.jit
def matmul_tile(
    A, W, a_row_M, inside_M, n_N, size_i, size_n, stride_a, stride_wi, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(M, N) float32: a tile of A @ W. EVEN: the inner dimension is a multiple of the tile."""
    i_I = tl.arange(0, BLOCK_I)
    a_rows = A + a_row_M.to(tl.int64)[:, None] * stride_a + i_I[None, :]
    w_rows = W + i_I[:, None] * stride_wi + n_N[None, :] * stride_wn
    inside_N = n_N < size_n
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, size_i, BLOCK_I):
        if EVEN:
            a_MI = tl.load(a_rows + i, mask=inside_M[:, None], other=0.0)
            w_IN = tl.load(w_rows + i * stride_wi, mask=inside_N[None, :], other=0.0)
        else:
            inside_I = i + i_I < size_i
            a_MI = tl.load(a_rows + i, mask=inside_M[:, None] & inside_I[None, :], other=0.0)
            w_IN = tl.load(w_rows + i * stride_wi, mask=inside_I[:, None] & inside_N[None, :], other=0.0)
        acc_MN = matmul(a_MI, w_IN, acc_MN, UPCAST)
    return acc_MN


@triton.jit
def up_kernel(
    X, W, BIAS, TOKEN, OFFSETS, HIDDEN, ACT, E, size_i, size_n, stride_a, stride_we, stride_wi, stride_wn, ROWS_BUCKET,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, BLOCK_E: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """ACT (S, F) = activation(X[token] @ W[e] + BIAS[e]); with KEEP also HIDDEN, the activation's input."""
    e, row, end, n = place_of(tl.program_id(0), OFFSETS, E, tl.cdiv(size_n, BLOCK_N), BLOCK_E, BLOCK_M)
    if e >= E:
        return
    s_M, n_N = row + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = s_M < end, n_N < size_n
    token_M = tl.load(TOKEN + s_M, mask=inside_M, other=0)
    weight = W + e.to(tl.int64) * stride_we
    hidden_MN = matmul_tile(
        X, weight, token_M, inside_M, n_N, size_i, size_n, stride_a, stride_wi, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_I, EVEN, UPCAST,
    )  # fmt: skip
    hidden_MN += tl.load(BIAS + e * size_n + n_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    here = s_M.to(tl.int64)[:, None] * size_n + n_N[None, :]
    inside = inside_M[:, None] & inside_N[None, :]
    # Rounded first: the backward recomputes the activation from the stored value.
    hidden_MN = hidden_MN.to(ACT.dtype.element_ty)
    if KEEP:
        tl.store(HIDDEN + here, hidden_MN, mask=inside)
    act_MN, _ = activated(hidden_MN.to(tl.float32), ACTIVATION)
    tl.store(ACT + here, act_MN.to(ACT.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    A, W, BIAS, GATE, PAIR, OFFSETS, OUT, E, size_i, size_n, stride_a, stride_we, stride_wi, stride_wn, ROWS_BUCKET,
    GATED: tl.constexpr, BLOCK_E: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """OUT[pair] = A[s] @ W[e], in token order; GATED: (A[s] @ W[e] + BIAS[e]) * GATE[pair]."""
    e, row, end, n = place_of(tl.program_id(0), OFFSETS, E, tl.cdiv(size_n, BLOCK_N), BLOCK_E, BLOCK_M)
    if e >= E:
        return
    s_M, n_N = row + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = s_M < end, n_N < size_n
    weight = W + e.to(tl.int64) * stride_we
    y_MN = matmul_tile(
        A, weight, s_M, inside_M, n_N, size_i, size_n, stride_a, stride_wi, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_I, EVEN, UPCAST,
    )  # fmt: skip
    pair_M = tl.load(PAIR + s_M, mask=inside_M, other=0)
    if GATED:
        y_MN += tl.load(BIAS + e * size_n + n_N, mask=inside_N, other=0.0).to(tl.float32)[None, :]
        y_MN *= tl.load(GATE + pair_M, mask=inside_M, other=0.0).to(tl.float32)[:, None]
    there = pair_M.to(tl.int64)[:, None] * size_n + n_N[None, :]
    tl.store(OUT + there, y_MN.to(OUT.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


@triton.jit
def hidden_gradient_kernel(
    DOUT, W, HIDDEN, GATE, TOKEN, PAIR, OFFSETS, DHIDDEN, GATED_ACT, DGATE,
    E, S, size_i, size_n, stride_a, stride_we, stride_wi, stride_wn, ROWS_BUCKET,
    ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """From DOUT[token] @ W[e]^T: DHIDDEN, GATED_ACT (for the weight gradients) and DGATE (F tiles, S), tile by tile."""
    e, row, end, n = place_of(tl.program_id(0), OFFSETS, E, tl.cdiv(size_n, BLOCK_N), BLOCK_E, BLOCK_M)
    if e >= E:
        return
    s_M, n_N = row + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = s_M < end, n_N < size_n
    token_M = tl.load(TOKEN + s_M, mask=inside_M, other=0)
    weight = W + e.to(tl.int64) * stride_we
    dact_MN = matmul_tile(
        DOUT, weight, token_M, inside_M, n_N, size_i, size_n, stride_a, stride_wi, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_I, EVEN, UPCAST,
    )  # fmt: skip
    here = s_M.to(tl.int64)[:, None] * size_n + n_N[None, :]
    inside = inside_M[:, None] & inside_N[None, :]
    hidden_MN = tl.load(HIDDEN + here, mask=inside, other=0.0).to(tl.float32)
    act_MN, slope_MN = activated(hidden_MN, ACTIVATION)
    pair_M = tl.load(PAIR + s_M, mask=inside_M, other=0)
    gate_M = tl.load(GATE + pair_M, mask=inside_M, other=0.0).to(tl.float32)
    tl.store(DGATE + n.to(tl.int64) * S + s_M, tl.sum(act_MN * dact_MN, 1), mask=inside_M)
    tl.store(DHIDDEN + here, (gate_M[:, None] * dact_MN * slope_MN).to(DHIDDEN.dtype.element_ty), mask=inside)
    tl.store(GATED_ACT + here, (gate_M[:, None] * act_MN).to(GATED_ACT.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    A, B, TOKEN, PAIR, GATE, OFFSETS, DW, DBIAS, size_a, size_b, ROWS_BUCKET,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """DW[e] (size_a, size_b) = A[rows]^T @ B[rows] over the expert's rows, and DBIAS[e], the sum of these rows of B.

    GATHER_B: B is indexed by token and, for the bias, multiplied by the gate (which A includes).
    """
    e = tl.program_id(1)
    num_b = tl.cdiv(size_b, BLOCK_N)
    m, n = tl.program_id(0) // num_b, tl.program_id(0) % num_b
    m_M, n_N, i_I = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_I)
    inside_M, inside_N = m_M < size_a, n_N < size_b
    begin, end = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_N = tl.zeros([BLOCK_N], tl.float32)
    for s in tl.range(begin, end, BLOCK_I):
        s_I = s + i_I
        inside_I = s_I < end
        a_row_I, b_row_I = s_I, s_I
        if GATHER_A or GATHER_B:
            token_I = tl.load(TOKEN + s_I, mask=inside_I, other=0)
            a_row_I = token_I if GATHER_A else s_I
            b_row_I = token_I if GATHER_B else s_I
        a_pointers = A + a_row_I.to(tl.int64)[:, None] * size_a + m_M[None, :]
        b_pointers = B + b_row_I.to(tl.int64)[:, None] * size_b + n_N[None, :]
        a_IM = tl.load(a_pointers, mask=inside_I[:, None] & inside_M[None, :], other=0.0)
        b_IN = tl.load(b_pointers, mask=inside_I[:, None] & inside_N[None, :], other=0.0)
        acc_MN = matmul(tl.trans(a_IM), b_IN, acc_MN, UPCAST)
        if m == 0:
            wide_IN = b_IN.to(tl.float32)
            if GATHER_B:
                pair_I = tl.load(PAIR + s_I, mask=inside_I, other=0)
                wide_IN *= tl.load(GATE + pair_I, mask=inside_I, other=0.0).to(tl.float32)[:, None]
            bias_N += tl.sum(wide_IN, 0)
    here = e.to(tl.int64) * size_a * size_b + m_M.to(tl.int64)[:, None] * size_b + n_N[None, :]
    tl.store(DW + here, acc_MN.to(DW.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])
    if m == 0:
        tl.store(DBIAS + e * size_b + n_N, bias_N.to(DBIAS.dtype.element_ty), mask=inside_N)
