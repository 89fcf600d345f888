"""How likely a model finds whole names."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import GPT2Config, PretrainedConfig


class ScorableBatch(Protocol):
    """What scoring needs of a `flash_experts.data.packing.PackedBatch`."""

    @property
    def inputs(self) -> dict[str, Any]: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def name_index(self) -> torch.Tensor: ...
    @property
    def num_names(self) -> int: ...


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes at most; None where its configuration names no limit."""
    limit = config.to_dict().get("max_position_embeddings")
    return config.n_positions if isinstance(config, GPT2Config) else limit


def name_nats(model: torch.nn.Module, batch: ScorableBatch) -> torch.Tensor:
    """Negative log-likelihood of each name of a packed row, its end symbol included.

    Over the one tokenization that the tokenizer gives: an upper bound of the true figure, which would sum over all.

    Args:
        model: a causal LM of transformers that takes packed rows (attention ``fe_attention``).
        batch: names in one row.

    Returns:
        (N,) float32, in nats.
    """
    logits_LV = model(**batch.inputs).logits[0]
    nats_L = F.cross_entropy(logits_LV.float(), batch.labels, reduction="none")
    return nats_L.new_zeros(batch.num_names).index_add_(0, batch.name_index, nats_L)
