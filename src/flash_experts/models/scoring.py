"""Using a model for scoring: eval mode, and how many tokens it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GPT2Config, PretrainedConfig


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards each module gets its own former mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def context_length(config: PretrainedConfig) -> int | None:
    """Maximum number of tokens of a model; None where its configuration has no limit."""
    limit = config.to_dict().get("max_position_embeddings")
    return config.n_positions if isinstance(config, GPT2Config) else limit
