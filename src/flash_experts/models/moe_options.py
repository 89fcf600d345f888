"""The options of the MoE layer and of upcycling, each declared once for configuration, YAML and command line.

Without transformers, which would slow the start of every command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flash_experts.options import option

EXPERTS = "The experts"  # heading of these options


@dataclass
class MoEOptions:
    """What the MoE blocks are, and how their load is balanced (`flash_experts.models.router`, ``moe_layer``)."""

    num_experts: int = option(8, "E, experts per MoE layer", EXPERTS, bounds=(0, 10_000))
    num_experts_per_tok: int = option(
        2, "k, experts that each token is sent to (with expert choice: on average)", EXPERTS, bounds=(1, 10_000)
    )
    moe_layer_freq: int = option(
        2, "distance between MoE layers in blocks; 1: every block, 2: every other block", EXPERTS, bounds=(1, 10_000)
    )
    routing: Literal["token_choice", "expert_choice"] = option(
        "token_choice", "token_choice: tokens choose experts; expert_choice: experts choose tokens (Zhou et al. 2022; "
        "not causal)", EXPERTS,
    )  # fmt: skip
    scoring_func: Literal["softmax", "topk_softmax", "sigmoid"] = option(
        "softmax", "function that turns router logits into gates: softmax over all experts and then the top k, "
        "topk_softmax over the top k alone, or sigmoid (DeepSeek-V3)", EXPERTS,
    )  # fmt: skip
    capacity_factor: float | None = option(
        None, "capacity of an expert, as a multiple of the mean load: in training, with expert choice always; null: no "
        "token dropping, with expert choice 1", EXPERTS,
        bounds=(1e-3, 10**6),
    )  # fmt: skip
    allow_noncausal_generation: bool = option(
        False, "let a model with expert choice generate: it then chooses among the tokens of each forward, not as in "
        "training", EXPERTS,
    )  # fmt: skip
    router_aux_loss_coef: float = option(
        0.01, "weight of the load-balancing loss (Fedus et al. 2021, eq. 4); 0: off", EXPERTS, bounds=(0, 10**6)
    )
    router_aux_loss_scope: Literal["micro_batch", "global_batch", "sequence"] = option(
        "micro_batch", "tokens over which the load must balance: micro_batch (each forward), global_batch (each "
        "optimizer step over all processes, Qiu et al. 2025) or sequence (each name, DeepSeek-V3, eq. 17)", EXPERTS,
    )  # fmt: skip
    router_z_loss_coef: float = option(
        0.001, "weight of the router z-loss (Zoph et al. 2022, eq. 5); 0: off", EXPERTS, bounds=(0, 10**6)
    )
    router_jitter_noise: float = option(
        0.0, "noise on the router's input in training, a factor from 1 - noise to 1 + noise (Fedus et al. 2021, "
        "section 2.4)", EXPERTS, bounds=(0, 0.999),
    )  # fmt: skip
    router_bias_update_rate: float = option(
        0.0, "step of the loss-free balancing bias (Wang et al. 2024); 0: off", EXPERTS, bounds=(0, 10**6)
    )


@dataclass
class UpcyclingOptions:
    """How experts are made of a dense layer, besides the method (`flash_experts.models.upcycling`)."""

    granularity: int = option(
        1, "g, parts that granular and shared cut a layer into: g * E experts, g * k per token", EXPERTS,
        bounds=(1, 10_000),
    )  # fmt: skip
    noise_scale: float = option(
        0.001, "standard deviation of the noise, as a share of that of each matrix, for noise", EXPERTS, bounds=(0, 100)
    )
    drop_ratio: float = option(
        0.5, "share of the hidden units that are initialized again, for drop", EXPERTS, bounds=(0, 1)
    )
    router_init: Literal["normal", "zeros", "orthogonal"] = option(
        "normal", "initialization of the routers: normal, zeros (all scores tie until the first step) or orthogonal",
        EXPERTS,
    )  # fmt: skip


Method = Literal["copy", "noise", "drop", "granular", "shared"]
METHOD_HELP = (
    "initialization of the experts; copy: copies of the dense layer; noise: copies with noise; drop: copies with some "
    "hidden units initialized again; granular: parts of the layer; shared: the layer for every token, and routed "
    "experts that start at zero"
)


def too_many_per_token(options: MoEOptions) -> list[str]:
    """A sentence if tokens are sent to more experts than there are."""
    if options.num_experts_per_tok <= options.num_experts:
        return []
    return [
        f"num_experts_per_tok ({options.num_experts_per_tok}) must be between 1 and num_experts ({options.num_experts})"
    ]
