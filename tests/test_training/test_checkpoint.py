"""The checkpoint format by itself, without a run: what a folder must hold, and the order of steps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

from flash_experts.models.saving import MANIFEST
from flash_experts.training import CheckpointError
from flash_experts.training.checkpoint import (
    PICKLES,
    STATE,
    TENSORS,
    checkpoint_steps,
    load_weights,
    prune_checkpoints,
    read_state,
    remove_leftovers,
    verify_checkpoint,
)
from flash_experts.training.run_state import TrainerState, checkpoint_path

NEEDED = (STATE, TENSORS, "config.json")


def write_folder(folder: Path, names: tuple[str, ...] = NEEDED) -> Path:
    """Files with a right manifest; their content is not read."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    entries = {name: {"sha256": hashlib.sha256(name.encode()).hexdigest(), "bytes": len(name)} for name in names}
    (folder / MANIFEST).write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("missing", NEEDED)
def test_a_folder_without_a_state_cannot_be_resumed(tmp_path: Path, missing: str) -> None:
    """Such as an exported model, whose manifest is right."""
    verify_checkpoint(write_folder(tmp_path / "whole"))
    folder = write_folder(tmp_path / "part", tuple(name for name in NEEDED if name != missing))
    with pytest.raises(CheckpointError, match=f"cannot be resumed: {missing} is not in its manifest"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"])
def test_each_kind_of_pickle_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = write_folder(tmp_path / "whole")
    (folder / f"optimizer{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=rf"optimizer\{suffix} is a pickle"):
        verify_checkpoint(folder)
    assert suffix in PICKLES


def test_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """A step of seven digits comes after those of six."""
    for step in (1_000_000, 7, 999_999):
        write_folder(checkpoint_path(tmp_path, step))
    assert checkpoint_steps(tmp_path) == [7, 999_999, 1_000_000]
    prune_checkpoints(tmp_path, 2, 0, pytest.fail)
    assert checkpoint_steps(tmp_path) == [999_999, 1_000_000]


def test_only_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    left = (".tmp-export", ".tmp-step-000006", ".tmp-removed-step-000003", ".tmp-step-1000000")
    others = (".tmp-notes", ".tmp-step-6", "step-000006")
    for name in (*left, *others):
        (folder / name).mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(others)


def test_weights_are_all_those_of_the_model_and_no_others(dense: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A missing one would stay as the new model had it. Of tied weights, one name is enough."""
    weights = {name: torch.rand_like(weight) for name, weight in dense.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    load_weights(tmp_path, dense)
    assert all(torch.equal(dense.state_dict()[name], weight) for name, weight in weights.items())
    assert dense.lm_head.weight is dense.transformer.wte.weight
    name = "transformer.ln_f.bias"
    others = {"more": torch.ones(1), **weights}
    for spoiled, differing in (({key: weights[key] for key in weights if key != name}, name), (others, "more")):
        save_file(spoiled, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"another model.*{differing} differs"):
            load_weights(tmp_path, dense)


def test_a_state_of_an_older_version_had_no_time_of_the_first_validation(tmp_path: Path) -> None:
    state = TrainerState(step=7, tokens=90, seconds=3.5, best_bits_per_char=2.5, best_step=6)
    numbers = asdict(state)
    del numbers["evaluation_seconds"]
    about = {"state": numbers, "config": {}, "data": {}, "registered": {}}
    (tmp_path / STATE).write_text(json.dumps(about))
    assert read_state(tmp_path)[0] == state
