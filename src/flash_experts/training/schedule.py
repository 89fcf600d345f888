"""The learning rate over a run, as a pure function of how far the run is.

With p the share of the training that is done (0 to 1, of its steps or of its seconds between the first validation and
the last, whichever is further), w the share of
the warm-up, m the last rate over the highest, and x = (p - w) / (1 - w) the share of what follows the warm-up:

    constant  1
    linear    m + (1 - m) (1 - x)
    cosine    m + (1 - m) (1 + cos(pi x)) / 2                      Loshchilov and Hutter 2017, without restarts
    wsd       1 until p = 1 - d, then m + (1 - m) (1 - sqrt(y))    y = (p - (1 - d)) / d, the share of the decay

each times the warm-up, min(1, p / w); where the run has known steps, step n of W warm-up steps has (n + 1) / W, so that
the first is not wasted on a rate of 0. wsd, warm-up-stable-decay, is Hu et al. 2024 (MiniCPM), section 4; the shape of
its decay is the one that Hägele et al. 2024, section 3, found best. d is ``decay_share``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flash_experts.training.training_config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm-up, then a fall to ``min_ratio`` of the highest rate.

    Attributes:
        kind: cosine, linear, constant or wsd.
        warmup: steps (1 or more) or a share of the run (under 1).
        min_ratio: last rate over the highest.
        planned_steps: steps in all; None where the clock alone ends the run.
        planned_seconds: seconds in all; None where steps alone end the run.
        decay_share: share of the run, at its end, in which wsd falls.
    """

    kind: str
    warmup: float
    min_ratio: float
    planned_steps: int | None
    planned_seconds: float | None
    decay_share: float = 0.2

    @classmethod
    def of(cls, config: TrainingConfig, planned_steps: int | None) -> Schedule:
        """The schedule of a run.

        Args:
            config: of the run.
            planned_steps: steps that its epochs, or those of its stages, come to; None where they set no end.
        """
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
        """How much of the training is done, 0 to 1, by whichever limit is nearer.

        Args:
            step: optimizer steps done.
            seconds: time since the run started, its first validation included.
            evaluation_seconds: time of that validation; as much is kept free for the one at the end.
        """
        by_steps = 0.0 if self.planned_steps is None else step / self.planned_steps
        by_clock = 0.0
        if self.planned_seconds is not None:
            by_clock = (seconds - evaluation_seconds) / max(1e-9, self.planned_seconds - 2 * evaluation_seconds)
        return min(1.0, max(0.0, by_steps, by_clock))

    def factor(self, step: int, seconds: float, evaluation_seconds: float = 0.0) -> float:
        """The rate of the step that follows ``step`` finished ones, over the highest rate; arguments of `progress`."""
        progress = self.progress(step, seconds, evaluation_seconds)
        if self.warmup >= 1:
            warm, warm_end = (step + 1) / self.warmup, self.warmup / (self.planned_steps or math.inf)
        elif self.planned_steps is not None and self.planned_seconds is None:
            # A share of known steps is a number of steps, and the first of them is not wasted on a rate of 0.
            warm, warm_end = (step + 1) / max(1.0, self.warmup * self.planned_steps), self.warmup
        else:
            warm, warm_end = (progress / self.warmup if self.warmup else 1.0), self.warmup
        fall_begins = 1 - self.decay_share if self.kind == "wsd" else warm_end
        fallen = max(0.0, progress - fall_begins) / max(1e-12, 1 - fall_begins)
        return min(1.0, warm) * self._fall(min(1.0, fallen))

    def _fall(self, fallen: float) -> float:
        """1 at 0, ``min_ratio`` at 1."""
        if self.kind == "constant":
            return 1.0
        heights = {
            "linear": 1 - fallen,
            "cosine": 0.5 * (1 + math.cos(math.pi * fallen)),
            "wsd": 1 - math.sqrt(fallen),
        }
        return self.min_ratio + (1 - self.min_ratio) * heights[self.kind]
