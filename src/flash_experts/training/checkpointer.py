"""A run's own checkpoints: when to write, what to resume, what has changed since.

Writing takes the time of hashing and of the disk. So that training does not stand still for it, the main process
copies what is to be saved into its own memory and a thread writes the copy; the next save waits for the former. What
a run says and does stays as if everything were written at once: an error comes up at the next step, and the end of
the run waits for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.files import flush_file
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.background import Background, CpuCopy, gather_each
from flash_experts.training.checkpoint import CheckpointError
from flash_experts.training.stateful import Stateful, TrainerState, join_state, split_state
from flash_experts.training.tracking import METRICS_FILE
from flash_experts.training.training_config import TrainingConfig

# What may differ when a run is resumed:
# - refused: another tokenizer, other names to validate on, another model configuration (but for `run_info.MAY_CHANGE`),
#   another kind of optimizer, ema_decay set or unset;
# - with a warning: the four settings below, the training names, the number of processes, the device, `parallel`;
# - without: every other setting, such as limits, learning rates, how often something is done, and the tracker.
_FIELDS_OF_THE_ORDER = ("seed", "tokens_per_batch", "attribute_dropout", "stages")


class Checkpointer:
    """Saves and restores one run: the weights, a `TrainerState`, and every object that is registered.

    Args:
        run_dir: the run's folder.
        model: the plain model (no DDP or compiled wrapper); its parts may be spread over processes.
        tokenizer: saved with it.
        keep: newest checkpoints that are kept, besides that of the best validation.
        info: the run's ``config``, ``data``, ``processes``, ``device`` and ``identity`` (kept in each checkpoint and
            compared on resuming).
        say: tells the person who watches.
        is_main: whether this process writes; all processes read.
        background: write on a thread, which takes memory for a copy of what is saved.
    """

    def __init__(
        self,
        run_dir: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        keep: int,
        info: Mapping[str, Any],
        say: Callable[[str], None],
        is_main: bool,
        background: bool,
    ):
        self.run_dir, self.model, self.tokenizer = run_dir, model, tokenizer
        self._keep, self._say, self._is_main = keep, say, is_main
        self._about = {name: info[name] for name in ("config", "data", "processes", "device", "identity")}
        self._registered: dict[str, Stateful] = {}
        self._saved: Path | None = None
        self._background = Background() if background else None
        self._copies = {use: CpuCopy() for use in ("weights", "tensors", "export")}

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        info: Mapping[str, Any],
        say: Callable[[str], None],
        is_main: bool,
    ) -> Checkpointer:
        """That of a run."""
        keep, background = config.keep_checkpoints, config.save_in_background
        return cls(config.run_dir, model, tokenizer, keep, info, say, is_main, background)

    def register(self, name: str, stateful: Stateful) -> None:
        """Makes an object's state part of every checkpoint, under a name that stays the same."""
        assert name not in self._registered and "/" not in name, name
        self._registered[name] = stateful

    # ------------------------------------------------------------------------------------------------------ writing

    def save(self, state: TrainerState) -> Path:
        """Writes the checkpoint of this step, if there is none yet, and removes old ones. All processes call it."""
        path = checkpoints.checkpoint_path(self.run_dir, state.step)
        if self._saved == path:
            return path
        self._saved = path
        tensors: dict[str, torch.Tensor] = {}
        values = {}
        for name, stateful in self._registered.items():
            own, values[name] = split_state(name, stateful.state_dict())
            tensors |= own
        about = {"state": asdict(state), **self._about, "registered": values}
        weights = self._copy("weights", self._weights())
        tensors = self._copy("tensors", tensors)
        self._do(partial(self._write, path, weights, tensors, about, state.best_step))
        return path

    def export(self) -> None:
        """Puts the model as it is now into the run's folder, where `load_model` finds it. All processes call it."""
        weights = self._copy("export", self._weights())
        self._do(partial(checkpoints.export_model, self.run_dir, self.model, self.tokenizer, weights))

    @property
    def is_writing(self) -> bool:
        """Whether something asked for is not on the disk yet."""
        return self._background is not None and self._background.busy

    def check(self) -> None:
        """Raises the error of a write that has ended in the meantime.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._background is not None:
            self._background.check()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            CheckpointError: something could not be.
        """
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Waits at the end of a run that may have failed already: a write that fails too is said, not raised."""
        try:
            self.wait()
        except CheckpointError as error:
            self._say(str(error))

    def last_good(self) -> Path | None:
        """The newest checkpoint that verifies, after waiting for the one being written."""
        self.close()
        return checkpoints.latest_checkpoint(self.run_dir, self._say)

    def _copy(self, use: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors, gathered from all processes: what the main one's thread may read while training goes on,
        the tensors themselves where no thread will, and nothing on the other processes."""
        whole: dict[str, torch.Tensor] = {}
        if self._is_main and self._background is not None:
            self.wait()
            return self._copies[use].take(tensors)
        for name, first, tensor in gather_each(tensors):
            if self._is_main:
                whole[name] = whole[first] if tensor is None else tensor.contiguous()
        return whole

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict(keep_vars=True)  # the parameters themselves: tied ones are told by being the same

    def _do(self, work: Callable[[], None]) -> None:
        if not self._is_main:
            return
        if self._background is None:
            work()
        else:
            self._background.submit(work)

    def _write(
        self,
        path: Path,
        weights: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, Any],
        best_step: int,
    ) -> None:
        metrics = self.run_dir / METRICS_FILE
        if metrics.exists():  # a run that goes on from here relies on the lines up to here
            flush_file(metrics)
        checkpoints.save_checkpoint(path, self.model, self.tokenizer, weights, tensors, about)
        checkpoints.prune_checkpoints(self.run_dir, self._keep, best_step, self._say)

    # ------------------------------------------------------------------------------------------------------ reading

    def restore(self, resume: str | Path | None, overwrite: bool = False) -> TrainerState:
        """Fills the model and what is registered from a checkpoint; see `Trainer.train` for the arguments.

        Raises:
            ValueError: ``resume`` is None, and there are checkpoints that a new run would overwrite.
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        if self._is_main:
            checkpoints.remove_leftovers(self.run_dir)
        steps = checkpoints.checkpoint_steps(self.run_dir)
        if resume is None and steps and not overwrite:
            raise ValueError(
                f"{self.run_dir} has checkpoints up to step {steps[-1]:,}: go on with --resume auto, or choose another "
                "run_name (--overwrite starts over)"
            )
        if resume is None or (resume == "auto" and not steps):
            return TrainerState()
        folder = self._find(resume)
        state, about = checkpoints.read_state(folder)
        self._check_identity(folder, about.get("identity"))
        checkpoints.load_weights(folder, self.model)
        self._load_registered(folder, about["registered"])
        if folder.resolve() == checkpoints.checkpoint_path(self.run_dir, state.step).resolve():
            self._saved = checkpoints.checkpoint_path(self.run_dir, state.step)
        elif steps:
            raise ValueError(
                f"{self.run_dir} has checkpoints of its own, which going on from {folder} would replace: choose "
                "another run_name"
            )
        self._say(f"resuming {folder} after step {state.step:,}")
        self._compare(about)
        return state

    def drop_later(self, step: int) -> None:
        """Removes checkpoints after ``step``, damaged or of a course that is left: the run writes them
        again."""
        if self._is_main:
            checkpoints.drop_later(self.run_dir, step)

    def _check_identity(self, folder: Path, then: Any) -> None:
        """Refuses the checkpoint of another tokenizer, model configuration or set of validation names."""
        if not isinstance(then, dict):
            self._say(f"{folder} is of an older version: its tokenizer, model and validation names are not compared")
            return
        now = self._about["identity"]
        changed = []
        if then.get("tokenizer") != now["tokenizer"]:
            changed.append("its tokenizer is another one")
        if then.get("validation_names") != now["validation_names"]:
            changed.append("it was validated on other names")
        config: Any = then.get("model_config")
        for name, value in now["model_config"].items() if isinstance(config, dict) else ():
            if name in config and config[name] != value:
                changed.append(f"its {name} is {config[name]}, not {value}")
        if changed:
            raise checkpoints.not_this_run(folder, ", ".join(changed))

    def _load_registered(self, folder: Path, values: Mapping[str, Any]) -> None:
        if values.keys() != self._registered.keys():
            there, here = ", ".join(sorted(values)), ", ".join(sorted(self._registered))
            raise checkpoints.not_this_run(folder, f"it has the state of {there}, but this run has {here}")
        tensors = checkpoints.load_tensors(folder)
        for name, stateful in self._registered.items():
            try:
                stateful.load_state_dict(join_state(name, tensors, values[name]))
            except (ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
                raise checkpoints.not_this_run(folder, f"{name}: {error}") from error

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
        for name in ("processes", "device", "parallel"):
            before, here = (found.get(name, found["config"].get(name)) for found in (about, self._about))
            if before != here:
                self._say(
                    f"not as in the checkpoint: {name} {here}, formerly {before}. Dropout and rounding differ, so what "
                    "follows is as good, but not equal to the bit"
                )
