"""Parameter groups, learning-rate schedule, Muon, the optimizers' state in checkpoints, weight average (EMA).

Shape suffixes: N matrices of a batch, R rows, C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from flash_experts.training.distributed import gather_full, holds_whole_matrices, local_shard, shard_like
from flash_experts.training.loss import use_bfloat16
from flash_experts.training.training_config import PARTS, LearningRateScale, TrainingConfig

# The first number in a parameter's name is that of its block: transformer.h.3.mlp, model.layers.3.mlp.
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")

# ---------------------------------------------------------------------------------------------------- parameter groups


def part_of(name: str) -> str:
    """The part of the model (`PARTS`) of a parameter. Shared experts get every token: they are dense."""
    if ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "dense"


def freeze_parts(model: nn.Module, scale: LearningRateScale) -> None:
    """Freezes the parts whose scale is 0; a ValueError if one with a scale is missing, or nothing is left to train."""
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
    """The optimizers by their names in checkpoints: ``optimizer`` (fused AdamW), and ``muon``.

    Weight decay is on matrices alone. Each group has a ``scale``, see `set_rates`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales, hidden = _scales(model, config), _hidden_matrices(model)
    for_adamw: dict[object, dict[str, Any]] = {}
    for_muon: dict[object, dict[str, Any]] = {}
    for name, parameter in trained:
        groups = for_adamw
        settings = {"scale": scales[name], "weight_decay": config.weight_decay if _is_matrix(name, parameter) else 0.0}
        if config.optimizer == "muon" and name in hidden:
            groups = for_muon
            settings["blocks"] = hidden[name]
        # One fused kernel updates a group, and all its weights must be sharded over the same mesh.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        group = groups.setdefault((mesh, *settings.values()), {"params": [], **settings})
        group["params"].append(parameter)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if for_adamw:
        first, second = config.betas
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for _, parameter in trained)
        optimizers["optimizer"] = torch.optim.AdamW(
            list(for_adamw.values()), lr=config.learning_rate, betas=(first, second), eps=1e-8, fused=fused
        )
    if for_muon:
        optimizers["muon"] = Muon(
            list(for_muon.values()),
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            dtype=torch.bfloat16 if use_bfloat16(config.precision, trained[0][1].device) else None,
        )
    return optimizers


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")  # experts' biases are stacked, so they have 2 dimensions


def _hidden_matrices(model: nn.Module) -> dict[str, int]:
    """The parameters for Muon, with the number of matrices side by side in each: the blocks' linear layers and experts.

    Routers and embeddings are tables of vectors, not maps between spaces.
    """
    found = {}
    for place, module in model.named_modules():
        for own, parameter in module.named_parameters(place, recurse=False):
            is_map = isinstance(module, nn.Linear | Conv1D) or part_of(own) == "experts"
            if is_map and _is_matrix(own, parameter) and part_of(own) != "router" and _BLOCK.search(own):
                is_qkv = isinstance(module, Conv1D) and place.endswith("c_attn")  # query, key, value
                found[own] = 3 if is_qkv else 1
    return found


# ----------------------------------------------------------------------------------------- learning rates of the parts


def _scales(model: nn.Module, config: TrainingConfig) -> dict[str, float]:
    """The factor of each parameter's learning rate: the part's scale times the layer's decay."""
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    embeddings = {f"{place}.weight" for place, module in model.named_modules() if isinstance(module, nn.Embedding)}
    num_blocks = 1 + max(blocks.values(), default=-1)
    scales = {}
    for name in names:
        distance = num_blocks - blocks[name] if name in blocks else (num_blocks + 1) * (name in embeddings)
        scales[name] = getattr(config.lr_scale, part_of(name)) * config.layer_decay**distance
    return scales


def set_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Sets each group's learning rate to ``rate`` times its scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]


