"""How a run uses several processes: the model copied, sharded, or with its experts spread.

A strategy is chosen by name (`training.parallel`); the loop calls the same few methods of each. All of them compute the
gradient of one large batch: every process adds the gradient of its rows, and the loss of each row is divided by the
labels of all processes, so what is wanted is the sum over processes, never the mean.

With one process there is nothing to spread, and each strategy is the plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel
from transformers import initialization as init

from flash_experts.models.expert_parallel import reduce_expert_gradients, spread_experts
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.training.scaling import expert_group
from flash_experts.training.sharding import clip_grad_norm, gather_whole
from flash_experts.training.training_config import TrainingConfig


class Replicated:
    """Every process has the whole model (DistributedDataParallel); the base of the other strategies.

    Args:
        model: plain; spread in place, so optimizers are made after this.
        accelerator: of the run.

    Attributes:
        wrapped: what training calls. Validation and saving use the plain model.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, compile: bool):
        self.model, self.accelerator = model, accelerator
        module = torch.compile(model, dynamic=True) if compile else model
        self.wrapped = self._wrap(cast(nn.Module, module))

    def _wrap(self, module: nn.Module) -> nn.Module:
        return cast(nn.Module, self.accelerator.prepare_model(module))

    def no_sync(self) -> AbstractContextManager[Any]:
        """While open, backwards add to this process's own gradient: only the last of a step tells the others."""
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this process's part of the step's loss. DDP takes the mean over processes: multiply by
        their number to undo that."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, limit: float) -> torch.Tensor:
        """The norm of the whole gradient, a 0-dimensional tensor equal on all processes; over ``limit`` the gradient is
        scaled down to it. After the last backward of a step."""
        return clip_grad_norm(self.model.parameters(), limit)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open the plain model may be called in eval mode: as often on every process, if parts are spread."""
        self.model.eval()
        yield

    def whole_model(self) -> PreTrainedModel | None:
        """An ordinary model with the weights of now, in eval mode, for the main process to do with alone what it likes;
        None on the others. All must call it."""
        return self.model.eval() if self.accelerator.is_main_process else None


class Sharded(Replicated):
    """Every process has a part of each weight, gradient and optimizer state, experts included (FSDP2). A block's
    weights are gathered when it is computed, and freed after."""

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, compile: bool):
        self._class = type(model)
        super().__init__(model, accelerator, compile)

    def _wrap(self, module: nn.Module) -> nn.Module:
        self._shard(set())
        return module

    def _shard(self, ignored: set[nn.Parameter]) -> None:
        """Shards each block, and as one more unit what is outside of them."""
        world = self.accelerator.num_processes
        mesh = init_device_mesh(self.accelerator.device.type, (world,))
        stacked = {weight for name, weight in self.model.named_parameters() if ".experts." in name}

        def placement(weight: nn.Parameter) -> Shard | None:
            """By rows; but few experts over many processes are cut inside, or some processes would have none."""
            cut_inside = weight in stacked and weight.shape[0] % world and weight.shape[1] % world == 0
            return Shard(1) if cut_inside else None

        units = [module for module in self.model.modules() if type(module).__name__ in self._units()]
        for module in [*units, self.model]:
            fully_shard(module, mesh=mesh, shard_placement_fn=placement, ignored_params=ignored)
            unit = cast(FSDPModule, module)
            unit.set_gradient_divide_factor(1.0)  # the sum over processes,
            unit.set_force_sum_reduction_for_comms(True)  # which gloo knows as nothing but a sum

    def _units(self) -> list[str]:
        return list(self.model._no_split_modules or ())

    @property
    def _fsdp(self) -> FSDPModule:
        return cast(FSDPModule, self.model)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As for copies. Each process keeps its own whole gradients until the last backward of the step."""
        self._fsdp.set_requires_gradient_sync(False)
        yield
        self._fsdp.set_requires_gradient_sync(True)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        # A forward leaves the embeddings gathered for the backward that follows it. None does here, and the next
        # forward would use them although the weights may have changed (averaged weights, a checkpoint).
        self._fsdp.reshard()

    def whole_model(self) -> PreTrainedModel | None:
        is_main = self.accelerator.is_main_process
        whole = self._empty_copy() if is_main else None
        targets = {} if whole is None else whole.state_dict()
        for name, part in self.model.state_dict().items():
            gathered = gather_whole(part)
            if is_main:
                targets[name].copy_(gathered)
        return whole

    def _empty_copy(self) -> PreTrainedModel:
        with init.no_init_weights(), self.accelerator.device:
            return self._class(copy.deepcopy(self.model.config)).eval()


class ExpertParallel(Sharded):
    """Every process has some of the experts, whole, and tokens travel to them (`models.expert_parallel`); the rest of
    the model is sharded. With more processes than experts, or numbers that do not divide, several groups of processes
    have all experts each, and the gradients of equal experts are added up after the last backward."""

    def _wrap(self, module: nn.Module) -> nn.Module:
        config, world = self.model.config, self.accelerator.num_processes
        assert isinstance(config, GPT2MoEConfig)
        group = expert_group(config, world)
        mesh = init_device_mesh(self.accelerator.device.type, (world // group, group))
        self._experts = spread_experts(self.model, config, mesh)
        self._shard(set(self._experts))
        return module

    def clip(self, limit: float) -> torch.Tensor:
        reduce_expert_gradients(self._experts)
        return super().clip(limit)


def spread_model(model: PreTrainedModel, accelerator: Accelerator, config: TrainingConfig) -> Replicated:
    """The strategy of a run, with the model spread by it.

    Raises:
        ValueError: experts are to be spread, but the model has none, or no two processes can share them.
    """
    world = accelerator.num_processes
    if world == 1 or config.parallel == "ddp":
        return Replicated(model, accelerator, config.compile)
    if config.parallel == "fsdp":
        return Sharded(model, accelerator, config.compile)
    if not isinstance(model.config, GPT2MoEConfig):
        raise ValueError("parallel: expert spreads experts, but the model has none: take ddp or fsdp")
    if expert_group(model.config, world) == 1:
        raise ValueError(
            f"{world} processes cannot share {model.config.num_experts} experts: start a number of processes that has "
            "a divisor in common with it, or take parallel: fsdp"
        )
    return ExpertParallel(model, accelerator, config.compile)
