"""The learning rate over a run, as pure functions of how far the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flash_experts.training.training_config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, then a fall to ``min_ratio`` of the highest rate.

    Attributes:
        kind: cosine, linear or constant.
        warmup: steps (1 or more) or a share of the run (under 1).
        min_ratio: last rate over the highest.
        planned_steps: steps in all; None where the clock alone ends the run.
        planned_seconds: seconds in all; None where steps alone end the run.
    """

    kind: str
    warmup: float
    min_ratio: float
    planned_steps: int | None
    planned_seconds: float | None

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run; epochs are turned into steps."""
        steps = [] if config.max_steps is None else [config.max_steps]
        if config.max_epochs is not None:
            steps.append(math.ceil(config.max_epochs * steps_per_epoch))
        return cls(
            kind=config.schedule,
            warmup=config.warmup_steps,
            min_ratio=config.min_lr_ratio,
            planned_steps=min(steps) if steps else None,
            planned_seconds=None if config.max_minutes is None else config.max_minutes * 60,
        )

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done after ``step`` steps and ``seconds``: 0 to 1, by whichever ends
        first."""
        by_steps = 0.0 if self.planned_steps is None else step / self.planned_steps
        by_clock = 0.0 if self.planned_seconds is None else seconds / self.planned_seconds
        return min(1.0, max(by_steps, by_clock))

    def factor(self, step: int, seconds: float) -> float:
        """The rate of the step that follows ``step`` finished ones, over the highest rate."""
        progress = self.progress(step, seconds)
        if self.warmup >= 1:
            warm, warm_end = (step + 1) / self.warmup, self.warmup / (self.planned_steps or math.inf)
        elif self.planned_steps is not None and self.planned_seconds is None:
            # A share of known steps is a number of steps, and the first of them is not wasted on a rate of 0.
            warm, warm_end = (step + 1) / max(1.0, self.warmup * self.planned_steps), self.warmup
        else:
            warm, warm_end = (progress / self.warmup if self.warmup else 1.0), self.warmup
        fallen = max(0.0, progress - warm_end) / max(1e-12, 1 - warm_end)
        return min(1.0, warm) * self._fall(min(1.0, fallen))

    def _fall(self, fallen: float) -> float:
        """1 at 0, ``min_ratio`` at 1."""
        if self.kind == "constant":
            return 1.0
        height = 0.5 * (1 + math.cos(math.pi * fallen)) if self.kind == "cosine" else 1 - fallen
        return self.min_ratio + (1 - self.min_ratio) * height
