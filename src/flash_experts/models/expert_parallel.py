"""Experts spread over processes: each holds some of them, and tokens travel to their experts and back.

The layer around them stays as it is: the router chooses among all experts, and what it calls is still
``experts(x_TD, experts_TK, gates_TK)``. In there (Lepikhin et al. 2020, GShard; without a capacity, as in MegaBlocks,
Gale et al. 2022):

    1. each process sorts its (token, expert) pairs by expert and tells the others how many will come for each expert
    2. an all-to-all takes the hidden states to the processes that hold the experts
    3. there the experts compute them, by whatever implementation the configuration names
    4. another all-to-all takes the results back, where the gates weigh them

In the backward gradients take the same ways in the other direction. transformers' own plan (``base_model_ep_plan``) is
another thing: every process has all tokens, and what each computes of them is added up.

The weights are DTensors under their usual names, so optimizers, norms and checkpoints see whole experts.

Letters in the shapes: X processes that hold different experts, E experts, L = E / X of them here, T tokens, K experts
per token, S = T * K pairs of this process, R pairs that come to it, D width.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call

from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import Experts, MoELayer


class SpreadExperts(nn.Module):
    """`Experts` of which this process computes E / X, in the place of all of them.

    Args:
        experts: all experts, equal on every process. They are left as they are.
        config: theirs.
        mesh: the processes, (replicas, X): those of a column hold the same experts.

    Raises:
        ValueError: X does not divide E.
    """

    def __init__(self, experts: Experts, config: GPT2MoEConfig, mesh: DeviceMesh):
        super().__init__()
        assert mesh.ndim == 2, mesh
        self.num_experts, self.group_size = experts.num_experts, mesh.size(1)
        if self.num_experts % self.group_size:
            raise ValueError(f"{self.group_size} processes cannot share {self.num_experts} experts evenly")
        self._group = mesh.get_group(1)
        for name, weight in experts.named_parameters():
            here = distribute_tensor(weight.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(here, requires_grad=weight.requires_grad))
        config = copy.copy(config)
        config.num_experts = self.num_experts // self.group_size
        with torch.device("meta"):
            # What computes: it has no weights of its own, each forward lends it those of this process.
            self._compute = [Experts(config)]  # in a list, so that it is no part of the model

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """``sum_k gates[t, k] * MLP_{experts[t, k]}(x[t])``, (T, D). Every process must call it, with tokens or not."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):  # half the bytes travel
            x_TD, gates_TK = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x_TD, gates_TK))
        (T, K), D = experts_TK.shape, x_TD.shape[1]
        order_S = experts_TK.reshape(-1).argsort(stable=True)
        sent_XL, come_XL = self._count_pairs(experts_TK)
        # The sizes must be known on the host: the one wait for the device in each layer.
        sent, come = torch.stack([sent_XL.sum(1), come_XL.sum(1)]).tolist()
        x_SD = x_TD[:, None].expand(T, K, D).reshape(T * K, D)[order_S]
        x_RD = all_to_all_single_autograd(x_SD, come, sent, self._group)
        y_SD = all_to_all_single_autograd(self._compute_pairs(x_RD, come_XL), sent, come, self._group)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(T * K, device=order_S.device)
        return torch.bmm(gates_TK[:, None], y_SD[back_S].view(T, K, D))[:, 0]

    def _count_pairs(self, experts_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs that this process sends, and that come to it: (X, L) int64, by process and expert."""
        choices_S = experts_TK.reshape(-1)
        sent_E = choices_S.new_zeros(self.num_experts).scatter_add_(0, choices_S, torch.ones_like(choices_S))
        come_E = all_to_all_single(sent_E, None, None, self._group)
        return sent_E.view(self.group_size, -1), come_E.view(self.group_size, -1)

    def _compute_pairs(self, x_RD: torch.Tensor, come_XL: torch.Tensor) -> torch.Tensor:
        """(R, D): the outputs of this process's experts for the pairs that came, in their order."""
        local_L = torch.arange(come_XL.shape[1], device=x_RD.device)
        expert_R = local_L.repeat(self.group_size).repeat_interleave(come_XL.reshape(-1), output_size=len(x_RD))
        # A gradient here is of the tokens of one row of the mesh: `reduce_expert_gradients` adds up those of all.
        weights = {name: weight.to_local(grad_placements=[Partial(), Shard(0)]) for name, weight in self._weights()}
        ones_R1 = x_RD.new_ones(len(x_RD), 1)
        return functional_call(self._compute[0], weights, (x_RD, expert_R[:, None], ones_R1))

    def _weights(self) -> list[tuple[str, DTensor]]:
        return [(name, weight) for name, weight in self.named_parameters() if isinstance(weight, DTensor)]


def spread_experts(model: nn.Module, config: GPT2MoEConfig, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Spreads the experts of every MoE layer of a model, in place; returns their weights.

    Args:
        model: a `GPT2MoEForCausalLM`, equal on every process. Its routers, their counts and its losses stay as they
            are: each process routes its own tokens.
        config: its configuration.
        mesh: the processes, (replicas, X).

    Raises:
        ValueError: X does not divide the number of experts.
    """
    spread: list[nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            experts = SpreadExperts(layer.experts, config, mesh)
            layer.experts = experts  # type: ignore[assignment]
            spread += experts.parameters()
    return spread


@torch.no_grad()
def reduce_expert_gradients(weights: list[nn.Parameter]) -> None:
    """Adds up the gradients of the processes that hold the same experts. Call once a step, before the norm is taken."""
    for weight in weights:
        if isinstance(weight.grad, DTensor) and isinstance(weight, DTensor):
            weight.grad = weight.grad.redistribute(placements=weight.placements)
