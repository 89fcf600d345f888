"""Downcycling: an MoE model back to a dense GPT-2, by averaging the weights of each layer's experts.

It is a baseline for the value of separate experts (Wortsman et al. 2022, model soups; Li et al. 2022,
branch-train-merge), and a model for programs that know no experts. An upcycled model that was not trained gives back
the dense weights, bit by bit for copies. Shared experts are kept next to the mean of the routed ones: a sum of MLPs is
one MLP with the hidden units of both.

Shape suffixes: E experts, R = E / g groups of g experts (granular upcycling; g is 1 otherwise), F hidden units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router_metrics import count_loads
from flash_experts.models.scoring import evaluating

_CLASS_FIELDS = ("model_type", "architectures", "transformers_version")  # set by the configuration's class


@torch.no_grad()
def to_dense(moe: GPT2MoEForCausalLM, loads: Mapping[int, torch.Tensor] | None = None) -> GPT2LMHeadModel:
    """A dense GPT-2 whose MLPs are the means of the experts, in eval mode.

    ``loads`` has weights (E,) of the experts, by block number from 0; None is equal weights.

    Raises:
        ValueError: loads of the wrong shape.
    """
    config = moe.config
    granularity, width = _sizes(config)
    dropped = {*config.own_fields(), *_CLASS_FIELDS}
    kept = {name: value for name, value in config.to_dict().items() if name not in dropped}
    if width != _dense_size(config):
        kept["n_inner"] = width
    dense_config = GPT2Config(**kept)
    dense_config._attn_implementation = config._attn_implementation
    dense: GPT2LMHeadModel = nn.Module.to(GPT2LMHeadModel(dense_config), device=moe.device, dtype=moe.dtype)
    weights = {name: tensor for name, tensor in moe.state_dict().items() if ".mlp." not in name}
    block: Any
    for index, block in enumerate(moe.transformer.h):
        if isinstance(block.mlp, MoELayer):
            share_R = _shares(index, loads, config.num_experts, granularity)
            mlp = _mean_layer(block.mlp, share_R.to(moe.device), granularity)
        else:
            mlp = block.mlp.state_dict()
        prefix = f"transformer.h.{index}.mlp."
        weights |= {prefix + name: tensor for name, tensor in _widened(mlp, width).items()}
    dense.load_state_dict(weights)
    dense.generation_config = moe.generation_config
    return dense.eval()


def _dense_size(config: GPT2MoEConfig) -> int:
    return config.n_inner if config.n_inner is not None else 4 * config.n_embd


def _sizes(config: GPT2MoEConfig) -> tuple[int, int]:
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
    """The mean of a layer's experts, named as GPT-2's MLP."""
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
    """The same MLP with more hidden units: copies of the first, with output weights of zero.

    (Units with input weights of zero as well would get no gradient.)
    """
    up_DF, up_bias_F, down_FD = mlp["c_fc.weight"], mlp["c_fc.bias"], mlp["c_proj.weight"]
    size = len(up_bias_F)
    unit_F = torch.arange(width, device=up_bias_F.device) % size
    down_FD = torch.cat([down_FD, down_FD.new_zeros(width - size, down_FD.shape[1])])
    return {**mlp, "c_fc.weight": up_DF[:, unit_F], "c_fc.bias": up_bias_F[unit_F], "c_proj.weight": down_FD}


def _mean(stacked_R: torch.Tensor, share_R: torch.Tensor) -> torch.Tensor:
    """Weighted mean over the first dimension, as the first plus a mean difference: exact where all are equal."""
    first = stacked_R[0]
    return first + torch.tensordot(share_R.to(first.dtype), stacked_R - first, dims=1)


@torch.no_grad()
def measure_loads(moe: GPT2MoEForCausalLM, rows: Iterable[Mapping[str, Any]]) -> dict[int, torch.Tensor]:
    """Expert loads (E,) float64 by block number, over forwards in eval mode without padding."""

    def forwards() -> None:
        for row in rows:
            moe(**row)

    with evaluating(moe):
        return count_loads(moe, forwards)
