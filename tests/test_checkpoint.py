"""Checkpoints: whole or not there, checked on the way back, and a resumed run is the uninterrupted run."""

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
import torch
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.training import CheckpointError, Trainer, TrainingConfig, TrainingResult
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.tracking import read_metrics
from tests.test_training import TRAIN, VALIDATION, make_model

MEASURED = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """Twelve steps in one and a half epochs, dropout and accumulation on, a log line over two steps."""
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="straight",
        seed=1,
        max_steps=12,
        max_epochs=None,
        tokens_per_batch=75,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        log_every=2,
        eval_every=4,
        checkpoint_every=3,
        keep_checkpoints=9,
        device="cpu",
    )


@pytest.fixture
def train(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., tuple[PreTrainedModel, TrainingResult]]:
    def train(
        config: TrainingConfig, resume: str | Path | None = None, seed: int = 0, moe: bool = False
    ) -> tuple[PreTrainedModel, TrainingResult]:
        model: PreTrainedModel = make_model(dense_config, seed=seed)
        if moe:
            fields = dense_config.to_dict()
            fields.pop("model_type")
            torch.manual_seed(seed)
            model = GPT2MoEForCausalLM(
                GPT2MoEConfig(**fields, num_experts=4, router_bias_update_rate=0.01, router_jitter_noise=0.1)
            )
        return model, Trainer(model, tokenizer, TRAIN, VALIDATION, config).train(resume)

    return train


def interrupted_copy(config: TrainingConfig, step: int, name: str) -> TrainingConfig:
    """The run as a kill some steps after the checkpoint of ``step`` would leave it."""
    copy = replace(config, run_name=name)
    shutil.copytree(config.run_dir, copy.run_dir)
    for later in checkpoints.checkpoint_steps(copy.run_dir):
        if later > step:
            shutil.rmtree(checkpoints.checkpoint_path(copy.run_dir, later))
    return copy


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("step", [3, 6])
def test_resumed_run_is_the_uninterrupted_run_to_the_bit(
    train: Callable[..., Any], config: TrainingConfig, moe: bool, step: int
) -> None:
    """Step 3 is amid an epoch and amid an interval of the log; the new model starts from other weights."""
    model, result = train(config, moe=moe)
    copy = interrupted_copy(config, step, "resumed")
    with (copy.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 13, "lo')  # a line that the kill cut off
    resumed, resumed_result = train(copy, "auto", seed=99, moe=moe)
    assert resumed_result.step == 12 and resumed_result.best_bits_per_char == result.best_bits_per_char
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    one, two = (without_times(read_metrics(run.run_dir / "metrics.jsonl")) for run in (config, copy))
    keys = [(line["event"], line["step"]) for line in two]
    assert len(keys) == len(set(keys)), "a resumed run repeats no line"
    assert one == two
    for name in ("model.safetensors", "tokenizer.json"):
        assert (config.run_dir / name).read_bytes() == (copy.run_dir / name).read_bytes()


def test_a_checkpoint_folder_may_be_named_and_later_ones_go(train: Callable[..., Any], config: TrainingConfig) -> None:
    model, _ = train(config)
    again, _ = train(config, checkpoints.checkpoint_path(config.run_dir, 6), seed=5)
    assert torch.equal(model.transformer.wte.weight, again.transformer.wte.weight)


def test_a_finished_run_does_nothing_unless_more_is_asked(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    _, result = train(config, "auto")
    assert result.step == 12 and "is finished" in capsys.readouterr().err
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before
    _, result = train(replace(config, max_steps=14), "auto")
    assert result.step == 14
    with pytest.raises(ValueError, match="--resume auto, or choose another run_name"):
        train(config)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model.safetensors", flip_a_bit, "SHA-256"),
        ("trainer_state.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100]), "100 bytes"),
        ("trainer_state.json", Path.unlink, "missing"),
        ("MANIFEST.json", lambda path: path.write_text("{"), "damaged"),
        ("MANIFEST.json", Path.unlink, "missing"),
        ("MANIFEST.json", lambda path: path.write_text('{"a": {"sha256": "", "bytes": 0}}'), "missing"),
        ("optimizer.pt", lambda path: path.write_bytes(b"\x80\x04."), "pickle"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    train: Callable[..., Any],
    config: TrainingConfig,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], Any],
    words: str,
) -> None:
    short = replace(config, max_steps=6, eval_every=None)
    train(short)
    newest = checkpoints.checkpoint_path(config.run_dir, 6)
    damage(newest / file)
    with pytest.raises(CheckpointError, match=words):
        train(short, newest)
    capsys.readouterr()
    _, result = train(short, "auto")
    err = capsys.readouterr().err
    assert "skipping the checkpoint of step 6" in err and words in err and "step-000003" in err
    assert result.step == 6
    checkpoints.verify_checkpoint(newest)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(train: Callable[..., Any], config: TrainingConfig) -> None:
    short = replace(config, max_steps=3)
    train(short)
    flip_a_bit(checkpoints.checkpoint_path(config.run_dir, 3) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train(short, "auto")


def test_a_checkpoint_of_another_model_is_refused(
    train: Callable[..., Any], config: TrainingConfig, dense_config: GPT2Config
) -> None:
    train(replace(config, max_steps=3))
    with pytest.raises(CheckpointError, match="another model"):
        train(config, "auto", moe=True)
    dense_config.n_embd = 48
    with pytest.raises(CheckpointError, match="another model"):
        train(config, "auto")


def test_other_data_or_seed_is_said(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_steps=3))
    train(replace(config, seed=8, tokens_per_batch=90), "auto")
    assert "not as in the checkpoint: seed, tokens_per_batch" in capsys.readouterr().err


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
    """KeyboardInterrupt stands for the kill: nothing catches it, so the temporary folder stays as it was."""
    name = "_sha256" if at == "before the manifest" else "flush_folder"
    real = getattr(checkpoints, name)

    def killed(path: Path) -> Any:
        if "step-000006" in str(path):
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, name, killed)
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
    assert written == {".json", ".jsonl", ".safetensors"}
    manifest = json.loads((config.run_dir / "MANIFEST.json").read_text())
    assert "model.safetensors" in manifest and "trainer_state.safetensors" not in manifest


