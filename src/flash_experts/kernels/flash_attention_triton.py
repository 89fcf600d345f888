"""Flash attention on a GPU: our Triton programs as operators of PyTorch.

What runs is in `flash_attention_programs` (forward) and `flash_attention_backward`; here it is launched, tuned and made
known to autograd and to ``torch.compile`` (``flash_experts::attention_forward`` and ``_backward``).

The tile sizes are tuned at the first call for each head dim, bucket of lengths, dtype and kind of mask, and kept on
disk beside Triton's compiled programs, so the next process starts with them. Under ``TRITON_INTERPRET=1`` the same
programs run on a CPU, thousands of times slower: that is for tests.

Letters in the shapes: B batch, S length, H query heads, G key/value heads, C head dim, T rows of all documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from flash_experts.kernels import flash_decode_triton
from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.kernels.flash_attention_tuning import DELTA, FORWARD, INTERPRETED, KEYS, QUERIES, length_bucket

_MIN_HEAD_DIM = 16
# Documents up to this length are packed: programs take tiles of rows, whatever documents lie in them. Longer ones fill
# tiles of their own well enough, and then the last tiles of each can go first.
PACKED_UP_TO = 512
_NO_LIMIT = 2**30


@dataclass(frozen=True, slots=True)
class _Problem:
    """The tensors and numbers of one call, in the order in which the programs take them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    k_lengths: torch.Tensor | None
    slopes: torch.Tensor | None
    seed: torch.Tensor | None
    max_q: int
    max_k: int
    packed: bool
    scale: float
    left: int
    right: int
    softcap: float
    dropout: float

    @property
    def batch(self) -> int:
        """Second axis of the grid is this times the heads: sequences, documents, or 1 where rows are packed."""
        if self.cu_q is None:
            return self.q.shape[0]
        return 1 if self.packed else self.cu_q.numel() - 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys that the first axis of the grid covers."""
        return (self.q.shape[0], self.k.shape[0]) if self.packed else (self.max_q, self.max_k)

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    def empty_lse(self) -> torch.Tensor:
        """Uninitialised, (B, H, S) or (H, T) float32."""
        shape = (self.q.shape[0], self.heads, self.q.shape[1]) if self.cu_q is None else (self.heads, self.q.shape[0])
        return self.q.new_empty(shape, dtype=torch.float32)

    def tables(self) -> tuple[torch.Tensor | None, ...]:
        doc_T = None
        if self.packed:
            assert self.cu_q is not None
            rows_T = torch.arange(self.q.shape[0], device=self.q.device, dtype=self.cu_q.dtype)
            doc_T = torch.searchsorted(self.cu_q[1:], rows_T, right=True, out_int32=True)
            doc_T = doc_T.clamp_(max=self.cu_q.numel() - 2)
        return self.cu_q, self.cu_k, self.k_lengths, doc_T, self.slopes, self.seed

    def numbers(self) -> tuple[Any, ...]:
        left, right = (_NO_LIMIT if limit < 0 else limit for limit in (self.left, self.right))
        bucket = length_bucket(max(self.max_q, self.max_k))
        sizes = (*self.lengths, self.heads, self.heads // self.kv_heads)
        slope_stride = self.slopes.stride(0) if self.slopes is not None and self.slopes.ndim == 2 else 0
        return (slope_stride, *sizes, self.scale, self.softcap, left, right, self.dropout, bucket)

    def flags(self, left_edge: bool) -> dict[str, Any]:
        return {
            "C": self.q.shape[-1],
            "BLOCK_C": max(triton.next_power_of_2(self.q.shape[-1]), _MIN_HEAD_DIM),
            "CAUSAL": self.right == 0,
            "RAGGED": self.cu_q is not None and not self.packed,
            "PACKED": self.packed,
            "LEFT_EDGE": left_edge or self.packed,
            "SOFTCAP": self.softcap > 0,
            "ALIBI": self.slopes is not None,
            "DROPOUT": self.dropout > 0,
            "UPCAST": INTERPRETED and self.q.dtype == torch.bfloat16,
        }


def _row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Elements from batch to batch, row to row, head to head, of (B, S, H, C) or (T, H, C)."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.ndim == 4 else (0, x.stride(0), x.stride(1))


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def _launch(program: Any, tile: str, length: int, sequences: int, *arguments: Any, **flags: Any) -> None:
    """Runs a program on (tiles of that length, sequences), unless there is nothing to do."""
    if length and sequences:
        program[lambda meta: (triton.cdiv(length, meta[tile]), sequences)](*arguments, **flags)


# The arguments of both operators: the fields of _Problem.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, Tensor? k_lengths, Tensor? slopes, Tensor? seed, "
    "SymInt max_q, SymInt max_k, bool packed, float scale, SymInt left, SymInt right, float softcap, float dropout"
)


@torch.library.custom_op(
    "flash_experts::attention_forward", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _attention_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); see `attention` and `attention_varlen`."""
    problem = _Problem(*arguments)
    q, k, v = problem.q, problem.k, problem.v
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), problem.empty_lse()
    if problem.cu_q is not None and not problem.packed:  # rows after the last document belong to no program
        out.zero_()
        lse.fill_(float("-inf"))
    strides = (*_row_strides(q), *_row_strides(k), *_row_strides(v), *_row_strides(out), *_lse_strides(lse))
    _launch(
        FORWARD, "BLOCK_M", problem.lengths[0], problem.batch * problem.heads,
        q, k, v, out, lse, *problem.tables(), *strides, *problem.numbers(),
        **problem.flags(left_edge=problem.left >= 0),
    )  # fmt: skip
    return out, lse


