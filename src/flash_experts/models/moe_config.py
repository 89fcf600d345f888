"""The configuration of a GPT-2 with Mixture of Experts (MoE) layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.activations import ACT2FN

from flash_experts.models.attention_backends import check_name as check_backend_name
from flash_experts.models.moe_options import MoEOptions, too_many_per_token
from flash_experts.options import problems_of
from flash_experts.terminal import did_you_mean, nearest


@strict
class GPT2MoEConfig(MoEOptions, GPT2Config):
    """GPT-2's configuration, `MoEOptions`, and what else the MoE blocks need.

    Attributes:
        moe_intermediate_size: hidden units of one expert; None is the dense layer's own (``n_inner`` or 4 x width).
            Smaller ones are fine-grained experts (Dai et al. 2024, DeepSeekMoE, section 3.1; Krajewski et al. 2024).
        num_shared_experts: experts of every token besides its k, added without a gate (DeepSeekMoE, section 3.2).
        norm_topk_prob: divide the k gates by their sum. Upcycling is exact only then.
        output_router_logits: return the router's logits and losses from every forward.
        attention_backend: name in `flash_experts.models.attention_backends`.

    Values out of bounds, settings that contradict each other and misspelled fields raise a ValueError.
    """

    model_type = "gpt2_moe"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss", "z_loss"]  # noqa: RUF012

    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        for key, near in self._misspelled(kwargs).items():
            raise ValueError(f"GPT2MoEConfig has no field {key!r}: did you mean {near!r}?")
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Warns about misspelled saved fields; ValueError for misspelled kwargs."""
        for key, near in cls._misspelled(kwargs).items():
            raise ValueError(f"GPT2MoEConfig has no field {key!r}: did you mean {near!r}?")
        unknown = cls._misspelled(config_dict)
        for key, near in unknown.items():
            warnings.warn(f"config.json: ignored {key!r}, which gpt2_moe does not have (it has {near!r})", stacklevel=2)
        return super().from_dict({key: config_dict[key] for key in config_dict.keys() - unknown.keys()}, **kwargs)

    @classmethod
    def _misspelled(cls, names: Iterable[str]) -> dict[str, str]:
        known = {field.name for field in fields(cls)}
        near = {name: nearest(name, cls.own_fields(), cutoff=0.75) for name in names if name not in known}
        return {name: match for name, match in near.items() if match}

    def _check(self) -> None:
        check_backend_name(self.attention_backend, "attention_backend")
        problems = problems_of(self, MoEOptions) or too_many_per_token(self)
        if problems:
            raise ValueError("; ".join(problems))
        if not 1 <= self.moe_layer_freq <= self.n_layer:
            raise ValueError(
                f"moe_layer_freq ({self.moe_layer_freq}) must be between 1 (every block) and n_layer "
                f"({self.n_layer}): with more no block would have experts"
            )
        for name in ("moe_intermediate_size", "n_inner"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be 1 or more, not {size}")
        if self.activation_function not in ACT2FN:
            hint = did_you_mean(str(self.activation_function), ACT2FN, f"it is one of {', '.join(sorted(ACT2FN))}")
            raise ValueError(f"there is no activation_function {self.activation_function!r}: {hint}")
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        self._check_routing()

    def _check_routing(self) -> None:
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be 0 or more, not {self.num_shared_experts}")
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
        """Names of the fields that GPT-2's configuration lacks."""
        inherited = {field.name for field in fields(GPT2Config)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    @property
    def has_causal_routing(self) -> bool:
        """Whether a token's experts depend on earlier tokens only."""
        return self.routing != "expert_choice"

    def is_moe_layer(self, layer_idx: int) -> bool:
        """The last of each ``moe_layer_freq`` blocks has experts."""
        return (layer_idx + 1) % self.moe_layer_freq == 0

    @property
    def expert_size(self) -> int:
        """ff, the hidden units of one expert."""
        if self.moe_intermediate_size is not None:
            return self.moe_intermediate_size
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd
