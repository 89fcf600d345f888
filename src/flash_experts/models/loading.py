"""Models from folders or the hub: safetensors only, every failure one line that says what to do."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, keeps_packed_apart
from flash_experts.models.folder_checks import check_finite, check_folder, check_sizes

# transformers spells GPT-2's activation out in seven elementwise operations; PyTorch has the same function as one.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}


def _check_hub(model_id: str) -> None:
    """Says at once that the hub cannot be reached. Its client would try for two minutes."""
    try:
        cached = try_to_load_from_cache(model_id, "config.json")
    except HFValidationError as error:
        raise ValueError(_unreachable(model_id, error)) from error
    if isinstance(cached, str) or constants.is_offline_mode() or getproxies():
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=10).close()
    except OSError as error:
        raise ValueError(_unreachable(model_id, error)) from error


def load_config(source: str | Path) -> GPT2Config:
    """The configuration of a model folder or hub id.

    Raises:
        ValueError: there is none that transformers can read.
    """
    folder = Path(source)
    if folder.exists():
        check_folder(folder)
    else:
        _check_hub(str(source))
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # whatever a library says of a file that may come from a stranger
        raise ValueError(_unreachable(source, error)) from error
    if folder.exists():
        check_sizes(folder, config)
    return cast(GPT2Config, config)


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
            str(source),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION_IMPLEMENTATION if keeps_packed_apart(config) else None,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise ValueError(_unreachable(source, error)) from error
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


def _unreachable(source: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "ignore_mismatched_sizes" in reason:  # transformers' word for it, in a message for developers
        reason = "a weight has not the shape that config.json gives it"
    if Path(source).exists():
        return f"{source} cannot be loaded, its files are damaged or of another model: {reason}"
    return (
        f"no model at {source}: there is no such folder, and it could not be had from the hub. Give a folder, or "
        f"models/mtg-base, which needs no network ({reason})"
    )
