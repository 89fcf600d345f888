"""Fine-tuning on card names: one loop for CPU, GPU and many GPUs, and checkpoints that survive a kill.

The names below are imported when they are first used, so that showing the options of a run needs no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.training.callbacks import Callback
    from flash_experts.training.checkpoint import CheckpointError
    from flash_experts.training.errors import NonFiniteLossError, TrainingError
    from flash_experts.training.result import TrainingResult
    from flash_experts.training.trainer import Trainer
    from flash_experts.training.training_config import TrainingConfig

_HOMES = {
    "Callback": "callbacks",
    "CheckpointError": "checkpoint",
    "NonFiniteLossError": "errors",
    "Trainer": "trainer",
    "TrainingConfig": "training_config",
    "TrainingError": "errors",
    "TrainingResult": "result",
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