def test_the_manifest_has_the_hash_of_every_file(train: Callable[..., Any], config: TrainingConfig) -> None:
    train(replace(config, max_steps=3))
    for folder in (config.run_dir, checkpoints.checkpoint_path(config.run_dir, 3)):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files - manifest.keys() <= {"MANIFEST.json", "metrics.jsonl", "run.json"}
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
    """Training goes on while the thread is held up; the files are those of a save in the foreground."""
    front = replace(config, run_name="front", save_in_background=False, max_steps=8, eval_every=None)
    train(front)
    behind = replace(front, run_name="behind", save_in_background=True)
    if resumed:
        behind = replace(interrupted_copy(front, 3, "behind"), save_in_background=True)
    go_on = threading.Event()
    held_up = []
    real, step = checkpoints.with_manifest, Trainer._step

    def slow(target: Path, write: Callable[[Path], None]) -> None:
        if target.name == "step-000006":
            held_up.append(go_on.wait(timeout=60))
        real(target, write)

    def last_step(trainer: Trainer, *args: Any) -> None:
        step(trainer, *args)
        if trainer.state.step == 7:  # one step and a half after the save began
            go_on.set()

    monkeypatch.setattr(checkpoints, "with_manifest", slow)
    monkeypatch.setattr(Trainer, "_step", last_step)
    train(behind, "auto" if resumed else None)
    assert held_up == [True]
    for name in ("model.safetensors", "trainer_state.safetensors"):
        one, two = (checkpoints.checkpoint_path(run.run_dir, 6) / name for run in (front, behind))
        assert one.read_bytes() == two.read_bytes()


def test_an_error_in_the_background_comes_up_before_the_next_save(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    endless = replace(config, max_steps=10**6, checkpoint_every=10**6 - 1, log_every=10**6, eval_every=None)
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


def test_damaged_newest_checkpoints_do_not_push_out_the_only_good_one(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_steps=9, eval_every=None))
    for step in (6, 9):
        flip_a_bit(checkpoints.checkpoint_path(config.run_dir, step) / "model.safetensors")
    said: list[str] = []
    checkpoints.prune_checkpoints(config.run_dir, 2, 0, said.append)
    assert checkpoints.checkpoint_steps(config.run_dir) == [3, 6, 9]
    assert "step 9" in said[0] and "step 6" in said[1] and "older ones are kept" in said[2]
    _, result = train(replace(config, keep_checkpoints=1, eval_every=None), "auto")
    assert result.step == 12 and checkpoints.checkpoint_steps(config.run_dir) == [12]
    assert "step-000003" in capsys.readouterr().err


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
    checkpoints.verify_checkpoint(checkpoints.checkpoint_path(config.run_dir, 3))


def test_another_runs_checkpoint_does_not_replace_own_ones(train: Callable[..., Any], config: TrainingConfig) -> None:
    short = replace(config, max_steps=3, eval_every=None)
    train(short)
    folder = checkpoints.checkpoint_path(config.run_dir, 3)
    with pytest.raises(ValueError, match="checkpoints of its own"):
        other = replace(short, run_name="other", max_steps=6)
        train(other)
        train(other, folder)
    assert checkpoints.checkpoint_steps(other.run_dir) == [3, 6]
    _, result = train(replace(config, run_name="third", max_steps=6), folder)
    assert result.step == 6


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
            checkpoints.verify_checkpoint(checkpoints.checkpoint_path(small.run_dir, step))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
