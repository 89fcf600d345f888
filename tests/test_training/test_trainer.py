"""One update of the weights, and the model that a run leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.training import Trainer, TrainingConfig
from tests.test_training import TRAIN, VALIDATION, make_model


@pytest.mark.parametrize("clip_norm", [0.01, 1e6, None])
def test_the_optimizer_gets_the_clipped_gradient_and_the_log_the_whole_norm(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, clip_norm: float | None
) -> None:
    model = make_model(dense_config)
    settings = replace(config, clip_norm=clip_norm, max_steps=1, eval_every=None)
    trainer = Trainer(model, tokenizer, TRAIN, [], settings)
    norms: list[float] = []

    def look(*_: Any) -> None:
        gradients = [
            parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))

    trainer.optimizers["optimizer"].register_step_pre_hook(look)
    trainer._step(1e-3)
    logged = trainer.window.metrics()["grad_norm"]
    assert logged > 0.1 and norms == [pytest.approx(min(logged, clip_norm or logged), rel=1e-4)]


def test_a_variable_of_accelerate_does_not_divide_the_gradient(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, [], config)
        trainer._step(1e-3)
        norms.append(trainer.window.metrics()["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_a_trained_model_has_the_plain_loss_again(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    """Label smoothing is for the run alone."""
    model = make_model(dense_config)
    settings = replace(config, label_smoothing=0.5, max_steps=1, eval_every=None)
    Trainer(model, tokenizer, TRAIN, VALIDATION, settings).train()
    ids = torch.arange(10)[None]
    out = model.eval()(ids, labels=ids)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0, :-1], ids[0, 1:]))
