"""What an attention computes, apart from its tensors: shared by every kernel, checked once.

Every mask that flash-attn offers lets a query see one interval of keys. With ``offset = S_k - S_q`` (so that the last
query meets the last key, bottom-right alignment), query i sees the keys

    i + offset - left  <=  j  <=  i + offset + right,        0 <= j < S_k

where -1 stands for "no limit", and causal attention is ``right = 0``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of one attention.

    Attributes:
        scale: factor of the scores q . k, usually 1 / sqrt(head_dim).
        left: keys before its own place that a query sees; -1: all.
        right: keys after its own place that a query sees; -1: all, 0: causal.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off (Gemma 2).
        alibi_slopes: (H,) or (B, H) float32, the scores get ``-slope * |i + offset - j|`` (Press et al. 2021); or None.
        dropout: probability that a weight is dropped after the softmax.
        seed: (1,) int64 tensor on the device of the inputs. The weight of query i and key j in head h of sequence b
            is dropped as a pure function of (seed, b * H + h, i, j), so that the backward replays it. None without
            dropout.
    """

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # A branch, for torch.compile cannot compare two comparisons when the probability is no constant.
        if self.dropout > 0:
            assert self.seed is not None, "dropout needs a seed"
        else:
            assert self.seed is None, "a seed is for dropout"

    @property
    def causal(self) -> bool:
        """Whether no query sees past its own place."""
        return self.right == 0
