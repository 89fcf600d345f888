"""Flash attention on a GPU: launch, autotuning and PyTorch operators of our Triton kernels.

The custom operators ``flash_experts::attention_forward`` and ``_backward`` support autograd and ``torch.compile``. Tile
sizes are autotuned at the first call for each head dim, length bucket, dtype and kind of mask, and cached on disk.
``TRITON_INTERPRET=1`` runs the kernels on a CPU, for tests only. Shape suffixes as in `attention_options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from flash_experts.kernels import flash_decode_triton
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths, within_int32
from flash_experts.kernels.flash_attention_backward import delta_kernel, keys_kernel, queries_kernel
from flash_experts.kernels.flash_attention_programs import forward_kernel

INTERPRETED: bool = triton.knobs.runtime.interpret
PACKED_UP_TO = 512  # documents up to this length share tiles (packed layout); longer ones fill tiles of their own
_SHARED_MEMORY = 227 * 1024  # bytes per thread block on a Hopper GPU; with less, such settings fail to compile
_SHORTEST_BUCKET, _LONGEST_BUCKET = 64, 8192
_MIN_HEAD_DIM = 16


def length_bucket(length: int) -> int:
    """The power of two at or above a length, from 64 to 8192: a key of the autotuner."""
    return min(max(triton.next_power_of_2(length), _SHORTEST_BUCKET), _LONGEST_BUCKET)


def fitting(kernel: str, configs: list[Any], block_c: int, element_size: int) -> list[Any]:
    """The settings worth tuning: tiles fit in shared memory, accumulators in registers. The smallest if none fits.

    ``kernel`` is "forward", "keys" or "queries"; ``block_c`` the head dim, rounded up to a power of two.
    """

    def shared_memory(config: Any) -> int:
        small, large = sorted(config.kwargs.values())
        return block_c * element_size * 2 * (large + config.num_stages * small)

    def per_thread(config: Any) -> int:
        m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        values = {"forward": m * (block_c + n), "keys": 2 * n * (block_c + m), "queries": m * (block_c + 2 * n)}
        return values[kernel] // (32 * config.num_warps)

    # On Hopper, accumulators of up to so many values per thread hardly spill (scripts/hopper_report.py).
    limit = 128 if kernel == "forward" else 160
    fit = [config for config in configs if per_thread(config) <= limit and shared_memory(config) <= _SHARED_MEMORY]
    return fit or [min(configs, key=per_thread)]


def _tuned(name: str, kernel: Any, tiles: list[tuple[int, int, int, int]]) -> Any:
    """``tiles`` are the settings (BLOCK_M, BLOCK_N, warps, stages) to try."""

    def prune(configs: list[Any], named_args: dict[str, Any], **meta: Any) -> list[Any]:
        return fitting(name, configs, meta["BLOCK_C"], named_args["Q"].element_size())

    if INTERPRETED:
        tiles = [(32, 32, 4, 1)]
    return triton.autotune(
        [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=s) for m, n, warps, s in tiles],
        key=["LENGTH_BUCKET", "C", "CAUSAL", "PACKED", "LEFT_EDGE", "DROPOUT"],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(kernel)


FORWARD = _tuned(
    "forward",
    forward_kernel,
    [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 32, 8, 3),
        (128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
        (32, 32, 4, 2),
    ],
)  # fmt: skip
KEYS = _tuned(
    "keys",
    keys_kernel,
    [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 32, 4, 2),
    ],
)  # fmt: skip
QUERIES = _tuned(
    "queries",
    queries_kernel,
    [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 2),
    ],
)  # fmt: skip
DELTA = triton.autotune([triton.Config({"BLOCK_M": 64})], key=[])(delta_kernel)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One call, in the order of the operators' arguments."""

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
        """Sequences, documents, or 1 if packed; times the heads, the grid's second axis."""
        if self.cu_q is None:
            return self.q.shape[0]
        return 1 if self.packed else self.cu_q.numel() - 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys along the grid's first axis."""
        return (self.q.shape[0], self.k.shape[0]) if self.packed else (self.max_q, self.max_k)

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    def empty_lse(self) -> torch.Tensor:
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
        left, right = within_int32(self.left), within_int32(self.right)
        bucket = length_bucket(max(self.max_q, self.max_k))
        sizes = (*self.lengths, self.heads, self.heads // self.k.shape[-2])
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
    """Strides of batch, row and head, in elements."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.ndim == 4 else (0, x.stride(0), x.stride(1))


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def _launch(kernel: Any, tile: str, length: int, sequences: int, *arguments: Any, **flags: Any) -> None:
    """Launches a grid of (tiles of that length, sequences), unless it is empty."""
    if length and sequences:
        kernel[lambda meta: (triton.cdiv(length, meta[tile]), sequences)](*arguments, **flags)


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
    if problem.cu_q is not None and not problem.packed:  # no program instance writes rows after the last document
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
    dout = _with_dense_rows(dout)
    delta = _delta(out, dout, lse)
    all_are_written = problem.packed or (problem.cu_q is None and problem.k_lengths is None)
    make = torch.empty_like if all_are_written else torch.zeros_like
    dq, dk, dv = (make(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tables, numbers, lse_strides = problem.tables(), problem.numbers(), _lse_strides(lse)
    strides = (*_row_strides(q), *_row_strides(k), *_row_strides(v), *_row_strides(dout))
    _launch(
        KEYS, "BLOCK_N", problem.lengths[1], problem.batch * k.shape[-2],
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
    """Sum over C of out * dout, float32, shaped as the log-sum-exp."""
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
    """As `flash_attention_reference.attention`, for float16, bfloat16 or float32 and C from 16 to 256."""
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
    lengths: PackedLengths,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of packed documents (variable length): (T_q, H, C), log-sum-exp (H, T_q)."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
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
