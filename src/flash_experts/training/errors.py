"""How a run fails. The messages say what to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flash_experts.training.training_config import TrainingConfig


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss or its gradient became NaN or infinite.

    Args:
        step: the first such optimizer step, from 1.
        names: what it was to learn; none where a validation found it.
        last_good: the newest checkpoint that verifies, or None.
        config: of the run.
        bfloat16: whether forwards run in bfloat16.
    """

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
            f"the loss or its gradient is not a finite number {where}: stopped before the weights moved, nothing was "
            f"saved after it; {good}. To go on, {', or '.join(advice)}"
        )
        self.step = step


class LostProcessError(TrainingError):
    """Another process of the run died, or its machine fell silent.

    Args:
        step: the optimizer step, from 1.
        last_good: the newest checkpoint that verifies, or None.
    """

    def __init__(self, step: int, last_good: Path | None):
        good = f"go on from {last_good} with --resume auto" if last_good else "there is no checkpoint yet: start anew"
        super().__init__(f"another process of this run is gone, at step {step}: see its own last lines; {good}")


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
