"""Kernels for CPUs: matmuls with a weight matrix, and all experts' two-layer MLPs as one differentiable operation.

`linear` takes the faster library: oneDNN with AVX-512, else MKL, whose AVX-512 kernels run on Intel processors only.

`grouped_mlp` replaces the plain loop over experts, in which autograd adds a full-size weight gradient per expert. With
many rows per expert (`_GroupedMLP`, grouped GEMM) each weight gradient is written into one buffer; with few
(`_BatchedMLP`, batched GEMM) all experts are multiplied at once, each padded to the busiest one.

Shape suffixes: N rows, T tokens, K experts per token, S = T * K pairs sorted by expert, P the same with each expert's
rows padded, E experts, M rows of the busiest expert, D width, F hidden units of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]

_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_DTYPES = (torch.float32, torch.bfloat16)

# Batched is faster up to this many rows for the busiest expert, from this share of the experts in use, and with at most
# this many padded rows per pair.
_FEW_ROWS = 96
_MOST_EXPERTS = 0.75
_MOST_PADDED = 4

# oneDNN generates code for each new shape, and experts get other numbers of rows at every step. So with oneDNN, more
# rows than this are padded to a multiple of it.
_ROWS_MULTIPLE = 32


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices. PyTorch does it in software otherwise, which is far slower
    than float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight + bias``, (N, F), any float dtype and device; not differentiable.

    ``weight_DF`` may be a transposed (F, D) matrix: neither layout is copied.
    """
    if uses_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "none", [], "")
        return out_NF
    return x_ND @ weight_DF if bias_F is None else torch.addmm(bias_F, x_ND, weight_DF)


