"""What is subtle about several processes, each in a function with its reason."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from flash_experts.models.loading import resolve_device

# Longer than what the main process does alone while the others wait for it (sample names). A process that dies closes
# its connections, and the others fail at once; one that falls silent is found much earlier by `heartbeat`.
_LONGEST_WAIT = timedelta(minutes=10)


def make_accelerator(device: str) -> Accelerator:
    """The process group and the device of this process.

    Raises:
        ValueError: the device is not there.
    """
    found = resolve_device(None if device == "auto" else device)
    # Buffers are what each router counted of its own tokens: DDP would overwrite them with the main process's before
    # each forward. Gradients that are views of what DDP sends are not held twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=_LONGEST_WAIT), ddp]
    return Accelerator(cpu=found.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes dropout (and router noise) a function of (seed, step, process).

    So a checkpoint needs no random state, the processes draw different masks, and neither validation nor sampling
    can move what training draws.
    """
    torch.manual_seed(random.Random(f"dropout/{seed}/{step}/{rank}").getrandbits(63))


def most_of_all(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The largest of each value over the processes, so that all decide alike. Times keep their double precision."""
    mine = torch.tensor([values], device=accelerator.device, dtype=torch.float64)
    return cast(list[float], cast(torch.Tensor, accelerator.gather(mine)).amax(0).tolist())


def agree(accelerator: Accelerator, seconds: float, stop: bool, due: bool, seconds_held: float) -> tuple[float, bool]:
    """Time and the wish to stop as all processes know them.

    A signal reaches one process, and clocks differ: one that ended a step before the others would leave them waiting
    for its gradient. On GPUs, where asking waits for the device, they are exchanged at log steps alone.

    Args:
        accelerator: of the run.
        seconds: by this process's clock.
        stop: whether this process was told to stop.
        due: whether this is a log step.
        seconds_held: what was agreed last; it holds where nothing is exchanged.
    """
    if accelerator.num_processes == 1:
        return seconds, stop
    if not due and accelerator.device.type != "cpu":
        return seconds_held, False
    most_seconds, any_stop = most_of_all(accelerator, [seconds, float(stop)])
    return most_seconds, bool(any_stop)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone: gloo and NCCL have no class of their own for it."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text
