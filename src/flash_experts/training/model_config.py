"""What a run trains, as options. Light to import: the command line shows it in --help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_bias_update_rate",
)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        num_experts: E, experts per MoE layer; 0 trains the model as it is, without upcycling.
        num_experts_per_tok: k, experts that each token is sent to.
        moe_layer_freq: 1 puts experts in every block, 2 in every other.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_z_loss_coef: weight of the router z-loss.
        router_jitter_noise: noise on the router's input in training.
        router_bias_update_rate: step of the loss-free balancing bias, 0 is off.
        dropout: probability of every dropout of the model; null keeps the base's own.
        n_layer: blocks of a new model (without a base).
        n_embd: width of a new model.
        n_head: attention heads of a new model.
        n_positions: longest text of a new model, in tokens.
        vocab_size: tokens of a new model's tokenizer, which is trained on the prepared cards.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: int = 2
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    dropout: float | None = None
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_positions: int = 128
    vocab_size: int = 4096

    @property
    def moe_fields(self) -> dict[str, Any]:
        """The fields that `GPT2MoEForCausalLM.from_dense` takes."""
        return {name: getattr(self, name) for name in _MOE_FIELDS}
