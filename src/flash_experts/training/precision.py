"""In what number format a run computes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether forwards run under bfloat16 autocast. Weights and optimizer stay in float32.

    Raises:
        ValueError: bfloat16 is asked for on a GPU without it.
    """
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and device.type == "cuda" and not has_it:
        raise ValueError("this GPU has no bfloat16: set precision to float32 or auto")
    return precision == "bfloat16" or (precision == "auto" and has_it)


def check_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, if its weights are float32.

    Raises:
        ValueError: they are not. AdamW's small steps would be lost in 16 bits.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("the model's weights must be float32 to train: load it with dtype=torch.float32")
    return model
