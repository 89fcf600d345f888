"""AdamW as GPT-2 is trained: decay on matrices alone."""

from __future__ import annotations

import torch
from torch import nn

from flash_experts.training.training_config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW (one kernel for all weights) with weight decay on matrices and none on biases and norms.

    The experts' biases are stacked, so they have two dimensions: they are told by their names.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
            (decayed if is_matrix else free).append(parameter)
    if not decayed and not free:
        raise ValueError("the model has no weights to train: every parameter is frozen")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in [*decayed, *free])
    first, second = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(first, second),
        eps=1e-8,
        fused=fused,
    )
