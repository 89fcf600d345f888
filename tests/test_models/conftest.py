"""A MoE model whose routing matters."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel

from flash_experts import GPT2MoEForCausalLM


@pytest.fixture
def moe(dense: GPT2LMHeadModel) -> GPT2MoEForCausalLM:
    """Experts that differ from each other, so that routing matters."""
    model = GPT2MoEForCausalLM.from_dense(dense, 4, 2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
