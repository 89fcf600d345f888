"""A checkpoint is checked on the way back, and a resumed run is the uninterrupted run."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.training import CheckpointError, Trainer, TrainingConfig
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.optimizer import part_of
from flash_experts.training.run_state import checkpoint_path
from flash_experts.training.tracking import read_metrics
from flash_experts.training.training_config import LearningRateScale
from tests.helpers.damage import flip_a_bit, interrupted_copy, with_right_hashes
from tests.test_training import TRAIN, VALIDATION, make_model

MEASURED = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


@pytest.mark.parametrize("moe", [False, True])
def test_resumed_run_is_the_uninterrupted_run_to_the_bit(
    train: Callable[..., Any], config: TrainingConfig, moe: bool
) -> None:
    """Step 3 is amid an epoch and a logging window; the new model starts from other weights."""
    model, result = train(config, moe=moe)
    copy = interrupted_copy(config, 3, "resumed")
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
    again, _ = train(config, checkpoint_path(config.run_dir, 6), seed=5)
    assert torch.equal(model.transformer.wte.weight, again.transformer.wte.weight)
    train(replace(config, max_steps=7), checkpoint_path(config.run_dir, 6))
    assert checkpoints.checkpoint_steps(config.run_dir) == [3, 6, 7]


@pytest.fixture
def worse_after_three(train: Callable[..., Any], config: TrainingConfig) -> TrainingConfig:
    """A run whose best model, with averaged weights, is that of step 3 of six: then its rate is far too high."""
    settings = replace(config, max_steps=3, eval_every=3, ema_decay=0.5)
    train(settings)
    worse = replace(settings, max_steps=6, learning_rate=3.0, clip_norm=None, schedule="constant", warmup_steps=0)
    _, result = train(worse, "auto")
    assert result.best_step == 3
    return worse


@pytest.mark.parametrize("max_steps", [6, 9])
def test_another_runs_best_model_comes_with_its_checkpoint(
    train: Callable[..., Any], worse_after_three: TrainingConfig, max_steps: int
) -> None:
    """Also where nothing is left to train."""
    second = replace(worse_after_three, run_name="second", max_steps=max_steps)
    folder = checkpoint_path(worse_after_three.run_dir, 6)
    model, result = train(second, folder, seed=5)
    assert (result.best_step, result.step) == (3, max_steps)
    best = (worse_after_three.run_dir / "model.safetensors").read_bytes()
    assert (second.run_dir / "model.safetensors").read_bytes() == best and (second.run_dir / "README.md").exists()
    straight, _ = train(replace(worse_after_three, max_steps=max_steps), "auto")
    assert torch.equal(model.transformer.wte.weight, straight.transformer.wte.weight), "it continues from step 6"


def test_without_the_best_checkpoint_the_next_validation_counts(
    train: Callable[..., Any], worse_after_three: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(checkpoint_path(worse_after_three.run_dir, 3))
    folder = checkpoint_path(worse_after_three.run_dir, 6)
    for name, max_steps, best in (("longer", 9, 9), ("over", 6, 0)):
        second = replace(worse_after_three, run_name=name, max_steps=max_steps)
        _, result = train(second, folder)
        assert "the best model so far, of step 3, is not here: the next validation" in capsys.readouterr().err
        assert result.best_step == best and (result.best_bits_per_char is None) == (not best)
        assert (second.run_dir / "model.safetensors").exists()


def test_an_earlier_checkpoint_brings_back_the_best_model_of_its_time(
    train: Callable[..., Any], config: TrainingConfig
) -> None:
    """The folder has the model of step 12, and the new branch gets only worse."""
    _, result = train(config := replace(config, eval_every=3))
    assert result.best_step == 12
    at_three = load_file(checkpoint_path(config.run_dir, 3) / "model.safetensors")
    worse = replace(config, max_steps=6, learning_rate=3.0, clip_norm=None, schedule="constant", warmup_steps=0)
    _, result = train(worse, checkpoint_path(config.run_dir, 3))
    assert result.best_step == 3
    kept = load_file(config.run_dir / "model.safetensors")
    assert all(torch.equal(weight, at_three[name]) for name, weight in kept.items())


def test_an_ordinary_resume_does_not_write_the_model_again(train: Callable[..., Any], config: TrainingConfig) -> None:
    train(replace(config, max_steps=3, eval_every=3))
    model = config.run_dir / "model.safetensors"
    before = model.stat().st_mtime_ns
    train(replace(config, max_steps=3, eval_every=3), "auto")
    train(replace(config, max_steps=6, eval_every=3, learning_rate=3.0, clip_norm=None, schedule="constant"), "auto")
    assert model.stat().st_mtime_ns == before


def test_a_finished_run_does_nothing_unless_more_is_asked(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    _, result = train(config, "auto")
    assert result.step == 12 and "is finished" in capsys.readouterr().err
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before
    assert (config.run_dir / "README.md").exists()
    (config.run_dir / "README.md").unlink()  # as a kill after the last checkpoint leaves it
    train(config, "auto")
    assert (config.run_dir / "README.md").exists()
    _, result = train(replace(config, max_steps=14), "auto")
    assert result.step == 14
    with pytest.raises(
        ValueError, match=r"set resume: auto to continue, or choose another run_name \(overwrite: true starts over"
    ):
        train(config)


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
    newest = checkpoint_path(config.run_dir, 6)
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
    flip_a_bit(checkpoint_path(config.run_dir, 3) / "model.safetensors")
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


def test_another_tokenizer_or_validation_is_refused_by_name(
    train: Callable[..., Any], config: TrainingConfig, dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> None:
    """All of the same sizes: without the comparison the run would continue with them."""
    short = replace(config, max_steps=3, eval_every=None)
    model, _ = train(short)
    other_tokenizer = train_tokenizer([card.name[::-1] for card in TRAIN] * 9, len(tokenizer))
    other_config = copy.deepcopy(dense_config)
    other_config.layer_norm_epsilon = 0.01
    changes: dict[str, dict[str, Any]] = {
        "its tokenizer differs": {"tokenizer": other_tokenizer},
        r"its validation names differ \([^)]*\)": {"validation_cards": VALIDATION[1:]},
        "its layer_norm_epsilon is 1e-05, not 0.01": {"model": make_model(other_config)},
    }
    for name, change in changes.items():
        parts = {"model": model, "tokenizer": tokenizer, "validation_cards": VALIDATION} | change
        trainer = Trainer(train_cards=TRAIN, config=replace(short, max_steps=6), **parts)
        with pytest.raises(CheckpointError, match=rf"{name}\. Resume with .*another run_name") as caught:
            trainer.train("auto")
        assert "\n" not in str(caught.value)
    other_dropout = make_model(copy.deepcopy(dense_config), dropout=0.3)
    allowed = Trainer(other_dropout, tokenizer, TRAIN, VALIDATION, replace(short, max_steps=6))
    assert allowed.train("auto").step == 6


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_warning(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_steps=3, eval_every=None))
    folder = checkpoint_path(config.run_dir, 3)
    about = json.loads((folder / checkpoints.STATE).read_text())
    del about["identity"]
    (folder / checkpoints.STATE).write_text(json.dumps(about))
    with_right_hashes(folder)
    _, result = train(replace(config, max_steps=6, eval_every=None), "auto")
    assert result.step == 6 and "is of an older version" in capsys.readouterr().err


def test_other_data_or_seed_is_reported(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_steps=3))
    train(replace(config, seed=8, tokens_per_batch=90), "auto")
    assert "not as in the checkpoint: seed, tokens_per_batch" in capsys.readouterr().err


def test_changed_settings_are_reported_and_kept_in_run_json(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three settings at two steps; what cannot change what a step learns is in run.json alone."""

    def changes() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if "the steps so far had" in line]

    first = replace(config, max_steps=3, eval_every=None)
    train(first)
    assert "resumed" not in json.loads((config.run_dir / "run.json").read_text("utf-8"))
    second = replace(first, max_steps=6, learning_rate=2e-2, log_every=3)
    train(second, "auto")
    shown = capsys.readouterr().err
    assert (
        "\nlearning_rate is 0.02; the steps so far had 0.01\n" in shown and shown.count("; the steps so far had") == 1
    )
    train(replace(second, max_steps=9, clip_norm=None), "auto")
    assert changes() == ["clip_norm is null; the steps so far had 1.0"]
    assert json.loads((config.run_dir / "run.json").read_text("utf-8"))["resumed"] == [
        {"step": 3, "changed": {"max_steps": [3, 6], "learning_rate": [0.01, 0.02], "log_every": [2, 3]}},
        {"step": 6, "changed": {"max_steps": [6, 9], "clip_norm": [1.0, None]}},
    ]


