"""The model and tokenizer that a run starts from: a dense base upcycled, a base as it is, or a new model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import CONDITIONS, Attributes, prompt_words, read_conditions, told_conditions
from flash_experts.data.tokenizer import load_tokenizer, train_tokenizer
from flash_experts.data.trimming import texts_of_cards, trim_tokenizer
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.models.loading import load_config, load_model
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.trimming import trim_vocabulary
from flash_experts.training.model_config import ModelConfig


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
    config.validate()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if base is None:
        tokenizer = _new_tokenizer(config, cards)
        model = _new_model(config, tokenizer)
        if config.num_experts:
            model = GPT2MoEForCausalLM.from_dense(model, **config.moe_fields)
    else:
        if config.tokenizer is not None:
            raise ValueError("model.tokenizer is for a new model: a base has its own, set one of the two to null")
        if config.num_experts and load_config(base).model_type == "gpt2":
            model = GPT2MoEForCausalLM.from_dense(base, **config.moe_fields)  # never two copies in memory
        else:
            model = load_model(base, "cpu")
        tokenizer = load_tokenizer(base, model.config.vocab_size)
        if config.trim_vocabulary:
            tokenizer, kept_ids = trim_tokenizer(tokenizer, texts_of_cards(cards))
            trim_vocabulary(model, kept_ids)
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    model.loss_type = "ForCausalLM"
    _tell_conditions(model, cards)
    return model, tokenizer


def _tell_conditions(model: PreTrainedModel, cards: Sequence[Card]) -> None:
    """Adds to the configuration what the model can be asked for, once it has learned these cards, of what only some
    sources tell."""
    before, now = read_conditions(model.config.to_dict()), told_conditions(cards)
    if now:
        names = {**before, **now}
        setattr(model.config, CONDITIONS, {name: sorted({*before.get(name, ()), *now.get(name, ())}) for name in names})


def tokenizer_texts(cards: Sequence[Card]) -> list[str]:
    """What a new tokenizer is trained on: every prompt as it is written, and every name as it is learned."""
    prompts = [Attributes.of(card).prompt() for card in cards]
    return [*prompts, *(" " + card.name for card in cards)]


def _new_tokenizer(config: ModelConfig, cards: Sequence[Card]) -> PreTrainedTokenizerBase:
    """One trained on the cards, or another model's, reduced to what the cards need if that is asked for."""
    if config.tokenizer is None:
        return train_tokenizer(tokenizer_texts(cards), config.vocab_size, prompt_words(cards))
    tokenizer = load_tokenizer(config.tokenizer)
    return trim_tokenizer(tokenizer, texts_of_cards(cards))[0] if config.trim_vocabulary else tokenizer


def _new_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
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
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = probability
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
