"""Runs that write checkpoints: their settings, and how they are started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.training import Trainer, TrainingConfig, TrainingResult
from tests.test_training import TRAIN, VALIDATION, make_model


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
