"""What chapter 11 and its solutions share: a model's matrices by part, their inputs' second moments, and two ways to round.

A matrix is W_IO: I inputs, O output units. A unit has one scale s, and its weights become whole multiples of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from chapter_models import nats_of_names
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.models.moe_layer import Experts, MoELayer

ATTENTION, DENSE, SHARED, ROUTED = "attention", "dense MLPs", "shared experts", "routed experts"
EMBEDDING = "embedding"


def matrices(model: Any) -> dict[str, list[torch.Tensor]]:
    """The weights of each part as matrices W_IO. They are views: what is written into them, the model has."""
    parts: dict[str, list[torch.Tensor]] = {part: [] for part in (EMBEDDING, ATTENTION, DENSE, SHARED, ROUTED)}
    parts[EMBEDDING].append(model.transformer.wte.weight.data.T)  # as the output layer reads it: a token is a unit
    for block in model.transformer.h:
        parts[ATTENTION] += [block.attn.c_attn.weight.data, block.attn.c_proj.weight.data]
        mlp, part = block.mlp, DENSE
        if isinstance(mlp, MoELayer):
            parts[ROUTED] += [*mlp.experts.up_proj.data, *mlp.experts.down_proj.data]
            mlp, part = mlp.shared_experts, SHARED
        parts[part] += [mlp.c_fc.weight.data, mlp.c_proj.weight.data]
    return parts


@torch.no_grad()
def second_moments(model: Any, names: Sequence[Card], tokenizer: PreTrainedTokenizerBase) -> dict[int, torch.Tensor]:
    """H_II = X^T X of the inputs X_TI that each matrix reads in these names, by the address of its weights.

    The embedding's is left out. An expert's has only the tokens that the router sends to it.
    """
    moments: dict[int, torch.Tensor] = {}

    def add(W_IO: torch.Tensor, x_TI: torch.Tensor) -> None:
        x_TI = x_TI.flatten(0, -2)
        moments[W_IO.data_ptr()] = moments.get(W_IO.data_ptr(), 0) + x_TI.T @ x_TI

    def of_layer(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        add(module.weight, inputs[0])

    def of_experts(module: Experts, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        x_TD, experts_TK = inputs[:2]
        for expert in range(module.num_experts):
            mine_ND = x_TD[(experts_TK == expert).any(-1)]
            add(module.up_proj[expert], mine_ND)
            hidden = module.act_fn(mine_ND @ module.up_proj[expert] + module.up_proj_bias[expert])
            add(module.down_proj[expert], hidden)

    hooks = []
    for module in model.transformer.h.modules():
        if isinstance(module, Experts):
            hooks.append(module.register_forward_hook(of_experts))
        elif type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_hook(of_layer))
    nats_of_names(model, names, tokenizer)
    for hook in hooks:
        hook.remove()
    return moments


def largest_scale(W_IO: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale of each unit, (O,), with which its largest weight is the largest integer with this number of bits."""
    return W_IO.abs().amax(0).clamp_min(1e-12) / (2 ** (bits - 1) - 1)


def best_scale(W_IO: torch.Tensor, bits: int) -> torch.Tensor:
    """Of 40 scales up to the largest, the one with the least squared error, for each unit: (O,)."""
    scales_SO = torch.linspace(0.1, 1, 40)[:, None] * largest_scale(W_IO, bits)
    errors_SO = torch.stack([(rounded(W_IO, s_O, bits) - W_IO).square().sum(0) for s_O in scales_SO])
    return scales_SO.gather(0, errors_SO.argmin(0, keepdim=True))[0]


def rounded(W_IO: torch.Tensor, s_O: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest multiples of the scale; those beyond the largest integer are cut off there (clipped)."""
    most = 2 ** (bits - 1) - 1
    return (W_IO / s_O).round().clamp(-most, most) * s_O


def gptq(W_IO: torch.Tensor, H_II: torch.Tensor, s_O: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds one input's weights after the other, and lets the inputs that are left make up for the error (GPTQ)."""
    W_IO = W_IO.clone()
    inputs = len(W_IO)
    damped = H_II.double() + 0.01 * H_II.diagonal().mean() * torch.eye(inputs)  # an input that is never read has 0
    U_II = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    for i in range(inputs):
        new_O = rounded(W_IO[i], s_O, bits)
        error_O = (W_IO[i] - new_O) / U_II[i, i]
        W_IO[i:] -= U_II[i, i:, None] * error_O
        W_IO[i] = new_O
    return W_IO
