"""Checkpoints that survive a kill at any moment.

A checkpoint is written to a temporary folder beside its place, every file is flushed to the disk, a manifest
with the SHA-256 of each is added, and the folder is renamed: it is there whole, or it is not there. On the
way back every file is checked. Only safetensors and JSON are written or read; a pickle can run code when
loaded, and is refused.

Random states are not stored: the trainer seeds dropout anew at each step from (seed, step, process).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"
OPTIMIZER = "trainer_state.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


@dataclass
class TrainerState:
    """Where a run stands. Everything but the weights and the optimizer's tensors.

    Attributes:
        step: optimizer steps done.
        tokens: tokens multiplied so far.
        seconds: wall-clock time of training so far, without what a kill lost.
        best_bits_per_char: lowest validation figure yet; None before the first.
        best_step: when that was.
        bad_evaluations: validations since then.
        interval_loss: sum of the losses since the last line of metrics.
        interval_steps: how many they were.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_bits_per_char: float | None = None
    best_step: int = 0
    bad_evaluations: int = 0
    interval_loss: float = 0.0
    interval_steps: int = 0


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """``run_dir/checkpoints/step-000100``."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of which there is a checkpoint folder, whole or damaged, oldest first."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    about: dict[str, Any],
) -> Path:
    """Writes ``step-NNNNNN`` atomically.

    Args:
        run_dir: the run's folder.
        model: saved with `save_pretrained`.
        tokenizer: saved with `save_pretrained`.
        optimizer: its tensors are saved under the names of the parameters.
        state: saved as JSON.
        about: more JSON, kept beside the state (the configuration, the data's fingerprint).

    Raises:
        CheckpointError: it could not be written (a full disk); nothing half-written is left.
    """

    def write(folder: Path) -> None:
        _save_model(folder, model, tokenizer)
        save_file(optimizer_tensors(model, optimizer), folder / OPTIMIZER)
        text = json.dumps({"state": asdict(state), **about}, indent=2)
        (folder / STATE).write_text(text + "\n", encoding="utf-8")

    target = checkpoint_path(run_dir, state.step)
    with_manifest(target, write)
    return target


def export_model(run_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the model into the run's folder itself, each file by rename, the manifest last.

    Raises:
        CheckpointError: it could not be written; the model that was there is still whole.
    """

    def write(folder: Path) -> None:
        _save_model(folder, model, tokenizer)

    staged = run_dir / ".export"
    with_manifest(staged, write)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(path, run_dir / path.name)
    staged.rmdir()
    _flush_folder(run_dir)


def with_manifest(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder with ``write``, adds the manifest, flushes, and renames it to ``target``."""
    temporary = target.with_name(f".tmp-{target.name.lstrip('.')}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        manifest = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in _files(temporary):
            _flush(path)
        _flush_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _flush_folder(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write {target}: {error}. Free some disk space, or give another output_dir; "
            "checkpoints written before are still good"
        ) from error


def verify_checkpoint(folder: Path) -> None:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: it names the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    for path in _files(folder):
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, which can run code when loaded: refused, remove it")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, (sha256, size) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, but {size} were written")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    for name in (STATE, OPTIMIZER, "config.json"):
        if name not in expected:
            raise CheckpointError(f"{folder} cannot be resumed: {name} is not in its manifest")


def latest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each damaged one on the way is named and skipped."""
    for step in reversed(checkpoint_steps(run_dir)):
        folder = checkpoint_path(run_dir, step)
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f"skipping the checkpoint of step {step}: {error}")
        else:
            return folder
    return None


def read_state(folder: Path) -> tuple[TrainerState, dict[str, Any]]:
    """The state of a verified checkpoint, and what was kept beside it."""
    try:
        about = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = TrainerState(**about.pop("state"))
    except (ValueError, KeyError, TypeError) as error:
        known = ", ".join(field.name for field in fields(TrainerState))
        raise CheckpointError(f"{folder / STATE} is not a trainer state ({known}): {error}") from error
    return state, about


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights and the optimizer's tensors of a verified checkpoint into those given, in place.

    Raises:
        CheckpointError: they are of another model.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / OPTIMIZER)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} is of another model than the one being trained: {reason}") from error
    tied = model.all_tied_weights_keys  # save_pretrained leaves out what is only a second name
    absent = [name for name in missing if name not in tied]
    if absent or unexpected:
        first = (absent or unexpected)[0]
        raise CheckpointError(f"{folder} is of another model than the one being trained: {first} differs")
    load_optimizer_tensors(model, optimizer, tensors)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``{parameter name}|{key}`` tensors."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value.contiguous()
        for parameter, slots in optimizer.state.items()
        for key, value in slots.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. Rates and the like are not restored: the configuration says
    them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {name: index for index, name in enumerate(order)}
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("|")
        if name not in index_of:
            raise CheckpointError(f"the optimizer's state has {name}, which the model being trained has not")
        slots.setdefault(index_of[name], {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints, and what killed runs left half-written."""
    folder = run_dir / "checkpoints"
    doomed = [checkpoint_path(run_dir, step) for step in checkpoint_steps(run_dir)[:-keep]]
    for path in [*doomed, *folder.glob(".tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def drop_later(run_dir: Path, step: int) -> None:
    """Removes checkpoints after ``step``: a run that goes on from there writes them again."""
    for later in checkpoint_steps(run_dir):
        if later > step:
            shutil.rmtree(checkpoint_path(run_dir, later), ignore_errors=True)


def _save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`save_pretrained` of both, without its progress bars amid ours."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a power cut. Windows has no such call, nor the need."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
