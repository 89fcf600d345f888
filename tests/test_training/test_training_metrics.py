"""What a run measures: the window between two lines, the time left, the draw of validation names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.training import TrainingConfig
from flash_experts.training.metrics import LoggingWindow, Validation, training_metrics
from flash_experts.training.run_state import TrainerState
from tests.test_training import CARDS, make_model


def test_a_window_is_the_mean_of_its_good_steps_and_each_begins_anew(dense_config: GPT2Config) -> None:
    window = LoggingWindow(make_model(dense_config), Accelerator(cpu=True), is_code_length=True)
    good, bad = torch.tensor(False), torch.tensor(True)
    for loss, nats, characters, is_bad in ((2.0, 60.0, 10.0, good), (4.0, 20.0, 30.0, good), (9.0, 9.0, 9.0, bad)):
        window.add(torch.tensor([loss, nats, characters, 0.0, 0.0]), torch.tensor(loss / 2), is_bad)
    assert window.metrics() == pytest.approx(
        {"loss": 3.0, "grad_norm": 2.0, "bits_per_char": 80 / math.log(2) / 40}, rel=1e-6
    )
    window.add(torch.tensor([5.0, 8.0, 4.0, 0.0, 0.0]), torch.tensor(7.0), good)
    assert window.metrics() == pytest.approx(
        {"loss": 5.0, "grad_norm": 7.0, "bits_per_char": 2 / math.log(2)}, rel=1e-6
    )
    assert window.metrics() == {}, "no step, no loss"


def test_the_time_left_has_a_last_validation_as_long_as_the_first() -> None:
    """A quarter of the training took 120 of the 130 seconds: three more quarters, and 10 seconds."""
    state = TrainerState(step=25, seconds=130.0, evaluation_seconds=10.0)
    assert training_metrics(state, TrainingConfig(), 1.0, 1e-3, 0.25, {})["eta_seconds"] == 370.0


def test_validation_scores_a_draw_of_the_names_that_the_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    """Not the first ones, which may be alike; the same draw in every process and after resuming."""

    def drawn(seed: int, names: int = 9) -> str:
        config = replace(TrainingConfig(), seed=seed, validation_names=names)
        validation = Validation(CARDS, tokenizer, config, 0, 1)
        assert validation.num_names == min(names, len(CARDS))
        return validation.sha256

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, 1000) == drawn(1, 1000), "all of them"
