"""Models from folders or the hub: safetensors only, every failure one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from flash_experts.model_files import first_line, local_folder
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, keeps_packed_apart
from flash_experts.models.folder_checks import check_finite, check_folder, read_config

# transformers spells GPT-2's activation out in seven elementwise operations; PyTorch has the same function as one.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


def load_config(source: str | Path) -> GPT2Config:
    """The configuration of a model folder or hub id.

    Raises:
        ValueError: there is none, it is damaged, or of a family that is not loaded (`any_family`).
    """
    folder = local_folder(source)
    check_folder(folder)
    return cast(GPT2Config, read_config(folder))


def load_model(
    source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model in eval mode: ours, or any dense one of transformers.

    A GPT-2 gets our attention and the fused form of its activation: the same numbers to rounding.

    Args:
        source: a folder that `save_pretrained` wrote, or a hub id.
        device: where to put it; CUDA if there is one, when None.
        dtype: of its weights, whatever they were saved in.

    Raises:
        ValueError: missing, damaged, a pickle, no causal LM, or CUDA asked for where there is none.
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
            attn_implementation=ATTENTION_IMPLEMENTATION if keeps_packed_apart(config) else None,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a library says of a file that may come from an untrusted source
        raise ValueError(_damaged(source, error)) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        raise ValueError(f"{source} lacks {len(absent)} weights, {absent[0]} first: the checkpoint is not whole")
    check_finite(source, model)
    if model.config.model_type == "gpt2":
        model.loss_type = "ForCausalLM"  # transformers does not find it by the class's name, and warns
    return cast(PreTrainedModel, model.to(target).eval())


def load_dense(source: str | Path, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A dense GPT-2 to upcycle, on the CPU. See `load_model`.

    Raises:
        ValueError: as `load_model`, or the model is not a dense GPT-2.
    """
    model = load_model(source, "cpu", dtype)
    if model.config.model_type != "gpt2" or not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type} model: upcycling takes a dense gpt2")
    return model


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        ValueError: CUDA is asked for and there is none, or the name is unknown.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one that this program computes on: use cpu, cuda or cuda:N")
    if resolved.type == "cuda" and resolved.index is not None and resolved.index >= torch.cuda.device_count() > 0:
        raise ValueError(f"no device {device!r} here: the last is cuda:{torch.cuda.device_count() - 1}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: use --device cpu, or install a CUDA build of PyTorch")
    return resolved


def _damaged(source: str | Path, error: Exception) -> str:
    reason = first_line(error)
    if "ignore_mismatched_sizes" in reason:  # transformers' word for it, in a message for developers
        reason = "a weight has not the shape that config.json gives it"
    return f"{source} cannot be loaded, its files are damaged or of another model: {reason}"
