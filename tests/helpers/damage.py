"""Damaged runs, as a kill or a bad disk leaves them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from flash_experts.models.saving import MANIFEST
from flash_experts.training import TrainingConfig
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.run_state import checkpoint_path


def interrupted_copy(config: TrainingConfig, step: int, name: str) -> TrainingConfig:
    """A copy of the run as a kill some steps after the checkpoint of ``step`` would leave it."""
    copy = replace(config, run_name=name)
    shutil.copytree(config.run_dir, copy.run_dir)
    for later in checkpoints.checkpoint_steps(copy.run_dir):
        if later > step:
            shutil.rmtree(checkpoint_path(copy.run_dir, later))
    return copy


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_right_hashes(folder: Path) -> None:
    """Makes the manifest of a changed checkpoint right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest:
        content = (folder / name).read_bytes()
        manifest[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
