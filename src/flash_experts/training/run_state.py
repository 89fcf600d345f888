"""How far a run is, how it ended, the signals and the errors that stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flash_experts.training.training_config import TrainingConfig

RUN_INFO = "run.json"


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

    def closing_message(self, how_to_resume: str | None = None) -> str:
        """One line for the user: where the model is, or how to resume (default: in Python)."""
        if self.interrupted:
            saved = checkpoint_path(self.run_dir, self.step)
            stopped = f"{self.reason}: stopped after step {self.step:,}, saved in {saved}"
            how = how_to_resume or f'train again with run_name={self.run_dir.name!r} and resume="auto"'
            return f"{stopped}. To continue, {how}"
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

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]


class TrainingError(RuntimeError):
    """A run cannot continue."""


class NonFiniteLossError(TrainingError):
    """A NaN or infinite loss or gradient at ``step`` (from 1), with its names, or in a validation, without."""

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
        good = (
            f"to continue from {last_good}, set resume: auto"
            if last_good
            else "there is no checkpoint yet: start again"
        )
        super().__init__(f"another process of this run is gone, at step {step}: see its own last lines; {good}")


class OutOfMemoryError(TrainingError):
    """The device's memory ran out in a step."""

    def __init__(self, step: int, accumulation: int):
        super().__init__(
            f"out of memory at step {step}: set gradient_accumulation_steps to {2 * accumulation} (now "
            f"{accumulation}), which learns the same in about half the memory"
        )
