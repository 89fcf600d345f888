"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flash_experts.training.checkpoint import checkpoint_path
from flash_experts.training.schedule import Schedule
from flash_experts.training.stateful import TrainerState


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        reason: ``steps``, ``time``, ``early stopping``, or a signal's name.
        step: optimizer steps done in all.
        best_bits_per_char: lowest mean of the unconditional and the conditional bits per character (see
            `validation.SELECTION`); None without validation names.
        best_step: its step, whose weights are in ``run_dir``.
        run_dir: the finished model's folder.
        seconds: training time in all.
    """

    reason: str
    step: int
    best_bits_per_char: float | None
    best_step: int
    run_dir: Path
    seconds: float

    @classmethod
    def of(cls, state: TrainerState, reason: str, run_dir: Path) -> TrainingResult:
        """The result of a run that stands at ``state``."""
        return cls(reason, state.step, state.best_bits_per_char, state.best_step, run_dir, state.seconds)

    @property
    def interrupted(self) -> bool:
        return self.reason.startswith("SIG")

    def last_words(self) -> str:
        """One line for the person who watched: where the model is, or how to go on."""
        if self.interrupted:
            saved = checkpoint_path(self.run_dir, self.step)
            stopped = f"{self.reason}: stopped after step {self.step:,}, saved in {saved}"
            return f"{stopped}. Continue with --resume auto --training.run-name {self.run_dir.name}"
        best = ""
        if self.best_bits_per_char is not None:
            best = f", best at step {self.best_step:,}: {self.best_bits_per_char:.3f} bits per character on average"
        return f"finished ({self.reason}) after step {self.step:,}{best}: the model is {self.run_dir}"


def reason_to_end(state: TrainerState, schedule: Schedule, patience: int | None) -> str | None:
    """Why a run is over, by its state and configuration alone, so that a resumed run knows it too; None if it is not.

    Args:
        state: where the run stands.
        schedule: says how many steps and seconds it was to take.
        patience: validations in a row without a new best that end it; None for any number.
    """
    if schedule.planned_steps is not None and state.step >= schedule.planned_steps:
        return "steps"
    seconds = state.seconds + state.evaluation_seconds  # with the validation that is still to come
    if schedule.planned_seconds is not None and seconds >= schedule.planned_seconds:
        return "time"
    if patience is not None and state.bad_evaluations >= patience:
        return "early stopping"
    return None
