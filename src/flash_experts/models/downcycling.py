"""The way back from experts to a dense GPT-2: each layer's experts averaged, weight by weight.

The mean of a model's experts is a baseline for what experts are worth beyond more weights (Wortsman et al. 2022, model
soups; Li et al. 2022, branch-train-merge), and as large and fast as the model that was upcycled. The mean may be
weighted by the load, the share of the tokens that the router sends to each expert, so that idle experts count little.

An upcycled model that was not trained gives back the dense weights, bit by bit for copies: the mean is taken as the
first expert plus the weighted mean of the others' differences from it, and differences of copies are zero.

Letters in the shapes: E experts, R = E / g groups of g experts (granular upcycling; g is 1 otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.models.modes import evaluating
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router_hooks import count_loads

_OF_THE_CLASS = ("model_type", "architectures", "transformers_version")  # of what a configuration tells of itself


@torch.no_grad()
def to_dense(
    moe: GPT2MoEForCausalLM, loads: Mapping[int, torch.Tensor] | None = None, granularity: int = 1
) -> GPT2LMHeadModel:
    """A dense GPT-2 whose MLPs are the means of the experts.

    Args:
        moe: left as it is.
        loads: for each block with experts (from 0), how much each of its experts counts, (E,); None for all alike. With
            granularity the loads of a group are added up.
        granularity: g, for a model of granular upcycling: expert ``r * g + s`` is shard s of group r. The shards are
            put side by side again, and the second matrix divided by g.

    Returns:
        In eval mode, on the device and with the dtype of ``moe``.

    Raises:
        ValueError: the model has shared experts, experts that do not fill a dense layer, or loads that do not fit.
    """
    config = moe.config
    if config.num_shared_experts:
        raise ValueError(
            "a model with shared experts has no dense layer of the same width: the shared experts and the mean of the "
            "routed ones are two sums of hidden units. Only models without them can be downcycled"
        )
    dense_size = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    if config.expert_size * granularity != dense_size or config.num_experts % granularity:
        raise ValueError(
            f"{granularity} of the {config.num_experts} experts, of {config.expert_size} hidden units each, do not "
            f"make a layer of {dense_size}: for a model of granular upcycling give the granularity it was made with"
        )
    dropped = {*config.own_fields(), *_OF_THE_CLASS}
    kept = {name: value for name, value in config.to_dict().items() if name not in dropped}
    dense_config = GPT2Config(**kept)
    dense_config._attn_implementation = config._attn_implementation
    dense: GPT2LMHeadModel = nn.Module.to(GPT2LMHeadModel(dense_config), device=moe.device, dtype=moe.dtype)
    weights = {name: tensor for name, tensor in moe.state_dict().items() if ".mlp." not in name}
    block: Any
    for index, block in enumerate(moe.transformer.h):
        prefix = f"transformer.h.{index}.mlp."
        if isinstance(block.mlp, MoELayer):
            share_R = _shares(index, loads, config.num_experts, granularity)
            mlp = _mean_layer(block.mlp, share_R.to(moe.device), granularity)
        else:
            mlp = block.mlp.state_dict()
        weights |= {prefix + name: tensor for name, tensor in mlp.items()}
    dense.load_state_dict(weights)
    dense.generation_config = moe.generation_config
    return dense.eval()


def _shares(index: int, loads: Mapping[int, torch.Tensor] | None, num_experts: int, granularity: int) -> torch.Tensor:
    """(R,) float64 weights of the groups of a block, which sum to one."""
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
    """The mean of a layer's experts under the names of GPT-2's MLP."""
    experts = layer.experts
    # Group by group: (R, g, ...) to (g, ...), then the shards side by side along the hidden units.
    up, up_bias, down, down_bias = (
        _mean(stacked.unflatten(0, (-1, granularity)), share_R)
        for stacked in (experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias)
    )
    return {
        "c_fc.weight": torch.cat(list(up), dim=1),
        "c_fc.bias": up_bias.reshape(-1),
        "c_proj.weight": torch.cat(list(down), dim=0) / granularity,
        # Every shard of a group has the whole bias, and the gates add up to one.
        "c_proj.bias": down_bias[0] + (down_bias - down_bias[0]).mean(0),
    }


def _mean(stacked_R: torch.Tensor, share_R: torch.Tensor) -> torch.Tensor:
    """Weighted mean over the first dimension; exactly the first where all are equal."""
    first = stacked_R[0]
    return first + torch.tensordot(share_R.to(first.dtype), stacked_R - first, dims=1)


@torch.no_grad()
def measure_loads(moe: GPT2MoEForCausalLM, rows: Iterable[Mapping[str, Any]]) -> dict[int, torch.Tensor]:
    """How many tokens the router of each block sends to each expert.

    Args:
        moe: any mode; it is evaluated, and its mode put back.
        rows: arguments of forwards without padding, for example `flash_experts.data.packing.PackedBatch.inputs`.

    Returns:
        For each block with experts (from 0) its loads, (E,) float64 on the CPU.
    """

    def forwards() -> None:
        for row in rows:
            moe(**row)

    with evaluating(moe):
        return count_loads(moe, forwards)
