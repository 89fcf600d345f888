"""Saving and resuming a run: asynchronous checkpoints, which a thread writes while training continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.files import flush_file
from flash_experts.model_files import CONFIG
from flash_experts.models.saving import CheckpointError, export_model
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.distributed import gather_full
from flash_experts.training.run_state import RUN_INFO, TrainerState, checkpoint_path
from flash_experts.training.tracking import METRICS_FILE, SELECTION, read_untrusted_metrics
from flash_experts.training.training_config import TrainingConfig

# A resumed run may differ from the checkpoint:
# - refused: tokenizer, validation names (so, where validation_names is fewer than the data has, another number of them
#   or another seed), model configuration (except `run_folder.MAY_CHANGE`), kind of optimizer, ema_decay set or unset,
#   and with it an lr_scale of 0;
# - accepted with a line: training names, number of processes, device, `parallel`, and every setting that is not in
#   `_SILENT`;
# - accepted: the settings in `_SILENT`, which leave what a step learns as it is (limits, logging, the tracker).
# run.json has all settings that changed, under "resumed".
_DATA_ORDER_FIELDS = ("seed", "tokens_per_batch", "attribute_dropout", "names_per_prompt", "stages")
_SILENT = {
    *("output_dir", "run_name", "max_steps", "max_epochs", "max_minutes", "early_stopping_patience", "on_nan"),
    *("log_every", "eval_every", "validation_names", "checkpoint_every", "keep_checkpoints", "save_in_background"),
    *("sample_every", "tracker", "gradient_accumulation_steps", "compile", "deterministic"),
    *("data", "extra_names"),  # folders, whose names are compared
    *("device", "parallel", *_DATA_ORDER_FIELDS),  # reported together
}


class Stateful(Protocol):
    """An object that a checkpoint keeps, once registered with the `Checkpointer`."""

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Tensors, sharded ones too. Called on every process, so it may gather."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state_dict` gave (tensors are full and on the CPU); ValueError if it does not match."""


