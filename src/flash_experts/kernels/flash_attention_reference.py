"""Flash attention in plain PyTorch, tile by tile, to read next to the papers.

Dao et al. 2022, "FlashAttention", and Dao 2023, "FlashAttention-2" (Algorithms 1 and 2). Attention is
``softmax(scale * q k^T) v``. Of the (S_q, S_k) matrix of scores only one tile is materialised at a time:

1. Online softmax (`_forward_tile`): going through the keys, each query keeps the running maximum of its scores, the sum
   of exp(score - maximum), and the weighted sum of the values. When the maximum grows, both sums are rescaled by
   exp(old maximum - new maximum).
2. Recomputation (`_backward_tile`): the backward computes each tile of weights again as exp(score - LSE) from the
   log-sum-exp (LSE), one number per query.
3. The softmax's gradient needs the row sum ``sum_j weight_ij * dweight_ij``, which equals ``sum_c dout_ic * out_ic``
   (delta).

Fully masked tiles are skipped, so causal attention costs half.

Shape suffixes: B sequences, S length, H query heads, G key/value heads, R = H / G query heads that share a
key/value head, C head dim, M queries of a tile, N keys of a tile, T tokens of a packed sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths


@dataclass(frozen=True, slots=True)
class _Part:
    """Sequences of equal length: a whole batch, one sequence with its own keys, or a packed document."""

    batch: slice
    queries: slice
    keys: slice
    first: int  # number of the first sequence, for ALiBi slopes and dropout

    def sequences(self) -> range:
        return range(self.first, self.first + self.batch.stop - self.batch.start)


@dataclass(frozen=True, slots=True)
class _Mask:
    """Query i sees keys i + offset - left to i + offset + right; infinity is no limit."""

    num_queries: int
    num_keys: int
    left: float
    right: float

    @classmethod
    def of(cls, part: _Part, options: AttentionOptions) -> _Mask:
        left, right = (math.inf if limit < 0 else limit for limit in (options.left, options.right))
        return cls(part.queries.stop - part.queries.start, part.keys.stop - part.keys.start, left, right)

    @property
    def offset(self) -> int:
        """Bottom-right alignment: the last query stands at the last key."""
        return self.num_keys - self.num_queries

    def keys_seen(self, queries: range) -> range:
        first = max(0, queries.start + self.offset - self.left)
        last = min(self.num_keys - 1, queries.stop - 1 + self.offset + self.right)
        return range(int(first), int(last) + 1)

    def queries_seeing(self, keys: range) -> range:
        first = max(0, keys.start - self.offset - self.right)
        last = min(self.num_queries - 1, keys.stop - 1 - self.offset + self.left)
        return range(int(first), int(last) + 1)

    def is_full(self, queries: range, keys: range) -> bool:
        sees_first = keys.start >= queries.stop - 1 + self.offset - self.left
        sees_last = keys.stop - 1 <= queries.start + self.offset + self.right
        return sees_first and sees_last


def _tiles(positions: range, size: int) -> Iterator[range]:
    for start in range(positions.start, positions.stop, size):
        yield range(start, min(start + size, positions.stop))


class _Scores:
    def __init__(self, part: _Part, options: AttentionOptions, heads: int, groups: int):
        self.part, self.options, self.heads, self.groups = part, options, heads, groups
        self.mask = _Mask.of(part, options)

    def tile(
        self, q_BGRMC: torch.Tensor, k_BGNC: torch.Tensor, queries: range, keys: range
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scores (B, G, R, M, N), -inf where masked, and their derivative by ``q k^T``."""
        options = self.options
        score_BGRMN = options.scale * torch.einsum("bgrmc,bgnc->bgrmn", q_BGRMC, k_BGNC)
        derivative: torch.Tensor | float = options.scale
        if options.softcap > 0:
            capped_BGRMN = torch.tanh(score_BGRMN / options.softcap)
            score_BGRMN = options.softcap * capped_BGRMN
            derivative = options.scale * (1 - capped_BGRMN**2)
        is_full = self.mask.is_full(queries, keys)
        if is_full and options.alibi_slopes is None:
            return score_BGRMN, derivative
        place_M = torch.arange(queries.start, queries.stop, device=q_BGRMC.device) + self.mask.offset
        distance_MN = place_M[:, None] - torch.arange(keys.start, keys.stop, device=q_BGRMC.device)
        if options.alibi_slopes is not None:
            slopes = self._slopes(options.alibi_slopes).to(score_BGRMN.dtype)
            score_BGRMN = score_BGRMN - slopes * distance_MN.abs()
        if not is_full:
            visible_MN = (distance_MN <= self.mask.left) & (distance_MN >= -self.mask.right)
            score_BGRMN = score_BGRMN.masked_fill(~visible_MN, -math.inf)
        return score_BGRMN, derivative

    def _slopes(self, slopes: torch.Tensor) -> torch.Tensor:
        """(H,) or (B, H) to this part's (1 or B, G, R, 1, 1)."""
        if slopes.dim() == 2:
            slopes = slopes[self.part.sequences().start : self.part.sequences().stop]
        return slopes.reshape(-1, self.groups, self.heads // self.groups, 1, 1)

    def drop(self, weight_BGRMN: torch.Tensor, queries: range, keys: range) -> torch.Tensor:
        """Weights (or gradients) after dropout; kept ones are divided by 1 - p."""
        p, seed = self.options.dropout, self.options.seed
        if seed is None:
            return weight_BGRMN
        keep_BHMN = dropout_keep_mask(seed, self.part.sequences(), self.heads, queries, keys, p)
        return weight_BGRMN * keep_BHMN.unflatten(1, (self.groups, -1)) / (1 - p)


def _forward_tile(
    scores: _Scores, q_BGRMC: torch.Tensor, k_BGSC: torch.Tensor, v_BGSC: torch.Tensor, queries: range, block_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2, Algorithm 1, for one tile of queries: output and log-sum-exp."""
    out_BGRMC = torch.zeros_like(q_BGRMC)
    sum_BGRM = q_BGRMC.new_zeros(q_BGRMC.shape[:-1])
    max_BGRM = torch.full_like(sum_BGRM, -math.inf)
    for keys in _tiles(scores.mask.keys_seen(queries), block_k):
        k_BGNC, v_BGNC = (x[:, :, keys.start : keys.stop].to(q_BGRMC.dtype) for x in (k_BGSC, v_BGSC))
        score_BGRMN, _ = scores.tile(q_BGRMC, k_BGNC, queries, keys)
        new_max_BGRM = torch.maximum(max_BGRM, score_BGRMN.amax(-1))
        # A query without a visible key so far has the maximum -inf; any finite number serves, as all its terms are 0.
        shift_BGRM = new_max_BGRM.masked_fill(new_max_BGRM == -math.inf, 0)
        weight_BGRMN = torch.exp(score_BGRMN - shift_BGRM[..., None])
        rescale_BGRM = torch.exp(max_BGRM - shift_BGRM)
        sum_BGRM = sum_BGRM * rescale_BGRM + weight_BGRMN.sum(-1)
        kept_BGRMN = scores.drop(weight_BGRMN, queries, keys)
        out_BGRMC = out_BGRMC * rescale_BGRM[..., None] + torch.einsum("bgrmn,bgnc->bgrmc", kept_BGRMN, v_BGNC)
        max_BGRM = new_max_BGRM
    saw_nothing_BGRM = sum_BGRM == 0
    out_BGRMC = out_BGRMC / sum_BGRM.masked_fill(saw_nothing_BGRM, 1)[..., None]
    return out_BGRMC, max_BGRM + torch.log(sum_BGRM)  # -inf for fully masked queries


def _backward_tile(
    scores: _Scores,
    q: dict[str, torch.Tensor],
    k_BGNC: torch.Tensor,
    v_BGNC: torch.Tensor,
    keys: range,
    block_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2, Algorithm 2, for one tile of keys: returns dk and dv, and adds to ``q["dq"]`` in place."""
    dk_BGNC, dv_BGNC = torch.zeros_like(k_BGNC), torch.zeros_like(v_BGNC)
    for queries in _tiles(scores.mask.queries_seeing(keys), block_q):
        rows = slice(queries.start, queries.stop)
        q_BGRMC, dout_BGRMC = (q[name][:, :, :, rows].to(k_BGNC.dtype) for name in ("q", "dout"))
        lse_BGRM, delta_BGRM = q["lse"][:, :, :, rows], q["delta"][:, :, :, rows]
        score_BGRMN, derivative = scores.tile(q_BGRMC, k_BGNC, queries, keys)
        weight_BGRMN = torch.exp(score_BGRMN - lse_BGRM.masked_fill(lse_BGRM == -math.inf, 0)[..., None])
        dv_BGNC += torch.einsum("bgrmn,bgrmc->bgnc", scores.drop(weight_BGRMN, queries, keys), dout_BGRMC)
        dkept_BGRMN = torch.einsum("bgrmc,bgnc->bgrmn", dout_BGRMC, v_BGNC)
        dweight_BGRMN = scores.drop(dkept_BGRMN, queries, keys)
        dscore_BGRMN = weight_BGRMN * (dweight_BGRMN - delta_BGRM[..., None]) * derivative
        q["dq"][:, :, :, rows] += torch.einsum("bgrmn,bgnc->bgrmc", dscore_BGRMN, k_BGNC)
        dk_BGNC += torch.einsum("bgrmn,bgrmc->bgnc", dscore_BGRMN, q_BGRMC)  # sums over the heads of the group
    return dk_BGNC, dv_BGNC


class _FlashAttention(torch.autograd.Function):
    """(B, S, H, C) inputs, in parts; computed in float32, or float64 for float64 inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHC: torch.Tensor,
        k_BSGC: torch.Tensor,
        v_BSGC: torch.Tensor,
        options: AttentionOptions,
        parts: list[_Part],
        block_q: int,
        block_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        H, G = q_BSHC.shape[2], k_BSGC.shape[2]
        dtype = torch.promote_types(q_BSHC.dtype, torch.float32)
        out_BSHC = torch.empty_like(q_BSHC, memory_format=torch.contiguous_format)
        lse_BHS = q_BSHC.new_empty(q_BSHC.shape[0], H, q_BSHC.shape[1], dtype=dtype)
        for part in parts:
            scores = _Scores(part, options, H, G)
            q, out = (_query_heads(x[part.batch, part.queries], G) for x in (q_BSHC, out_BSHC))
            k, v = (x[part.batch, part.keys].transpose(1, 2) for x in (k_BSGC, v_BSGC))
            lse = lse_BHS[part.batch, :, part.queries].unflatten(1, (G, -1))
            for queries in _tiles(range(scores.mask.num_queries), block_q):
                rows = slice(queries.start, queries.stop)
                tile = _forward_tile(scores, q[:, :, :, rows].to(dtype), k, v, queries, block_k)
                out[:, :, :, rows], lse[:, :, :, rows] = tile
        ctx.save_for_backward(q_BSHC, k_BSGC, v_BSGC, out_BSHC, lse_BHS)
        ctx.settings = options, parts, block_q, block_k
        ctx.mark_non_differentiable(lse_BHS)
        return out_BSHC, lse_BHS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHC: torch.Tensor, _dlse: Any) -> tuple[torch.Tensor | None, ...]:
        q_BSHC, k_BSGC, v_BSGC, out_BSHC, lse_BHS = ctx.saved_tensors
        options, parts, block_q, block_k = ctx.settings
        H, G = q_BSHC.shape[2], k_BSGC.shape[2]
        dq_BSHC = torch.zeros_like(q_BSHC, dtype=lse_BHS.dtype)
        dk_BSGC, dv_BSGC = torch.zeros_like(k_BSGC), torch.zeros_like(v_BSGC)
        delta_BHS = torch.linalg.vecdot(dout_BSHC.to(lse_BHS.dtype), out_BSHC.to(lse_BHS.dtype)).transpose(1, 2)
        for part in parts:
            scores = _Scores(part, options, H, G)
            of_queries = {
                name: _query_heads(x[part.batch, part.queries], G)
                for name, x in (("q", q_BSHC), ("dq", dq_BSHC), ("dout", dout_BSHC))
            }
            for name, x in (("lse", lse_BHS), ("delta", delta_BHS)):
                of_queries[name] = x[part.batch, :, part.queries].unflatten(1, (G, -1))
            k, v, dk, dv = (x[part.batch, part.keys].transpose(1, 2) for x in (k_BSGC, v_BSGC, dk_BSGC, dv_BSGC))
            for keys in _tiles(range(scores.mask.num_keys), block_k):
                columns = slice(keys.start, keys.stop)
                k_BGNC, v_BGNC = (x[:, :, columns].to(lse_BHS.dtype) for x in (k, v))
                dk[:, :, columns], dv[:, :, columns] = _backward_tile(scores, of_queries, k_BGNC, v_BGNC, keys, block_q)
        return dq_BSHC.to(q_BSHC.dtype), dk_BSGC, dv_BSGC, None, None, None, None


def _query_heads(x_BSHC: torch.Tensor, groups: int) -> torch.Tensor:
    """A view (B, G, R, S, C): query head h is number h % R of key/value head h // R."""
    return x_BSHC.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def attention(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
    *,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch, differentiable once in q, k and v; every option on every device.

    ``k_lengths_B`` is the int32 number of keys in use per sequence, read on the host. Returns (B, S_q, H, C) and the
    log-sum-exp (B, H, S_q), without gradient. A fully masked query gets 0 and -inf.
    """
    (B, S_q), S_k = q_BSHC.shape[:2], k_BSGC.shape[1]
    parts = [_Part(slice(0, B), slice(0, S_q), slice(0, S_k), 0)]
    if k_lengths_B is not None:
        lengths = enumerate(k_lengths_B.tolist())
        parts = [_Part(slice(b, b + 1), slice(0, S_q), slice(0, length), b) for b, length in lengths]
    return _FlashAttention.apply(q_BSHC, k_BSGC, v_BSGC, options, parts, block_q, block_k)


def attention_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    lengths: PackedLengths,
    options: AttentionOptions,
    *,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of packed documents (variable length): (T_q, H, C), log-sum-exp (H, T_q)."""
    starts_q, starts_k = lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist()
    parts = [
        _Part(slice(0, 1), slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2]), n)
        for n in range(len(starts_q) - 1)
    ]
    out_1THC, lse_1HT = _FlashAttention.apply(q_THC[None], k_TGC[None], v_TGC[None], options, parts, block_q, block_k)
    return out_1THC[0], lse_1HT[0]


# ------------------------------------------------------------------------------------------------------------- dropout
# Flash attention does not store its dropout mask; the backward computes it again, tile by tile in another order. The
# number of query i, key j, head h and sequence b is philox4x32_10(key=seed, counter=(j, i, b * H + h, 0)), bit for bit
# as triton.language.philox, so that all kernels drop the same weights.

_LOW = 0xFFFFFFFF  # 32-bit words are kept in int64: torch's uint32 has few operations
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10  # the largest float32 that keeps (2**31 - 1) times it under 1


def philox4x32(
    key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers"): four random words.

    ``key`` is the low and high word of the seed. All are int64 tensors with values in [0, 2**32); shapes broadcast.
    """
    key_0, key_1 = key
    word_0, word_1, word_2, word_3 = counter
    for _ in range(_ROUNDS):
        # A product of two words needs unsigned 64 bits. int64 wraps around, and every bit stays right.
        product_0, product_2 = word_0 * _MULTIPLIERS[0], word_2 * _MULTIPLIERS[1]
        word_0 = ((product_2 >> 32) & _LOW) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & _LOW) ^ word_3 ^ key_1
        word_1, word_3 = product_2 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & _LOW, (key_1 + _KEY_STEPS[1]) & _LOW
    return word_0, word_1, word_2, word_3


def uniform(word: torch.Tensor) -> torch.Tensor:
    """Random words to float32 in [0, 1), as `triton.language.uint_to_uniform_float`."""
    # As signed 32-bit numbers, with a negative x folded onto -x - 1: 31 bits remain.
    folded = torch.where(word > 0x7FFFFFFF, _LOW - word, word)
    return folded.to(torch.float32) * _TO_UNIT


def dropout_keep_mask(
    seed: torch.Tensor, batch: int | range, heads: int, rows: int | range, cols: int | range, p: float
) -> torch.Tensor:
    """Dropout mask of attention weights, (B, H, M, N) bool, true where a weight is kept, with probability 1 - p.

    ``seed`` is (1,) int64; ``batch`` numbers the sequences, ``rows`` and ``cols`` queries and keys. An int n is
    ``range(n)``.
    """
    sequence_B, row_M, col_N = (_numbers(numbers, seed.device) for numbers in (batch, rows, cols))
    head_BH = sequence_B[:, None] * heads + torch.arange(heads, device=seed.device)
    counter = (
        col_N[None, None, None, :],
        row_M[None, None, :, None],
        head_BH[:, :, None, None] & _LOW,
        torch.zeros_like(seed),
    )
    word_BHMN, *_ = philox4x32((seed & _LOW, (seed >> 32) & _LOW), counter)
    return uniform(word_BHMN) > p


def _numbers(numbers: int | range, device: torch.device) -> torch.Tensor:
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    return torch.arange(numbers.start, numbers.stop, device=device)
