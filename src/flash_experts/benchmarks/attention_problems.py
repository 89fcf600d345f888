"""Problems of the attention benchmark: batches, packed card names, decoding; with exact results in float64.

Shape suffixes: B batch, S sequence length, H heads, C head dim, T tokens of a packed sequence, N names in it, M longest
name, R tokens of the names that are compared with float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from flash_experts.benchmarks.timing import Lap
from flash_experts.kernels.attention_options import AttentionOptions

Tensors = tuple[torch.Tensor, ...]
_CHECKED_NAMES = 32  # first and last names of a packed sequence


@dataclass(frozen=True, slots=True)
class Trial:
    """One implementation on one problem.

    Without ``dout``, the gradient of the output, only the forward runs; ``pick`` selects the part of output and
    gradients that is compared with the exact result; ``context`` is around several passes.
    """

    attend: Callable[..., torch.Tensor]
    inputs: Tensors
    dout: torch.Tensor | None
    pick: Callable[[torch.Tensor], torch.Tensor]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self, lap: Lap) -> Tensors:
        """Returns the output and the gradients of q, k and v; calls ``lap`` after forward and backward."""
        with torch.set_grad_enabled(self.dout is not None):
            out = self.attend(*self.inputs)
        lap()
        if self.dout is None:
            return (out,)
        gradients = torch.autograd.grad(out, self.inputs, self.dout)
        lap()
        return out, *gradients

    def picked(self) -> Tensors:
        return tuple(self.pick(x.detach()) for x in self.run(lambda: None))


def exact(q_BSHC: torch.Tensor, k_BSHC: torch.Tensor, v_BSHC: torch.Tensor, causal: bool, dout: Any = None) -> Tensors:
    """Computes softmax attention in float64, one head at a time: the output, and with ``dout`` the gradients."""
    heads = []
    for h in range(q_BSHC.shape[2]):
        q, k, v = (x[:, :, h].detach().double().requires_grad_(dout is not None) for x in (q_BSHC, k_BSHC, v_BSHC))
        scores_BSS = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if causal:
            S_q, S_k = scores_BSS.shape[1:]
            hidden_SS = torch.ones(S_q, S_k, dtype=torch.bool, device=q.device).triu(S_k - S_q + 1)
            scores_BSS = scores_BSS.masked_fill(hidden_SS, -torch.inf)
        out = scores_BSS.softmax(-1) @ v
        gradients = () if dout is None else torch.autograd.grad(out, (q, k, v), dout[:, :, h].double())
        heads.append((out.detach(), *gradients))
    return tuple(torch.stack(parts, 2) for parts in zip(*heads, strict=True))


def _leaves(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensors:
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    return (*(x.requires_grad_() for x in (q, k, v)), dout)


class BatchProblem:
    """Self-attention of B sequences of one length, as in training; q, k and v are (B, S, H, C)."""

    section = "batch"

    def __init__(
        self, batch: int, length: int, heads: int, head_dim: int, causal: bool, device: torch.device, dtype: torch.dtype
    ):
        self.batch, self.length, self.heads, self.head_dim, self.causal = batch, length, heads, head_dim, causal
        self.device, self.dtype = device, dtype
        *qkv, self.dout = _leaves((batch, length, heads, head_dim), device, dtype)
        self.qkv = tuple(qkv)
        self.options = AttentionOptions(head_dim**-0.5, right=0 if causal else -1)

    @property
    def flops(self) -> float:
        """FLOPs of the forward; the backward has 2.5 times as many."""
        return 4 * self.batch * self.length**2 * self.heads * self.head_dim / (2 if self.causal else 1)

    @staticmethod
    def pick(x_BSHC: torch.Tensor) -> torch.Tensor:
        return x_BSHC[-1:, :, [0, -1]]

    def truth(self) -> Tensors:
        q, k, v, dout = map(self.pick, (*self.qkv, self.dout))
        return exact(q, k, v, self.causal, dout)

    def trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.qkv, self.dout, self.pick, context)


class DecodeProblem:
    """One new token for each of B sequences against its KV cache, in the layout of transformers: (B, H, S, C)."""

    section = "decode"
    causal = False  # one query attends to its whole cache

    def __init__(self, batch: int, length: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.length, self.heads, self.head_dim = batch, length, heads, head_dim
        self.device, self.dtype = device, dtype
        shapes = ((batch, heads, 1, head_dim), *[(batch, heads, length, head_dim)] * 2)
        self.qkv = tuple(torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes)
        self.options = AttentionOptions(head_dim**-0.5)

    @property
    def bytes(self) -> int:
        """Minimum memory traffic of the forward: the KV cache, read once."""
        return self.qkv[1].nbytes + self.qkv[2].nbytes

    @staticmethod
    def pick(x_BSHC: torch.Tensor) -> torch.Tensor:
        return x_BSHC[-1:]

    def truth(self) -> Tensors:
        q, k, v = map(self.pick, self.qkv)
        return exact(q, k, v, False)

    def trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.qkv, None, self.pick, context)


@dataclass(eq=False)
class PackedProblem:
    """Causal attention within each of many card names: one packed sequence, or padded for baselines that need it (which
    is not timed, in their favor)."""

    lengths: list[int]
    heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    section: str = field(default="packed", init=False)
    causal: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        N, self.longest, self.tokens = len(self.lengths), max(self.lengths), sum(self.lengths)
        length_N = torch.tensor(self.lengths)
        self.cu_seqlens = F.pad(length_N.cumsum(0), (1, 0)).to(self.device, torch.int32)
        self.document_T = torch.repeat_interleave(length_N).to(self.device)
        place_T = torch.arange(self.tokens, device=self.device) - self.cu_seqlens[self.document_T]
        self.padded_place_T = self.document_T * self.longest + place_T
        *qkv, self.dout = _leaves((self.tokens, self.heads, self.head_dim), self.device, self.dtype)
        self.qkv = tuple(qkv)
        self.padded_qkv = tuple(self._padded(x.detach()).requires_grad_() for x in self.qkv)
        self.padded_dout = self._padded(self.dout)
        self.options = AttentionOptions(self.head_dim**-0.5, right=0)
        checked = [n for n in range(N) if n < _CHECKED_NAMES or n >= N - _CHECKED_NAMES]
        starts = self.cu_seqlens.tolist()
        self.checked = [slice(starts[n], starts[n + 1]) for n in checked]
        self.checked_R = torch.cat([torch.arange(s.start, s.stop, device=self.device) for s in self.checked])

    @property
    def bytes(self) -> int:
        """Minimum memory traffic of the forward: q, k and v read once, the output written."""
        return 4 * self.qkv[0].nbytes

    def _padded(self, x_THC: torch.Tensor) -> torch.Tensor:
        shape = (len(self.lengths), self.longest, *x_THC.shape[1:])
        flat = x_THC.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.padded_place_T, x_THC).view(shape)

    def pick(self, x_THC: torch.Tensor) -> torch.Tensor:
        return x_THC[self.checked_R]

    def pick_padded(self, x_NMHC: torch.Tensor) -> torch.Tensor:
        return x_NMHC.flatten(0, 1)[self.padded_place_T[self.checked_R]]

    def truth(self) -> Tensors:
        names = []
        for rows in self.checked:
            q, k, v, dout = (x[None, rows] for x in (*self.qkv, self.dout))
            names.append(exact(q, k, v, True, dout))
        return tuple(torch.cat(parts, 1)[0] for parts in zip(*names, strict=True))

    def trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.qkv, self.dout, self.pick, context)

    def padded_trial(self, attend: Callable[..., torch.Tensor], context: Any = nullcontext) -> Trial:
        return Trial(attend, self.padded_qkv, self.padded_dout, self.pick_padded, context)


Problem = BatchProblem | DecodeProblem | PackedProblem


def name_lengths(tokens: int, tokenizer: str) -> list[int]:
    """The lengths in tokens of real names with full prompts, about ``tokens`` in total."""
    from flash_experts.data.cleaning import clean
    from flash_experts.data.packing import encode_cards
    from flash_experts.data.sources import load_source
    from flash_experts.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    cards = list(clean(load_source("embedded").rows).cards)
    random.Random(0).shuffle(cards)
    lengths: list[int] = []
    for name in encode_cards(cards[: tokens // 4 + 1], loaded):  # a name has more than four tokens
        if sum(lengths) + name.num_inputs > tokens:
            break
        lengths.append(name.num_inputs)
    if not lengths:
        raise ValueError(f"--names-tokens {tokens} is less than one name: give 100 or more")
    return lengths
