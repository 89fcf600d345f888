"""Models for other runtimes: ONNX, GGUF, a dense GPT-2; each says how far its logits are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitDifference:
    """The largest absolute difference of two models' logits, and the source's largest absolute logit."""

    largest: float
    scale: float
    names: int

    def __str__(self) -> str:
        return (
            f"logits differ from the source's by at most {self.largest:.2g} (on {self.names} real names, logits up to "
            f"{self.scale:.0f})"
        )


@torch.no_grad()
def logit_difference(
    source: PreTrainedModel, exported: Callable[[torch.Tensor], torch.Tensor], names: Sequence[Sequence[int]]
) -> LogitDifference:
    """Compares two models name by name, so that no name is padded, in eval mode on the CPU.

    ``exported`` gives float logits (1, S, V) of ids (1, S) int64, cut off at the model's context.
    """
    largest = scale = 0.0
    for ids in names:
        ids_1S = torch.tensor([ids[: source.config.max_position_embeddings]])
        wanted = source(ids_1S, use_cache=False).logits
        largest = max(largest, (exported(ids_1S) - wanted).abs().max().item())
        scale = max(scale, wanted.abs().max().item())
    return LogitDifference(largest, scale, len(names))