def linear_gelu_tanh(x_ND: torch.Tensor, weight_DF: torch.Tensor, bias_F: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh(x @ weight + bias)``, (N, F); not differentiable. oneDNN fuses it."""
    if uses_onednn(x_ND):
        out_NF: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_DF.T, bias_F, "gelu", [], "tanh")
        return out_NF
    return F.gelu(torch.addmm(bias_F, x_ND, weight_DF), approximate="tanh")


def uses_onednn(x_ND: torch.Tensor) -> bool:
    """Whether oneDNN multiplies these rows; it generates code for each new number of rows."""
    if torch.compiler.is_compiling():  # the compiler calls oneDNN itself, and cannot lower this operator
        return False
    is_float = x_ND.device.type == "cpu" and x_ND.dtype in _DTYPES
    return _ONEDNN and bool(torch.backends.mkldnn.enabled) and is_float and x_ND.numel() > 0


@dataclass(frozen=True, slots=True)
class _Groups:
    """The pairs sorted by expert, without and with padding (token 0 with a gate of zero) for the matmuls."""

    pair_of_S: torch.Tensor
    token_of_P: torch.Tensor
    place_of_S: torch.Tensor  # index of each sorted pair among the padded rows
    counts: list[int]
    filled: list[int]

    @classmethod
    def of(cls, experts_TK: torch.Tensor, counts_E: torch.Tensor, fills: bool) -> _Groups:
        expert_of_pair = experts_TK.reshape(-1)
        pair_of_S = torch.argsort(expert_of_pair, stable=True)
        token_of_S, place_of_S = pair_of_S // experts_TK.shape[1], torch.arange(len(pair_of_S))
        counts = counts_E.tolist()
        if not fills:
            return cls(pair_of_S, token_of_S, place_of_S, counts, counts)
        multiple_E = (counts_E + _ROWS_MULTIPLE - 1) // _ROWS_MULTIPLE * _ROWS_MULTIPLE
        filled_E = torch.where(counts_E > _ROWS_MULTIPLE, multiple_E, counts_E)
        shift_E = (filled_E - counts_E).cumsum(0) - (filled_E - counts_E)
        place_of_S += shift_E[expert_of_pair[pair_of_S]]
        token_of_P = pair_of_S.new_zeros(int(filled_E.sum()))
        token_of_P[place_of_S] = token_of_S
        return cls(pair_of_S, token_of_P, place_of_S, counts, filled_E.tolist())

    def __iter__(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """For each expert with tokens: number, padded rows, and pairs (the first of those rows)."""
        pair = row = 0
        for expert, (count, filled) in enumerate(zip(self.counts, self.filled, strict=True)):
            if count:
                yield expert, slice(row, row + filled), self.pair_of_S[pair : pair + count]
                pair, row = pair + count, row + filled


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        up_EDF: torch.Tensor,
        up_bias_EF: torch.Tensor,
        down_EFD: torch.Tensor,
        down_bias_ED: torch.Tensor,
        activation: Activation,
        counts_E: torch.Tensor,
    ) -> torch.Tensor:
        (T, K), D = experts_TK.shape, x_TD.shape[1]
        groups = _Groups.of(experts_TK, counts_E, uses_onednn(x_TD))
        y_pairs_D = x_TD.new_empty(T * K, D)  # row t * K + k: expert k of token t, before its gate
        kept = []
        for e, rows, pairs in groups:
            hidden_F = linear(x_TD[groups.token_of_P[rows]], up_EDF[e], up_bias_EF[e])
            act_F = activation(hidden_F)
            y_pairs_D[pairs] = linear(act_F, down_EFD[e], down_bias_ED[e])[: len(pairs)]
            kept += [hidden_F, act_F]
        ctx.save_for_backward(x_TD, gates_TK, up_EDF, down_EFD, y_pairs_D, *kept)
        ctx.activation, ctx.groups = activation, groups
        return _combine(y_pairs_D, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gates_TK, up_EDF, down_EFD, y_pairs_D, *kept = ctx.saved_tensors
        (T, K), D = gates_TK.shape, x_TD.shape[1]
        groups: _Groups = ctx.groups
        gate_P = gates_TK.new_zeros(len(groups.token_of_P))
        gate_P[groups.place_of_S] = gates_TK.reshape(-1)[groups.pair_of_S]
        weights_too = any(ctx.needs_input_grad[3:7])
        dx_pairs_D, dup_EDF, ddown_EFD = (torch.empty_like(tensor) for tensor in (y_pairs_D, up_EDF, down_EFD))
        dup_bias_EF = up_EDF.new_zeros(up_EDF.shape[0], up_EDF.shape[2])
        ddown_bias_ED = up_EDF.new_zeros(down_EFD.shape[0], down_EFD.shape[2])
        for (e, rows, pairs), hidden_F, act_F in zip(groups, kept[::2], kept[1::2], strict=True):
            tokens = groups.token_of_P[rows]
            dy_D = dout_TD[tokens] * gate_P[rows, None]
            dhidden_F = _activation_gradient(ctx.activation, hidden_F, linear(dy_D, down_EFD[e].T))
            dx_pairs_D[pairs] = linear(dhidden_F, up_EDF[e].T)[: len(pairs)]
            if weights_too:
                torch.mm(act_F.T, dy_D, out=ddown_EFD[e])
                torch.sum(dy_D, 0, out=ddown_bias_ED[e])
                torch.mm(x_TD[tokens].T, dhidden_F, out=dup_EDF[e])
                torch.sum(dhidden_F, 0, out=dup_bias_EF[e])
        dx_TD = dx_pairs_D.view(T, K, D).sum(1)
        dgates_TK = (y_pairs_D.view(T, K, D) @ dout_TD[:, :, None])[:, :, 0]
        if not weights_too:
            return dx_TD, None, dgates_TK, *[None] * 6
        for e in (expert for expert, count in enumerate(groups.counts) if not count):
            dup_EDF[e].zero_()
            ddown_EFD[e].zero_()
        return dx_TD, None, dgates_TK, dup_EDF, dup_bias_EF, ddown_EFD, ddown_bias_ED, None, None


class _BatchedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        up_EDF: torch.Tensor,
        up_bias_EF: torch.Tensor,
        down_EFD: torch.Tensor,
        down_bias_ED: torch.Tensor,
        activation: Activation,
        counts_E: torch.Tensor,
    ) -> torch.Tensor:
        (T, K), (E, D, _), M = experts_TK.shape, up_EDF.shape, int(counts_E.max())
        expert_of_pair = experts_TK.reshape(-1)
        pair_of_S = torch.argsort(expert_of_pair, stable=True)
        expert_of_S = expert_of_pair[pair_of_S]
        first_E = counts_E.cumsum(0) - counts_E
        slot_of_S = expert_of_S * M + torch.arange(T * K) - first_E[expert_of_S]
        slot_of_pair = torch.empty_like(slot_of_S)
        slot_of_pair[pair_of_S] = slot_of_S
        x_EMD = _in_slots(x_TD.repeat_interleave(K, 0), slot_of_pair, E, M)
        hidden_EMF = torch.baddbmm(up_bias_EF[:, None], x_EMD, up_EDF)
        act_EMF = activation(hidden_EMF)
        y_EMD = torch.baddbmm(down_bias_ED[:, None], act_EMF, down_EFD)
        y_pairs_D = y_EMD.view(E * M, D)[slot_of_pair]
        ctx.save_for_backward(x_EMD, gates_TK, up_EDF, down_EFD, hidden_EMF, act_EMF, y_pairs_D, slot_of_pair)
        ctx.activation = activation
        return _combine(y_pairs_D, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_EMD, gates_TK, up_EDF, down_EFD, hidden_EMF, act_EMF, y_pairs_D, slot_of_pair = ctx.saved_tensors
        (T, K), (E, M, D) = gates_TK.shape, x_EMD.shape
        # Padding rows are zeros here, so they add nothing to any gradient below.
        dy_EMD = _in_slots((dout_TD[:, None] * gates_TK[:, :, None]).view(T * K, D), slot_of_pair, E, M)
        dact_EMF = torch.bmm(dy_EMD, down_EFD.transpose(1, 2))
        dhidden_EMF = _activation_gradient(ctx.activation, hidden_EMF, dact_EMF)
        dx_EMD = torch.bmm(dhidden_EMF, up_EDF.transpose(1, 2))
        dx_TD = dx_EMD.view(E * M, D)[slot_of_pair].view(T, K, D).sum(1)
        dgates_TK = (y_pairs_D.view(T, K, D) @ dout_TD[:, :, None])[:, :, 0]
        if not any(ctx.needs_input_grad[3:7]):
            return dx_TD, None, dgates_TK, *[None] * 6
        dup_EDF, dup_bias_EF = torch.bmm(x_EMD.transpose(1, 2), dhidden_EMF), dhidden_EMF.sum(1)
        ddown_EFD, ddown_bias_ED = torch.bmm(act_EMF.transpose(1, 2), dy_EMD), dy_EMD.sum(1)
        return dx_TD, None, dgates_TK, dup_EDF, dup_bias_EF, ddown_EFD, ddown_bias_ED, None, None


def _one_token(
    x_1D: torch.Tensor,
    experts_1K: torch.Tensor,
    gates_1K: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    activation: Activation,
) -> torch.Tensor:
    """For decoding: no sorting, nothing saved for the backward."""
    up_EDF, up_bias_EF, down_EFD, down_bias_ED = weights
    rows = []
    for e in experts_1K[0].tolist():
        if activation is gelu_tanh:
            act_1F = linear_gelu_tanh(x_1D, up_EDF[e], up_bias_EF[e])
        else:
            act_1F = activation(linear(x_1D, up_EDF[e], up_bias_EF[e]))
        rows.append(linear(act_1F, down_EFD[e], down_bias_ED[e]))
    return gates_1K @ torch.cat(rows)


def _in_slots(rows_PD: torch.Tensor, slot_of_pair: torch.Tensor, E: int, M: int) -> torch.Tensor:
    """One row per pair to (E, M, D), zeros elsewhere."""
    slots = rows_PD.new_zeros(E * M, rows_PD.shape[1])
    return slots.index_copy_(0, slot_of_pair, rows_PD).view(E, M, -1)


def _combine(y_pairs_D: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """Weighted sums (T, D) of (T * K, D) in token order."""
    T, K = gates_TK.shape
    return torch.bmm(gates_TK[:, None, :], y_pairs_D.view(T, K, y_pairs_D.shape[1]))[:, 0]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def _activation_gradient(activation: Activation, hidden: torch.Tensor, dact: torch.Tensor) -> torch.Tensor:
    """Other activations than GELU are recomputed under autograd."""
    if activation is gelu_tanh:
        return torch.ops.aten.gelu_backward(dact, hidden, approximate="tanh")
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        (dhidden,) = torch.autograd.grad(activation(leaf), leaf, dact)
    return dhidden


def grouped_mlp(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    up_EDF: torch.Tensor,
    up_bias_EF: torch.Tensor,
    down_EFD: torch.Tensor,
    down_bias_ED: torch.Tensor,
    activation: Activation,
    batched: bool | None = None,
) -> torch.Tensor:
    """``sum_k gates[t, k] * MLP_{experts[t, k]}(x[t])``, (T, D), differentiable in every float input.

    Floats have one dtype; experts are integers in [0, E). ``batched`` forces the batched or the grouped way; None
    chooses the faster one.
    """
    num_experts = up_EDF.shape[0]
    weights = (up_EDF, up_bias_EF, down_EFD, down_bias_ED)
    if len(x_TD) == 1 and not torch.is_grad_enabled():
        return _one_token(x_TD, experts_TK, gates_TK, weights, activation)
    counts_E = torch.bincount(experts_TK.reshape(-1), minlength=num_experts)
    if batched is None:
        most, used, num_pairs = int(counts_E.max()), int(counts_E.count_nonzero()), experts_TK.numel()
        is_mostly_padding = most * num_experts > _MOST_PADDED * num_pairs
        batched = most <= _FEW_ROWS and used >= _MOST_EXPERTS * num_experts and not is_mostly_padding
    function = _BatchedMLP if batched and experts_TK.numel() else _GroupedMLP
    return function.apply(x_TD, experts_TK, gates_TK, *weights, activation, counts_E)