# ------------------------------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning-rate warmup, then decay to ``min_ratio`` of the peak, by steps or by the clock, and the end of the run.

    Attributes:
        kind: cosine, linear, constant or wsd (warmup-stable-decay, which decays in the last ``decay_share`` of a run).
        warmup: steps (1 or more) or share of the run (under 1).
        planned_steps: None for no limit, as with ``planned_seconds``.
    """

    kind: str
    warmup: float
    min_ratio: float
    planned_steps: int | None
    planned_seconds: float | None
    decay_share: float = 0.2

    @classmethod
    def of(cls, config: TrainingConfig, planned_steps: int | None) -> Schedule:
        """A run's schedule; ``planned_steps`` are those of its epochs."""
        steps = [limit for limit in (config.max_steps, planned_steps) if limit is not None]
        return cls(
            kind=config.schedule,
            warmup=config.warmup_steps,
            min_ratio=config.min_lr_ratio,
            planned_steps=min(steps) if steps else None,
            planned_seconds=None if config.max_minutes is None else config.max_minutes * 60,
            decay_share=config.decay_share,
        )

    def progress(self, step: int, seconds: float, evaluation_seconds: float = 0.0) -> float:
        """Share of the training that is done, 0 to 1, by the nearer limit.

        ``seconds`` include the ``evaluation_seconds`` of the first validation; as much is reserved for the last one.
        """
        by_steps = 0.0 if self.planned_steps is None else step / self.planned_steps
        by_clock = 0.0
        if self.planned_seconds is not None:
            by_clock = (seconds - evaluation_seconds) / max(1e-9, self.planned_seconds - 2 * evaluation_seconds)
        return min(1.0, max(0.0, by_steps, by_clock))

    def limit_reached(self, step: int, seconds: float, evaluation_seconds: float = 0.0) -> str | None:
        """``steps`` or ``time``, whichever ends the run here. Arguments as in `progress`."""
        if self.planned_steps is not None and step >= self.planned_steps:
            return "steps"
        if self.planned_seconds is not None and seconds + evaluation_seconds >= self.planned_seconds:
            return "time"
        return None

    def factor(self, step: int, seconds: float, evaluation_seconds: float = 0.0) -> float:
        """Learning rate after ``step`` steps, over the peak."""
        progress = self.progress(step, seconds, evaluation_seconds)
        if self.warmup >= 1:
            warm, warm_end = (step + 1) / self.warmup, self.warmup / (self.planned_steps or math.inf)
        elif self.planned_steps is not None and self.planned_seconds is None:
            # A share of a known number of steps is a number of steps; the first is not wasted on a rate of 0.
            warm, warm_end = (step + 1) / max(1.0, self.warmup * self.planned_steps), self.warmup
        else:
            warm, warm_end = (progress / self.warmup if self.warmup else 1.0), self.warmup
        decay_start = 1 - self.decay_share if self.kind == "wsd" else warm_end
        decayed = max(0.0, progress - decay_start) / max(1e-12, 1 - decay_start)
        return min(1.0, warm) * self._decay(min(1.0, decayed))

    def _decay(self, progress: float) -> float:
        """1 at 0, ``min_ratio`` at 1."""
        if self.kind == "constant":
            return 1.0
        heights = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "wsd": 1 - math.sqrt(progress),
        }
        return self.min_ratio + (1 - self.min_ratio) * heights[self.kind]


# ----------------------------------------------------------------------------------------------------------------- Muon

