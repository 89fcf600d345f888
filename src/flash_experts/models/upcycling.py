"""Sparse upcycling: an MoE model whose experts are initialised from the MLPs of a dense GPT-2; and the way back.

The dense layer is ``W2 act(W1 x + b1) + b2``, the MoE layer ``sum_e g_e MLP_e(x)``, with gates that sum to one. Before
any training:

    copy      Every expert is the dense layer (Komatsuzaki et al. 2022). Exact.
    noise     Copies plus N(0, (noise_scale * std(W))^2) on both matrices. The output differs in proportion to
              noise_scale.
    drop      Each expert redraws a share ``drop_ratio`` of its hidden units from normal distributions with the mean and
              standard deviation of the dense ones (Nakamura et al. 2025, Drop-Upcycling). The output differs by what
              those units contributed.
    granular  Virtual groups (He et al. 2024): g * E experts of ff / g hidden units, g * k per token. Expert
              ``r * g + s`` of group r holds shard s. The g experts of a group share one row of the router, so a token
              takes whole groups with equal gates, 1/g of one expert's: W2 is multiplied by g, b2 is not. Exact.
    shared    The shared expert is the dense layer. Routed experts copy W1 and have W2 = 0, b2 = 0: the router gets no
              gradient until they are trained. With granularity g, g shared experts make up the dense layer, and routed
              ones have a shard of W1. Exact with any gates.

Exact means up to rounding (logits at most 1e-5 apart in float32), for tokens that have an expert and no dropped choice.

Downcycling (`to_dense`) averages the weights of each layer's experts (Wortsman et al. 2022, model soups; Li et al.
2022, branch-train-merge), which gives back the dense weights of copies bit by bit. Shared experts are kept next to the
mean of the routed ones: a sum of MLPs is one MLP with the hidden units of both.

Shape suffixes: E experts, R = E / g groups of g experts (granular upcycling; g is 1 otherwise), D width, F hidden
units of the dense layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from flash_experts.models.loading import FUSED_ACTIVATIONS
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.moe_options import EXPERTS, METHOD_HELP, Method, UpcyclingOptions
from flash_experts.models.router_metrics import count_loads
from flash_experts.models.scoring import evaluating
from flash_experts.options import option, options_of, problems_of
from flash_experts.terminal import did_you_mean

# What the dense model is: other values would give other outputs, or fit none of its weights.
_DENSE_FIELDS = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"),
    *("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
)
_CLASS_FIELDS = ("model_type", "architectures", "transformers_version")  # set by the configuration's class


@dataclass(kw_only=True)
class Upcycling(UpcyclingOptions):
    """How experts are made of a dense layer (see the module)."""

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
        """The dense model's configuration with experts; ValueError for a field unknown or that changes its output."""
        known = {field.name for field in fields(GPT2MoEConfig)} | GPT2MoEConfig.attribute_map.keys()
        for name in config_fields.keys() - known - {"attn_implementation"}:
            own = [*options_of(UpcyclingOptions), *GPT2MoEConfig.own_fields()]
            listed = f"give method, dtype or one of {', '.join(own)}"
            raise ValueError(f"from_dense has no option {name!r}: {did_you_mean(name, own, listed, cutoff=0.75)}")
        inherited = {name: value for name, value in dense.to_dict().items() if name not in _CLASS_FIELDS}
        activation = inherited["activation_function"]
        inherited["activation_function"] = FUSED_ACTIVATIONS.get(activation, activation)
        dense_size = _dense_size(dense)
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
        for name in _DENSE_FIELDS:
            if getattr(config, name) != inherited[name]:
                raise ValueError(
                    f"{name} = {getattr(config, name)} would change the dense model's output, whose {name} is "
                    f"{inherited[name]}: leave it out"
                )
        self._check(config, dense_size)
        return config

    def _check(self, config: GPT2MoEConfig, dense_size: int) -> None:
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
    """Fills a new `GPT2MoEForCausalLM`; ``take`` frees each part of ``dense`` once copied, to save memory."""
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
    """Normal, with the mean and standard deviation of ``source``."""
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


