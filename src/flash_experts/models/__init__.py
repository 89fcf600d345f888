"""GPT-2 with experts, its attention, and loading and scoring of models."""

from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_config import GPT2MoEConfig

__all__ = ["GPT2MoEConfig", "GPT2MoEForCausalLM"]
