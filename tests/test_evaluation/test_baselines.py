"""The dense baselines of configs/ are of the size that they are compared at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.commands.train import make_parser
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.costs import ModelSize, parameter_counts
from flash_experts.models.loading import load_config
from flash_experts.models.moe import GPT2MoEForCausalLM

ROOT = Path(__file__).parents[2]


def size_of(preset: str) -> ModelSize:
    """Parameters of a new dense model of a preset, without making their values."""
    args = make_parser().parse_args([f"--config={ROOT / 'configs' / preset}"])
    shape = args.model
    assert args.base is None and shape.num_experts == 0
    names = ("n_layer", "n_embd", "n_head", "n_positions")
    vocabulary = len(load_tokenizer(ROOT / "models/mtg-base"))  # the preset's bytes, and words of prompts besides
    with torch.device("meta"):
        return parameter_counts(
            GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **{name: getattr(shape, name) for name in names}))
        )


@pytest.fixture(scope="module")
def mixture() -> ModelSize:
    """Parameters of the mixture that is released."""
    shape = yaml.safe_load((ROOT / "configs/names.yaml").read_text("utf-8"))["model"]
    dense = GPT2LMHeadModel(load_config(ROOT / "models/mtg-base"))
    fields = ("num_experts", "num_experts_per_tok", "moe_layer_freq", "granularity")
    chosen = {name: shape[name] for name in fields}
    return parameter_counts(GPT2MoEForCausalLM.from_dense(dense, method=shape["upcycling"], **chosen))


def test_equal_active_and_equal_total_are(mixture: ModelSize) -> None:
    assert size_of("dense-equal-active.yaml").total == pytest.approx(mixture.active, rel=0.02)
    assert size_of("dense-equal-total.yaml").total == pytest.approx(mixture.total, rel=0.02)
