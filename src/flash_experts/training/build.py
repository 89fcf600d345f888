"""The model and tokenizer that a run starts from: an upcycled dense base, a base as it is, or a new model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import (
    CONDITIONS,
    Attributes,
    collect_conditions,
    prompt_words,
    read_conditions,
    texts_of_cards,
)
from flash_experts.data.tokenizer import load_tokenizer, train_tokenizer
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.models.loading import load_config, load_model, use_tokens_of
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_options import MoEOptions, UpcyclingOptions
from flash_experts.models.trimming import trim_tokenizer, trim_vocabulary
from flash_experts.models.upcycling import Upcycling
from flash_experts.options import defaults_of, options_of
from flash_experts.training.run_folder import DROPOUTS
from flash_experts.training.training_config import NEW, ModelConfig

# Methods of upcycling that a new model follows in its shape: fine-grained experts, and shared ones.
_SHAPES = ("granular", "shared")
# Settings of the experts that change how they are trained or used, not what they compute in a forward.
_TRAINING_ONLY = (
    "capacity_factor",
    "allow_noncausal_generation",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "router_z_loss_coef",
    "router_jitter_noise",
    "router_bias_update_rate",
)


def build_model(
    base: str | None, config: ModelConfig, cards: Sequence[Card], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds the model and tokenizer of a run, deterministically by ``seed``.

    Args:
        base: folder or hub id of a GPT-2, dense or MoE; None for a new model.
        cards: training cards, for a new tokenizer or a trimmed vocabulary.

    Raises:
        ValueError: the configuration is wrong, or does not fit the base.
    """
    config.validate()
    config = settings_in_force(base, config)
    torch.manual_seed(seed)
    model: PreTrainedModel
    if base is None:
        tokenizer = _new_tokenizer(config, cards)
        model = _new_model(config, tokenizer)
        if config.teacher_embeddings and config.tokenizer is not None:
            _embeddings_from_teacher(
                model, load_model(config.tokenizer, "cpu"), tokenizer, load_tokenizer(config.tokenizer)
            )
        if config.num_experts:
            model = _with_new_experts(model, config)
    else:
        family = load_config(base).model_type
        if config.num_experts and family == "gpt2":
            model = GPT2MoEForCausalLM.from_dense(base, **config.moe_fields)  # avoids two copies in memory
        else:
            settings = {name: getattr(config, name) for name in _TRAINING_ONLY} if family == "gpt2_moe" else {}
            model = load_model(base, "cpu", settings=settings)
        tokenizer = load_tokenizer(base, model.config.vocab_size)
        use_tokens_of(model, tokenizer)
        if config.trim_vocabulary:
            tokenizer, kept_ids = trim_tokenizer(tokenizer, texts_of_cards(cards), config.keep_words)
            trim_vocabulary(model, kept_ids)
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    model.loss_type = "ForCausalLM"
    _record_conditions(model, cards)
    return model, tokenizer


def settings_in_force(base: str | None, config: ModelConfig) -> ModelConfig:
    """The settings with those that a base with experts has already, and trains with unless others are set.

    A setting is set if it differs from its default, and ``num_experts`` is not 0.

    Raises:
        ValueError: a setting that is set cannot take effect on this base.
    """
    defaults = defaults_of(ModelConfig)
    changed = [name for name, default in defaults.items() if getattr(config, name) != default]
    if config.keep_words and not config.trim_vocabulary:
        raise ValueError("model.keep_words is for a trimmed vocabulary: set model.trim_vocabulary, or leave it out")
    if base is None:
        _check_new_vocabulary(config, changed)
        _check_new_experts(config, changed)
        return config
    known = options_of(ModelConfig)
    if new := [name for name in changed if known[name].group == NEW and name != "dropout"]:
        names = ", ".join(f"model.{name}" for name in new) + (" is" if len(new) == 1 else " are")
        raise ValueError(f"{names} for a new model, but a base is given, which has its own: leave one of the two out")
    own = load_config(base)
    if own.model_type == "gpt2_moe":
        return _settings_of(base, own, config, changed)
    if config.num_experts and own.model_type != "gpt2":
        raise ValueError(
            f"{base} is a {own.model_type} model, which cannot be upcycled: set model.num_experts to 0 to fine-tune it "
            "as it is"
        )
    return config


def _check_new_vocabulary(config: ModelConfig, changed: Sequence[str]) -> None:
    if config.tokenizer is None and config.trim_vocabulary:
        raise ValueError("model.trim_vocabulary needs the vocabulary of a base or of model.tokenizer: leave it out")
    if config.tokenizer is not None and "vocab_size" in changed:
        raise ValueError(
            "model.vocab_size is for a tokenizer that is trained, but model.tokenizer is given, which has its own: "
            "leave one of the two out"
        )