def test_a_resumed_run_may_freeze_parts_and_train_them_again(train: Callable[..., Any], config: TrainingConfig) -> None:
    settings = replace(config, eval_every=None, checkpoint_every=3)
    before, _ = train(replace(settings, max_steps=3), moe=True)
    frozen = replace(settings, lr_scale=LearningRateScale(dense=0))
    model, result = train(replace(frozen, max_steps=6), "auto", moe=True)
    same = {name for name, weight in before.named_parameters() if torch.equal(weight, model.get_parameter(name))}
    assert result.step == 6 and same == {name for name, _ in model.named_parameters() if part_of(name) == "dense"}
    again, result = train(replace(settings, max_steps=9), "auto", moe=True)
    assert result.step == 9 and not torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


def test_another_draw_of_validation_names_is_refused_with_its_settings(
    train: Callable[..., Any], config: TrainingConfig
) -> None:
    settings = replace(config, validation_names=4, max_steps=3)
    train(settings)
    for change in ({"seed": 2}, {"validation_names": 5}):
        with pytest.raises(CheckpointError, match=r"validation names differ \(validation_names and seed draw them"):
            train(replace(settings, max_steps=6, **change), "auto")  # type: ignore[arg-type]


def test_changed_options_of_the_model_are_reported(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for steps, dropout in ((3, None), (6, 0.3)):
        origin = {"base": None, "model": {"dropout": dropout}}
        settings = replace(config, max_steps=steps, eval_every=None)
        Trainer(make_model(dense_config), tokenizer, TRAIN, [], settings, origin=origin).train("auto")
    assert "\nmodel.dropout is 0.3; the steps so far had null\n" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_reports_it(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(config, max_steps=3, eval_every=None)
    train(settings, "auto")
    assert "starts over" not in capsys.readouterr().err, "a new run"
    shutil.rmtree(checkpoint_path(config.run_dir, 3))
    _, result = train(settings, "auto")
    assert result.step == 3
    assert f"no checkpoint in {config.run_dir}: the run starts over from step 0\n" in capsys.readouterr().err


def test_the_time_of_a_checkpoint_includes_the_validation_of_its_step(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(config, max_steps=3, eval_every=3)
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, settings)
    assert trainer.validation is not None
    score = trainer.validation.sums

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(2 if trainer.state.step else 0)
        return score(*args)

    monkeypatch.setattr(trainer.validation, "sums", slow)
    result = trainer.train()
    state, _ = checkpoints.read_state(checkpoint_path(config.run_dir, 3))
    (line,) = [each for each in read_metrics(config.run_dir / "metrics.jsonl", "validation") if each["step"] == 3]
    assert state.seconds == result.seconds >= line["seconds"] + 2


def test_damaged_newest_checkpoints_do_not_push_out_the_only_good_one(
    train: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(config, max_steps=9, eval_every=None))
    for step in (6, 9):
        flip_a_bit(checkpoint_path(config.run_dir, step) / "model.safetensors")
    warnings: list[str] = []
    checkpoints.prune_checkpoints(config.run_dir, 2, 0, warnings.append)
    assert checkpoints.checkpoint_steps(config.run_dir) == [3, 6, 9]
    assert "step 9" in warnings[0] and "step 6" in warnings[1] and "older ones are not removed" in warnings[2]
    _, result = train(replace(config, keep_checkpoints=1, eval_every=None), "auto")
    assert result.step == 12 and checkpoints.checkpoint_steps(config.run_dir) == [12]
    assert "step-000003" in capsys.readouterr().err


def test_another_runs_checkpoint_does_not_replace_own_ones(train: Callable[..., Any], config: TrainingConfig) -> None:
    short = replace(config, max_steps=3, eval_every=None)
    train(short)
    folder = checkpoint_path(config.run_dir, 3)
    with pytest.raises(ValueError, match="checkpoints of its own"):
        other = replace(short, run_name="other", max_steps=6)
        train(other)
        train(other, folder)
    assert checkpoints.checkpoint_steps(other.run_dir) == [3, 6]
    _, result = train(replace(config, run_name="third", max_steps=6), folder)
    assert result.step == 6


def test_early_stopping_patience_is_resumed(train: Callable[..., Any], config: TrainingConfig) -> None:
    """A rate so high that it only gets worse: two validations in vain before the kill, the third after it."""
    settings = replace(config, learning_rate=3.0, clip_norm=None, warmup_steps=0, schedule="constant")
    settings = replace(settings, eval_every=1, checkpoint_every=1, early_stopping_patience=3)
    _, straight = train(settings)
    copy = interrupted_copy(settings, 2, "resumed")
    _, resumed = train(copy, "auto", seed=99)
    for result in (straight, resumed):
        assert (result.reason, result.step, result.best_step) == ("early stopping", 3, 0)
    _, again = train(copy, "auto")
    assert (again.reason, again.step) == ("early stopping", 3), "a run that is over stays so"
