"""Checkpoints that survive a kill at any moment.

A checkpoint is written to a temporary folder next to its place, every file is flushed to the disk, a manifest
with the SHA-256 of each is added, and the folder is renamed: it is there whole, or it is not there. On the
way back every file is checked. Only safetensors and JSON are written or read; a pickle can run code when
loaded, and is refused.

The temporary folders of a run have fixed names in ``checkpoints``, which belong to whoever holds the run's lock: the
next run removes what a killed one left. Those of `write_model` have names that nobody can guess (see
`flash_experts.files`).

Random states are not stored: the trainer seeds dropout at each step from (seed, step, process).

The functions here write and read folders; what goes into them and when is decided in `checkpointer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flash_experts.ctrl_c import held_back
from flash_experts.files import check_replaced, flush_file, folder_lock, put_file, temporary_beside
from flash_experts.training.sharding import part_like
from flash_experts.training.stateful import TrainerState

MANIFEST = "MANIFEST.json"
STATE = "trainer_state.json"
TENSORS = "trainer_state.safetensors"
_FRACTIONS, _NUMBERS = (
    ("seconds", "evaluation_seconds", "best_bits_per_char"),
    (int, float),
)  # the other values are whole numbers
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """``run_dir/checkpoints/step-000100``."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of which there is a checkpoint folder, whole or damaged, oldest first."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def save_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    about: Mapping[str, Any],
) -> None:
    """Writes a checkpoint folder atomically.

    Args:
        target: the folder.
        model: says how weights are saved; those it has now are not looked at.
        tokenizer: saved with `save_pretrained`.
        weights: the model's state dict.
        tensors: of everything else.
        about: all that is not a tensor, as JSON: the ``state``, the configuration, the data's fingerprint.

    Raises:
        CheckpointError: it could not be written (a full disk); nothing half-written is left.
    """

    def write(folder: Path) -> None:
        _save_model(folder, model, tokenizer, weights)
        save_file(dict(tensors), folder / TENSORS)
        (folder / STATE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    if target.exists():  # damaged, or of a course that is left
        remove_folder(target)
    with_manifest(target, write, _temporary(target.parent, target.name))


def export_model(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Writes the model into the run's folder itself, each file by rename, the manifest last.

    Raises:
        CheckpointError: it could not be written; the model that was there is still whole.
    """

    _fill_folder(run_dir, _temporary(run_dir / "checkpoints", "export"), model, tokenizer, weights)


def write_model(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, overwrite: bool = False) -> None:
    """Writes a model and its tokenizer into a folder, where other files stay: whole, or not at all.

    Raises:
        ValueError: the folder is not empty, and ``overwrite`` is not given.
        CheckpointError: it could not be written; what was there is still whole.
    """
    out, weights = Path(os.path.realpath(out)), model.state_dict()
    if not out.is_dir():
        with_manifest(out, lambda folder: _save_model(folder, model, tokenizer, weights))
        return
    with folder_lock(out):  # two commands at once: the second finds the files of the first
        check_replaced(out, overwrite)
        _fill_folder(out, temporary_beside(out / "model"), model, tokenizer, weights)


def _fill_folder(
    folder: Path,
    temporary: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Writes a model into ``temporary``, then moves its files into a folder that is there."""
    try:
        _write_staged(folder, lambda staged: _save_model(staged, model, tokenizer, weights), temporary)
        with held_back():
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST):
                put_file(path, folder / path.name)
            temporary.rmdir()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(folder)


def with_manifest(target: Path, write: Callable[[Path], None], temporary: Path | None = None) -> None:
    """Fills a temporary folder with ``write``, adds the manifest, flushes, and renames it to ``target``.

    Raises:
        CheckpointError: it could not be written, or another process has written ``target`` in the meantime.
    """
    temporary = temporary or temporary_beside(target)
    _write_staged(target, write, temporary)
    try:
        with held_back():
            os.rename(temporary, target)
    except OSError as error:
        if not target.is_dir():
            raise _not_written(target, error) from error
        raise CheckpointError(f"another process has written {target} in the meantime: give a new folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(target.parent)


def _write_staged(target: Path, write: Callable[[Path], None], temporary: Path) -> None:
    """Fills the temporary folder of ``target``, which is gone if that fails."""
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        manifest = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        mode = stat.S_IMODE((temporary / MANIFEST).stat().st_mode)
        for path in _files(temporary):
            path.chmod(mode)  # safetensors gives its files to their owner alone
            flush_file(path)
        flush_folder(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # A full disk is an error of safetensors' own to safetensors, and a plain Exception to tokenizers.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise _not_written(target, error) from error


def _not_written(target: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"could not write {target}: {error}. Free some disk space, or write to another folder; "
        "checkpoints written before are still good"
    )


def _temporary(checkpoints: Path, name: str) -> Path:
    """A temporary folder of the run that holds the lock; what a killed save left there goes."""
    temporary = checkpoints / f".tmp-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, (sha256, size) in expected.items():
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: {name!r} is no file of this folder")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes, but {size} were written")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    for name in (STATE, TENSORS, "config.json"):
        if name not in expected:
            raise CheckpointError(f"{folder} cannot be resumed: {name} is not in its manifest")


def latest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each damaged one on the way is named and skipped."""
    return first_whole(run_dir, list(reversed(checkpoint_steps(run_dir))), warn)


def first_whole(run_dir: Path, steps: list[int], warn: Callable[[str], None]) -> Path | None:
    """The first checkpoint of ``steps`` that verifies; each damaged one before it is named."""
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
    """The state of a verified checkpoint, and what was kept beside it.

    Raises:
        CheckpointError: that is not what a run writes.
    """
    known = [field.name for field in fields(TrainerState)]
    try:
        about = json.loads((folder / STATE).read_text(encoding="utf-8"))
        numbers = about.pop("state")
        numbers.setdefault("evaluation_seconds", 0.0)  # checkpoints of older versions lack it
        state = TrainerState(**{name: numbers.pop(name) for name in known}, **numbers)
        for name, value in asdict(state).items():
            is_absent = value is None and name == "best_bits_per_char"
            is_number = type(value) in (_NUMBERS if name in _FRACTIONS else (int,))
            if not is_absent and not (is_number and value >= 0):
                raise ValueError(f"{name} is {value!r:.40}")
        objects = {name: about[name] for name in ("config", "data", "registered")}
        for name, value in (objects | objects["registered"]).items():
            if not isinstance(value, dict):
                raise ValueError(f"{name} is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE} is not a trainer state ({', '.join(known)}): {error}") from error
    return state, about


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Puts the weights of a verified checkpoint into a model, in place.

    Raises:
        CheckpointError: they are of another model.
    """
    try:
        weights = load_file(folder / "model.safetensors")
        own = model.state_dict()
        for name in weights.keys() & own.keys():
            if weights[name].is_floating_point() != own[name].is_floating_point():
                raise RuntimeError(f"{name} is {weights[name].dtype}")
        placed = {name: part_like(weight, own[name]) if name in own else weight for name, weight in weights.items()}
        missing, unexpected = model.load_state_dict(placed, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise not_this_run(folder, error) from error
    tied = model.all_tied_weights_keys  # save_pretrained leaves out what is only a second name
    absent = [name for name in missing if name not in tied]
    if absent or unexpected:
        raise not_this_run(folder, f"{(absent or unexpected)[0]} differs")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a verified checkpoint that are not the model's weights."""
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise not_this_run(folder, error) from error


def not_this_run(folder: Path, reason: object) -> CheckpointError:
    """The error of a whole checkpoint that does not fit what is being trained."""
    text = " ".join(str(reason).split())
    return CheckpointError(
        f"{folder} is of another model or configuration than the one being trained: {text}. Resume with what it was "
        "trained with, or choose another run_name"
    )


def prune_checkpoints(run_dir: Path, keep: int, best_step: int, warn: Callable[[str], None]) -> None:
    """Removes all but the newest ``keep`` checkpoints and that of the best step.

    Nothing whole is removed before one of those that stay has been read back and verifies: damaged ones must not
    push out the only good one.
    """
    steps = checkpoint_steps(run_dir)
    stay = {*steps[-keep:], best_step}
    doomed = [step for step in steps if step not in stay]
    if not doomed:
        return
    if first_whole(run_dir, [step for step in reversed(steps) if step in stay], warn) is None:
        warn(f"none of the checkpoints that would stay in {run_dir} is whole: the older ones are kept")
        return
    for step in doomed:
        remove_folder(checkpoint_path(run_dir, step))


def remove_leftovers(run_dir: Path) -> None:
    """Removes what a killed run left half-written or half-removed. The caller holds the run's lock."""
    for path in (run_dir / "checkpoints").glob(".tmp-*"):
        if re.fullmatch(r"\.tmp-(export|(removed-)?step-\d{6,})", path.name):
            shutil.rmtree(path, ignore_errors=True)


def drop_later(run_dir: Path, step: int) -> None:
    """Removes checkpoints after ``step``: a run that goes on from there writes them again."""
    for later in checkpoint_steps(run_dir):
        if later > step:
            remove_folder(checkpoint_path(run_dir, later))


def remove_folder(folder: Path) -> None:
    """Removes a folder. It loses its name first: a kill halfway must not leave half a checkpoint under it."""
    doomed = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """`save_pretrained` of both, without its progress bars amid ours."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=dict(weights))
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a power cut. Windows has no such call, nor the need."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
