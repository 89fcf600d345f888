"""The configuration of a GPT-2 whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

_OWN_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_layer_freq",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_bias_update_rate",
    "output_router_logits",
)


@strict
class GPT2MoEConfig(GPT2Config):
    """GPT-2's configuration and what its mixture-of-experts blocks need.

    Attributes:
        num_experts: E, experts in each MoE layer.
        num_experts_per_tok: k, experts that each token is sent to.
        moe_layer_freq: 1 puts experts in every block, 2 in every other (the last of each group of 2), and so on.
        moe_intermediate_size: hidden units of one expert; None is the dense layer's own (``n_inner`` or 4 x width).
        norm_topk_prob: divide the k gates by their sum, so that they sum to one. Upcycling is exact only then.
        router_aux_loss_coef: weight of the load-balancing loss (Fedus et al. 2021, eq. 4); 0 is off.
        router_z_loss_coef: weight of the router z-loss (Zoph et al. 2022, eq. 5); 0 is off.
        router_jitter_noise: in training the router's input is multiplied by U(1 - noise, 1 + noise)
            (Fedus et al. 2021, section 2.4). The experts see the input as it is.
        router_bias_update_rate: step of the loss-free balancing bias (Wang et al. 2024), 0 is off. A training loop
            calls `flash_experts.models.router_metrics.update_router_biases` after each optimizer step.
        output_router_logits: return the router's logits and the balancing loss from every forward.
            In training both losses are part of ``.loss`` whether this is set or not.

    Raises:
        ValueError: k > E, a size or a rate that cannot be, or a misspelled field of the list above.
    """

    model_type = "gpt2_moe"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "z_loss"]  # noqa: RUF012

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            near = difflib.get_close_matches(key, _OWN_FIELDS, n=1, cutoff=0.75)
            if near:
                raise ValueError(f"GPT2MoEConfig has no field {key!r}: did you mean {near[0]!r}?")
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be 1 or more, not {self.num_experts}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and num_experts "
                f"({self.num_experts})"
            )
        if not 1 <= self.moe_layer_freq <= self.n_layer:
            raise ValueError(
                f"moe_layer_freq ({self.moe_layer_freq}) must be between 1 (every block) and n_layer "
                f"({self.n_layer}): with more no block would have experts"
            )
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size must be 1 or more, not {self.moe_intermediate_size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise must be at least 0 and under 1, not {self.router_jitter_noise}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether block ``layer_idx`` (from 0) has experts: the last of each group of ``moe_layer_freq`` blocks."""
        return (layer_idx + 1) % self.moe_layer_freq == 0

    @property
    def expert_size(self) -> int:
        """ff, the hidden units of one expert."""
        if self.moe_intermediate_size is not None:
            return self.moe_intermediate_size
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd
