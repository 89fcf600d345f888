"""What must survive a kill: the one way of it into a checkpoint and back.

Everything that one step leaves to the next is either a field of `TrainerState` (numbers of the loop itself), the
model's weights, or an object of the protocol below that is registered with the `Checkpointer` under a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from flash_experts.training.muon import Muon
from flash_experts.training.sharding import part_like

# What an optimizer keeps of a parameter: tensors like it, and a count of steps.
_SLOTS = {torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"}, Muon: {"momentum_buffer"}}


@dataclass
class TrainerState:
    """Where a run stands. Everything but the weights and the optimizer's tensors.

    Attributes:
        step: optimizer steps done.
        tokens: tokens multiplied so far.
        seconds: wall-clock time of training so far, without what a kill lost.
        evaluation_seconds: wall-clock time of the first validation.
        best_bits_per_char: lowest validation figure yet (`validation.SELECTION`); None before the first.
        best_step: when that was.
        bad_evaluations: validations since then.
        skipped_steps: steps whose loss or gradient was not finite and that were left out (``on_nan: skip``).
        skipped_in_a_row: how many of them came one after the other, up to the last of them.
        last_skipped: the last of them.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    best_bits_per_char: float | None = None
    best_step: int = 0
    bad_evaluations: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    last_skipped: int = 0

    def skip(self, step: int) -> int:
        """Counts a step that was left out. Returns how many in a row that makes."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step == self.last_skipped + 1 else 1
        self.last_skipped = step
        self.skipped_steps += 1
        return self.skipped_in_a_row

    def validated(self, bits_per_char: float) -> bool:
        """Takes in the validation figure of this step. Returns whether it is a new best."""
        if self.best_bits_per_char is not None and bits_per_char >= self.best_bits_per_char:
            self.bad_evaluations += 1
            return False
        self.best_bits_per_char, self.best_step, self.bad_evaluations = bits_per_char, self.step, 0
        return True


class Stateful(Protocol):
    """An object whose state is part of a checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, and values that JSON knows, by key. Called on every process, so it may gather; tensors that are
        spread over processes are gathered by the checkpointer."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave; tensors come whole and on the CPU.

        Raises:
            ValueError: the state is of something else.
        """


class OptimizerState:
    """An optimizer's tensors under the names of their parameters, ``h.0.ln_1.weight|exp_avg``.

    Names, unlike torch's numbers, still say what is what when parameters are grouped another way. Rates and the
    like are not stored: the configuration says them.

    Args:
        model: the plain model whose parameters the optimizer moves.
        optimizer: the plain optimizer, AdamW or Muon.
    """

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
                raise ValueError(f"it has a state of {name}, which is not trained here")
            parameter = parameters[index_of[name]]
            shape = torch.Size() if slot == "step" else parameter.shape
            # The fused kernels believe what they are given: of a smaller tensor they would read and write what follows.
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{key} is no floating-point tensor of shape {tuple(shape)}")
            slots.setdefault(index_of[name], {})[slot] = value if slot == "step" else part_like(value, parameter)
        expected = _SLOTS[type(self._optimizer)]
        for index, own in slots.items():
            if own.keys() != expected:
                there, here = ", ".join(sorted(own)), ", ".join(sorted(expected))
                raise ValueError(f"of {self._names[parameters[index]]} it has {there}, not {here}")
        self._optimizer.load_state_dict({"state": slots, "param_groups": self._optimizer.state_dict()["param_groups"]})


def split_state(name: str, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a state, as ``name/key``, and its other values."""
    tensors = {f"{name}/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return tensors, values


def join_state(name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`; ``tensors`` may have those of other names too."""
    prefix = name + "/"
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return own | dict(values)
