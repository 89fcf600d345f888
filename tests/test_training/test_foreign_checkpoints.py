"""Checkpoints of strangers: every hash is right, and what they hold is not what a run writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_experts.models.saving import CheckpointError
from flash_experts.training import TrainingConfig
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training.run_state import checkpoint_path
from tests.helpers.damage import with_right_hashes

WEIGHT = "transformer.h.0.mlp.c_fc.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(train: Callable[..., Any], config: TrainingConfig) -> Path:
    train(replace(config, max_steps=3, ema_decay=0.9))
    return checkpoint_path(config.run_dir, 3)


def refused(train: Callable[..., Any], config: TrainingConfig, folder: Path) -> str:
    with_right_hashes(folder)
    with pytest.raises(CheckpointError) as error:
        train(replace(config, max_steps=4, ema_decay=0.9), folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(key)


def with_other(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without(f"optimizer/{WEIGHT}|exp_avg"), f"for {WEIGHT} it has exp_avg_sq, step, not exp_avg, exp_avg_sq"),
        # AdamW's fused kernel would read and write what lies behind it.
        (with_other(f"optimizer/{WEIGHT}|exp_avg", lambda tensor: tensor.new_zeros(0)), "of shape (32, 128)"),
        (with_other(f"optimizer/{WEIGHT}|exp_avg_sq", lambda tensor: tensor.T.contiguous()), "of shape (32, 128)"),
        (with_other(f"optimizer/{WEIGHT}|exp_avg", lambda tensor: tensor.int()), "floating-point"),
        (with_other(f"optimizer/{WEIGHT}|step", lambda tensor: tensor.new_ones(2)), "of shape ()"),
        (lambda tensors: tensors.update({"optimizer/other|step": torch.ones(())}), "which is not trained here"),
        (lambda tensors: tensors.update({f"optimizer/{WEIGHT}|more": torch.ones(32, 128)}), "more, step, not"),
        (without("interval/sums"), "sums"),
        (with_other("interval/sums", lambda tensor: tensor.new_zeros(())), "its sums"),
        (with_other(f"ema/{WEIGHT}", lambda tensor: tensor.new_zeros(1, 1)), "has another shape"),
    ],
)
def test_tensors_that_are_not_of_this_run(
    spoil: Callable[[Tensors], None], words: str, train: Callable[..., Any], config: TrainingConfig, folder: Path
) -> None:
    tensors = load_file(folder / checkpoints.TENSORS)
    spoil(tensors)
    save_file(tensors, folder / checkpoints.TENSORS)
    assert words in refused(train, config, folder)


def test_weights_of_whole_numbers(train: Callable[..., Any], config: TrainingConfig, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[WEIGHT] = weights[WEIGHT].int()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"{WEIGHT} is torch.int32" in refused(train, config, folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda about: about["state"].update(step=-1), "step is -1"),
        (lambda about: about["state"].update(tokens=True), "tokens is True"),
        (lambda about: about["state"].update(seconds=float("nan")), "seconds is nan"),
        (lambda about: about["state"].pop("best_step"), "best_step"),
        (lambda about: about["state"].update(more=1), "more"),
        (lambda about: about["registered"].update(optimizer=None), "optimizer is not an object"),
        (lambda about: about["registered"].update(interval=3), "interval is not an object"),
        (lambda about: about["registered"].pop("optimizer"), "this run has"),
    ],
)
def test_a_state_that_is_not_of_this_run(
    spoil: Callable[[dict[str, Any]], Any],
    words: str,
    train: Callable[..., Any],
    config: TrainingConfig,
    folder: Path,
) -> None:
    about = json.loads((folder / checkpoints.STATE).read_text())
    spoil(about)
    (folder / checkpoints.STATE).write_text(json.dumps(about))
    assert words in refused(train, config, folder)
