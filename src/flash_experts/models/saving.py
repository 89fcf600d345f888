"""Atomic saving of model folders: written under a temporary name, flushed with a manifest of SHA-256, and renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flash_experts.files import (
    check_replaced,
    deferred_ctrl_c,
    flush_file,
    folder_lock,
    move_into_place,
    sha256_of,
    temporary_next_to,
)

MANIFEST = "MANIFEST.json"
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another model, or could not be written."""


def export_model(
    run_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Writes the model into the run's folder, each file by rename, the manifest last (`CheckpointError`)."""
    temporary = temporary_folder(run_dir / "checkpoints", "export")
    _fill_folder(run_dir, temporary, lambda folder: save_model(folder, model, tokenizer, weights))


def write_model(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, overwrite: bool = False) -> None:
    """Writes a model and its tokenizer into a folder atomically; other files there stay.

    Raises:
        ValueError: the folder is not empty without ``overwrite``, or could not be written (`CheckpointError`).
    """
    weights = model.state_dict()
    write_folder(out, lambda folder: save_model(folder, model, tokenizer, weights), overwrite)


def write_folder(out: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Writes files atomically, as `write_model`; ``write`` fills the folder that it is given."""
    out = Path(os.path.realpath(out))
    if not out.is_dir():
        with_manifest(out, write)
        return
    with folder_lock(out):  # of two commands at once, the second finds the files of the first
        check_replaced(out, overwrite)
        _fill_folder(out, temporary_next_to(out / "model"), write)


def _fill_folder(folder: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    try:
        _write_staged(folder, write, temporary)
        *files, manifest = sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST)
        names = {path.name for path in files}
        with deferred_ctrl_c():
            for path in files:
                move_into_place(path, folder / path.name)
            # Weights in one file go before shards, and would be loaded instead of them.
            if any(map(_WEIGHT_FILE.fullmatch, names)):
                for path in list(folder.iterdir()):
                    if _WEIGHT_FILE.fullmatch(path.name) and path.name not in names:
                        path.unlink()
            move_into_place(manifest, folder / MANIFEST)
            temporary.rmdir()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(folder)


def with_manifest(target: Path, write: Callable[[Path], None], temporary: Path | None = None) -> None:
    """Fills a temporary folder with ``write``, adds the manifest, flushes, and renames it.

    Raises:
        CheckpointError: it could not be written, or another process wrote ``target`` meanwhile.
    """
    temporary = temporary or temporary_next_to(target)
    _write_staged(target, write, temporary)
    try:
        with deferred_ctrl_c():
            os.rename(temporary, target)
    except OSError as error:
        if not target.is_dir():
            raise _not_written(target, error) from error
        raise CheckpointError(f"another process has written {target} in the meantime: give a new folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush_folder(target.parent)


def _write_staged(target: Path, write: Callable[[Path], None], temporary: Path) -> None:
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        manifest = {
            path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files_in(temporary)
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        mode = stat.S_IMODE((temporary / MANIFEST).stat().st_mode)
        for path in files_in(temporary):
            path.chmod(mode)  # safetensors makes its files readable by their owner only
            flush_file(path)
        flush_folder(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # On a full disk safetensors raises SafetensorError, and tokenizers a plain Exception.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise _not_written(target, error) from error


def _not_written(target: Path, error: BaseException) -> CheckpointError:
    # Of libraries' errors, which have no number, a full disk is the likeliest.
    is_full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Free some disk space, or write" if is_full else "Write"
    return CheckpointError(
        f"could not write {target}: {error}. {advice} to another folder; checkpoints written before are intact"
    )


def temporary_folder(checkpoints: Path, name: str) -> Path:
    """A temporary folder of a locked run; removes what a killed save left there."""
    temporary = checkpoints / f".tmp-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def remove_folder(folder: Path) -> None:
    """Renames it first, so that a kill halfway leaves no partial checkpoint under its name."""
    doomed = folder.with_name(f".tmp-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, torch.Tensor],
) -> None:
    """`save_pretrained` without transformers' progress bars."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=dict(weights))
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.save_pretrained(folder)
    finally:
        if had_bars:
            logging.enable_progress_bar()


def files_in(folder: Path) -> Iterator[Path]:
    """The files of a folder, by name, without folders."""
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def flush_folder(folder: Path) -> None:
    """Flushes the folder itself, so that a rename survives a power cut (POSIX only)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
