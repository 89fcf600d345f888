"""Several processes: data parallel (DDP), sharded (FSDP2) and expert parallel models, agreement, and a heartbeat."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed import DistError, PrefixStore, TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers import initialization as init

from flash_experts.models.expert_parallel import expert_group_size, reduce_expert_gradients, shard_experts
from flash_experts.models.loading import resolve_device
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.training.training_config import TrainingConfig

# Longer than what the main process does alone while the others wait for it (sample names). A process that dies closes
# its connections, and the others fail at once; one that stops responding is found much earlier by `Heartbeat`.
_LONGEST_WAIT = timedelta(minutes=10)
# A process that is silent for this long counts as dead. With the time to notice it, under a minute.
HEARTBEAT_TIMEOUT_SECONDS = 45.0
_BEATS_PER_TIMEOUT = 9
_ENDED = "ended"


def make_accelerator(device: str) -> Accelerator:
    """Joins the process group and selects this process's device; a ValueError if it is not available."""
    found = resolve_device(None if device == "auto" else device)
    # Each router's buffers count its own tokens: DDP would overwrite them with the main process's before each forward.
    # Gradients that are views of DDP's buckets are not held twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=_LONGEST_WAIT), ddp]
    # The plugin overrides ACCELERATE_GRADIENT_ACCUMULATION_STEPS, by which each backward would divide the loss again.
    accumulation = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(
        cpu=found.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=accumulation,
        kwargs_handlers=handlers,
    )


# ------------------------------------------------------------------------------------------------------ sharded tensors
# A DTensor stands for the full tensor, of which each process holds a shard. Functions here take ordinary tensors too.


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, in the tensor's memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every process (all-gather). All must call it, in the same order."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards ``full``, which every process has, as ``like``. Nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    return distribute_tensor(full.to(like.device), mesh, like.placements, src_data_rank=None)


def holds_whole_matrices(tensor: torch.Tensor) -> bool:
    """Whether no matrix is cut: an ordinary tensor, or experts' (N, R, C) sharded over N alone."""
    if not isinstance(tensor, DTensor):
        return True
    shards = [placement for placement in tensor.placements if not placement.is_replicate()]
    return tensor.ndim == 3 and all(isinstance(shard, Shard) and shard.dim == 0 for shard in shards)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scales the gradient down to the norm ``limit``; returns the norm before, 0-dimensional."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # A shard may be on one process alone or replicated on several: DTensors know which, and count each one once.
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for parameter in trained:
        gradient = cast(torch.Tensor, parameter.grad)
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [gather_full(torch.nn.utils.get_total_norm(gradients)) for gradients in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if math.isfinite(limit):
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local_shard(cast(torch.Tensor, parameter.grad)) for parameter in trained], scale)
    return norm


# -------------------------------------------------------------------------------------------------- parallel strategies


def parallelize_model(model: PreTrainedModel, accelerator: Accelerator, config: TrainingConfig) -> Replicated:
    """Distributes the model in place by ``config.parallel``, before its optimizers are made.

    Raises:
        ValueError: expert parallel, but the model has no experts, or no two processes can share them.
    """
    world = accelerator.num_processes
    if world == 1 or config.parallel == "ddp":
        return Replicated(model, accelerator, config.compile)
    if config.parallel == "fsdp":
        return Sharded(model, accelerator)
    if not isinstance(model.config, GPT2MoEConfig):
        raise ValueError("parallel: expert distributes experts, but the model has none: use ddp or fsdp")
    if expert_group_size(model.config, world) == 1:
        raise ValueError(
            f"{world} processes cannot share {model.config.num_experts} experts: start a number of processes that has "
            "a divisor in common with it, or use parallel: fsdp"
        )
    return ExpertParallel(model, accelerator)


class Replicated:
    """Data parallel: every process has the whole model (DDP). Base of the other strategies.

    Training calls ``wrapped``; validation and saving use the plain ``model``.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, compile: bool = False):
        self.model, self.accelerator = model, accelerator
        self._class = type(model)  # sharding changes it
        self.wrapped = self._wrap(cast(nn.Module, torch.compile(model, dynamic=True) if compile else model))

    def _wrap(self, module: nn.Module) -> nn.Module:
        return cast(nn.Module, self.accelerator.prepare_model(module))

    def no_sync(self) -> AbstractContextManager[Any]:
        """While open, backwards add to this process's gradient without communication."""
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's part of the step's loss."""
        self.accelerator.backward(loss * self.accelerator.num_processes)  # undoes DDP's mean over processes

    def clip(self, limit: float) -> torch.Tensor:
        """Clips the global gradient norm after a step's last backward; returns the norm before."""
        return clip_grad_norm(self.model.parameters(), limit)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open, the plain model is in eval mode; all processes must call a sharded one equally often."""
        self.model.eval()
        yield

    def full_model(self) -> PreTrainedModel | None:
        """An unsharded model in eval mode on the main process, None on the others; all call it."""
        return self.model.eval() if self.accelerator.is_main_process else None


class Sharded(Replicated):
    """FSDP2 (ZeRO-3): every process has a shard of weights, gradients and optimizer state.

    The weights of a block are all-gathered when it is computed, and freed after.
    """

    def _wrap(self, module: nn.Module) -> nn.Module:
        self._shard(set())
        return module

    def _shard(self, ignored: set[nn.Parameter]) -> None:
        """Shards each block, and the rest as one unit."""
        world = self.accelerator.num_processes
        mesh = init_device_mesh(self.accelerator.device.type, (world,))
        stacked = {weight for name, weight in self.model.named_parameters() if ".experts." in name}

        def placement(weight: nn.Parameter) -> Shard | None:
            """The first dimension, or the second if the processes cannot share the experts evenly."""
            cut_inside = weight in stacked and weight.shape[0] % world and weight.shape[1] % world == 0
            return Shard(1) if cut_inside else None

        blocks = self.model._no_split_modules or ()
        units = [module for module in self.model.modules() if type(module).__name__ in blocks]
        for module in [*units, self.model]:
            fully_shard(module, mesh=mesh, shard_placement_fn=placement, ignored_params=ignored)
            unit = cast(FSDPModule, module)
            unit.set_gradient_divide_factor(1.0)  # a sum over processes, not a mean,
            unit.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has

    @property
    def _fsdp(self) -> FSDPModule:
        return cast(FSDPModule, self.model)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As with DDP; each process keeps unsharded gradients until the last backward of the step."""
        self._fsdp.set_requires_gradient_sync(False)
        yield
        self._fsdp.set_requires_gradient_sync(True)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        # A forward leaves the embeddings gathered for its backward. The next one would use them, although the weights
        # may have changed (averaged weights, a checkpoint).
        self._fsdp.reshard()

    def full_model(self) -> PreTrainedModel | None:
        full = None
        if self.accelerator.is_main_process:
            with init.no_init_weights(), self.accelerator.device:
                full = self._class(copy.deepcopy(self.model.config)).eval()
        targets = {} if full is None else full.state_dict()
        for name, shard in self.model.state_dict().items():
            gathered = gather_full(shard)
            if full is not None:
                targets[name].copy_(gathered)
        return full


