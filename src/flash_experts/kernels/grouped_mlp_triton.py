"""All experts' two-layer MLPs over their tokens, as one differentiable operation for GPUs (grouped GEMM).

The function and shape suffixes of `flash_experts.kernels.cpu`, on the kernels of `grouped_gemm_triton`, without a host
synchronisation (CUDA graphs can capture it) or a graph break. The backward recomputes the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from flash_experts.kernels import grouped_gemm_triton as gemm_kernels

INTERPRETED: bool = triton.knobs.runtime.interpret
# The fused activations, by transformers' names.
ACTIVATIONS = {
    "gelu_new": gemm_kernels.GELU_TANH.value,
    "gelu_pytorch_tanh": gemm_kernels.GELU_TANH.value,
    "gelu_fast": gemm_kernels.GELU_TANH.value,
    "gelu": gemm_kernels.GELU_ERF.value,
    "relu": gemm_kernels.RELU.value,
    "silu": gemm_kernels.SILU.value,
    "swish": gemm_kernels.SILU.value,
}
_SMALLEST_COLUMNS = 32 if INTERPRETED else 64  # the narrowest tile below


def _tuned(kernel: Any, key: list[str], tiles: list[tuple[int, int, int, int, int]]) -> Any:
    """``tiles`` are the settings (BLOCK_M, BLOCK_N, BLOCK_I, warps, stages) to try."""
    if INTERPRETED:
        tiles = [(32, 32, 32, 4, 1)]
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_I": i}, num_warps=warps, num_stages=stages)
        for m, n, i, warps, stages in tiles
    ]
    return triton.autotune(configs, key=key, cache_results=True)(kernel)


_ROW_TILES = [
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
]  # fmt: skip
_WEIGHT_TILES = [
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 3),
]  # fmt: skip
_UP = _tuned(gemm_kernels.up_kernel, ["size_i", "size_n", "ROWS_BUCKET"], _ROW_TILES)
_DOWN = _tuned(gemm_kernels.down_kernel, ["size_i", "size_n", "GATED", "ROWS_BUCKET"], _ROW_TILES)
_HIDDEN_GRADIENT = _tuned(
    gemm_kernels.hidden_gradient_kernel,
    ["size_i", "size_n", "ROWS_BUCKET"],
    [(128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4)],
)  # the kernel's last step holds three tiles at a time
_WEIGHT_GRADIENT = _tuned(gemm_kernels.weight_gradient_kernel, ["size_a", "size_b", "ROWS_BUCKET"], _WEIGHT_TILES)


def _rows_bucket(rows: int) -> int:
    """The autotuner's key: a power of two."""
    return min(triton.next_power_of_2(max(rows, 16)), 2**16)


def _launch_rows(kernel: Any, x: torch.Tensor, w_EIN: torch.Tensor, rows: int, *tensors: Any, **flags: Any) -> None:
    """``tensors`` are the kernel's first arguments, up to E."""
    E, size_i, size_n = w_EIN.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:  # each expert's last tile may be partial
        return ((triton.cdiv(rows, meta["BLOCK_M"]) + min(E, rows)) * triton.cdiv(size_n, meta["BLOCK_N"]),)

    if rows:
        kernel[grid](
            *tensors, size_i, size_n, x.stride(0), *w_EIN.stride(), ROWS_BUCKET=_rows_bucket(rows),
            BLOCK_E=max(triton.next_power_of_2(E), 2), EVEN=size_i % 64 == 0,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **flags,
        )  # fmt: skip


