"""The state of a run: how far it is, why it ends, the errors that stop it, and the ``state_dict`` protocol."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import nn

from flash_experts.training.distributed import shard_like
from flash_experts.training.optimizer import Muon, Schedule
from flash_experts.training.training_config import TrainingConfig

# State that an optimizer keeps for each parameter.
_SLOTS = {torch.optim.AdamW: {"exp_avg", "exp_avg_sq", "step"}, Muon: {"momentum_buffer"}}


@dataclass
class TrainerState:
    """How far a run is, as kept in checkpoints.

    Attributes:
        tokens: input tokens processed.
        seconds: wall-clock training time, without what a kill lost.
        evaluation_seconds: time of the first validation.
        best_bits_per_char: lowest `tracking.SELECTION` so far.
        bad_evaluations: validations since the best one.
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
        """Counts a skipped step; returns how many in a row."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step == self.last_skipped + 1 else 1
        self.last_skipped = step
        self.skipped_steps += 1
        return self.skipped_in_a_row

    def validated(self, bits_per_char: float) -> bool:
        """Records a validation; returns whether it is a new best."""
        if self.best_bits_per_char is not None and bits_per_char >= self.best_bits_per_char:
            self.bad_evaluations += 1
            return False
        self.best_bits_per_char, self.best_step, self.bad_evaluations = bits_per_char, self.step, 0
        return True


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """``run_dir/checkpoints/step-000100``."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def reason_to_end(state: TrainerState, schedule: Schedule, patience: int | None) -> str | None:
    """Why a run is over, or None: by state and configuration alone, so a resumed run decides alike."""
    if schedule.planned_steps is not None and state.step >= schedule.planned_steps:
        return "steps"
    seconds = state.seconds + state.evaluation_seconds  # with the validation that is still to come
    if schedule.planned_seconds is not None and seconds >= schedule.planned_seconds:
        return "time"
    if patience is not None and state.bad_evaluations >= patience:
        return "early stopping"
    return None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended; ``reason`` is ``steps``, ``time``, ``early stopping``, or a signal's name.

    ``best_bits_per_char`` is the lowest `tracking.SELECTION`; None without validation names.
    """

    reason: str
    step: int
    best_bits_per_char: float | None
    best_step: int
    run_dir: Path
    seconds: float

    @classmethod
    def of(cls, state: TrainerState, reason: str, run_dir: Path) -> TrainingResult:
        return cls(reason, state.step, state.best_bits_per_char, state.best_step, run_dir, state.seconds)

    @property
    def interrupted(self) -> bool:
        return self.reason.startswith("SIG")

    def closing_message(self) -> str:
        """One line for the user: where the model is, or how to resume."""
        if self.interrupted:
            saved = checkpoint_path(self.run_dir, self.step)
            stopped = f"{self.reason}: stopped after step {self.step:,}, saved in {saved}"
            return f"{stopped}. Continue with --resume auto --training.run-name {self.run_dir.name}"
        best = ""
        if self.best_bits_per_char is not None:
            best = f", best at step {self.best_step:,}: {self.best_bits_per_char:.3f} bits per character on average"
        return f"finished ({self.reason}) after step {self.step:,}{best}: the model is {self.run_dir}"


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopSignals:
    """While open, the first of `STOP_SIGNALS` sets `received` to its name; a second Ctrl+C interrupts at once.

    A signal that was ignored stays so: SIGHUP under nohup, SIGINT of a shell's background jobs.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        previous = self._previous.get(signal.SIGINT)
        if self.received is not None and name == "SIGINT" and callable(previous):
            previous(number, frame)
        self.received = name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]


class TrainingError(RuntimeError):
    """A run cannot continue."""


class NonFiniteLossError(TrainingError):
    """A NaN or infinite loss or gradient, at ``step`` (from 1) with its training names, or in a validation, without."""

    def __init__(self, step: int, names: Sequence[str], last_good: Path | None, config: TrainingConfig, bfloat16: bool):
        where = f"in the validation at step {step}"
        if names:
            shown = ", ".join(names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            where = f"at step {step} ({shown}{more}, all in bad-batch-{step:06d}.json)"
        good = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
        advice = ["halve learning_rate"]
        advice += [] if config.clip_norm is not None else ["set clip_norm: 1.0"]
        advice += ["set precision: float32"] if bfloat16 else []
        advice += [] if config.on_nan == "skip" else ["set on_nan: skip"]
        super().__init__(
            f"the loss or its gradient is not a finite number {where}: stopped before the weights changed, nothing was "
            f"saved after it; {good}. To continue, {', or '.join(advice)}"
        )
        self.step = step


class LostProcessError(TrainingError):
    """Another process died, or its machine stopped responding."""

    def __init__(self, step: int, last_good: Path | None):
        good = f"resume {last_good} with --resume auto" if last_good else "there is no checkpoint yet: start again"
        super().__init__(f"another process of this run is gone, at step {step}: see its own last lines; {good}")


class OutOfMemoryError(TrainingError):
    """The device's memory ran out in a step."""

    def __init__(self, step: int, accumulation: int):
        super().__init__(
            f"out of memory at step {step}: set gradient_accumulation_steps to {2 * accumulation} (now "
            f"{accumulation}), which learns the same in about half the memory"
        )


class Stateful(Protocol):
    """An object that a checkpoint keeps, once registered with the `Checkpointer`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors (sharded ones too) and JSON values. Called on every process, so it may gather."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave (tensors are full and on the CPU); ValueError if it does not match."""


class OptimizerState:
    """The state of AdamW or Muon by parameter names, ``h.0.ln_1.weight|exp_avg``.

    Unlike torch's indices, names stay right when parameters are grouped differently.
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
                raise ValueError(f"it has optimizer state for {name}, which is not trained here")
            parameter = parameters[index_of[name]]
            shape = torch.Size() if slot == "step" else parameter.shape
            # The fused kernels do not check shapes: with a smaller tensor they would write out of bounds.
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{key} is not a floating-point tensor of shape {tuple(shape)}")
            slots.setdefault(index_of[name], {})[slot] = value if slot == "step" else shard_like(value, parameter)
        expected = _SLOTS[type(self._optimizer)]
        for index, own in slots.items():
            if own.keys() != expected:
                there, here = ", ".join(sorted(own)), ", ".join(sorted(expected))
                raise ValueError(f"for {self._names[parameters[index]]} it has {there}, not {here}")
        self._optimizer.load_state_dict({"state": slots, "param_groups": self._optimizer.state_dict()["param_groups"]})


def split_state(name: str, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a state, with keys ``name/key``, and its JSON values."""
    tensors = {f"{name}/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return tensors, values


def join_state(name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`; ``tensors`` may have other names' keys."""
    prefix = name + "/"
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return own | dict(values)
