"""A run's own checkpoints: when to write, what to resume, what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.checkpoint import CheckpointError, TrainerState

# A resumed run is the run that was interrupted only if these are what they were.
_FIELDS_OF_THE_ORDER = ("seed", "tokens_per_batch", "attribute_dropout", "curriculum")


class Checkpointer:
    """Saves and restores one run.

    Args:
        run_dir: the run's folder.
        model: the plain model (no DDP or compiled wrapper).
        tokenizer: saved with it.
        optimizer: the plain optimizer.
        keep: newest checkpoints that are kept.
        info: the run's ``config`` and ``data`` (kept in each checkpoint and compared on resuming).
        say: tells the person who watches.
        is_main: whether this process writes; all processes read.
    """

    def __init__(
        self,
        run_dir: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        keep: int,
        info: Mapping[str, Any],
        say: Callable[[str], None],
        is_main: bool,
    ):
        self.run_dir, self.model, self.tokenizer, self.optimizer = run_dir, model, tokenizer, optimizer
        self._keep, self._say, self._is_main = keep, say, is_main
        self._about = {"config": info["config"], "data": info["data"]}
        self._saved: Path | None = None

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint folder."""
        steps = checkpoints.checkpoint_steps(self.run_dir)
        return checkpoints.checkpoint_path(self.run_dir, steps[-1]) if steps else None

    def save(self, state: TrainerState) -> Path:
        """Writes the checkpoint of this step, if there is none yet, and removes the old ones."""
        path = checkpoints.checkpoint_path(self.run_dir, state.step)
        if self._is_main and self._saved != path:
            checkpoints.save_checkpoint(self.run_dir, self.model, self.tokenizer, self.optimizer, state, self._about)
            checkpoints.prune_checkpoints(self.run_dir, self._keep)
            self._saved = path
        return path

    def export(self) -> None:
        """Puts the model as it is now into the run's folder, where `load_model` finds it."""
        if self._is_main:
            checkpoints.export_model(self.run_dir, self.model, self.tokenizer)

    def restore(self, resume: str | Path | None) -> TrainerState:
        """Fills model and optimizer from a checkpoint; see `Trainer.train` for ``resume``.

        Raises:
            ValueError: ``resume`` is None, and there are checkpoints that a new run would overwrite.
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        steps = checkpoints.checkpoint_steps(self.run_dir)
        if resume is None and steps:
            raise ValueError(
                f"{self.run_dir} has checkpoints up to step {steps[-1]:,}: go on with --resume auto, or "
                "choose another run_name"
            )
        if resume is None or (resume == "auto" and not steps):
            return TrainerState()
        folder = self._find(resume)
        state, about = checkpoints.read_state(folder)
        checkpoints.load_checkpoint(folder, self.model, self.optimizer)
        if folder == checkpoints.checkpoint_path(self.run_dir, state.step):
            self._saved = folder
        self._say(f"resuming {folder} after step {state.step:,}")
        self._compare(about)
        return state

    def drop_later(self, step: int) -> None:
        """Removes checkpoints after ``step``, damaged or of a course that is left: the run writes them
        again."""
        if self._is_main:
            checkpoints.drop_later(self.run_dir, step)

    def _find(self, resume: str | Path) -> Path:
        if resume != "auto":
            checkpoints.verify_checkpoint(Path(resume))
            return Path(resume)
        folder = checkpoints.latest_checkpoint(self.run_dir, self._say)
        if folder is None:
            raise CheckpointError(
                f"none of the checkpoints in {self.run_dir} is whole: remove its folder checkpoints to start anew"
            )
        return folder

    def _compare(self, about: Mapping[str, Any]) -> None:
        """Says what differs from the run that wrote the checkpoint, where it changes what is learned when."""
        then, now = about["config"], self._about["config"]
        changed = [name for name in _FIELDS_OF_THE_ORDER if then.get(name) != now[name]]
        if about["data"].get("train_sha256") != self._about["data"]["train_sha256"]:
            changed.append("the training names")
        if changed:
            self._say(f"not as in the checkpoint: {', '.join(changed)}. Names come in another order from here on")
