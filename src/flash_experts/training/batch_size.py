"""The largest step that fits into the device's memory.

Powers of two are tried from the top, each with the forward and backward of one row of real names, until one does not
run out of memory. The largest that leaves eight steps in an epoch is the first: larger steps learn little from few
names. Nothing of a trial stays: no gradient, no statistic of a router, no random state.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from flash_experts.data.packing import EncodedName, PackedBatch, pack
from flash_experts.training.batches import NameBatches
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.errors import TrainingError
from flash_experts.training.parallel import Replicated
from flash_experts.training.precision import use_bfloat16
from flash_experts.training.processes import most_of_all
from flash_experts.training.training_config import TrainingConfig

SMALLEST = 256
_STEPS_PER_EPOCH = 8
# Epochs drop other attributes, so that their steps are not quite as large as those of the first.
_TO_SPARE = 1.1


def largest_that_fits(fits: Callable[[int], bool], tokens_per_epoch: int) -> int:
    """The largest power of two, from `SMALLEST` to an eighth of an epoch, for which ``fits`` holds.

    Args:
        fits: whether a step of so many tokens runs.
        tokens_per_epoch: tokens of all names.

    Raises:
        TrainingError: not even `SMALLEST` fits.
    """
    size = max(SMALLEST, 2 ** int(math.log2(max(1, tokens_per_epoch / _STEPS_PER_EPOCH))))
    while size >= SMALLEST:
        if fits(size):
            return size
        size //= 2
    raise TrainingError(
        f"not even a step of {SMALLEST} tokens fits into the device's memory: raise gradient_accumulation_steps, or "
        "take a smaller model"
    )


class Trial:
    """Tries steps of a model on its device.

    Args:
        wrapped: the model as training calls it.
        model: the plain model in it.
        optimizers: of the run; they are not touched, but what they will need is counted.
        accelerator: of the run. If memory runs out on one process, all try the next size.
        names: an epoch of each stage.
        rows_per_step: rows that a step is cut into, over all processes.
        autocast: whether forwards are in bfloat16.
    """

    def __init__(
        self,
        wrapped: nn.Module,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        accelerator: Accelerator,
        names: Sequence[Sequence[EncodedName]],
        rows_per_step: int,
        autocast: bool,
    ):
        self._wrapped, self._model, self._accelerator = wrapped, model, accelerator
        self._names, self._rows_per_step, self._autocast = names, rows_per_step, autocast
        self.device = accelerator.device
        self.tokens_per_epoch = max(sum(name.num_inputs for name in epoch) for epoch in names)
        # AdamW keeps two numbers for each weight, Muon one; an optimizer has them after its first step.
        self._state_numbers = sum(
            parameter.numel() * (1 if group.get("blocks") else 2)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def fits(self, tokens: int) -> bool:
        """Whether a step of so many tokens runs, on every process."""
        was_training = self._model.training
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        device = self.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            is_out = self._runs_out(tokens)
        # Out of the except clause: an exception holds on to the tensors of the frames that it came through.
        self._model.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        self._model.train(was_training)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return not most_of_all(self._accelerator, [float(is_out)])[0]

    def _runs_out(self, tokens: int) -> bool:
        device = self.device
        try:
            optimizer_state = torch.empty(self._state_numbers, device=device)
            self._wrapped.train()
            for epoch in self._names:
                row = pack(_first_names(epoch, tokens * _TO_SPARE / self._rows_per_step)).to(device)
                for _ in range(2):  # the second row of a step finds the gradient of the first in memory
                    self._forward_backward(row)
            del optimizer_state
        except torch.OutOfMemoryError:
            return True
        return False

    def _forward_backward(self, row: PackedBatch) -> None:
        with self._accelerator.no_sync(self._wrapped):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                output = self._wrapped(**row.inputs_with_loss(row.labels.numel()))
            self._accelerator.backward(output.loss)


def choose_tokens_per_batch(trial: Trial, run_dir: Path, say: Callable[[str], None]) -> int:
    """What the run in this folder began with, or else the largest that fits; says which.

    Raises:
        TrainingError: not even `SMALLEST` fits.
        ValueError: on a CPU, where memory has no sharp end.
    """
    if trial.device.type == "cpu":
        raise ValueError(
            "find_batch_size is for GPUs: on a CPU a trial too large is not refused, the system swaps or kills the "
            "process in the middle of it. Set tokens_per_batch (2048 suits a laptop)"
        )
    size = found_before(run_dir)
    if size is not None:
        say(f"tokens_per_batch: {size:,}, as when the run began")
        return size
    size = largest_that_fits(trial.fits, trial.tokens_per_epoch)
    where = f"fits on {trial.device} and leaves {_STEPS_PER_EPOCH} steps in an epoch"
    say(f"tokens_per_batch: {size:,}, the largest power of two that {where}")
    return size


def with_found_batch_size(
    config: TrainingConfig,
    parallel: Replicated,
    optimizers: Iterable[torch.optim.Optimizer],
    accelerator: Accelerator,
    batches: NameBatches,
    say: Callable[[str], None],
) -> TrainingConfig:
    """The configuration with the tokens of a step that `choose_tokens_per_batch` gives.

    Args:
        config: of the run.
        parallel: the model, as it is spread.
        optimizers: of the run.
        accelerator: of the run.
        batches: their names are tried, whatever the size of their steps.
        say: tells the person who watches.

    Raises:
        TrainingError: not even `SMALLEST` fits.
        ValueError: on a CPU.
    """
    rows_per_step = config.gradient_accumulation_steps * accelerator.num_processes
    autocast = use_bfloat16(config.precision, accelerator.device)
    names = batches.first_epochs()
    trial = Trial(parallel.wrapped, parallel.model, optimizers, accelerator, names, rows_per_step, autocast)
    return replace(config, tokens_per_batch=choose_tokens_per_batch(trial, config.run_dir, say))


def _first_names(epoch: Sequence[EncodedName], tokens: float) -> list[EncodedName]:
    """Names with at least so many tokens, begun anew where there are too few."""
    row: list[EncodedName] = []
    total = 0
    while total < tokens:
        row.append(epoch[len(row) % len(epoch)])
        total += row[-1].num_inputs
    return row


def found_before(run_dir: Path) -> int | None:
    """What the run in this folder found when it began, if it has checkpoints: its steps must not change."""
    path = run_dir / "run.json"
    if not checkpoint_steps(run_dir) or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    return cast(int, config["tokens_per_batch"]) if config.get("find_batch_size") else None
