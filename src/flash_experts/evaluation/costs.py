"""What a model costs: parameters, memory, and the training that its folder records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flash_experts.evaluation.curves import read_curve
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router import Router
from flash_experts.models.router_hooks import in_use
from flash_experts.training.run_info import multiplied_parameters, training_flops
from flash_experts.training.tracking import METRICS_FILE


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters: all, and those that work on one token (of E experts only the k that it is sent to)."""

    total: int
    active: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Memory, and the training that led to the model where it is known.

    Attributes:
        memory_bytes: of the weights as they are measured (float32).
        disk_bytes: of the weights as they are stored; None for a model that came from no folder.
        training_tokens: tokens that the last training read, prompts included; None where metrics.jsonl is missing.
            What the model it started from had read does not count.
        training_seconds: of that training, by the clock of the machine it ran on.
        flops_per_token: floating-point operations of a training step for each token: 6 for each weight that a token
            is multiplied with (Kaplan et al. 2020, section 2.1), the output layer at every token, attention's own
            products left out.
    """

    memory_bytes: int
    disk_bytes: int | None
    training_tokens: int | None
    training_seconds: float | None
    flops_per_token: float

    @property
    def training_flops(self) -> float | None:
        """Floating-point operations of the training; None where its tokens are not known."""
        return None if self.training_tokens is None else self.flops_per_token * self.training_tokens


def parameter_counts(model: torch.nn.Module) -> ModelSize:
    """Counts parameters, those shared by two modules once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            router: Router = in_use(layer.router, Router)
            held = sum(parameter.numel() for parameter in layer.experts.parameters())
            idle += held - held * router.top_k // router.num_experts
    return ModelSize(total, total - idle)


def costs_of(model: PreTrainedModel, folder: Path | None) -> Costs:
    """What a language model costs; ``folder`` is where it was loaded from, if it was."""
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
