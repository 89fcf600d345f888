"""Fine-tuning on card names: one loop for CPU, GPU and many GPUs. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.training.checkpoint import CheckpointError
    from flash_experts.training.run_state import NonFiniteLossError, TrainingError, TrainingResult
    from flash_experts.training.tracking import Callback
    from flash_experts.training.trainer import Trainer
    from flash_experts.training.training_config import TrainingConfig

_HOMES = {
    "Callback": "tracking",
    "CheckpointError": "checkpoint",
    "NonFiniteLossError": "run_state",
    "Trainer": "trainer",
    "TrainingConfig": "training_config",
    "TrainingError": "run_state",
    "TrainingResult": "run_state",
}
__all__ = [
    "Callback",
    "CheckpointError",
    "NonFiniteLossError",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
