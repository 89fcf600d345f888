"""What a run trains, as options. Light to import: the command line shows it in --help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "granularity",
    "noise_scale",
    "drop_ratio",
    "router_init",
    "routing",
    "scoring_func",
    "capacity_factor",
    "allow_noncausal_generation",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_bias_update_rate",
)


# The smallest and the largest value of each number. The largest are far beyond what anyone has trained.
_BOUNDS: dict[str, tuple[float, float]] = {
    "num_experts": (0, 10_000),
    "num_experts_per_tok": (1, 10_000),
    "moe_layer_freq": (1, 10_000),
    "granularity": (1, 10_000),
    "noise_scale": (0, 100),
    "drop_ratio": (0, 1),
    "capacity_factor": (1e-3, 1e6),
    "router_aux_loss_coef": (0, 1e6),
    "router_z_loss_coef": (0, 1e6),
    "router_jitter_noise": (0, 0.999),
    "router_bias_update_rate": (0, 1e6),
    "dropout": (0, 0.999),
    "n_layer": (1, 10_000),
    "n_embd": (1, 1_000_000),
    "n_head": (1, 1_000_000),
    "n_positions": (2, 10_000_000),
    "vocab_size": (257, 10_000_000),
}


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    Attributes:
        num_experts: E, experts per MoE layer; 0 trains the model as it is, without upcycling.
        num_experts_per_tok: k, experts that each token is sent to.
        moe_layer_freq: distance between MoE layers in blocks; 1: every block, 2: every other block.
        upcycling: initialization of the experts from the dense layers: copy, noise (copies with noise), drop (copies
            with a share of the hidden units initialized again), granular (parts of a layer, more of them per token), or
            shared (the dense layer for every token, and routed experts that start at zero).
        granularity: g, parts that granular and shared cut a layer into; there are g * E experts, g * k per token.
        noise_scale: standard deviation of the noise, as a share of that of each matrix.
        drop_ratio: share of the hidden units that drop initializes again.
        router_init: initialization of the routers: normal, zeros or orthogonal.
        routing: token_choice (tokens choose experts), or expert_choice (experts choose tokens; not causal).
        scoring_func: function that turns router logits into gates: softmax, topk_softmax or sigmoid.
        capacity_factor: capacity of an expert in training, as a multiple of the mean load; null: no token dropping.
        allow_noncausal_generation: let a model with expert choice generate, though not as it was trained.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_aux_loss_scope: what must balance: micro_batch (each forward), global_batch (each optimizer step over
            all processes) or sequence (each name).
        router_z_loss_coef: weight of the router z-loss.
        router_jitter_noise: noise on the router's input in training.
        router_bias_update_rate: step of the loss-free balancing bias, 0 is off.
        trim_vocabulary: keep only the tokens of the base that the cards use; the rest cost time and memory for nothing.
        dropout: probability of every dropout of the model; null keeps the base's own.
        n_layer: blocks of a new model (without a base).
        n_embd: width of a new model.
        n_head: attention heads of a new model.
        n_positions: longest text of a new model, in tokens.
        vocab_size: tokens of a new model's tokenizer, which is trained on the prepared cards.
        tokenizer: folder or hub id whose tokenizer a new model takes, such as that of its teacher; null trains one.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: int = 2
    upcycling: Literal["copy", "noise", "drop", "granular", "shared"] = "copy"
    granularity: int = 1
    noise_scale: float = 0.001
    drop_ratio: float = 0.5
    router_init: Literal["normal", "zeros", "orthogonal"] = "normal"
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    scoring_func: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax"
    capacity_factor: float | None = None
    allow_noncausal_generation: bool = False
    router_aux_loss_coef: float = 0.01
    router_aux_loss_scope: Literal["micro_batch", "global_batch", "sequence"] = "micro_batch"
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    trim_vocabulary: bool = False
    dropout: float | None = None
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_positions: int = 128
    vocab_size: int = 4096
    tokenizer: str | None = None

    def validate(self) -> None:
        """Checks every number, those too that a base or ``num_experts: 0`` leaves without use.

        Raises:
            ValueError: all that is wrong, in one message.
        """
        problems = []
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                problems.append(f"{name} is {value}, but it must be from {least:,} to {most:,}")
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            problems.append(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and num_experts "
                f"({self.num_experts})"
            )
        if problems:
            raise ValueError("the model configuration is wrong: " + "; ".join(problems))

    @property
    def moe_fields(self) -> dict[str, Any]:
        """The fields that `GPT2MoEForCausalLM.from_dense` takes."""
        return {"method": self.upcycling} | {name: getattr(self, name) for name in _MOE_FIELDS}
