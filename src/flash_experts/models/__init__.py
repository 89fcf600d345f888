"""GPT-2 with experts, its attention, and loading and scoring of models; names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.models.moe_config import GPT2MoEConfig

_HOMES = {"GPT2MoEConfig": "moe_config", "GPT2MoEForCausalLM": "moe"}
__all__ = ["GPT2MoEConfig", "GPT2MoEForCausalLM"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