def _check_new_experts(config: ModelConfig, changed: Sequence[str]) -> None:
    if not config.num_experts:
        return
    unused = [f"model.{name}" for name in ("noise_scale", "drop_ratio", "router_init") if name in changed]
    if config.upcycling not in ("copy", *_SHAPES):
        unused.insert(0, f"model.upcycling {config.upcycling}")
    if unused:
        raise ValueError(
            f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} for experts made of a base, and a new model "
            "draws each of its experts at random: leave that out, or give a base"
        )


def _settings_of(base: str, own: GPT2Config, config: ModelConfig, changed: Sequence[str]) -> ModelConfig:
    kept = {each.name: getattr(own, each.name) for each in fields(MoEOptions)}
    upcycling = [*(each.name for each in fields(UpcyclingOptions)), "upcycling"]
    if not config.num_experts:
        return replace(config, **kept, **{name: defaults_of(ModelConfig)[name] for name in upcycling})
    fixed = [*kept.keys() - {*_TRAINING_ONLY}, *upcycling]
    for name in changed:
        if name in fixed and getattr(config, name) != kept.get(name):
            has = f"its {name} is {kept[name]}" if name in kept else "they are not made again"
            raise ValueError(
                f"model.{name} is {getattr(config, name)}, but {base} has experts already, and {has}: leave it out, or "
                "take a dense base"
            )
    return replace(config, **{name: value for name, value in kept.items() if name not in changed})


def _record_conditions(model: PreTrainedModel, cards: Sequence[Card]) -> None:
    """Adds attributes that only some sources have to the configuration: the model learns to use them."""
    before, now = read_conditions(model.config.to_dict()), collect_conditions(cards)
    if now:
        names = {**before, **now}
        setattr(model.config, CONDITIONS, {name: sorted({*before.get(name, ()), *now.get(name, ())}) for name in names})


def _new_tokenizer(config: ModelConfig, cards: Sequence[Card]) -> PreTrainedTokenizerBase:
    """``config.tokenizer``, trimmed if configured, or one trained on all prompts, and all names after a space."""
    if config.tokenizer is None:
        prompts = [Attributes.of(card).prompt() for card in cards]
        texts = [*prompts, *(" " + card.name for card in cards)]
        return train_tokenizer(texts, config.vocab_size, prompt_words(cards))
    tokenizer = load_tokenizer(config.tokenizer)
    if not config.trim_vocabulary:
        return tokenizer
    return trim_tokenizer(tokenizer, texts_of_cards(cards), config.keep_words)[0]


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


def _with_new_experts(dense: GPT2LMHeadModel, config: ModelConfig) -> GPT2MoEForCausalLM:
    """The new model with experts in place of some MLPs. Each is initialized by itself: copies of a random layer would
    only start alike."""
    method = config.upcycling if config.upcycling in _SHAPES else "copy"
    shape = Upcycling(method=method, granularity=config.granularity)
    sizes = {each.name: getattr(config, each.name) for each in fields(MoEOptions)}
    model = GPT2MoEForCausalLM(shape.config(dense.config, **sizes))
    model.load_state_dict(dense.state_dict(), strict=False)  # everything but the layers that are experts now
    return model


def _embeddings_from_teacher(
    model: GPT2LMHeadModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Initializes the token embeddings with the first principal components of the teacher's, rescaled.

    They keep as much of the inner products between tokens as the new width can hold.
    """
    ids = teacher_tokenizer.get_vocab()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with torch.no_grad():
        weight_VD = _embeddings(teacher).float()[[ids[token] for token, _ in tokens]]
        new_VW = _embeddings(model)
        u_VR, s_R, _ = torch.linalg.svd(weight_VD - weight_VD.mean(0), full_matrices=False)
        rank = min(new_VW.shape[1], s_R.numel())
        components_VR = u_VR[:, :rank] * s_R[:rank]
        new_VW[: len(tokens), :rank] = components_VR * (
            new_VW.std() * math.sqrt(new_VW.shape[1] / rank) / components_VR.std()
        )
        new_VW[: len(tokens), rank:] = 0


def _embeddings(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets it in the configuration and in the modules, which read that when they are made."""
    names = [name for name in DROPOUTS if hasattr(model.config, name)]
    if not names:
        raise ValueError(
            f"model.dropout is {probability}, but a {model.config.model_type} model has no dropout: leave it out"
        )
    for name in names:
        setattr(model.config, name, probability)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in names:
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, probability)