class ExpertParallel(Sharded):
    """Every process has some whole experts, to which tokens are sent by all-to-all; the rest is sharded.

    Several groups of processes may have all experts each, whose gradients are all-reduced.
    """

    def _wrap(self, module: nn.Module) -> nn.Module:
        config, world = self.model.config, self.accelerator.num_processes
        assert isinstance(config, GPT2MoEConfig)
        group = expert_group_size(config, world)
        mesh = init_device_mesh(self.accelerator.device.type, (world // group, group))
        self._experts = shard_experts(self.model, config, mesh)
        self._shard(set(self._experts))
        return module

    def clip(self, limit: float) -> torch.Tensor:
        reduce_expert_gradients(self._experts)
        return super().clip(limit)


# -------------------------------------------------------------------------------------- agreement between processes


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes dropout and router noise a function of (seed, step, process).

    So a checkpoint needs no random state, and validation and sampling may draw.
    """
    torch.manual_seed(random.Random(f"dropout/{seed}/{step}/{rank}").getrandbits(63))


def max_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Maximum over the processes, in float64."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor([values], device=accelerator.device, dtype=torch.float64)
    return cast(list[float], cast(torch.Tensor, accelerator.gather(mine)).amax(0).tolist())


def agree(accelerator: Accelerator, seconds: float, stop: bool, due: bool, seconds_held: float) -> tuple[float, bool]:
    """Training time and whether to stop, equal on all processes: signals reach one of them, and clocks differ.

    The exchange would synchronize GPUs: there it waits for a log step (``due``), and ``seconds_held`` stays till then.
    """
    if accelerator.num_processes > 1 and not due and accelerator.device.type != "cpu":
        return seconds_held, False
    most_seconds, any_stop = max_over_processes(accelerator, [seconds, float(stop)])
    return most_seconds, bool(any_stop)


def is_lost_process(error: BaseException) -> bool:
    """Whether another process is gone, for which gloo and NCCL have no class."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text


# ----------------------------------------------------------------------------------------------------------- heartbeat


def watch_other_processes(accelerator: Accelerator) -> AbstractContextManager[object]:
    """A `Heartbeat`, or nothing for a single process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return nullcontext() if world == 1 else Heartbeat(rank, world)


class Heartbeat:
    """While open, ends this process when another one has been silent for too long.

    The main thread most likely waits for it inside PyTorch, where no exception reaches it. So a thread ends the
    process, as NCCL's watchdog does; checkpoints are atomic.
    """

    def __init__(self, rank: int, world: int):
        self._rank, self._others = rank, [other for other in range(world) if other != rank]
        self._timeout = HEARTBEAT_TIMEOUT_SECONDS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # of the process group's store
        timeout = timedelta(seconds=self._timeout)
        # A connection of its own: a wait on another thread's would block this one.
        self._store = PrefixStore("heartbeat", TCPStore(host, port, is_master=False, timeout=timeout))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(self._timeout)

    def _run(self) -> None:
        # Silence is counted in this process's own beats: if the whole machine was paused, nobody is blamed.
        heard = {other: ("", 0) for other in self._others}
        beat = 0
        try:
            while not self._closing.wait(self._timeout / _BEATS_PER_TIMEOUT):
                beat += 1
                self._store.set(str(self._rank), str(beat))
                for other in self._others:
                    latest = self._store.get(str(other)).decode() if self._store.check([str(other)]) else ""
                    if latest != heard[other][0] or latest == _ENDED:
                        heard[other] = latest, beat
                    elif beat - heard[other][1] > _BEATS_PER_TIMEOUT:
                        _exit_for_lost_process(other)
            self._store.set(str(self._rank), _ENDED)  # from here on silence is expected
        except DistError:
            # The store is gone with the machine that hosts it. At the end of a run the first process may have exited.
            if not self._closing.is_set():
                _exit_for_lost_process(0)


def _exit_for_lost_process(lost: int) -> None:
    sys.stderr.write(
        f"flash-experts: process {lost} of this run has been silent for {HEARTBEAT_TIMEOUT_SECONDS:.0f} seconds: its "
        "machine or the network is gone. Start the run again with resume: auto, from the last checkpoint\n"
    )
    sys.stderr.flush()
    os._exit(1)
