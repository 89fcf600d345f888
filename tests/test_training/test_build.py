"""The model of a run: what of the settings takes effect on which base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flash_experts import GPT2MoEForCausalLM
from flash_experts.model_files import any_family
from flash_experts.models.router import routers_of
from flash_experts.training.build import build_model, settings_in_force
from flash_experts.training.training_config import ModelConfig
from tests.helpers.command_line import ok
from tests.test_training import TRAIN

SMALL = ModelConfig(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=257, num_experts=2)


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def moe(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """The folder of a model with experts, and with settings of their training that are not the defaults."""
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_layer_freq": 1}
    model = GPT2MoEForCausalLM.from_dense(dense, **experts, router_aux_loss_coef=0.3, router_jitter_noise=0.1)
    return saved(model, tokenizer, tmp_path / "moe")


def test_a_base_with_experts_takes_the_settings_of_their_training_and_keeps_the_rest(moe: str) -> None:
    config = ModelConfig(router_aux_loss_coef=0.5, router_z_loss_coef=0.0, capacity_factor=1.25)
    model, _ = build_model(moe, config, TRAIN, seed=0)
    found = model.config
    assert (found.router_aux_loss_coef, found.router_z_loss_coef, found.capacity_factor) == (0.5, 0.0, 1.25)
    assert (found.num_experts, found.num_experts_per_tok, found.moe_layer_freq) == (4, 1, 1)
    assert all((router.capacity_factor, router.jitter_noise) == (1.25, 0.1) for router in routers_of(model).values())
    in_force = settings_in_force(moe, config)
    assert (in_force.num_experts, in_force.router_aux_loss_coef, in_force.router_jitter_noise) == (4, 0.5, 0.1)
    assert settings_in_force(moe, in_force) == in_force
    as_it_is = settings_in_force(moe, ModelConfig(num_experts=0, router_aux_loss_coef=0.5, granularity=4))
    assert (as_it_is.num_experts, as_it_is.router_aux_loss_coef) == (4, 0.3)
    assert settings_in_force(moe, as_it_is) == as_it_is, "build_model asks again"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_experts": 16}, r"model\.num_experts is 16, but .*moe has experts already, and its num_experts is 4"),
        ({"num_experts_per_tok": 3}, r"num_experts_per_tok is 3, .* its num_experts_per_tok is 1: leave it out"),
        ({"routing": "expert_choice"}, "routing is expert_choice, .* its routing is token_choice"),
        ({"upcycling": "noise"}, "upcycling is noise, but .* has experts already, and they are not made again"),
        ({"noise_scale": 0.1}, "noise_scale is 0.1, but .* has experts already"),
        ({"n_layer": 12, "n_embd": 16}, r"model\.n_layer, model\.n_embd are for a new model, but a base is given"),
    ],
)
def test_settings_that_a_base_with_experts_cannot_take(moe: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_model(moe, ModelConfig(**settings), TRAIN, seed=0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"keep_words": True}, "model.keep_words is for a trimmed vocabulary: set model.trim_vocabulary"),
        ({"tokenizer": "x", "vocab_size": 8000}, r"model\.vocab_size .* model\.tokenizer is given, which has its own"),
        ({"trim_vocabulary": True}, "trim_vocabulary needs the vocabulary of a base or of model.tokenizer"),
    ],
)
def test_settings_of_a_vocabulary_that_would_be_ignored_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings_in_force(None, ModelConfig(**settings))


def test_a_base_that_cannot_be_upcycled_is_not_trained_without_experts_in_silence(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=64))
    base = saved(llama, tokenizer, tmp_path / "llama")
    with pytest.raises(
        ValueError, match=r"llama is a llama model, which cannot be upcycled: set model\.num_experts to 0"
    ):
        build_model(base, ModelConfig(), TRAIN, seed=0)
    assert build_model(base, ModelConfig(num_experts=0), TRAIN, seed=0)[0].config.model_type == "llama"


@pytest.mark.parametrize("settings", [{"num_experts": 0}, {"num_experts": 2}, {"trim_vocabulary": True}])
def test_the_model_ends_names_with_the_token_of_its_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """transformers' default is GPT-2's own token 50256, which other tokenizers do not have."""
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64))
    assert dense.config.eos_token_id == 50256
    base = saved(dense, tokenizer, tmp_path / "dense")
    model, learned = build_model(base, ModelConfig(**settings), TRAIN, seed=0)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (learned.bos_token_id, learned.eos_token_id)
    if settings == {"num_experts": 2}:
        ok("upcycle", base, "--out", tmp_path / "out", cwd=tmp_path)
        upcycled = GPT2MoEForCausalLM.from_pretrained(tmp_path / "out")
        assert upcycled.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_run_records_the_settings_in_force(workplace: Path, tmp_path: Path, moe: str) -> None:
    where = ["--data", workplace / "data/mtg", "--training.output-dir", ".", "--training.run-name", "run"]
    settings = ["--training.max-steps", "1", "--model.router-aux-loss-coef", "0.5"]
    done = ok("train", "--base", moe, *where, *settings, cwd=tmp_path)
    assert "has experts already, and keeps its num_experts 4, num_experts_per_tok 1, moe_layer_freq 1" in done.err
    text = (tmp_path / "run" / "run.json").read_text()
    assert '"num_experts": 4' in text and '"router_aux_loss_coef": 0.5' in text and '"num_experts": 8' not in text


def test_dropout_is_everywhere_that_of_the_configuration() -> None:
    for asked, expected in ((0.25, 0.25), (0.0, 0.0), (None, 0.1)):  # GPT-2 has 0.1
        model, _ = build_model(None, replace(SMALL, dropout=asked), TRAIN, seed=0)
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        config = model.config
        assert found == {config.resid_pdrop, config.embd_pdrop, config.attn_pdrop} == {expected}


def test_dropout_of_a_base_is_what_its_modules_compute_with(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A Llama has dropout in its attention alone, and copies the probability from its configuration."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    base = saved(LlamaForCausalLM(LlamaConfig(**sizes, **common)), tokenizer, tmp_path / "llama")
    ids = torch.arange(9)[None]
    for dropout, is_same in ((None, True), (0.5, False)):
        model, _ = build_model(base, ModelConfig(num_experts=0, dropout=dropout), TRAIN, seed=0)
        model.train()
        assert model.config.attention_dropout == (dropout or 0.0)
        assert torch.equal(model(ids).logits, model(ids).logits) is is_same
    mamba = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, state_size=2, vocab_size=len(tokenizer)))
    with any_family(), pytest.raises(ValueError, match=r"model\.dropout is 0\.5, but a mamba model has no dropout"):
        build_model(saved(mamba, tokenizer, tmp_path / "mamba"), ModelConfig(num_experts=0, dropout=0.5), TRAIN, seed=0)


def test_the_seed_decides_the_weights() -> None:
    torch.manual_seed(3)
    one, _ = build_model(None, SMALL, TRAIN, seed=0)
    torch.manual_seed(4)
    again, other = (build_model(None, SMALL, TRAIN, seed=seed)[0] for seed in (0, 1))
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)


@pytest.mark.parametrize(
    ("settings", "experts", "per_token", "size", "shared"),
    [
        ({"num_experts": 4}, 4, 2, 128, 0),
        ({"num_experts": 2, "num_experts_per_tok": 1, "upcycling": "granular", "granularity": 4}, 8, 4, 32, 0),
        ({"num_experts": 2, "num_experts_per_tok": 1, "upcycling": "shared", "granularity": 2}, 4, 2, 64, 2),
    ],
)
def test_each_expert_of_a_new_model_is_drawn_by_itself(
    settings: dict[str, Any], experts: int, per_token: int, size: int, shared: int
) -> None:
    config = replace(SMALL, moe_layer_freq=1, **settings)
    model, _ = build_model(None, config, TRAIN, seed=0)
    dense, _ = build_model(None, replace(config, num_experts=0), TRAIN, seed=0)
    made = model.config
    found = made.num_experts, made.num_experts_per_tok, made.expert_size, made.num_shared_experts
    assert found == (experts, per_token, size, shared)
    for block, dense_block in zip(model.transformer.h, dense.transformer.h, strict=True):
        layer = block.mlp.experts
        onto_residual = 0.02 / (2 * made.n_layer) ** 0.5
        for weights, std in ((layer.up_proj, 0.02), (layer.down_proj, onto_residual)):
            assert abs(weights.std().item() / std - 1) < 0.05
            pairs = torch.corrcoef(weights.flatten(1)) - torch.eye(experts)
            assert pairs.abs().max() < 0.1, "no expert is a copy of another"
        rows = block.mlp.router.weight
        assert torch.unique(rows, dim=0).shape == rows.shape
        assert torch.equal(block.attn.c_attn.weight, dense_block.attn.c_attn.weight)
    assert torch.equal(model.transformer.wte.weight, dense.transformer.wte.weight)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"upcycling": "drop"}, "model.upcycling drop is for"),
        ({"upcycling": "noise", "noise_scale": 0.1}, "model.upcycling noise, model.noise_scale are for"),
        ({"router_init": "zeros"}, "model.router_init is for"),
    ],
)
def test_a_new_model_has_nothing_to_upcycle(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_model(None, replace(SMALL, **settings), TRAIN, seed=0)
    assert build_model(None, replace(SMALL, num_experts=0, **settings), TRAIN, seed=0)
