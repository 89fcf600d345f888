"""The configuration of a run: what is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flash_experts.training import TrainingConfig
from flash_experts.training.training_config import LearningRateScale, ModelConfig, Stage


def test_all_configuration_problems_come_at_once() -> None:
    wrong = TrainingConfig(
        max_epochs=None,
        learning_rate=-1,
        betas=(0.9, 1.0),
        schedule="cosin",
        run_name="a/b",  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="wrong") as caught:
        wrong.validate()
    for part in ("max_steps, max_epochs or max_minutes", "learning_rate is -1", "betas[1]", "cosin", "a/b"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (TrainingConfig(learning_rate="4e-4"), "learning_rate must be a number, not '4e-4'"),  # type: ignore[arg-type]
        (TrainingConfig(max_steps=2.5), "max_steps must be a whole number, not 2.5"),  # type: ignore[arg-type]
        (TrainingConfig(seed=True), "seed must be a whole number, not True"),
        (TrainingConfig(betas=(0.9,)), "betas must be a list of 2"),  # type: ignore[arg-type]
        (TrainingConfig(output_dir=Path("a")), "output_dir must be text"),  # type: ignore[arg-type]
        (TrainingConfig(lr_scale={"router": 0}), "lr_scale must be a LearningRateScale"),  # type: ignore[arg-type]
        (
            TrainingConfig(lr_scale=LearningRateScale(router="0")),  # type: ignore[arg-type]
            "lr_scale.router must be a number, not '0'",
        ),
        (
            TrainingConfig(max_epochs=None, stages=[Stage("a", epochs="2")]),  # type: ignore[arg-type]
            "stage 'a': epochs must be a number, not '2'",
        ),
        (ModelConfig(n_head="4"), "n_head must be a whole number, not '4'"),  # type: ignore[arg-type]
    ],
)
def test_options_of_a_wrong_type(wrong: TrainingConfig | ModelConfig, problem: str) -> None:
    with pytest.raises(ValueError, match=f"configuration is wrong: {problem}"):
        wrong.validate()


def test_numbers_of_numpy_become_those_of_json() -> None:
    config = TrainingConfig(max_steps=np.int64(4), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    config.validate()
    written = json.dumps(config.to_dict())
    assert '"max_steps": 4,' in written and '"learning_rate": 0.5,' in written and '"betas": [0.9, 0.95]' in written