@_attention_forward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    problem = _Problem(*arguments)
    return torch.empty_like(problem.q, memory_format=torch.contiguous_format), problem.empty_lse()


@torch.library.custom_op(
    "flash_experts::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv)."""
    problem = _Problem(*arguments)
    q, k, v, heads = problem.q, problem.k, problem.v, problem.heads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = _delta(out, dout, lse)
    all_are_written = problem.packed or (problem.cu_q is None and problem.k_lengths is None)
    make = torch.empty_like if all_are_written else torch.zeros_like
    dq, dk, dv = (make(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tables, numbers, lse_strides = problem.tables(), problem.numbers(), _lse_strides(lse)
    strides = (*_row_strides(q), *_row_strides(k), *_row_strides(v), *_row_strides(dout))
    _launch(
        KEYS, "BLOCK_N", problem.lengths[1], problem.batch * problem.kv_heads,
        q, k, v, dout, lse, delta, dk, dv, *tables, *strides, *_row_strides(dk), *lse_strides, *numbers,
        **problem.flags(left_edge=problem.right >= 0),
    )  # fmt: skip
    _launch(
        QUERIES, "BLOCK_M", problem.lengths[0], problem.batch * heads,
        q, k, v, dout, lse, delta, dq, *tables, *strides, *_row_strides(dq), *lse_strides, *numbers,
        **problem.flags(left_edge=problem.left >= 0),
    )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:3])
    return q, k, v


def _delta(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The sum over C of out * dout, shaped as the log-sum-exp, float32."""
    delta = torch.empty_like(lse)
    rows, heads, head_dim = out.shape[-3:]
    _launch(
        DELTA, "BLOCK_M", rows, out.shape[:-3].numel() * heads,
        out, dout, delta, *_row_strides(out), *_row_strides(dout), *_lse_strides(lse), rows, heads,
        C=head_dim, BLOCK_C=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return delta


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.numbers = inputs[8:]


def _backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    gradients = _attention_backward(dout, out, lse, *tensors, *ctx.numbers)
    return (*gradients, *[None] * (5 + len(ctx.numbers)))


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def attention(
    q_BSHC: torch.Tensor,
    k_BSGC: torch.Tensor,
    v_BSGC: torch.Tensor,
    options: AttentionOptions,
    k_lengths_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch, differentiable in q, k and v.

    Args:
        q_BSHC: queries, (B, S_q, H, C), float16, bfloat16 or float32; C is 16 to 256; strided views do.
        k_BSGC: keys, (B, S_k, G, C); query head h reads head h // (H / G).
        v_BSGC: values, as the keys.
        options: scale, masks, softcap, ALiBi, dropout.
        k_lengths_B: (B,) int32, keys in use of each sequence; None is all. A sequence's queries are its last ones.

    Returns:
        out (B, S_q, H, C), contiguous, dtype of q; log-sum-exp of the scores (B, H, S_q) float32, which carries no
        gradient. A query that sees no key gets zeros and minus infinity.
    """
    if flash_decode_triton.suits(q_BSHC, k_BSGC, v_BSGC, options):
        return flash_decode_triton.decode(q_BSHC, k_BSGC, v_BSGC, options, k_lengths_B)
    q, k, v = map(_with_dense_rows, (q_BSHC, k_BSGC, v_BSGC))
    out, lse = _attention_forward(
        q, k, v, None, None, k_lengths_B, options.alibi_slopes, options.seed, q.shape[1], k.shape[1], False,
        *_numbers(options),
    )  # fmt: skip
    return out, lse.detach()


def attention_varlen(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of documents that lie one after the other, each for itself; differentiable in q, k and v.

    Args:
        q_THC: queries of all documents, (T_q, H, C).
        k_TGC: keys, (T_k, G, C).
        v_TGC: values, as the keys.
        cu_seqlens_q: (N + 1,) int32 starts of the documents among the queries, and the end of the last. Passing the
            same tensor for the keys says that queries and keys are of the same rows, which is quicker.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: the most queries that a document has.
        max_seqlen_k: the most keys.
        options: as in `attention`.

    Returns:
        As `attention`: out (T_q, H, C) and log-sum-exp (H, T_q).
    """
    packed = cu_seqlens_q is cu_seqlens_k and max_seqlen_q <= PACKED_UP_TO
    q, k, v = map(_with_dense_rows, (q_THC, k_TGC, v_TGC))
    out, lse = _attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, options.alibi_slopes, options.seed, max_seqlen_q, max_seqlen_k,
        packed, *_numbers(options),
    )  # fmt: skip
    return out, lse.detach()


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _numbers(options: AttentionOptions) -> tuple[float | int, ...]:
    return options.scale, options.left, options.right, options.softcap, options.dropout
