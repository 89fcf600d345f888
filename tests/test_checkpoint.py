"""Checkpoints: whole or not there, checked on the way back, and a resumed run is the uninterrupted run."""

from __future__ import annotations

import errno
import json
import shutil
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

TIMES = ("seconds", "tokens_per_second", "eta_seconds")


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
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


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
    for mine, theirs in zip(one, two, strict=True):
        # Router statistics of the interval that was cut in two are of its second part.
        routed = {key for key in mine if key.startswith("router/") and mine["step"] == step + 1}
        assert {k: mine[k] for k in mine.keys() - routed} == {k: theirs[k] for k in theirs.keys() - routed}
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
    assert [path.name for path in folder.iterdir()] == ["step-000003"]
    checkpoints.verify_checkpoint(folder / "step-000003")


@pytest.mark.parametrize("at", ["before the manifest", "before the rename"])
def test_a_kill_while_writing_leaves_no_checkpoint_of_that_step(
    train: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """KeyboardInterrupt stands for the kill: nothing catches it, so the temporary folder stays as it was."""
    name = "_sha256" if at == "before the manifest" else "_flush_folder"
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
    train(replace(config, keep_checkpoints=2))
    assert checkpoints.checkpoint_steps(config.run_dir) == [9, 12]
    written = {path.suffix for path in config.run_dir.rglob("*") if path.is_file()}
    assert written == {".json", ".jsonl", ".safetensors"}
    manifest = json.loads((config.run_dir / "MANIFEST.json").read_text())
    assert "model.safetensors" in manifest and "trainer_state.safetensors" not in manifest
