"""GPT-2 with a Mixture of Experts and Flash Attention, fine-tuned to name Magic: The Gathering cards.

The three names below are imported when they are first used, so that ``import flash_experts`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.generation.generator import NameGenerator
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.moe_config import GPT2MoEConfig

__version__ = "0.1.0"
__all__ = ["GPT2MoEConfig", "GPT2MoEForCausalLM", "NameGenerator"]

_HOMES = {
    "GPT2MoEConfig": "flash_experts.models",
    "GPT2MoEForCausalLM": "flash_experts.models",
    "NameGenerator": "flash_experts.generation.generator",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
