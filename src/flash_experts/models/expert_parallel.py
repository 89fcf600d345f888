"""Expert parallelism: experts sharded over processes, tokens exchanged by all-to-all.

Each process sends hidden states to the processes with their experts, and gets the results back (Lepikhin et al. 2020,
GShard; dropless, as in MegaBlocks, Gale et al. 2022). As DTensors, optimizers and checkpoints see whole experts.

Shape suffixes: X processes that hold different experts, E experts, L = E / X local experts, T tokens, K experts per
token, S = T * K pairs of this process, R pairs received, D width.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call
from transformers import PreTrainedConfig

from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import Experts, MoELayer


def expert_group_size(config: PreTrainedConfig, processes: int) -> int:
    """X, ``gcd(E, processes)``: each group of X processes holds all experts."""
    return math.gcd(config.num_experts, processes) if isinstance(config, GPT2MoEConfig) else 1


class ShardedExperts(nn.Module):
    """Replaces `Experts`; processes in a column of ``mesh``, (replicas, X), hold the same shard."""

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
        with torch.device("meta"):  # each forward passes in this process's shard
            self._compute = [Experts(config)]  # in a list, so that it is not a submodule

    def forward(self, x_TD: torch.Tensor, experts_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """A collective: every process must call it, even without tokens."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):  # halves the communication
            x_TD, gates_TK = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x_TD, gates_TK))
        (T, K), D = experts_TK.shape, x_TD.shape[1]
        order_S = experts_TK.reshape(-1).argsort(stable=True)
        sent_XL, received_XL = self._count_pairs(experts_TK)
        # The host must know the sizes: the one synchronisation in each layer.
        sent, received = torch.stack([sent_XL.sum(1), received_XL.sum(1)]).tolist()
        x_SD = x_TD[:, None].expand(T, K, D).reshape(T * K, D)[order_S]
        x_RD = all_to_all_single_autograd(x_SD, received, sent, self._group)
        y_SD = all_to_all_single_autograd(self._compute_pairs(x_RD, received_XL), sent, received, self._group)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(T * K, device=order_S.device)
        return torch.bmm(gates_TK[:, None], y_SD[back_S].view(T, K, D))[:, 0]

    def _count_pairs(self, experts_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs sent and received: (X, L) int64 each, by process and expert."""
        choices_S = experts_TK.reshape(-1)
        sent_E = choices_S.new_zeros(self.num_experts).scatter_add_(0, choices_S, torch.ones_like(choices_S))
        come_E = all_to_all_single(sent_E, None, None, self._group)
        return sent_E.view(self.group_size, -1), come_E.view(self.group_size, -1)

    def _compute_pairs(self, x_RD: torch.Tensor, received_XL: torch.Tensor) -> torch.Tensor:
        local_L = torch.arange(received_XL.shape[1], device=x_RD.device)
        expert_R = local_L.repeat(self.group_size).repeat_interleave(received_XL.reshape(-1), output_size=len(x_RD))
        # Gradients here cover one row of the mesh: `reduce_expert_gradients` sums over the replicas.
        weights = {name: weight.to_local(grad_placements=[Partial(), Shard(0)]) for name, weight in self._weights()}
        ones_R1 = x_RD.new_ones(len(x_RD), 1)
        return functional_call(self._compute[0], weights, (x_RD, expert_R[:, None], ones_R1))

    def _weights(self) -> list[tuple[str, DTensor]]:
        return [(name, weight) for name, weight in self.named_parameters() if isinstance(weight, DTensor)]


def shard_experts(model: nn.Module, config: GPT2MoEConfig, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Shards the experts of every MoE layer in place; returns the sharded weights."""
    sharded: list[nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            experts = ShardedExperts(layer.experts, config, mesh)
            layer.experts = experts  # type: ignore[assignment]
            sharded += experts.parameters()
    return sharded


@torch.no_grad()
def reduce_expert_gradients(weights: list[nn.Parameter]) -> None:
    """All-reduces gradients over the replicas of each expert, once a step, before gradient clipping."""
    for weight in weights:
        if isinstance(weight.grad, DTensor) and isinstance(weight, DTensor):
            weight.grad = weight.grad.redistribute(placements=weight.placements)