class Checkpointer:
    """Saves and restores a run: weights, which may be sharded, a `TrainerState`, and every registered object.

    The main process writes, all read. ``info`` is the content of run.json, which is compared on resuming.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        info: Mapping[str, Any],
        notify: Callable[[str], None],
        is_main: bool,
    ):
        self.run_dir, self.model, self.tokenizer = config.run_dir, model, tokenizer
        self._keep, self._notify, self._is_main = config.keep_checkpoints, notify, is_main
        names = ("config", "data", "processes", "device", "identity", "origin")
        self._metadata: dict[str, Any] = json.loads(json.dumps({name: info[name] for name in names}, default=str))
        self._restored: Path | None = None
        self.resumed: list[dict[str, Any]] = []  # the steps at which settings changed: {"step": 7, "changed": {...}}
        self._registered: dict[str, Stateful] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint") if is_main and config.save_in_background else None
        self._pending: Future[None] | None = None  # what the thread writes
        self._buffers: dict[str, torch.Tensor] = {}

    def register(self, name: str, stateful: Stateful) -> None:
        """Adds an object's state to every checkpoint; its name must stay the same."""
        assert name not in self._registered and "/" not in name, name
        self._registered[name] = stateful

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self, state: TrainerState) -> None:
        """Writes this step's checkpoint and removes old ones. All processes call it."""
        states = {name: stateful.state_dict() for name, stateful in self._registered.items()}
        tensors = {f"{name}/{key}": tensor for name, own in states.items() for key, tensor in own.items()}
        metadata = {"state": asdict(state), **self._metadata, "registered": {name: {} for name in states}}
        metadata |= {"resumed": self.resumed} if self.resumed else {}
        weights, tensors = self._gather(self._weights()), self._gather(tensors)
        path = checkpoint_path(self.run_dir, state.step)
        self._submit(partial(self._write, path, weights, tensors, metadata, state.best_step))

    def export(self) -> None:
        """Writes the model to the run's folder. All processes call it."""
        weights = self._gather(self._weights())
        self._submit(partial(export_model, self.run_dir, self.model, self.tokenizer, weights))

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict(keep_vars=True)  # the parameters themselves: tied ones are the same object

    def _gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The full tensors on the main process, {} on the others; copies, if a thread reads them."""
        self.wait()  # for the buffers
        full: dict[str, torch.Tensor] = {}
        first_names: dict[int, str] = {}
        for name, tensor in tensors.items():
            first = first_names.setdefault(id(tensor), name)
            if first == name:
                gathered = gather_full(tensor)  # one by one; every process takes part
                if self._is_main:
                    full[name] = gathered.contiguous() if self._thread is None else self._copy(name, gathered)
            elif self._is_main:
                full[name] = full[first]  # tied weights stay one tensor
        if self._thread is not None and any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the next step overwrites what the device still copies
        return full

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in a CPU buffer that is kept, since page faults of fresh memory cost more than the copy."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def _submit(self, work: Callable[[], None]) -> None:
        """Runs work on the main process, in a thread for which the interpreter waits at exit, or at once."""
        if self._thread is not None:
            self._pending = self._thread.submit(work)
        elif self._is_main:
            work()

    def _write(
        self,
        path: Path,
        weights: Mapping[str, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, Any],
        best_step: int,
    ) -> None:
        metrics = self.run_dir / METRICS_FILE
        if metrics.exists():  # a run that resumes here needs the lines up to here
            flush_file(metrics)
        checkpoints.save_checkpoint(path, self.model, self.tokenizer, weights, tensors, metadata)
        checkpoints.prune_checkpoints(self.run_dir, self._keep, best_step, self._notify)

    @property
    def is_writing(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def check(self) -> None:
        """Raises the `CheckpointError` of a failed write; never waits."""
        if not self.is_writing:
            self.wait()

    def wait(self) -> None:
        """Waits for the write, and raises its `CheckpointError`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits; shows the error of a write instead of raising it, since the run may have failed already."""
        try:
            self.wait()
        except CheckpointError as error:
            self._notify(str(error))

    def last_good(self) -> Path | None:
        """The newest checkpoint that verifies, after waiting for the one being written."""
        self.close()
        return checkpoints.latest_checkpoint(self.run_dir, self._notify)

    # ----------------------------------------------------------------------------------------------------- resuming

    def restore(self, resume: str | Path | None, overwrite: bool = False) -> TrainerState:
        """Restores the model and all registered objects; arguments as in `Trainer.train`.

        Raises:
            ValueError: ``resume`` is None, and there are checkpoints that a new run would overwrite.
            CheckpointError: the checkpoint is missing or damaged, or belongs to another model.
        """
        if self._is_main:
            checkpoints.remove_leftovers(self.run_dir)
        steps = checkpoints.checkpoint_steps(self.run_dir)
        if resume is None and steps and not overwrite:
            raise ValueError(
                f"{self.run_dir} has checkpoints up to step {steps[-1]:,}: set resume: auto to continue, or choose "
                "another run_name (overwrite: true starts over)"
            )
        if resume == "auto" and not steps and (self.run_dir / RUN_INFO).exists():
            self._notify(f"no checkpoint in {self.run_dir}: the run starts over from step 0")
        self._restored = None
        if resume is None or (resume == "auto" and not steps):
            return TrainerState()
        folder = self._find(resume)
        state, metadata = checkpoints.read_state(folder)
        if steps and folder.resolve() != checkpoint_path(self.run_dir, state.step).resolve():
            raise ValueError(
                f"{self.run_dir} has checkpoints of its own, which resuming {folder} would replace: choose another "
                "run_name"
            )
        self._check_identity(folder, metadata.get("identity"))
        self._load(folder)
        self._restored = folder
        self._notify(f"resuming {folder} after step {state.step:,}")
        self._compare(metadata)
        self._note_changes(metadata, state.step)
        return state

    def holds_best(self, state: TrainerState, is_over: bool) -> bool:
        """Whether the run's folder has the best model of the restored ``state``, or none is due yet.

        It is missing when another run was resumed, and of a later step when an earlier checkpoint was.
        """
        best = state.best_bits_per_char
        if self._restored is None or (best is None and not is_over):
            return True
        is_own = self._restored.resolve() == checkpoint_path(self.run_dir, state.step).resolve()
        if not is_own or not (self.run_dir / CONFIG).is_file():
            return False
        lines = read_untrusted_metrics(self.run_dir / METRICS_FILE)
        later = [line.get(SELECTION) for line in lines if line["step"] > state.step]
        return best is None or not any(isinstance(value, float) and value < best for value in later)

    def export_best(self, state: TrainerState, export: Callable[[], None]) -> None:
        """Exports the best model of the restored ``state``, from the checkpoint of its step. All processes call it.

        If there is none, exports the restored model, and ``state`` has no best one until the next validation.
        """
        assert self._restored is not None
        best = checkpoints.checkpoint_of_best(self._restored, state)
        if best is None and state.best_bits_per_char is not None:
            self._notify(
                f"the best model so far, of step {state.best_step:,}, is not here: the next validation counts as best"
            )
            state.best_bits_per_char, state.best_step = None, 0
        if best is None or best == self._restored:
            export()
        else:
            self._load(best)
            export()
            self._load(self._restored)
        self.wait()

    def _load(self, folder: Path) -> None:
        checkpoints.load_weights(folder, self.model)
        self._load_registered(folder, checkpoints.read_state(folder)[1]["registered"].keys())

    def _check_identity(self, folder: Path, then: Any) -> None:
        """Refuses a checkpoint with another tokenizer, model configuration or set of validation names."""
        if not isinstance(then, dict):
            self._notify(f"{folder} is of an older version: its tokenizer, model and validation names are not compared")
            return
        now = self._metadata["identity"]
        changed = []
        if then.get("tokenizer") != now["tokenizer"]:
            changed.append("its tokenizer differs")
        if then.get("validation_names") != now["validation_names"]:
            changed.append("its validation names differ (validation_names and seed draw them from those of the data)")
        config: Any = then.get("model_config")
        for name, value in now["model_config"].items() if isinstance(config, dict) else ():
            if name in config and config[name] != value:
                changed.append(f"its {name} is {config[name]}, not {value}")
        if changed:
            raise checkpoints.mismatch_error(folder, ", ".join(changed))

    def _load_registered(self, folder: Path, names: Set[str]) -> None:
        if names != self._registered.keys():
            there, here = ", ".join(sorted(names)), ", ".join(sorted(self._registered))
            raise checkpoints.mismatch_error(folder, f"it has the state of {there}, but this run has {here}")
        tensors = checkpoints.load_tensors(folder)
        for name, stateful in self._registered.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            try:
                stateful.load_state_dict(own)
            except (ValueError, KeyError, RuntimeError) as error:
                raise checkpoints.mismatch_error(folder, f"{name}: {error}") from error

    def _find(self, resume: str | Path) -> Path:
        if resume != "auto":
            checkpoints.verify_checkpoint(Path(resume))
            return Path(resume)
        folder = checkpoints.latest_checkpoint(self.run_dir, self._notify)
        if folder is None:
            raise CheckpointError(
                f"none of the checkpoints in {self.run_dir} is valid: remove its folder checkpoints to start over"
            )
        return folder

    def _compare(self, metadata: Mapping[str, Any]) -> None:
        """Warns of differences that change the order of data or the rounding."""
        then, now = metadata["config"], self._metadata["config"]
        changed = [name for name in _DATA_ORDER_FIELDS if then.get(name, now[name]) != now[name]]
        if metadata["data"].get("train_sha256") != self._metadata["data"]["train_sha256"]:
            changed.append("the training names")
        if changed:
            self._notify(f"not as in the checkpoint: {', '.join(changed)}. The order of names differs from here on")
        for name in ("processes", "device", "parallel"):
            before, here = (found.get(name, found["config"].get(name)) for found in (metadata, self._metadata))
            if before != here:
                self._notify(
                    f"not as in the checkpoint: {name} {here}, formerly {before}. Dropout and rounding differ, so the "
                    "results are equivalent, but not equal to the bit"
                )

    def _note_changes(self, metadata: Mapping[str, Any], step: int) -> None:
        """Adds the settings that differ from the checkpoint's to its history; a line for each that is not silent."""
        before = metadata.get("resumed")
        self.resumed = list(before) if isinstance(before, list) else []
        then, now = _settings(metadata), _settings(self._metadata)
        changed = {name: [then[name], now[name]] for name in now if name in then and then[name] != now[name]}
        if changed:
            self.resumed.append({"step": step, "changed": changed})
        for name in (name for name in changed if name not in _SILENT):
            old, new = map(json.dumps, changed[name])
            self._notify(f"{name} is {new}; the steps so far had {old}")


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The training configuration, and the base, ``model.num_experts``, ... of the origin."""
    settings, origin = dict(metadata["config"]), metadata.get("origin")
    for name, value in origin.items() if isinstance(origin, dict) else ():
        settings |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return settings
