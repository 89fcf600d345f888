"""Checkpoints are complete or do not exist: full disks, kills, saves in the background, and what is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash_experts.models import saving
from flash_experts.models.saving import with_manifest
from flash_experts.training import CheckpointError, Trainer, TrainingConfig
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.run_state import checkpoint_path
from tests.helpers.damage import interrupted_copy


def test_a_full_disk_leaves_nothing_half_written(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoints.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free some disk space") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    folder = config.run_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "step-000003"]
    checkpoints.verify_checkpoint(folder / "step-000003")


@pytest.mark.parametrize("at", ["before the manifest", "before the rename"])
def test_a_kill_while_writing_leaves_no_checkpoint_of_that_step(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """KeyboardInterrupt stands for the kill, after which nothing tidies up: the temporary folder stays as it was."""
    name = "sha256_of" if at == "before the manifest" else "flush_folder"
    real = getattr(saving, name)

    def killed(path: Path) -> Any:
        if "step-000006" in str(path):
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(saving, name, killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert checkpoints.checkpoint_steps(config.run_dir) == [3]
    assert list((config.run_dir / "checkpoints").glob(".tmp-*"))
    _, result = train(config, "auto")
    assert result.step == 12 and not list((config.run_dir / "checkpoints").glob(".tmp-*"))


def test_only_the_newest_are_kept_and_hold_no_pickle(train: Callable[..., Any], config: TrainingConfig) -> None:
    train(replace(config, keep_checkpoints=2, eval_every=None))
    assert checkpoints.checkpoint_steps(config.run_dir) == [9, 12]
    written = {path.suffix for path in config.run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert written == {".json", ".jsonl", ".md", ".safetensors"}
    manifest = json.loads((config.run_dir / "MANIFEST.json").read_text())
    assert "model.safetensors" in manifest and "trainer_state.safetensors" not in manifest


def test_the_manifest_has_the_hash_of_every_file(train: Callable[..., Any], config: TrainingConfig) -> None:
    train(replace(config, max_steps=3))
    for folder in (config.run_dir, checkpoint_path(config.run_dir, 3)):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files - manifest.keys() <= {"MANIFEST.json", "README.md", "metrics.jsonl", "run.json"}
        for name, entry in manifest.items():
            content = (folder / name).read_bytes()
            assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_files_are_on_the_disk_before_the_folder_has_its_name_and_the_name_after(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_on_fsync(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_on_rename(source: Path, target: Path) -> None:
        if Path(target).name == "step-000003":
            expected = {str(source), *(str(path) for path in Path(source).iterdir())}
            assert expected <= flushed and len(expected) > 5
            assert str(config.run_dir / "metrics.jsonl") in flushed
            flushed.discard(str(Path(target).parent))
            done.append("renamed")
        rename(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", spy_on_fsync)
    monkeypatch.setattr(os, "rename", spy_on_rename)
    train(replace(config, max_steps=3))
    assert done == ["renamed"] and str(config.run_dir / "checkpoints") in flushed


@pytest.mark.parametrize("resumed", [False, True])
def test_a_save_in_the_background_writes_the_weights_of_its_step(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Training continues while the thread is blocked; the files equal those of a save in the foreground."""
    front = replace(config, run_name="front", save_in_background=False, max_steps=8, eval_every=None)
    train(front)
    behind = replace(front, run_name="behind", save_in_background=True)
    if resumed:
        behind = replace(interrupted_copy(front, 3, "behind"), save_in_background=True)
    go_on = threading.Event()
    held_up = []
    real, step = with_manifest, Trainer._step

    def slow(target: Path, *others: Any) -> None:
        if target.name == "step-000006":
            held_up.append(go_on.wait(timeout=60))
        real(target, *others)

    def last_step(trainer: Trainer, *args: Any) -> None:
        step(trainer, *args)
        if trainer.state.step == 7:  # one step and a half after the save began
            go_on.set()

    monkeypatch.setattr(checkpoints, "with_manifest", slow)
    monkeypatch.setattr(Trainer, "_step", last_step)
    train(behind, "auto" if resumed else None)
    assert held_up == [True]
    for name in ("model.safetensors", "trainer_state.safetensors"):
        one, two = (checkpoint_path(run.run_dir, 6) / name for run in (front, behind))
        assert one.read_bytes() == two.read_bytes()


def test_an_error_in_the_background_comes_up_before_the_next_save(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    endless = replace(config, max_steps=10**6, checkpoint_every=10**6 - 1, log_every=50, eval_every=None)
    steps = []
    step = Trainer._step

    def early(trainer: Trainer, *args: Any) -> None:
        step(trainer, *args)
        steps.append(trainer.state.step)
        if len(steps) == 2:
            trainer.checkpointer.save(trainer.state)

    monkeypatch.setattr(Trainer, "_step", early)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(endless)


def test_the_checkpoint_of_the_best_validation_stays(train: Callable[..., Any], config: TrainingConfig) -> None:
    # A rate so high that it only gets worse after the first steps.
    worse = replace(config, checkpoint_every=2, eval_every=2, keep_checkpoints=1, max_steps=8, learning_rate=0.05)
    _, result = train(replace(worse, clip_norm=None, schedule="constant", warmup_steps=0))
    steps = checkpoints.checkpoint_steps(config.run_dir)
    assert steps == sorted({result.best_step, 8} - {0})


def test_a_kill_while_removing_leaves_no_half_of_a_checkpoint(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(config, max_steps=6, eval_every=None))
    rmtree = shutil.rmtree

    def killed(path: Path, **kwargs: Any) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise KeyboardInterrupt
        rmtree(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.drop_later(config.run_dir, 3)
    assert checkpoints.checkpoint_steps(config.run_dir) == [3]
    checkpoints.verify_checkpoint(checkpoint_path(config.run_dir, 3))


def test_a_real_full_disk_leaves_the_former_checkpoint_whole(
    train: Callable[..., Any], config: TrainingConfig, tmp_path: Path
) -> None:
    """A file system of 3 MB in memory, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        small = replace(config, output_dir=str(disk), eval_every=None, keep_checkpoints=99, checkpoint_every=1)
        with pytest.raises(CheckpointError, match=r"No space left on device.*Free some disk space") as caught:
            train(replace(small, max_steps=50))
        assert "\n" not in str(caught.value)
        steps = checkpoints.checkpoint_steps(small.run_dir)
        assert steps and not list(small.run_dir.rglob(".tmp-step*"))
        for step in steps:
            checkpoints.verify_checkpoint(checkpoint_path(small.run_dir, step))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
