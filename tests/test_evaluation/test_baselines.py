"""Dense baselines of the MoE model: as many parameters, and at the start the same output."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.evaluation.scorers import ModelSize, parameter_counts
from flash_experts.models.loading import load_config
from flash_experts.models.moe import GPT2MoEForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from train_released import ACTIVE, TOTAL
from widen import widened

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    """A dense model of the released base's shape."""
    return GPT2LMHeadModel(load_config(ROOT / "models/mtg-base"))


@pytest.fixture(scope="module")
def moe_size(base: GPT2LMHeadModel) -> ModelSize:
    """Parameters of the released MoE model."""
    shape = yaml.safe_load((ROOT / "configs/names.yaml").read_text("utf-8"))["model"]
    fields = ("num_experts", "num_experts_per_tok", "moe_layer_freq", "granularity")
    chosen = {name: shape[name] for name in fields}
    return parameter_counts(GPT2MoEForCausalLM.from_dense(base, method=shape["upcycling"], **chosen))


def test_baselines_have_equal_active_and_equal_total_parameters(base: GPT2LMHeadModel, moe_size: ModelSize) -> None:
    assert parameter_counts(widened(base, ACTIVE)).total == pytest.approx(moe_size.active, rel=0.01)
    assert parameter_counts(widened(base, TOTAL)).total == pytest.approx(moe_size.total, rel=0.01)


def test_a_widened_model_has_the_same_logits_and_its_new_units_learn() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_positions=12)).eval()
    ids = torch.randint(0, 50, (3, 9))
    wide = widened(model, 80)
    assert wide.config.n_inner == 80 and wide.transformer.h[1].mlp.c_fc.weight.shape == (16, 80)
    torch.testing.assert_close(wide(ids).logits, model(ids).logits)
    wide(ids, labels=ids).loss.backward()
    gradient_HD = wide.transformer.h[0].mlp.c_proj.weight.grad
    assert (
        gradient_HD[64:].norm(dim=1) > 0
    ).all()  # equal units, or units without a gradient, would not be a fair baseline


def test_narrower_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=1, n_head=2, n_embd=16, n_positions=12))
    with pytest.raises(ValueError, match="more than the 64 units"):
        widened(model, 64)
