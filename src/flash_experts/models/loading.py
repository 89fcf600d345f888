"""Loads models from folders or the hub, safetensors only; every failure is one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from flash_experts.model_files import first_line, local_folder
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, separates_packed_sequences
from flash_experts.models.folder_checks import check_finite, check_folder, read_config

# transformers computes GPT-2's activation in seven elementwise operations; PyTorch has it as one.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


def load_config(source: str | Path) -> GPT2Config:
    """The configuration of a model folder or hub id.

    Raises:
        ValueError: it is missing, damaged, or of a model family that is not allowed (`any_family`).
    """
    folder = local_folder(source)
    check_folder(folder)
    return cast(GPT2Config, read_config(folder))


def load_model(
    source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Loads a causal language model in eval mode: ours, or a dense one of transformers.

    A GPT-2 gets our attention and the fused form of its activation: the same numbers up to rounding.

    Args:
        source: folder that `save_pretrained` wrote, or a hub id.
        device: None is CUDA if available, else the CPU.
        dtype: dtype to convert the weights to.

    Raises:
        ValueError: missing, damaged, a pickle, not a causal LM, or CUDA requested but not available.
    """
    target = resolve_device(device)
    config = load_config(source)
    is_gpt2 = isinstance(config, GPT2Config)
    if is_gpt2:
        activation = config.activation_function
        config.activation_function = FUSED_ACTIVATIONS.get(activation, activation)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(local_folder(source)),
            config=config,
            generation_config=GenerationConfig.from_model_config(config),  # else read from the folder
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION_IMPLEMENTATION if separates_packed_sequences(config) else None,
            output_loading_info=True,
        )
    except Exception as error:  # any error of a library on a file from an untrusted source
        raise ValueError(_damaged(source, error)) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        raise ValueError(f"{source} lacks {len(absent)} weights, {absent[0]} first: the checkpoint is incomplete")
    check_finite(source, model)
    if model.config.model_type == "gpt2":
        model.loss_type = "ForCausalLM"  # transformers cannot infer it from the class's name, and warns
    return cast(PreTrainedModel, model.to(target).eval())


def load_dense(source: str | Path, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Loads a dense GPT-2 on the CPU; ValueError as `load_model`, or for any other model."""
    model = load_model(source, "cpu", dtype)
    if model.config.model_type != "gpt2" or not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type} model: upcycling takes a dense gpt2")
    return model


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The named device; for None CUDA if available, else the CPU.

    Raises:
        ValueError: the name is unknown, or CUDA is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported: use cpu, cuda or cuda:N")
    if resolved.type == "cuda" and resolved.index is not None and resolved.index >= torch.cuda.device_count() > 0:
        raise ValueError(f"device {device!r} does not exist: the last is cuda:{torch.cuda.device_count() - 1}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: use --device cpu, or install a CUDA build of PyTorch")
    return resolved


def _damaged(source: str | Path, error: Exception) -> str:
    reason = first_line(error)
    if "ignore_mismatched_sizes" in reason:  # part of transformers' message, which is for developers
        reason = "the shape of a weight does not match config.json"
    return f"{source} cannot be loaded, its files are damaged or of another model: {reason}"
