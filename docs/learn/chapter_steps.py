"""Steps of training that chapters 5 and 10 share: a gradient, a timed step, names in steps, a tiny student's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from chapter_models import with_dropout
from transformers.activations import ACT2FN

from flash_experts.benchmarks.timing import Implementation, Lap
from flash_experts.data.cards import Card


def gradient(model: torch.nn.Module, *batches: dict[str, Any]) -> torch.Tensor:
    """All gradients of the sum of the batches' losses in one vector."""
    model.zero_grad()
    for inputs in batches:
        model(**inputs).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def timed_step(
    base: Any, names: Any, make_batch: Callable[..., dict[str, Any]], attention: str, activation: str, fused: bool
) -> tuple[Implementation, Any]:
    """A training step in three timed parts, and its model.

    Args:
        base: copied, without dropout.
        names: encoded names of the step.
        make_batch: makes the model's inputs from them, within the step.
        attention: name of an attention implementation.
        activation: name of an activation function.
        fused: whether the optimizer is fused.
    """
    model = with_dropout(base, 0.0)
    model.set_attn_implementation(attention)
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[activation]
    kind = {"fused": True} if fused else {"foreach": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **kind)

    def step(lap: Lap) -> None:
        loss = model(**make_batch(names)).loss
        lap()
        loss.backward()
        lap()
        optimizer.step()
        optimizer.zero_grad()
        lap()

    return Implementation(step), model


def in_steps(pool: Sequence[Card], steps: int, names_a_step: int) -> list[list[Card]]:
    """The names of each step: as many epochs of the pool as needed, each shuffled."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while len(order) < steps * names_a_step:
        order += torch.randperm(len(pool), generator=generator).tolist()
    return [[pool[n] for n in order[step * names_a_step : (step + 1) * names_a_step]] for step in range(steps)]


def student_step(student: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int, steps: int) -> None:
    """One optimizer step of a tiny student, clipped at 1. The rate: 8 steps of warmup to 2.5e-3, and a linear decay."""
    for group in optimizer.param_groups:
        group["lr"] = 2.5e-3 * min(1.0, (step + 1) / 8) * (1 - 0.9 * step / steps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
