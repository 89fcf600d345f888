"""What two processes send each other in a training step. Chapter 8 starts this file twice, as this command does:

    torchrun --nproc-per-node 2 docs/learn/two_processes.py OUT

Each process writes its measurements to OUT/RANK.json. The "devices" are two processes on one machine that talk through gloo.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from chapter_tools import cards, load_base
from torch.distributed.device_mesh import init_device_mesh

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models import expert_parallel
from flash_experts.models.expert_parallel import ShardedExperts

E, K, NAMES = 8, 2, 24


def gradient(model: torch.nn.Module, names: list[Any], labels: int) -> torch.Tensor:
    """(N,) the gradient of some names' part of the step's loss. Without balancing losses: they are no sum over tokens."""
    model.zero_grad()
    model(**pack(names).inputs_with_loss(labels)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def data_parallel(model: torch.nn.Module, names: list[Any], labels: int) -> dict[str, Any]:
    """Each process computes half of the names; the gradients are added up (DDP does this while it goes backward)."""
    alone_N = gradient(model, names, labels)
    mine_N = gradient(model, names[dist.get_rank() :: 2], labels)
    before = (mine_N - alone_N).norm() / alone_N.norm()
    dist.all_reduce(mine_N)
    after = (mine_N - alone_N).norm() / alone_N.norm()
    return {"before": before.item(), "after": after.item(), "bytes": mine_N.numel() * mine_N.element_size()}


def sharded(model: torch.nn.Module, names: list[Any], labels: int) -> dict[str, Any]:
    """Each process keeps, and updates, half of the weights: gradients are scattered, new weights gathered (ZeRO)."""
    weights_N = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    half = weights_N.numel() // 2
    whole_N = torch.nn.Parameter(weights_N[: 2 * half].clone())
    mine_H = torch.nn.Parameter(weights_N.view(-1)[: 2 * half].chunk(2)[dist.get_rank()].clone())
    local_N = gradient(model, names[dist.get_rank() :: 2], labels)[: 2 * half]
    mine_H.grad = torch.empty(half)
    dist.reduce_scatter_tensor(mine_H.grad, local_N.clone())
    dist.all_reduce(local_N)
    whole_N.grad = local_N
    for weight in (whole_N, mine_H):  # AdamW with all state here, and with half of it
        optimizer = torch.optim.AdamW([weight], lr=1e-3)
        optimizer.step()
        kept = sum(x.numel() for x in optimizer.state[weight].values() if x.ndim)
    gathered_N = torch.empty(2 * half)
    dist.all_gather_into_tensor(gathered_N, mine_H.detach())
    return {"off": (gathered_N - whole_N.detach()).abs().max().item(), "state": kept, "whole_state": 2 * len(weights_N)}


@contextmanager
def watched(sent: list[dict[str, Any]]) -> Iterator[None]:
    """Notes what the package's all-to-all sends: in all, and to the other process."""

    def noting(function: Any) -> Any:
        def call(x: torch.Tensor, come: list[int] | None, go: list[int] | None, group: Any) -> torch.Tensor:
            rows = [len(x) // 2] * 2 if go is None else go
            row = x[0].numel() * x.element_size() if len(x) else 0
            sent.append({"rows": rows, "bytes_to_other": rows[1 - dist.get_rank()] * row, "dtype": str(x.dtype)})
            return function(x, come, go, group)

        return call

    names = ("all_to_all_single", "all_to_all_single_autograd")
    originals = {name: getattr(expert_parallel, name) for name in names}
    with mock.patch.multiple(expert_parallel, **{name: noting(each) for name, each in originals.items()}):
        yield


@torch.no_grad()
def expert_parallel_layer(model: GPT2MoEForCausalLM, names: list[Any]) -> dict[str, Any]:
    """Each process holds half of the experts, and sends its tokens to where their experts are."""
    block = model.config.moe_layer_freq - 1
    layer = model.transformer.h[block].mlp
    read: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: read.append(inputs[0][0]))
    model(**pack(names[dist.get_rank() :: 2]).inputs)
    hook.remove()
    x_TD = read[0]
    _, gates_TK, experts_TK = layer.router(x_TD)
    sent: list[dict[str, Any]] = []
    spread = ShardedExperts(layer.experts, model.config, init_device_mesh("cpu", (1, 2)))
    with watched(sent):
        off = (spread(x_TD, experts_TK, gates_TK) - layer.experts(x_TD, experts_TK, gates_TK)).abs().max()
    held = sum(weight.to_local().numel() for weight in spread.parameters())
    return {
        "off": off.item(),
        "tokens": len(x_TD),
        "pairs_of_expert": torch.bincount(experts_TK.flatten(), minlength=E).tolist(),
        "sent": sent,
        "weights_here": held,
        "weights_in_all": sum(weight.numel() for weight in layer.experts.parameters()),
    }


def main(out: Path) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # some collectives have newer names, which torch 2.11 does not know
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    dense, tokenizer = load_base()
    names = encode_cards(cards("train")[:NAMES], tokenizer)
    labels = sum(len(name.ids) - name.prompt_length for name in names)
    torch.manual_seed(0)
    model = GPT2MoEForCausalLM.from_dense(
        dense, num_experts=E, num_experts_per_tok=K, router_aux_loss_coef=0.0, router_z_loss_coef=0.0
    )
    found = {
        "data parallel": data_parallel(copy.deepcopy(model), names, labels),
        "sharded": sharded(copy.deepcopy(model), names, labels),
        "expert parallel": expert_parallel_layer(model, names),
    }
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
