"""Numerics of a run: bfloat16 autocast, deterministic operations, and NaN/Inf checks that skip or stop a step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.packing import EncodedName

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# With `on_nan: skip`: after more of them the weights themselves are likely NaN, and continuing is useless.
MOST_SKIPS_IN_A_ROW = 20


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether forwards run under bfloat16 autocast; weights and optimizer state stay float32.

    Raises:
        ValueError: the GPU has no bfloat16.
    """
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and device.type == "cuda" and not has_it:
        raise ValueError("this GPU has no bfloat16: set precision to float32 or auto")
    return precision == "bfloat16" or (precision == "auto" and has_it)


def check_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model; ValueError unless its weights are float32 (16 bits lose AdamW's small steps)."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("the model's weights must be float32 to train: load it with dtype=torch.float32")
    return model


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If ``wanted``, restricts PyTorch to operations that give the same bits in every run; others raise.

    On CUDA atomic additions do not, nor does cuBLAS without a fixed workspace (``CUBLAS_WORKSPACE_CONFIG``, read when
    CUDA starts).
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class FiniteGuard:
    """The NaN/Inf check of loss and gradient norm before each update; a bad step on one process is bad for all.

    On a GPU reading the flag would synchronize: the fused optimizer gets it as a tensor and skips by itself, and the
    host reads it at the next line of metrics. With ``stop``, no later update is applied either.
    """

    def __init__(self, stop: bool, device: torch.device, world: int):
        self._stop, self._world = stop, world
        self._on_cpu = device.type == "cpu"
        self._unread: list[tuple[int, torch.Tensor]] = []
        self._any_bad = torch.zeros((), dtype=torch.bool, device=device)

    def check(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether step ``step`` (from 1) is bad: a 0-dimensional bool tensor, equal on all processes."""
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._world > 1:
            # The norm is global, but the loss is this process's: without agreement, one alone could skip.
            flag = is_bad.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            is_bad = flag > 0
        self._any_bad |= is_bad
        self._unread.append((step, is_bad))
        return is_bad

    def update(self, optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> bool:
        """Passes the flag to the optimizer; returns whether to call its ``step``."""
        found_bad = self._any_bad if self._stop else is_bad
        # torch's fused optimizers skip where `found_inf` is 1, which is GradScaler's way too.
        if self._on_cpu or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return not found_bad.item()
        optimizer.found_inf = found_bad.float()  # type: ignore[attr-defined]
        return True

    def bad_steps(self) -> list[int]:
        """Bad steps since the last call. Waits for the device."""
        if not self._unread:
            return []
        flags = torch.stack([flag for _, flag in self._unread]).tolist()
        steps = [step for (step, _), is_bad in zip(self._unread, flags, strict=True) if is_bad]
        self._unread.clear()
        return steps


def names_in(batch: Sequence[EncodedName], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(list(name.ids[name.prompt_length : -1]))).strip() for name in batch]


def write_bad_batch(run_dir: Path, step: int, names: Sequence[str]) -> Path:
    """Writes the names of the batch at which a run stopped."""
    path = run_dir / f"bad-batch-{step:06d}.json"
    text = json.dumps({"step": step, "names": list(names)}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