def _sorted_pairs(experts_TK: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs t * K + k sorted by expert (S,), their tokens (S,), each expert's start (E + 1,); int32."""
    expert_S, pair_S = experts_TK.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(expert_S, torch.arange(E + 1, device=expert_S.device, dtype=expert_S.dtype))
    pair_S = pair_S.to(torch.int32)
    return pair_S, pair_S // experts_TK.shape[1], starts.to(torch.int32)


@torch.library.custom_op("flash_experts::grouped_mlp", mutates_args=())
def _forward(
    x: torch.Tensor,
    experts: torch.Tensor,
    gates: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    activation: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, hidden (S, F) if ``keep`` else empty, and `_sorted_pairs`."""
    (T, K), (E, D, F) = experts.shape, up.shape
    pair, token, starts = _sorted_pairs(experts, E)
    act = x.new_empty(T * K, F)
    hidden = x.new_empty(T * K if keep else 0, F)
    _launch_rows(_UP, x, up, T * K, x, up, up_bias, token, starts, hidden, act, E, ACTIVATION=activation, KEEP=keep)
    y_pairs = x.new_zeros(T * K, D)  # a pair whose expert is E, dropped, adds nothing
    _launch_rows(_DOWN, act, down, T * K, act, down, down_bias, gates, pair, starts, y_pairs, E, GATED=True)
    return _over_experts(y_pairs, K), hidden, pair, token, starts


@_forward.register_fake
def _(x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, up: torch.Tensor, *others: Any) -> Any:
    pairs, keep = experts.numel(), others[-1]
    index = x.new_empty(pairs, dtype=torch.int32)
    starts = x.new_empty(up.shape[0] + 1, dtype=torch.int32)
    hidden = x.new_empty(pairs if keep else 0, up.shape[2])
    return x.new_empty(x.shape), hidden, index, torch.empty_like(index), starts


def _over_experts(pairs_PD: torch.Tensor, K: int) -> torch.Tensor:
    return pairs_PD if K == 1 else pairs_PD.view(-1, K, pairs_PD.shape[1]).sum(1)


@torch.library.custom_op("flash_experts::grouped_mlp_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    gates: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    hidden: torch.Tensor,
    pair: torch.Tensor,
    token: torch.Tensor,
    starts: torch.Tensor,
    activation: int,
    weights_too: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dgates, and the gradients of up and down and their biases (empty for frozen weights)."""
    (T, K), (E, D, F) = experts.shape, up.shape
    dout = dout.contiguous()
    dhidden, gated_act = torch.empty_like(hidden), torch.empty_like(hidden)
    dgate_parts = dout.new_zeros(triton.cdiv(F, _SMALLEST_COLUMNS), T * K, dtype=torch.float32)
    _launch_rows(
        _HIDDEN_GRADIENT, dout, down.transpose(1, 2), T * K,
        dout, down, hidden, gates, token, pair, starts, dhidden, gated_act, dgate_parts, E, T * K,
        ACTIVATION=activation,
    )  # fmt: skip
    dgates = torch.zeros_like(gates, dtype=torch.float32)
    dgates.view(-1)[pair.long()] = dgate_parts.sum(0)
    of_bias = (dout @ down_bias.T).float().gather(1, experts.clamp(max=E - 1))
    dgates += torch.where(experts < E, of_bias, 0)
    dx_pairs = dout.new_zeros(T * K, D)
    _launch_rows(
        _DOWN, dhidden, up.transpose(1, 2), T * K, dhidden, up, down_bias, gates, pair, starts, dx_pairs, E, GATED=False
    )
    first = _over_experts(dx_pairs, K), dgates.to(gates.dtype)
    if not weights_too:
        return (*first, up.new_empty(0), up.new_empty(0), up.new_empty(0), up.new_empty(0))
    index = (token, pair, gates, starts)
    of_up, of_down = (
        _weight_gradient(x, dhidden, up, index, True),
        _weight_gradient(gated_act, dout, down, index, False),
    )
    return (*first, *of_up, *of_down)


def _weight_gradient(
    a: torch.Tensor, b: torch.Tensor, w_EAB: torch.Tensor, index: tuple[torch.Tensor, ...], gathers_a: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of an expert's matrices and biases from the rows ``a`` and ``b``, one of which is by token."""
    E, size_a, size_b = w_EAB.shape
    dw_EAB, dbias_EB = torch.empty_like(w_EAB), w_EAB.new_empty(E, size_b)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(size_a, meta["BLOCK_M"]) * triton.cdiv(size_b, meta["BLOCK_N"]), E

    _WEIGHT_GRADIENT[grid](
        a, b, *index, dw_EAB, dbias_EB, size_a, size_b, GATHER_A=gathers_a, GATHER_B=not gathers_a,
        ROWS_BUCKET=_rows_bucket(index[0].numel()), UPCAST=INTERPRETED and a.dtype == torch.bfloat16,
    )  # fmt: skip
    return dw_EAB, dbias_EB


@_backward_op.register_fake
def _(
    dout: torch.Tensor,
    x: torch.Tensor,
    experts: torch.Tensor,
    gates: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *others: Any,
) -> Any:
    first = torch.empty_like(x), torch.empty_like(gates)
    if not others[-1]:
        return (*first, *[up.new_empty(0) for _ in range(4)])
    E, D, F = up.shape
    return (*first, torch.empty_like(up), up.new_empty(E, F), torch.empty_like(down), up.new_empty(E, D))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, experts, gates, up, _, down, down_bias, activation, keep = inputs
    assert keep, "gradients need the hidden units"
    ctx.save_for_backward(x, experts, gates, up, down, down_bias, *output[1:])
    ctx.activation = activation


def _backward(ctx: Any, dout: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    weights_too = any(ctx.needs_input_grad[3:7])
    dx, dgates, *weights = _backward_op(dout, *ctx.saved_tensors, ctx.activation, weights_too)
    return dx, None, dgates, *(weights if weights_too else [None] * 4), None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def grouped_mlp(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    up_EDF: torch.Tensor,
    up_bias_EF: torch.Tensor,
    down_EFD: torch.Tensor,
    down_bias_ED: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """As `flash_experts.kernels.cpu.grouped_mlp`, but expert E stands for none, and ``activation`` is in `ACTIVATIONS`.

    Floats are float16, bfloat16 or float32; matmuls accumulate in float32.
    """
    inputs = (x_TD, gates_TK, up_EDF, up_bias_EF, down_EFD, down_bias_ED)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    x, gates, *weights = (tensor.contiguous() for tensor in inputs)
    out, *_ = _forward(x, experts_TK, gates, *weights, ACTIVATIONS[activation], keep)
    return out
