"""Resumable state: the ``state_dict`` protocol of what a checkpoint keeps besides the weights and `TrainerState`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from flash_experts.training.muon import Muon
from flash_experts.training.sharding import shard_like

# State that an optimizer keeps for each parameter.
_SLOTS = {torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"}, Muon: {"momentum_buffer"}}


class Stateful(Protocol):
    """An object whose state is part of a checkpoint, once it is registered with the `Checkpointer`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors (sharded ones too) and JSON values by key. Called on every process, so it may gather."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave (tensors are full and on the CPU), or raises a ValueError if it does not
        match."""


class OptimizerState:
    """The state of AdamW or Muon by parameter names, ``h.0.ln_1.weight|exp_avg``, which, unlike torch's indices, stay
    right when parameters are grouped differently."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{self._names[parameter]}|{slot}": value
            for parameter, slots in self._optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        index_of = {self._names[parameter]: index for index, parameter in enumerate(parameters)}
        slots: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, slot = key.rpartition("|")
            if name not in index_of:
                raise ValueError(f"it has optimizer state for {name}, which is not trained here")
            parameter = parameters[index_of[name]]
            shape = torch.Size() if slot == "step" else parameter.shape
            # The fused kernels do not check shapes: with a smaller tensor they would write out of bounds.
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{key} is not a floating-point tensor of shape {tuple(shape)}")
            slots.setdefault(index_of[name], {})[slot] = value if slot == "step" else shard_like(value, parameter)
        expected = _SLOTS[type(self._optimizer)]
        for index, own in slots.items():
            if own.keys() != expected:
                there, here = ", ".join(sorted(own)), ", ".join(sorted(expected))
                raise ValueError(f"for {self._names[parameters[index]]} it has {there}, not {here}")
        self._optimizer.load_state_dict({"state": slots, "param_groups": self._optimizer.state_dict()["param_groups"]})


def split_state(name: str, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Separates the tensors of a state, with keys ``name/key``, from its JSON values."""
    tensors = {f"{name}/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return tensors, values


def join_state(name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`; ``tensors`` may also have other names' keys."""
    prefix = name + "/"
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return own | dict(values)
