"""A step whose loss or gradient is not a finite number: found before the weights move."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from flash_experts.data.packing import EncodedName

# With `on_nan: skip`: then the weights themselves are spoilt, and going on learns nothing.
MOST_SKIPS_IN_A_ROW = 20


class FiniteGuard:
    """Judges each step before its update.

    Where the optimizer runs on the CPU, or cannot skip by itself, the judgement is read at once. On a GPU that would
    have the host wait for every step: there the optimizer is given the judgement as a tensor and leaves the weights,
    its averages and its step count as they were, and the host reads it at the next line of metrics.

    Args:
        stop: one bad step ends the run: after it no update is let through, also before the host has read of it.
        device: of the losses.
        world: number of processes; what one of them finds holds for all.
    """

    def __init__(self, stop: bool, device: torch.device, world: int):
        self._stop, self._world = stop, world
        self._on_cpu = device.type == "cpu"
        self._unread: list[tuple[int, torch.Tensor]] = []
        self._any_bad = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether step ``step`` (from 1) is bad, as a 0-dimensional bool that every process agrees on."""
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._world > 1:
            # The norm is of all processes' gradient, but the loss is of one: without a word, one alone would skip.
            flag = is_bad.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            is_bad = flag > 0
        self._any_bad |= is_bad
        self._unread.append((step, is_bad))
        return is_bad

    def update(self, optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> bool:
        """Tells the optimizer of the judgement. Returns whether its step is to be taken."""
        held_back = self._any_bad if self._stop else is_bad
        # torch's fused optimizers skip where `found_inf` is 1; this is how GradScaler tells them, too.
        if self._on_cpu or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return not held_back.item()
        optimizer.found_inf = held_back.float()  # type: ignore[attr-defined]
        return True

    def bad_steps(self) -> list[int]:
        """The bad steps among those judged since the last call. Waits for the device."""
        if not self._unread:
            return []
        flags = torch.stack([flag for _, flag in self._unread]).tolist()
        steps = [step for (step, _), is_bad in zip(self._unread, flags, strict=True) if is_bad]
        self._unread.clear()
        return steps


def names_in(batch: Sequence[EncodedName], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of a batch as text."""
    return [str(tokenizer.decode(list(name.ids[name.prompt_length : -1]))).strip() for name in batch]


def write_bad_batch(run_dir: Path, step: int, names: Sequence[str]) -> Path:
    """Keeps the names of the batch that a run stopped at, to look at or to leave out."""
    path = run_dir / f"bad-batch-{step:06d}.json"
    text = json.dumps({"step": step, "names": list(names)}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
