"""Sparse upcycling: an MoE model whose experts are initialised from the MLPs of a dense GPT-2.

Write the dense layer as ``W2 act(W1 x + b1) + b2`` and the MoE layer as ``sum_e g_e MLP_e(x)``, with gates that sum to
one over the k chosen. Before any training, for every token, k and E:

    copy      Every expert is the dense layer (Komatsuzaki et al. 2022). Exact.
    noise     Copies plus N(0, (noise_scale * std(W))^2) on both matrices. The output differs in proportion to
              noise_scale.
    drop      Each expert redraws a share ``drop_ratio`` of its hidden units: their columns of W1, b1 and rows of W2,
              from normal distributions with the mean and standard deviation of the dense ones (Nakamura et al. 2025,
              Drop-Upcycling). The output differs by what those units contributed.
    granular  Virtual groups (He et al. 2024): g * E experts of ff / g hidden units, g * k per token. Expert
              ``r * g + s`` of group r holds shard s. The g experts of a group share one row of the router, so a token
              takes whole groups with equal gates, 1/g of one expert's: W2 is multiplied by g, b2 is not. Exact.
    shared    The shared expert is the dense layer. Routed experts copy W1 and have W2 = 0, b2 = 0, so they are silent
              until trained, and until then the router gets no gradient. With granularity g, g shared experts make up
              the dense layer, and routed ones have a shard of W1. Exact with any gates.

Exact means up to rounding: logits at most 1e-5 apart in float32. With ``routing="expert_choice"`` it holds for tokens
with an expert; with ``capacity_factor``, for tokens without dropped choices.

Shape suffixes: E experts, D width, F hidden units of the dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from flash_experts.models.loading import FUSED_ACTIVATIONS
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.moe_options import EXPERTS, METHOD_HELP, Method, UpcyclingOptions
from flash_experts.options import option, problems_of


@dataclass(kw_only=True)
class Upcycling(UpcyclingOptions):
    """How experts are made of a dense layer (see the module).

    Raises:
        ValueError: an unknown name, a number out of bounds, or a granularity that the method has no use for.
    """

    method: Method = option("copy", METHOD_HELP, EXPERTS)

    def __post_init__(self) -> None:
        if problems := problems_of(self, Upcycling):
            raise ValueError("; ".join(problems))
        if self.granularity > 1 and self.method not in ("granular", "shared"):
            raise ValueError(
                f"granularity {self.granularity} cuts a layer into parts, of which method {self.method!r} has no use: "
                "take method 'granular' or 'shared'"
            )
        if self.granularity > 1 and self.method == "granular" and self.router_init == "zeros":
            raise ValueError(
                "granular upcycling needs groups that score differently: router_init 'zeros' ties them all"
            )

    def config(
        self, dense: GPT2Config, num_experts: int, num_experts_per_tok: int, **config_fields: Any
    ) -> GPT2MoEConfig:
        """The dense model's configuration with experts, and the fused form of its activation.

        Raises:
            ValueError: a field is wrong, or would change the dense model's output.
        """
        inherited = dense.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            inherited.pop(key, None)
        activation = inherited["activation_function"]
        inherited["activation_function"] = FUSED_ACTIVATIONS.get(activation, activation)
        dense_size = dense.n_inner if dense.n_inner is not None else 4 * dense.n_embd
        if dense_size % self.granularity:
            raise ValueError(f"granularity {self.granularity} does not divide the {dense_size} hidden units of a layer")
        made = {
            "num_experts": num_experts * self.granularity,
            "num_experts_per_tok": num_experts_per_tok * self.granularity,
        }
        if self.granularity > 1:
            made["moe_intermediate_size"] = dense_size // self.granularity
        if self.method == "shared":
            made["num_shared_experts"] = self.granularity
        config = GPT2MoEConfig(**(inherited | made | config_fields))
        self._check(config, dense_size)
        return config

    def _check(self, config: GPT2MoEConfig, dense_size: int) -> None:
        """Rejects fields that would change the output."""
        if config.expert_size * self.granularity != dense_size:
            raise ValueError(
                f"the experts have {dense_size // self.granularity} of the dense layer's {dense_size} hidden units, "
                f"not moe_intermediate_size = {config.expert_size}: leave it out and set granularity"
            )
        if config.num_shared_experts != (self.granularity if self.method == "shared" else 0):
            raise ValueError(
                f"num_shared_experts = {config.num_shared_experts} would change the dense model's output: leave it "
                "out; method 'shared' makes as many as the granularity"
            )
        if not config.norm_topk_prob and self.method != "shared":
            raise ValueError("norm_topk_prob=False would change the dense model's output: leave it true for upcycling")
        rows = config.num_experts // (self.granularity if self.method == "granular" else 1)
        if self.router_init == "orthogonal" and rows > config.n_embd:
            raise ValueError(
                f"{rows} rows cannot be orthogonal at a width of {config.n_embd}: take router_init 'normal'"
            )


@torch.no_grad()
def fill_from_dense(model: PreTrainedModel, dense: GPT2LMHeadModel, upcycling: Upcycling, take: bool) -> None:
    """Fills every weight of a new `GPT2MoEForCausalLM` from a dense model, block by block.

    Args:
        model: model with the configuration of ``upcycling.config``, weights uninitialised.
        take: free each part of ``dense`` once copied, so that memory never holds two whole models; ``dense`` is
            unusable afterwards.
    """
    old: Any = dense.transformer
    new: Any = model.transformer
    if model.config.tie_word_embeddings:
        model.tie_weights()
    else:
        model.lm_head.load_state_dict(dense.lm_head.state_dict())
    if take:
        dense.lm_head = nn.Identity()
    for name in ("wte", "wpe", "ln_f"):
        getattr(new, name).load_state_dict(getattr(old, name).state_dict())
        if take:
            setattr(old, name, nn.Identity())
    for index, block in enumerate(new.h):
        for name, child in old.h[index].named_children():
            if isinstance(block.mlp, MoELayer) and child is old.h[index].mlp:
                _fill_experts(block.mlp, child, upcycling)
                _fill_router(block.mlp, upcycling, model.config.initializer_range)
            else:
                getattr(block, name).load_state_dict(child.state_dict())
        if take:
            old.h[index] = nn.Identity()


def _fill_experts(layer: MoELayer, mlp: GPT2MLP, upcycling: Upcycling) -> None:
    experts, granularity = layer.experts, upcycling.granularity
    up_DF, up_bias_F, down_FD, down_bias_D = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias
    hidden_units = experts.up_proj.shape[2]
    for e in range(experts.num_experts):
        shard = slice(e % granularity * hidden_units, (e % granularity + 1) * hidden_units)
        experts.up_proj[e] = up_DF[:, shard]
        experts.up_proj_bias[e] = up_bias_F[shard]
        # The gates sum to one over g times as many experts: each shard counts g times, the bias once.
        experts.down_proj[e] = down_FD[shard] * granularity if granularity > 1 else down_FD
        experts.down_proj_bias[e] = down_bias_D
        if upcycling.method == "noise":
            for weight, source in ((experts.up_proj[e], up_DF), (experts.down_proj[e], down_FD)):
                weight.add_(torch.randn_like(weight), alpha=upcycling.noise_scale * source.std().item())
        elif upcycling.method == "drop":
            count = int(upcycling.drop_ratio * hidden_units)
            units = torch.randperm(hidden_units, device=up_DF.device)[:count]
            experts.up_proj[e][:, units] = _alike(up_DF, experts.up_proj[e][:, units])
            experts.up_proj_bias[e, units] = _alike(up_bias_F, experts.up_proj_bias[e, units])
            experts.down_proj[e, units] = _alike(down_FD, experts.down_proj[e, units])
    if layer.shared_experts is not None:
        layer.shared_experts.c_fc.load_state_dict(mlp.c_fc.state_dict())
        layer.shared_experts.c_proj.load_state_dict(mlp.c_proj.state_dict())
        experts.down_proj.zero_()
        experts.down_proj_bias.zero_()


def _alike(source: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Normal random numbers with the mean and standard deviation of ``source``."""
    return torch.randn_like(like) * source.std() + source.mean()


def _fill_router(layer: MoELayer, upcycling: Upcycling, std: float) -> None:
    weight_ED = layer.router.weight
    repeats = upcycling.granularity if upcycling.method == "granular" else 1
    drawn_in = torch.promote_types(weight_ED.dtype, torch.float32)  # PyTorch cannot orthogonalise bfloat16
    rows_D = weight_ED.new_zeros(len(weight_ED) // repeats, weight_ED.shape[1], dtype=drawn_in)
    if upcycling.router_init == "normal":
        rows_D.normal_(std=std)
    elif upcycling.router_init == "orthogonal":
        nn.init.orthogonal_(rows_D, gain=std * rows_D.shape[1] ** 0.5)
    weight_ED.copy_(rows_D.repeat_interleave(repeats, 0))