# ---------------------------------------------------------------------------------------------------------- downcycling
@torch.no_grad()
def to_dense(moe: PreTrainedModel, loads: Mapping[int, torch.Tensor] | None = None) -> GPT2LMHeadModel:
    """A dense GPT-2 whose MLPs are the means of a `GPT2MoEForCausalLM`'s experts, in eval mode.

    ``loads`` has weights (E,) of the experts, by block number from 0; None is equal weights. Raises a ValueError for
    gates that do not sum to one (``norm_topk_prob`` false): a mean would be larger than the experts' output.
    """
    config: Any = moe.config
    if not config.norm_topk_prob:
        raise ValueError(
            "the gates of this model do not sum to one (norm_topk_prob is false), so that no mean of its experts gives "
            "its output: only models with norm_topk_prob true become dense"
        )
    granularity, width = _dense_sizes(config)
    dropped = {*config.own_fields(), *_CLASS_FIELDS}
    kept = {name: value for name, value in config.to_dict().items() if name not in dropped}
    if width != _dense_size(config):
        kept["n_inner"] = width
    dense_config = GPT2Config(**kept)
    dense_config._attn_implementation = config._attn_implementation
    dense: GPT2LMHeadModel = nn.Module.to(GPT2LMHeadModel(dense_config), device=moe.device, dtype=moe.dtype)
    weights = {name: tensor for name, tensor in moe.state_dict().items() if ".mlp." not in name}
    body: Any = moe.transformer
    for index, block in enumerate(body.h):
        if isinstance(block.mlp, MoELayer):
            share_R = _shares(index, loads, config.num_experts, granularity)
            mlp = _mean_layer(block.mlp, share_R.to(moe.device), granularity)
        else:
            mlp = block.mlp.state_dict()
        prefix = f"transformer.h.{index}.mlp."
        weights |= {prefix + name: tensor for name, tensor in _widened(mlp, width).items()}
    dense.load_state_dict(weights)
    dense.generation_config = copy.deepcopy(moe.generation_config)
    return dense.eval()


def _dense_size(config: GPT2Config) -> int:
    return config.n_inner if config.n_inner is not None else 4 * config.n_embd


def _dense_sizes(config: GPT2MoEConfig) -> tuple[int, int]:
    """g, and the hidden units of every block of the dense model."""
    granularity, rest = divmod(_dense_size(config), config.expert_size)
    if rest or config.num_experts % granularity:
        granularity = 1
    widths = [(granularity + config.num_shared_experts) * config.expert_size]
    if not all(map(config.is_moe_layer, range(config.n_layer))):
        widths.append(_dense_size(config))
    return granularity, max(widths)


def _shares(index: int, loads: Mapping[int, torch.Tensor] | None, num_experts: int, granularity: int) -> torch.Tensor:
    """(R,) float64 normalised weights of a block's groups."""
    if loads is None:
        load_E = torch.ones(num_experts, dtype=torch.float64)
    elif index not in loads:
        raise ValueError(f"there are no loads for block {index}, only for {sorted(loads)}")
    else:
        load_E = torch.as_tensor(loads[index], dtype=torch.float64).cpu()
    if load_E.shape != (num_experts,):
        raise ValueError(f"block {index} has {num_experts} experts, but {load_E.numel()} loads are given")
    if not torch.isfinite(load_E).all() or (load_E < 0).any() or not load_E.any():
        raise ValueError(f"the loads of block {index} must be 0 or more and not all 0, but are {load_E.tolist()}")
    load_R = load_E.view(-1, granularity).sum(1)
    return load_R / load_R.sum()


def _mean_layer(layer: MoELayer, share_R: torch.Tensor, granularity: int) -> dict[str, torch.Tensor]:
    experts = layer.experts
    # Mean over groups, (R, g, ...) to (g, ...); then the shards are concatenated along the hidden units.
    up, up_bias, down, down_bias = (
        _mean(stacked.unflatten(0, (-1, granularity)), share_R)
        for stacked in (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    )
    # Every shard of a group has the whole bias, and the gates sum to one.
    bias_D = down_bias[0] + (down_bias - down_bias[0]).mean(0)
    up_DF, up_bias_F, down_FD = torch.cat(list(up), dim=1), up_bias.reshape(-1), torch.cat(list(down)) / granularity
    if layer.shared_experts is not None:
        fc, proj = layer.shared_experts.c_fc, layer.shared_experts.c_proj
        up_DF, up_bias_F = torch.cat([fc.weight, up_DF], dim=1), torch.cat([fc.bias, up_bias_F])
        down_FD, bias_D = torch.cat([proj.weight, down_FD]), bias_D + proj.bias
    return {"c_fc.weight": up_DF, "c_fc.bias": up_bias_F, "c_proj.weight": down_FD, "c_proj.bias": bias_D}


def _widened(mlp: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The same MLP with more hidden units: copies (zeros would get no gradient) with output weights of zero."""
    up_DF, up_bias_F, down_FD = mlp["c_fc.weight"], mlp["c_fc.bias"], mlp["c_proj.weight"]
    size = len(up_bias_F)
    unit_F = torch.arange(width, device=up_bias_F.device) % size
    down_FD = torch.cat([down_FD, down_FD.new_zeros(width - size, down_FD.shape[1])])
    return {**mlp, "c_fc.weight": up_DF[:, unit_F], "c_fc.bias": up_bias_F[unit_F], "c_proj.weight": down_FD}


def _mean(stacked_R: torch.Tensor, share_R: torch.Tensor) -> torch.Tensor:
    """Weighted mean, as the first plus a mean difference: exact where all are equal."""
    first = stacked_R[0]
    return first + torch.tensordot(share_R.to(first.dtype), stacked_R - first, dims=1)


@torch.no_grad()
def measure_loads(moe: PreTrainedModel, rows: Iterable[Mapping[str, Any]]) -> dict[int, torch.Tensor]:
    """Expert loads (E,) float64 by block number."""

    def forwards() -> None:
        for row in rows:
            moe(**row)

    with evaluating(moe):
        return count_loads(moe, forwards)