# Coefficients of the quintic polynomial a x + b x^3 + c x^5, chosen for a steep slope at 0. Singular values end between
# about 0.7 and 1.2 instead of at 1, which does no harm.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_NRC: torch.Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Newton-Schulz iteration: singular vectors stay, singular values go to about 1.

    ``dtype`` is that of the matmuls (None: the input's), whose rounding the iteration tolerates.
    """
    first, third, fifth = _COEFFICIENTS
    x = matrices_NRC.to(dtype or matrices_NRC.dtype)
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x  # Gram matrices of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is over 1
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/).

    ``m = momentum m + g``, ``u = orthogonalize(g + momentum m)`` (Nesterov), ``w = (1 - lr decay) w - lr s u``

    ``s = 0.2 sqrt(max(R, C))`` makes updates as large as AdamW's (Liu et al. 2025, section 2.2). Unlike
    torch.optim.Muon it orthogonalizes each matrix of a stack: experts' weights, (E, D, F), and the ``blocks`` side by
    side in a parameter, such as query, key and value in GPT-2's c_attn, (D, 3 D).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": 1})
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.ndim in (2, 3) and parameter.size(-1) % group["blocks"] == 0, parameter.shape

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves each parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            rate, momentum, blocks = group["lr"], group["momentum"], group["blocks"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                total = state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
                update, longest = _direction(parameter.grad.add(total, alpha=momentum), blocks, self._dtype)
                size = 0.2 * math.sqrt(longest)
                local_shard(parameter).mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * size)


def _direction(gradient: torch.Tensor, blocks: int, dtype: torch.dtype | None) -> tuple[torch.Tensor, int]:
    """This process's shard of the update, and its matrices' longer side."""
    is_whole = holds_whole_matrices(gradient)  # a shard of a matrix cannot be orthogonalized by itself
    matrices = local_shard(gradient) if is_whole else gather_full(gradient)
    matrices_NRC = as_matrices(matrices, blocks)
    update = from_matrices(orthogonalize(matrices_NRC, dtype=dtype), matrices)
    return update if is_whole else local_shard(shard_like(update, gradient)), max(matrices_NRC.shape[-2:])


def as_matrices(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """Views (R, blocks C) or (N, R, C) as matrices (N, R, C)."""
    if tensor.ndim == 3:
        return tensor
    return tensor.unflatten(-1, (blocks, -1)).transpose(0, 1)


def from_matrices(matrices_NRC: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrices`."""
    if like.ndim == 3:
        return matrices_NRC
    return matrices_NRC.transpose(0, 1).flatten(-2)


# ------------------------------------------------------------------------------------------------ state in checkpoints

# State that an optimizer keeps for each parameter.
_SLOTS = {torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"}, Muon: {"momentum_buffer"}}


class OptimizerState:
    """The state of AdamW or Muon by parameter names, ``h.0.ln_1.weight|exp_avg``.

    Unlike torch's indices, names stay right when parameters are grouped differently.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            f"{self._names[parameter]}|{slot}": value
            for parameter, slots in self._optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        index_of = {self._names[parameter]: index for index, parameter in enumerate(parameters)}
        frozen = {name for parameter, name in self._names.items() if not parameter.requires_grad}
        slots: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, slot = key.rpartition("|")
            if name in frozen:  # since the checkpoint, by lr_scale
                continue
            if name not in index_of:
                raise ValueError(f"it has optimizer state for {name}, which is not trained here")
            parameter = parameters[index_of[name]]
            shape = torch.Size() if slot == "step" else parameter.shape
            # The fused kernels do not check shapes: with a smaller tensor they would write out of bounds.
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{key} is not a floating-point tensor of shape {tuple(shape)}")
            slots.setdefault(index_of[name], {})[slot] = value if slot == "step" else shard_like(value, parameter)
        expected = _SLOTS[type(self._optimizer)]
        for index, own in slots.items():
            if own.keys() != expected:
                there, here = ", ".join(sorted(own)), ", ".join(sorted(expected))
                raise ValueError(f"for {self._names[parameters[index]]} it has {there}, not {here}")
        self._optimizer.load_state_dict({"state": slots, "param_groups": self._optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------- average of the weights (EMA)


class WeightAverage:
    """Exponential moving average (EMA) of the trained weights: ``a = d a + (1 - d) w`` after each step.

    ``d = min(decay, (1 + n) / (10 + n))`` after n steps, so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int, skip: torch.Tensor) -> None:
        """Updates the averages after step ``step`` (from 1), except where ``skip`` (0-dimensional bool) is true."""
        weights = [local_shard(weight) for weight in self._weights.values()]
        averages = [local_shard(average) for average in self._averages.values()]
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        # Without reading the flag, which would synchronize: a share of 0 leaves an average as it is.
        shares = {one.dtype: one.new_full((), share).masked_fill(skip, 0) for one in averages}
        torch._foreach_lerp_(averages, weights, [shares[one.dtype] for one in averages])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model has the averages; after it its own weights, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # The values are swapped, not the tensors: a compiled or distributed model keeps references to its tensors.
        for name, weight in self._weights.items():
            mine, average = local_shard(weight), local_shard(self._averages[name])
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if state.keys() != self._averages.keys():
            first = sorted(state.keys() ^ self._averages.keys())[0]
            raise ValueError(f"the averages are for other weights: {first} differs")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"the average of {name} has another shape")
            average.copy_(shard_like(state[name], average))
