"""AdamW as GPT-2 is trained, or Muon for the matrices and AdamW for the rest; each part of the model at its own rate.

A parameter's rate is the schedule's times two factors:

- ``lr_scale`` of its part: the routers, the (routed) experts, or everything else, called dense. 0 freezes a part: no
  gradient is computed, no optimizer state is kept.
- ``layer_decay`` to the power of its distance from the output: 0 for what follows the blocks, 1 for the last block, L
  for the first, L + 1 for the embeddings (Bao et al. 2022, BEiT). The output layer of GPT-2 is its embedding table, and
  counts as embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flash_experts.training.muon import Muon
from flash_experts.training.precision import use_bfloat16
from flash_experts.training.training_config import PARTS, LearningRateScale, TrainingConfig

_BLOCK = re.compile(r"\bh\.(\d+)\.")
_EMBEDDINGS = ("wte.weight", "wpe.weight")


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter belongs to, by its name. Shared experts see every token: they are dense."""
    if ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "dense"


def freeze_parts(model: nn.Module, scale: LearningRateScale) -> None:
    """Takes the gradient from the parts whose scale is 0. They stay so in the model that was given.

    Raises:
        ValueError: a scale is of a part that the model has not, or nothing is left to train.
    """
    present = {part_of(name) for name, _ in model.named_parameters()}
    for part in PARTS:
        if getattr(scale, part) != 1 and part not in present:
            raise ValueError(
                f"lr_scale.{part} is {getattr(scale, part):g}, but the model has no {part}: leave it at 1, or set "
                "model.num_experts"
            )
    for name, parameter in model.named_parameters():
        if getattr(scale, part_of(name)) == 0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no weights to train: every parameter is frozen")


def make_optimizers(model: nn.Module, config: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a run by the names of their states in a checkpoint: ``optimizer`` (AdamW), and ``muon``.

    AdamW is fused (one kernel for all weights). Weight decay is on matrices, not on biases and norms; the experts'
    biases are stacked, so they have two dimensions: they are told by their names. Each group has a ``scale``, see
    `set_rates`.

    Raises:
        ValueError: every parameter is frozen.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the model has no weights to train: every parameter is frozen")
    scales = _scales(model, config)
    is_muons = {name: config.optimizer == "muon" and _is_hidden_matrix(name, parameter) for name, parameter in trained}
    for_adamw, for_muon = _Groups(), _Groups()
    for name, parameter in trained:
        decay = config.weight_decay if _is_matrix(name, parameter) else 0.0
        if is_muons[name]:
            blocks = 3 if name.endswith("c_attn.weight") else 1  # query, key and value side by side
            for_muon.add(parameter, scale=scales[name], weight_decay=decay, blocks=blocks)
        else:
            for_adamw.add(parameter, scale=scales[name], weight_decay=decay)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if for_adamw.groups:
        first, second = config.betas
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for _, parameter in trained)
        optimizers["optimizer"] = torch.optim.AdamW(
            for_adamw.groups, lr=config.learning_rate, betas=(first, second), eps=1e-8, fused=fused
        )
    if for_muon.groups:
        optimizers["muon"] = Muon(
            for_muon.groups,
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            dtype=torch.bfloat16 if use_bfloat16(config.precision, trained[0][1].device) else None,
        )
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Gives each group the rate of the step times its scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]


def part_rates(scale: LearningRateScale, rate: float) -> dict[str, float]:
    """``lr/router`` and so on, for the log; empty where all parts have the rate of the schedule."""
    scales = {part: getattr(scale, part) for part in PARTS}
    if all(factor == 1 for factor in scales.values()):
        return {}
    return {f"lr/{part}": rate * factor for part, factor in scales.items()}


class _Groups:
    """Parameter groups, one for each distinct set of settings."""

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], dict[str, Any]] = {}

    @property
    def groups(self) -> list[dict[str, Any]]:
        return list(self._groups.values())

    def add(self, parameter: nn.Parameter, **settings: float) -> None:
        # One kernel moves a group, and cannot take weights that are spread over processes in different ways.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = self._groups.setdefault((mesh, *settings.items()), {"params": [], **settings})
        group["params"].append(parameter)


def _scales(model: nn.Module, config: TrainingConfig) -> dict[str, float]:
    """The factors of each parameter's rate, multiplied."""
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    num_blocks = 1 + max(blocks.values(), default=-1)
    scales = {}
    for name in names:
        distance = num_blocks - blocks[name] if name in blocks else (num_blocks + 1) * name.endswith(_EMBEDDINGS)
        scales[name] = getattr(config.lr_scale, part_of(name)) * config.layer_decay**distance
    return scales


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon is for. The rows of routers and embeddings are vectors beside each other, not a map between spaces."""
    return _is_matrix(name, parameter) and part_of(name) != "router" and _BLOCK.search(name) is not None
