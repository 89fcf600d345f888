"""The model and tokenizer that a run starts from: a dense base upcycled, a base as it is, or a new model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import load_tokenizer, train_tokenizer
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.models.loading import load_model
from flash_experts.models.moe import GPT2MoEForCausalLM


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        num_experts: E, experts per MoE layer; 0 trains the model as it is, without upcycling.
        num_experts_per_tok: k, experts that each token is sent to.
        moe_layer_freq: 1 puts experts in every block, 2 in every other.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_z_loss_coef: weight of the router z-loss.
        router_jitter_noise: noise on the router's input in training.
        router_bias_update_rate: step of the loss-free balancing bias, 0 is off.
        dropout: probability of every dropout of the model; null keeps the base's own.
        n_layer: blocks of a new model (without a base).
        n_embd: width of a new model.
        n_head: attention heads of a new model.
        n_positions: longest text of a new model, in tokens.
        vocab_size: tokens of a new model's tokenizer, which is trained on the prepared cards.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layer_freq: int = 2
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    dropout: float | None = None
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_positions: int = 128
    vocab_size: int = 4096

    def moe_fields(self) -> dict[str, Any]:
        """The fields that `GPT2MoEForCausalLM.from_dense` takes."""
        moe = {field.name for field in fields(self)} & set(GPT2MoEForCausalLM.config_class.__dataclass_fields__)
        new_model = {"n_layer", "n_embd", "n_head", "n_positions", "vocab_size"}
        return {name: value for name, value in asdict(self).items() if name in moe - new_model}


def build_model(
    base: str | None, config: ModelConfig, cards: Sequence[Card], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes what a run trains. The same arguments give the same weights.

    Args:
        base: folder or hub id of a GPT-2, dense or with experts; None makes a new one.
        config: its experts, and its shape if it is new.
        cards: what a new tokenizer learns from.
        seed: of the new weights (routers, or everything).

    Raises:
        ValueError: the base cannot be loaded, has experts already and more are asked for, or a size is wrong.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel
    if base is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(tokenizer_texts(cards), config.vocab_size)
        model = _new_model(config, tokenizer)
    else:
        tokenizer = load_tokenizer(base)
        model = load_model(base, "cpu")
    if config.num_experts and model.config.model_type == "gpt2":
        model = GPT2MoEForCausalLM.from_dense(model, **config.moe_fields())  # type: ignore[arg-type]
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    model.loss_type = "ForCausalLM"
    return model, tokenizer


def tokenizer_texts(cards: Sequence[Card]) -> list[str]:
    """What a new tokenizer is trained on: every prompt as it is written, and every name as it is learned."""
    prompts = [Attributes.of(card).prompt() for card in cards]
    return [*prompts, *(" " + card.name for card in cards)]


def _new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd ({config.n_embd}) must be a multiple of n_head ({config.n_head})")
    gpt2 = GPT2Config(
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_positions=config.n_positions,
        vocab_size=len(tokenizer),
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    gpt2._attn_implementation = ATTENTION_IMPLEMENTATION
    return GPT2LMHeadModel(gpt2)


def _set_dropout(model: PreTrainedModel, probability: float) -> None:
    """One probability for every dropout, in the modules and in the configuration that is saved."""
    if not 0 <= probability < 1:
        raise ValueError(f"dropout must be at least 0 and under 1, not {probability}")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = probability
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
