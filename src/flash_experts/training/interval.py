"""What has happened since the last line of metrics. A resumed run goes on amid an interval as if never stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flash_experts.data.packing import PackedBatch
from flash_experts.models.router_metrics import router_metrics

# Buffers of a router that are no part of the model: what it has done since the last line.
_ROUTER_BUFFERS = ("interval_counts_E", "interval_pairs_EE", "interval_sums")
_BALANCING_LOSSES = ("aux_loss", "z_loss")
# Of the sums: those to which each process adds its own part.
_PARTS = [0, 3, 4, 5, 6]


class Interval:
    """Sums of an interval, on the device: adding to them waits for nothing.

    Args:
        model: the plain model, whose routers count for themselves.
        accelerator: adds up over the processes.
        is_code_length: whether the loss is plain cross-entropy, so that bits per character can be read off it.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, is_code_length: bool):
        self._model, self._accelerator, self._is_code_length = model, accelerator, is_code_length
        # This process's part of the losses, how many steps they are of, the last norm of a whole gradient; nats of its
        # names without any balancing loss, their characters, and its parts of the balancing losses.
        self._sums = torch.zeros(7, device=accelerator.device)
        self._forwards_of_step = torch.zeros(4, device=accelerator.device)
        self._balancing: list[str] = []  # which of them the model has

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor, is_bad: torch.Tensor) -> None:
        """Counts a step: 0-dimensional loss, norm and flag. A step that is skipped as bad leaves no trace."""
        total, steps, _ = self._sums[:3]
        added = torch.stack([total + loss, steps + 1, grad_norm.to(total.dtype)])
        added = torch.cat([added, self._sums[3:] + self._forwards_of_step])
        self._sums = torch.where(is_bad, self._sums, added)
        self._forwards_of_step = torch.zeros_like(self._forwards_of_step)

    def see(self, output: ModelOutput, row: PackedBatch, num_labels: int) -> None:
        """Counts a forward: the nats of its names, and its balancing losses by the row's share of the step's labels, as
        they are in ``output.loss``. Added up over rows and processes they are the step's means."""
        count = row.labels.numel()
        balancing = {name: output[name].detach() for name in _BALANCING_LOSSES if output.get(name) is not None}
        nats = output["loss"].detach() * num_labels
        for name, value in balancing.items():
            nats = nats - getattr(self._model.config, f"router_{name}_coef") * value * count
        parts = [balancing.get(name, torch.zeros_like(nats)) * (count / num_labels) for name in _BALANCING_LOSSES]
        characters = row.characters.sum().to(nats.device, torch.float32)
        self._forwards_of_step += torch.stack([nats.float(), characters, *(part.float() for part in parts)])
        self._balancing = list(balancing)

    def metrics(self) -> dict[str, float]:
        """Mean loss and balancing losses over steps, rows and processes (left out if every step was skipped), norm of
        the last gradient, bits per character of the names (the end symbol counts as one) after their prompts, what the
        routers did; begins anew. Every process must call it."""
        sums = self._sums.clone()
        sums[_PARTS] = cast(torch.Tensor, self._accelerator.reduce(sums[_PARTS], "sum"))
        total, steps, grad_norm, nats, characters, *parts = sums.tolist()
        self._sums[[1, *_PARTS]] = 0
        loss = {"loss": total / steps, "grad_norm": grad_norm} if steps else {}
        if steps and self._is_code_length:
            loss["bits_per_char"] = nats / math.log(2) / characters
        if steps:
            means = dict(zip(_BALANCING_LOSSES, (part / steps for part in parts), strict=True))
            loss |= {name: means[name] for name in self._balancing}
        self._add_up_routers()
        return loss | router_metrics(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Every process's own sums, (processes, ...), since their rounding is not that of the total."""
        own = {"sums": self._sums} | self._router_buffers()
        return {name: cast(torch.Tensor, self._accelerator.gather(value[None])) for name, value in own.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sums = state["sums"].to(self._sums.device)
        if sums.shape[1:] != self._sums.shape:
            raise ValueError("its sums are of another version of this program")
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        if len(sums) == world:
            self._sums = sums[rank].clone()
        else:  # another number of processes: each takes an equal part of the loss
            self._sums = sums[0].clone()
            self._sums[_PARTS] = sums[:, _PARTS].sum(0) / world
        for name, buffer in self._router_buffers().items():
            if state[name].shape[1:] != buffer.shape:
                raise ValueError(f"{name} is of other experts")
            if len(state[name]) == world:
                buffer.copy_(state[name][rank])
            else:  # they are only ever added up
                buffer.copy_(state[name].sum(0) * (rank == 0))

    def _add_up_routers(self) -> None:
        """Gives every process what the routers of all of them did."""
        buffers = list(self._router_buffers().values())
        if self._accelerator.num_processes == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        total = cast(torch.Tensor, self._accelerator.reduce(flat, "sum"))
        for buffer, part in zip(buffers, total.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def _router_buffers(self) -> dict[str, torch.Tensor]:
        buffers = self._model.named_buffers()
        return {name: buffer for name, buffer in buffers if name.rpartition(".")[2] in _ROUTER_BUFFERS}
