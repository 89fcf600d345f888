"""The configuration of a GPT-2 whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from flash_experts.models.attention_backends import check_name as check_backend_name

_CHOICES = {
    "routing": ("token_choice", "expert_choice"),
    "scoring_func": ("softmax", "topk_softmax", "sigmoid"),
    "router_aux_loss_scope": ("micro_batch", "global_batch", "sequence"),
}


@strict
class GPT2MoEConfig(GPT2Config):
    """GPT-2's configuration and what its mixture-of-experts blocks need.

    Attributes:
        num_experts: E, experts in each MoE layer.
        num_experts_per_tok: k, experts that each token is sent to (with expert choice: on average).
        moe_layer_freq: 1 puts experts in every block, 2 in every other (the last of each group of 2), and so on.
        moe_intermediate_size: hidden units of one expert; None is the dense layer's own (``n_inner`` or 4 x width).
            Fine-grained experts (Dai et al. 2024, DeepSeekMoE, section 3.1; Krajewski et al. 2024) of granularity g are
            g * E experts of this size ff / g, g * k of them per token: the same weights and arithmetic, more ways to
            combine them.
        num_shared_experts: experts that every token goes through besides its k, added without a gate (DeepSeekMoE,
            section 3.2). They are computed as one MLP, that many times as wide as an expert.
        routing: ``token_choice`` (each token chooses experts) or ``expert_choice`` (each expert chooses tokens, Zhou et
            al. 2022; not causal). `flash_experts.models.router` has the formulas of this and of the next two.
        scoring_func: ``softmax`` over all experts and then the top k, ``topk_softmax`` over the top k alone, or
            ``sigmoid`` (DeepSeek-V3).
        norm_topk_prob: divide the k gates by their sum, so that they sum to one. Upcycling is exact only then.
        capacity_factor: in training an expert takes at most this many times the mean load; the choices of lowest score
            are dropped and counted. None drops nothing. With expert choice it scales the tokens that an expert takes.
        allow_noncausal_generation: let a model with expert choice generate and keep a KV cache all the same: it then
            chooses among the tokens of each forward, not as it did in training.
        router_aux_loss_coef: weight of the load-balancing loss (Fedus et al. 2021, eq. 4); 0 is off.
        router_aux_loss_scope: over which tokens the load must balance: of one forward (``micro_batch``), of all
            forwards of an optimizer step on all processes (``global_batch``, Qiu et al. 2025), or of each sequence by
            itself (``sequence``, DeepSeek-V3, eq. 17). `flash_experts.models.moe_layer` has the formulas.
        router_z_loss_coef: weight of the router z-loss (Zoph et al. 2022, eq. 5); 0 is off.
        router_jitter_noise: in training the router's input is multiplied by U(1 - noise, 1 + noise)
            (Fedus et al. 2021, section 2.4). The experts see the input as it is.
        router_bias_update_rate: step of the loss-free balancing bias (Wang et al. 2024), 0 is off. A training loop
            calls `flash_experts.models.router_metrics.update_router_biases` after each optimizer step.
        output_router_logits: return the router's logits and the balancing loss from every forward.
            In training both losses are part of ``.loss`` whether this is set or not.
        attention_backend: what computes the attention: ``auto``, ``triton``, ``sdpa``, ``reference``, ... (the names
            are in `flash_experts.models.attention_backends`, whose context manager and environment variable go first).

    Raises:
        ValueError: k > E, a size or a rate that cannot be, settings that contradict each other, or a misspelled field
            of the list above.
    """

    model_type = "gpt2_moe"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "z_loss"]  # noqa: RUF012

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    routing: str = "token_choice"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    capacity_factor: float | None = None
    allow_noncausal_generation: bool = False
    router_aux_loss_coef: float = 0.01
    router_aux_loss_scope: str = "micro_batch"
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    output_router_logits: bool = False
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        for key, near in self._misspelled(kwargs).items():
            raise ValueError(f"GPT2MoEConfig has no field {key!r}: did you mean {near!r}?")
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own. A saved field that this class lacks but for its spelling is left out with a warning.

        Raises:
            ValueError: such a field is among ``kwargs``.
        """
        for key, near in cls._misspelled(kwargs).items():
            raise ValueError(f"GPT2MoEConfig has no field {key!r}: did you mean {near!r}?")
        unknown = cls._misspelled(config_dict)
        for key, near in unknown.items():
            warnings.warn(f"config.json: ignored {key!r}, which gpt2_moe does not have (it has {near!r})", stacklevel=2)
        return super().from_dict({key: config_dict[key] for key in config_dict.keys() - unknown.keys()}, **kwargs)

    @classmethod
    def _misspelled(cls, names: Iterable[str]) -> dict[str, str]:
        """Names that are close to a field of this class, but are not fields, and that field."""
        known = {field.name for field in fields(cls)}
        near = {name: difflib.get_close_matches(name, cls.own_fields(), 1, 0.75) for name in names if name not in known}
        return {name: matches[0] for name, matches in near.items() if matches}

    def _check(self) -> None:
        check_backend_name(self.attention_backend, "attention_backend")
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
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        self._check_routing()

    def _check_routing(self) -> None:
        """The choices by name, and what cannot go together."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name} is {value!r}, but it is one of {', '.join(choices)}{hint}")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be 0 or more, not {self.num_shared_experts}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor must be more than 0, or None to drop nothing, not {self.capacity_factor}"
            )
        if self.scoring_func == "topk_softmax" and not self.norm_topk_prob:
            raise ValueError(
                "a softmax over the chosen experts sums to one: leave norm_topk_prob true, or take "
                "scoring_func='softmax'"
            )
        if self.routing != "expert_choice":
            if self.allow_noncausal_generation:
                raise ValueError("allow_noncausal_generation is for routing='expert_choice': token choice is causal")
            return
        if self.scoring_func == "topk_softmax":
            raise ValueError("with expert choice no token has a top k: take scoring_func='softmax' or 'sigmoid'")
        if self.router_bias_update_rate > 0 or self.router_aux_loss_scope != "micro_batch":
            raise ValueError(
                "expert choice is balanced by construction: leave router_bias_update_rate 0 and router_aux_loss_scope "
                "'micro_batch'"
            )

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that GPT-2's own configuration does not have."""
        inherited = {field.name for field in fields(GPT2Config)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether block ``layer_idx`` (from 0) has experts: the last of each group of ``moe_layer_freq`` blocks."""
        return (layer_idx + 1) % self.moe_layer_freq == 0

    @property
    def expert_size(self) -> int:
        """ff, the hidden units of one expert."""
        if self.moe_intermediate_size is not None:
            return self.moe_intermediate_size
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd
