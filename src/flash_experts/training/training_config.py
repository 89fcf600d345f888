"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class TrainingConfig:
    """Settings of one run. At least one of ``max_steps``, ``max_epochs``, ``max_minutes`` ends it; the first
    wins.

    Args:
        output_dir: folder of all runs.
        run_name: the run is written to ``output_dir/run_name``.
        seed: of the order of names, of what is dropped from prompts, and of dropout.
        max_steps: optimizer steps; null for no limit.
        max_epochs: passes over the training names (fractions are fine); null for no limit.
        max_minutes: wall-clock budget, evaluations included; null for none. The schedule then follows the
            clock, so two such runs are not equal to the bit.
        tokens_per_batch: tokens of one optimizer step, about, over all processes and accumulated parts. Names
            are packed without padding.
        gradient_accumulation_steps: parts that a step's tokens are computed in, one after the other. More
            parts take less memory and give the same result.
        learning_rate: the highest of the schedule.
        weight_decay: AdamW's, on matrices alone (biases and norms are left out).
        betas: AdamW's.
        schedule: how the rate falls after the warm-up: cosine, linear, or constant.
        warmup_steps: steps (1 or more) or a share of the run (under 1) in which the rate rises from 0.
        min_lr_ratio: last rate over the highest.
        clip_norm: largest norm of the gradient; null for no clipping.
        log_every: steps between lines of metrics.
        eval_every: steps between validations; null for one at the start and one at the end.
        validation_names: how many names a validation scores (a fixed draw); null for all.
        checkpoint_every: steps between checkpoints; null for one at the end.
        keep_checkpoints: newest checkpoints that are kept.
        early_stopping_patience: validations in a row without a new best that end the run; null for never.
        sample_every: steps between sample names (needs a callback that makes them); null for never.
        attribute_dropout: chance that a part of a name's prompt (type, colors, mana value) is left out, drawn
            anew in each epoch, so that any subset may be given at generation.
        curriculum: order of names in the first epoch: none (shuffled), or length (short names first).
        precision: bfloat16, float32, or auto (bfloat16 on GPUs that have it).
        device: auto, cpu, cuda or cuda:N.
        compile: compile the model (torch.compile); pays off on GPUs and long runs.
        tracker: none, wandb (offline unless WANDB_API_KEY is set) or tensorboard. metrics.jsonl is always
            written.
    """

    output_dir: str = "models"
    run_name: str = "mtg-names"
    seed: int = 0
    max_steps: int | None = None
    max_epochs: float | None = 3.0
    max_minutes: float | None = None
    tokens_per_batch: int = 4096
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int | float = 0.05
    min_lr_ratio: float = 0.1
    clip_norm: float | None = 1.0
    log_every: int = 10
    eval_every: int | None = 200
    validation_names: int | None = 2000
    checkpoint_every: int | None = 200
    keep_checkpoints: int = 2
    early_stopping_patience: int | None = None
    sample_every: int | None = None
    attribute_dropout: float = 0.3
    curriculum: Literal["none", "length"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    compile: bool = False
    tracker: Literal["none", "wandb", "tensorboard"] = "none"

    @property
    def run_dir(self) -> Path:
        """Where the run is written: the best model, and ``checkpoints/`` below it."""
        return Path(self.output_dir) / self.run_name

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it (tuples become lists)."""
        return asdict(self) | {"betas": list(self.betas)}

    def validate(self) -> None:
        """Checks every field.

        Raises:
            ValueError: all that is wrong, in one message.
        """
        problems = [*self._number_problems(), *self._choice_problems()]
        if self.max_steps is None and self.max_epochs is None and self.max_minutes is None:
            problems.append("nothing ends the run: set max_steps, max_epochs or max_minutes")
        if not self.run_name or Path(self.run_name).name != self.run_name or self.run_name in (".", ".."):
            problems.append(f"run_name {self.run_name!r} must be one folder name")
        if self.max_minutes is None and self.max_steps is not None and self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        if problems:
            raise ValueError("the training configuration is wrong: " + "; ".join(problems))

    def _choice_problems(self) -> list[str]:
        choices = {
            "schedule": ("cosine", "linear", "constant"),
            "curriculum": ("none", "length"),
            "precision": ("auto", "float32", "bfloat16"),
            "tracker": ("none", "wandb", "tensorboard"),
        }
        return [
            f"{name} is {getattr(self, name)!r}, but it is one of {', '.join(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]

    def _number_problems(self) -> list[str]:
        problems = []

        def check(name: str, value: float | None, holds: bool, rule: str) -> None:
            if value is not None and not (math.isfinite(value) and holds):
                problems.append(f"{name} is {value}, but it must be {rule}")

        at_least_one = (
            "max_steps tokens_per_batch gradient_accumulation_steps log_every eval_every validation_names "
            "checkpoint_every keep_checkpoints early_stopping_patience sample_every"
        )
        for name in at_least_one.split():
            value = getattr(self, name)
            check(name, value, value is None or value >= 1, "1 or more")
        for name in ("max_epochs", "max_minutes", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            check(name, value, value is None or value > 0, "more than 0")
        for name in ("weight_decay", "warmup_steps", "seed"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("min_lr_ratio", "attribute_dropout"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for index, beta in enumerate(self.betas):
            check(f"betas[{index}]", beta, 0 <= beta < 1, "from 0 to under 1")
        return problems
