"""The checkpoint format: folders that survive a kill at any moment.

As `models.saving` writes folders, a checkpoint is complete or does not exist. Pickles, which can run code, are refused.
Random states are not stored: the trainer seeds dropout at each step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.files import sha256_of
from flash_experts.models.saving import (
    MANIFEST,
    CheckpointError,
    files_in,
    remove_folder,
    save_model,
    temporary_folder,
    with_manifest,
)
from flash_experts.training.distributed import shard_like
from flash_experts.training.run_state import TrainerState, checkpoint_path

STATE = "trainer_state.json"
TENSORS = "trainer_state.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Fields of `TrainerState` that need not be whole numbers.
_FRACTIONS, _NUMBERS = ("seconds", "evaluation_seconds", "best_bits_per_char"), (int, float)


def save_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Writes a checkpoint folder atomically; a CheckpointError, as on a full disk, leaves no partial folder.

    Args:
        model: defines how ``weights`` are saved; its own are not used.
        metadata: JSON values: ``state``, configuration, data hashes.
    """

    def write(folder: Path) -> None:
        save_model(folder, model, tokenizer, weights)
        save_file(dict(tensors), folder / TENSORS)
        (folder / STATE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    if target.exists():  # damaged, or replaced by this run
        remove_folder(target)
    with_manifest(target, write, temporary_folder(target.parent, target.name))


def verify_checkpoint(folder: Path) -> None:
    """Checks the files against the manifest; a CheckpointError if one is missing, damaged or a pickle."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: the folder does not exist")
    for path in files_in(folder):
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, which can run code when loaded: refused, remove it")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, (sha256, size) in expected.items():
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {name!r} is not a file in this folder")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, but {size} were written")
        if sha256_of(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    for name in (STATE, TENSORS, "config.json"):
        if name not in expected:
            raise CheckpointError(f"{folder} cannot be resumed: {name} is not in its manifest")


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, valid or damaged, oldest first."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def latest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; warns of damaged ones."""
    return first_valid(run_dir, list(reversed(checkpoint_steps(run_dir))), warn)


def first_valid(run_dir: Path, steps: list[int], warn: Callable[[str], None]) -> Path | None:
    """The first of ``steps`` whose checkpoint verifies; warns of damaged ones."""
    for step in steps:
        folder = checkpoint_path(run_dir, step)
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f"skipping the checkpoint of step {step}: {error}")
        else:
            return folder
    return None


def read_state(folder: Path) -> tuple[TrainerState, dict[str, Any]]:
    """The state of a verified checkpoint, and its other metadata; a CheckpointError if it is not what a run writes."""
    known = [field.name for field in fields(TrainerState)]
    try:
        metadata = json.loads((folder / STATE).read_text(encoding="utf-8"))
        numbers = metadata.pop("state")
        numbers.setdefault("evaluation_seconds", 0.0)  # checkpoints of older versions lack it
        state = TrainerState(**{name: numbers.pop(name) for name in known}, **numbers)
        for name, value in asdict(state).items():
            is_absent = value is None and name == "best_bits_per_char"
            is_number = type(value) in (_NUMBERS if name in _FRACTIONS else (int,))
            if not is_absent and not (is_number and value >= 0):
                raise ValueError(f"{name} is {value!r:.40}")
        objects = {name: metadata[name] for name in ("config", "data", "registered")}
        for name, value in (objects | objects["registered"]).items():
            if not isinstance(value, dict):
                raise ValueError(f"{name} is not an object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} is not a trainer state ({', '.join(known)}): {error}") from error
    return state, metadata


def checkpoint_of_best(folder: Path, state: TrainerState) -> Path | None:
    """The checkpoint with the best model of ``folder``'s ``state``: itself, a valid one next to it, or None."""
    if state.best_bits_per_char is None:
        return None
    if state.best_step == state.step:
        return folder
    best = folder.resolve().parent / checkpoint_path(folder, state.best_step).name
    try:
        verify_checkpoint(best)
        found, _ = read_state(best)
    except CheckpointError:
        return None
    known, own = ((each.best_step, each.best_bits_per_char) for each in (state, found))
    return best if known == own and found.step == found.best_step else None


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Loads a verified checkpoint's weights in place; a CheckpointError if they are another model's."""
    try:
        weights = load_file(folder / "model.safetensors")
        own = model.state_dict()
        for name in weights.keys() & own.keys():
            if weights[name].is_floating_point() != own[name].is_floating_point():
                raise RuntimeError(f"{name} is {weights[name].dtype}")
        placed = {name: shard_like(weight, own[name]) if name in own else weight for name, weight in weights.items()}
        missing, unexpected = model.load_state_dict(placed, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise mismatch_error(folder, error) from error
    tied = model.all_tied_weights_keys  # save_pretrained leaves out second names of tied weights
    absent = [name for name in missing if name not in tied]
    if absent or unexpected:
        raise mismatch_error(folder, f"{(absent or unexpected)[0]} differs")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise mismatch_error(folder, error) from error


def mismatch_error(folder: Path, reason: object) -> CheckpointError:
    text = " ".join(str(reason).split())
    return CheckpointError(
        f"{folder} belongs to another model or configuration than the one being trained: {text}. Resume with the "
        "settings it was trained with, or choose another run_name"
    )


def prune_checkpoints(run_dir: Path, keep: int, best_step: int, warn: Callable[[str], None]) -> None:
    """Removes all but the newest ``keep`` and the best one, if one of these verifies."""
    steps = checkpoint_steps(run_dir)
    stay = {*steps[-keep:], best_step}
    doomed = [step for step in steps if step not in stay]
    if not doomed:
        return
    if first_valid(run_dir, [step for step in reversed(steps) if step in stay], warn) is None:
        warn(f"none of the checkpoints to keep in {run_dir} is valid: the older ones are not removed")
        return
    for step in doomed:
        remove_folder(checkpoint_path(run_dir, step))


def drop_later(run_dir: Path, step: int) -> None:
    """Removes checkpoints after ``step``, which a resumed run writes again."""
    for later in checkpoint_steps(run_dir):
        if later > step:
            remove_folder(checkpoint_path(run_dir, later))


def remove_leftovers(run_dir: Path) -> None:
    """Removes temporary folders of a killed run; needs the run's lock."""
    for path in (run_dir / "checkpoints").glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-(export|(removed-)?step-\d{6,})", path.name):
            shutil.rmtree(path, ignore_errors=True)
