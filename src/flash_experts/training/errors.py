"""How a run fails. The messages say what to change."""

from __future__ import annotations

from pathlib import Path


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became NaN or infinite.

    Args:
        step: the first such optimizer step, from 1.
        last_good: the newest checkpoint, or None.
        clipped: whether gradients are clipped already.
        bfloat16: whether forwards run in bfloat16.
    """

    def __init__(self, step: int, last_good: Path | None, clipped: bool, bfloat16: bool):
        good = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
        advice = ["halve learning_rate"]
        advice += [] if clipped else ["set clip_norm: 1.0"]
        advice += ["set precision: float32"] if bfloat16 else []
        super().__init__(
            f"the loss or its gradient is not a finite number at step {step}: stopped, nothing was saved "
            f"after it; {good}. To go on, {', or '.join(advice)}"
        )
        self.step = step


class OutOfMemoryError(TrainingError):
    """The device's memory ran out in a step.

    Args:
        step: the optimizer step, from 1.
        accumulation: ``gradient_accumulation_steps`` as it is.
    """

    def __init__(self, step: int, accumulation: int):
        super().__init__(
            f"out of memory at step {step}: set gradient_accumulation_steps to {2 * accumulation} (now "
            f"{accumulation}), which learns the same in about half the memory"
        )
