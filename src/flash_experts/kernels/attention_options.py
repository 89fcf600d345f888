"""Options of an attention call, shared by all kernels.

Query i attends to one range of keys, aligned to the bottom right by ``offset = S_k - S_q``:

    i + offset - left  <=  j  <=  i + offset + right,        0 <= j < S_k

Shape suffixes of attention: B sequences, S length, H query heads, G key/value heads (query head h uses h // R), R = H /
G, C head dim, T tokens of a packed sequence, N documents in it, M length of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_NO_LIMIT = 2**30


def within_int32(limit: int) -> int:
    """A limit of the window for kernels, which add positions to it in int32: no limit, however written, is 2**30."""
    return limit if 0 <= limit < _NO_LIMIT else _NO_LIMIT


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of one attention call."""

    scale: float  # factor of the scores q . k, usually 1 / sqrt(head_dim)
    left: int = -1  # sliding window to the left; -1 is unlimited
    right: int = -1  # likewise to the right; 0 is causal
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0 is off (Gemma 2)
    # (H,) or (B, H) float32; scores get -slope * |i + offset - j| (Press et al. 2021).
    alibi_slopes: torch.Tensor | None = None
    dropout: float = 0.0  # probability that a weight is dropped after the softmax
    # (1,) int64 on the inputs' device. Dropout is a pure function of (seed, b * H + h, i, j): the backward replays it.
    seed: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # A branch: torch.compile cannot compare two comparisons when the probability is not a constant.
        if self.dropout > 0:
            assert self.seed is not None, "dropout needs a seed"
        else:
            assert self.seed is None, "a seed is for dropout"

    @property
    def causal(self) -> bool:
        return self.right == 0


class PackedLengths(NamedTuple):
    """The N documents of a packed (variable length) batch."""

    cu_seqlens_q: torch.Tensor  # (N + 1,) int32 start of each document among the queries, and their number
    cu_seqlens_k: torch.Tensor  # likewise for the keys; the same tensor for equal lengths is faster
    max_seqlen_q: int  # length of the longest document, in queries
    max_seqlen_k: int

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedLengths:
        """Queries and keys of equal lengths."""
        return cls(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
