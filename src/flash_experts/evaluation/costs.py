"""Cost of a model: total and active parameters, memory, and FLOPs and time of its recorded training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flash_experts.evaluation.curves import read_curve
from flash_experts.training.metrics import expert_shares, multiplied_parameters, training_flops
from flash_experts.training.tracking import METRICS_FILE


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters: all, and those active per token (k of E experts)."""

    total: int
    active: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Memory, and training where metrics.jsonl records it.

    Attributes:
        memory_bytes: parameters and buffers in memory (float32).
        training_tokens: with prompts, without those of the model that training started from.
        flops_per_token: training FLOPs per token: 6 per active weight (Kaplan et al. 2020, section 2.1), with the
            output layer at every token, without attention scores.
    """

    memory_bytes: int
    disk_bytes: int | None
    training_tokens: int | None
    training_seconds: float | None
    flops_per_token: float

    @property
    def training_flops(self) -> float | None:
        return None if self.training_tokens is None else self.flops_per_token * self.training_tokens


def parameter_counts(model: torch.nn.Module) -> ModelSize:
    """Counts parameters; tied ones count once."""
    shares, sizes = expert_shares(model), {parameter: parameter.numel() for parameter in model.parameters()}
    active = sum(size * shares.get(parameter, 1.0) for parameter, size in sizes.items())
    return ModelSize(sum(sizes.values()), round(active))


def costs_of(model: PreTrainedModel, folder: Path | None) -> Costs:
    """Measures a language model; ``folder`` is where it was loaded from, if any."""
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    stored = [] if folder is None else [path.stat().st_size for path in folder.glob("*.safetensors")]
    points = [] if folder is None else read_curve(folder / METRICS_FILE)
    return Costs(
        memory_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
        disk_bytes=sum(stored) if stored else None,
        training_tokens=max((point.tokens for point in points if point.tokens), default=None),
        training_seconds=max((point.seconds for point in points if point.seconds), default=None),
        flops_per_token=training_flops(multiplied_parameters(model), 1, 1),
    )
