"""Random problems for attention kernels, shared by their tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from flash_experts.kernels.attention_options import AttentionOptions

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Batch:
    """Tensors (B, S, heads, C) that need gradients."""

    qkv: Tensors
    options: AttentionOptions
    k_lengths_B: torch.Tensor | None


@dataclass
class Packed:
    """Tensors (T, heads, C) that need gradients, and their documents, whose arguments `varlen` gives in order."""

    qkv: Tensors
    options: AttentionOptions
    lengths_q: list[int]
    lengths_k: list[int]

    def starts(self) -> Tensors:
        cu_q = cumulative(self.lengths_q)
        return cu_q, cu_q if self.lengths_k is self.lengths_q else cumulative(self.lengths_k)

    def varlen(self) -> tuple[torch.Tensor | int, ...]:
        return (*self.starts(), max(self.lengths_q), max(self.lengths_k))


def cumulative(lengths: list[int]) -> torch.Tensor:
    """(N + 1,) int32 starts of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@st.composite
def heads_and_options(draw: st.DrawFn, batch: int, is_plain: bool) -> tuple[int, int, AttentionOptions]:
    """Query heads, key/value heads, options; ``is_plain`` leaves out what SDPA does not have."""
    groups, share = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    options = AttentionOptions(
        draw(st.sampled_from([0.5, 1.0])),
        left=draw(st.sampled_from([-1, -1, 0, 1, 4])),
        right=draw(st.sampled_from([-1, 0, 0, 2])),
    )
    if not is_plain:
        slopes = draw(st.sampled_from([None, (groups * share,), (batch, groups * share)]))
        dropout = draw(st.sampled_from([0.0, 0.3]))
        options = replace(
            options,
            softcap=draw(st.sampled_from([0.0, 1.5])),
            alibi_slopes=None if slopes is None else torch.rand(slopes),
            dropout=dropout,
            seed=torch.randint(2**63 - 1, (1,)) if dropout else None,
        )
    return groups * share, groups, options


@st.composite
def batches(draw: st.DrawFn, longest: int = 9, is_plain: bool = False) -> Batch:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, S_q, S_k = draw(st.integers(1, 3)), draw(st.integers(0, longest)), draw(st.integers(0, longest))
    S_k = draw(st.sampled_from([S_q, S_k]))
    H, G, options = draw(heads_and_options(B, is_plain))
    lengths = draw(st.none() | st.lists(st.integers(0, S_k), min_size=B, max_size=B))
    k_lengths_B = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    # Slices of wider tensors: nothing is contiguous.
    return Batch(tuple(_leaf(B, S, h)[:, :, :h] for S, h in ((S_q, H), (S_k, G), (S_k, G))), options, k_lengths_B)


@st.composite
def packed_rows(draw: st.DrawFn, longest: int = 9, documents: int = 6, is_plain: bool = False) -> Packed:
    """Documents of one token and of none are as likely as longer ones."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    lengths = st.sampled_from([0, 1]) | st.integers(0, longest)
    lengths_q = draw(st.lists(lengths, min_size=1, max_size=documents))
    N = len(lengths_q)
    lengths_k = lengths_q if draw(st.booleans()) else draw(st.lists(lengths, min_size=N, max_size=N))
    H, G, options = draw(heads_and_options(N, is_plain))
    shapes = (sum(lengths_q), H), (sum(lengths_k), G), (sum(lengths_k), G)
    return Packed(tuple(_leaf(1, T, h)[0, :, :h] for T, h in shapes), options, lengths_q, lengths_k)


def _leaf(B: int, S: int, heads: int) -> torch.Tensor:
    return torch.randn(B, S, heads + 1, 4, dtype=torch.float64, requires_grad=True)


def assert_same(ours: torch.Tensor, expected: torch.Tensor, inputs: Tensors, tolerance: float = 1e-11) -> None:
    """Outputs and the gradients that a random weighting of them gives to the inputs."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    weight = torch.randn_like(expected)
    found = gradients(ours, weight, inputs)
    for mine, theirs in zip(found, gradients(expected, weight, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def gradients(out: torch.Tensor, weight: torch.Tensor, inputs: Tensors) -> Tensors:
    """Zeros where an output does not depend on an input at all."""
    return torch.autograd.grad(out, inputs, weight.to(out.dtype), allow_unused=True, materialize_grads=True)


def assert_low_precision_rule(
    attend: Callable[[Tensors], torch.Tensor],
    oracle: Callable[[Tensors], torch.Tensor],
    plain: Callable[[Tensors], torch.Tensor],
    exact: Tensors,
    dtype: torch.dtype,
) -> None:
    """The peer's rule: our error is at most 2 times that of PyTorch's own mathematics in the same dtype, forward, and
    3 times backward, plus a rounding of the largest value.
    """
    rounded = tuple(x.detach().to(dtype).requires_grad_() for x in exact)
    doubles = tuple(x.detach().double().requires_grad_() for x in rounded)
    truth = oracle(doubles)
    weight = torch.randn_like(truth).to(dtype)
    ours, theirs = attend(rounded), plain(rounded)
    results = [(ours.detach(), theirs.detach(), truth.detach(), 2)]
    for mine, other, right in zip(
        gradients(ours, weight, rounded),
        gradients(theirs, weight, rounded),
        gradients(truth, weight, doubles),
        strict=True,
    ):
        results.append((mine, other, right, 3))
    for mine, other, right, factor in results:
        floor = torch.finfo(dtype).eps * float(right.abs().max())
        allowed = factor * float((other.double() - right).abs().max()) + floor
        assert float((mine.double() - right).abs().max()) <= allowed
