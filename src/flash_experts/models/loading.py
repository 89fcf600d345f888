"""Loads models from folders or the hub, safetensors only; every failure is one line that says what to do.

A folder may come from an untrusted source: no code in it runs, no file outside of it is read, and claimed sizes are
compared with actual ones before it is loaded.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    initialization,
)

from flash_experts.files import sha256_of
from flash_experts.model_files import (
    CONFIG,
    INDEX,
    WEIGHTS,
    any_family_is_allowed,
    check_files,
    check_place,
    first_line,
    has_holes,
    local_folder,
    parse_json,
    read_object,
)
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, separates_packed_sequences
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.released import model_folder

# transformers computes GPT-2's activation in seven elementwise operations; PyTorch has it as one.
FUSED_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}
FAMILIES: dict[str, type[PretrainedConfig]] = {"gpt2": GPT2Config, "gpt2_moe": GPT2MoEConfig, "llama": LlamaConfig}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_HEADER = 2**24  # bytes; 100,000 tensors take 12 million
_MOST_DIMENSIONS = 8
_MOST_LAYERS = 512
_MOST_INTEGER = 10**7  # for settings that are not a model's size
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # per element of a weight
_OTHER_TYPES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}  # buffers only
_DTYPES = (None, "auto", "float32", "bfloat16", "float16", "float64")
_FILE_NAME = re.compile(r"[/\\]|\.\.|\.(safetensors|bin|pt|pth|ckpt|pkl|json|py|so|gguf|jinja|model|txt)$")
# Fields of config.json that make transformers run or fetch something other than this folder's weights.
_REFUSED = {
    "auto_map": "names code of its own to run, which is never run: use a model of transformers' own classes",
    "quantization_config": "is quantized, which needs other packages: save the model in float32 or bfloat16",
    "transformers_weights": "names other files of weights, which are not read: remove transformers_weights",
    "configuration_files": "names other files of settings, which are not read: remove configuration_files",
}
# Known fields that the classes of `FAMILIES` do not declare: older names, and our own.
_OWN_FIELDS = {"dtype", "torch_dtype", "tie_word_embeddings", "rope_theta", "rope_scaling", "conditions"}
_ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
# Fields without effect on a model's size or function: ignored without a warning, as are those that begin with "_".
_WITHOUT_EFFECT = {field.name for field in fields(PretrainedConfig)} | set(
    "model_type task_specific_params num_labels torchscript pruned_heads n_ctx gradient_checkpointing unk_token_id "
    "output_attentions is_decoder use_bfloat16 resid_pdrop embd_pdrop attn_pdrop problem_type sep_token_id "
    "decoder_start_token_id attn_implementation experts_implementation max_length do_sample".split()
)


def load_config(source: str | Path) -> GPT2Config:
    """The configuration of a model folder or hub id; ValueError if it is damaged or not allowed (`any_family`)."""
    folder = local_folder(source)
    check_folder(folder)
    return cast(GPT2Config, read_config(folder))


def load_model(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedModel:
    """Loads a causal language model in eval mode: ours, or a dense one of transformers.

    A GPT-2 gets our attention and the fused form of its activation: the same numbers up to rounding. ``settings``
    replace fields of its configuration.

    Raises:
        ValueError: missing, damaged, a pickle, not a causal LM, or CUDA requested but not available.
    """
    target = resolve_device(device)
    config = load_config(source)
    if settings:
        if unknown := sorted(settings.keys() - config.to_dict().keys()):
            raise ValueError(f"{unknown[0]!r} is not a setting of a {config.model_type} model")
        config = type(config).from_dict(config.to_dict() | dict(settings))
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
    if surplus := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{source} has {len(surplus)} weights for which its config.json has no place, {surplus[0]} first: the two "
            "do not belong together"
        )
    check_finite(source, model)
    if model.config.model_type == "gpt2":
        model.loss_type = "ForCausalLM"  # transformers cannot infer it from the class's name, and warns
    return cast(PreTrainedModel, model.to(target).eval())


def use_tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model the BOS and EOS tokens of its tokenizer, with which names are learned, where it has others.

    Else transformers' ``generate`` would not stop at the end of a name.
    """
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id"):
            old, new = getattr(config, name, None), getattr(tokenizer, name)
            if new not in (old if isinstance(old, list) else [old]):
                setattr(config, name, new)


def load_dense(source: str | Path, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """`load_model` of a dense GPT-2, on the CPU."""
    model = load_model(source, "cpu", dtype)
    if model.config.model_type != "gpt2" or not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"{source} is a {model.config.model_type} model: upcycling takes a dense gpt2")
    return model


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The named device; for None CUDA if available, else the CPU. ValueError if it does not exist."""
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


# ------------------------------------------------------------------------------------------------- checks of a folder
def check_folder(folder: Path) -> None:
    """ValueError if a file is missing, too large, not JSON, pickled or elsewhere, or the configuration names code."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that save_pretrained wrote")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a model: config.json is missing (a checkpoint folder has one)")
    check_files(folder)
    config = read_object(folder / CONFIG)
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{folder / CONFIG} {reason}")
    for key, value in config.items():
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{folder / CONFIG} names kernels of a hub to run, {value}, which are never run")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter for another model: merge the two first (PEFT: merge_and_unload)")
    for path in weight_files(folder):
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{folder / INDEX} names weights that are not in its folder: {path}")
        check_place(folder, path)
        if has_holes(path):
            raise ValueError(f"{path} is damaged: more than half of it was never written")


def weight_files(folder: Path) -> list[Path]:
    """Paths of the weight files, which may not exist; ValueError for none, or only pickles."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{folder / INDEX} is damaged: it lists no weights")
        return sorted({folder / name for name in places.values()})
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise ValueError(
            f"{folder / pickled[0]} is a pickle, which can run code when loaded: refused. Save the model with "
            "save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing")


def weights_sha256(source: str | Path) -> str:
    """Identifies a model's weights: the SHA-256 of a folder's weight files, or a hub id."""
    folder = model_folder(source)
    if folder is None or not folder.is_dir():
        return str(source)
    return " ".join(map(sha256_of, weight_files(folder)))


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checked folder, from its known fields; ValueError if it is not allowed or invalid."""
    path = folder / CONFIG
    values = read_object(path)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        if any_family_is_allowed():
            return _made(folder, lambda: AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
        raise ValueError(
            f"{path}: only models of {', '.join(FAMILIES)} are loaded, and this is {str(family)[:40]!r}. If you "
            "trust its source, add --model-family any"
        )
    known, left_out = _known_fields(path, family, values)
    _check_values(path, known)
    config = _made(folder, lambda: FAMILIES[family](**known))
    if left_out:
        warnings.warn(f"{path}: ignored unknown fields of a {family} model: {', '.join(left_out[:5])}", stacklevel=3)
    return config


def _made(folder: Path, make: Callable[[], PretrainedConfig]) -> PretrainedConfig:
    try:
        config = make()
    except Exception as error:  # any error of a library on a file from an untrusted source
        raise ValueError(f"{folder / CONFIG} cannot be loaded: {first_line(error)}") from error
    check_sizes(folder, config)
    return config


def _known_fields(path: Path, family: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    kind = FAMILIES[family]
    names = {field.name for field in fields(kind)} - _WITHOUT_EFFECT | {*kind.attribute_map, *_OWN_FIELDS}
    if issubclass(kind, GPT2Config):
        names |= {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
    known, left_out = {}, []
    for name, value in values.items():
        if name in names:
            known[name] = value
            continue
        if type(value) is int and value > _MOST_INTEGER:
            raise ValueError(f"{path} asks for the impossible: {name} is {value:,}")
        if name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        if file := next(filter(_FILE_NAME.search, _texts(value)), None):
            raise ValueError(f"{path} names a file, {file[:60]!r}, which is not read: remove {name}")
        left_out.append(name)
    return known, left_out


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one


def _check_values(path: Path, known: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        if known.get(name) not in _DTYPES:
            raise ValueError(f"{path} cannot be loaded: {name} {known[name]!r} is not a dtype of weights")
    for name, value in known.items():
        if name in ("rope_parameters", "rope_scaling") and value is not None:
            if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
                raise ValueError(f"{path} is damaged: {name} does not hold settings of rotary positions")
            kind = value.get("rope_type", value.get("type", "default"))
            if str(kind) not in _ROPE_TYPES:
                raise ValueError(f"{path}: rope_type is one of {', '.join(sorted(_ROPE_TYPES))}, not {kind!r}")
        elif isinstance(value, dict) and name != "conditions":
            raise ValueError(f"{path} is damaged: {name} holds settings instead of a value")


def check_sizes(folder: Path, config: PretrainedConfig) -> None:
    """ValueError if the configured model is larger than the weights."""
    tensors = [size for path in weight_files(folder) for size in tensor_sizes(path)]
    layers = getattr(config, "num_hidden_layers", 1)  # some classes of transformers do not have it
    if not 1 <= layers <= min(max(1, len(tensors)), _MOST_LAYERS):  # the empty model would take long to make
        raise ValueError(f"{folder / CONFIG} asks for {layers:,} layers, but there are only {len(tensors):,} tensors")
    try:
        with initialization.no_init_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        tied = model.all_tied_weights_keys  # tied weights are saved once
        asked = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
        buffers = sum(buffer.numel() for buffer in model.buffers())
    except Exception as error:  # any error of a library on impossible sizes
        raise ValueError(f"{folder / CONFIG} asks for the impossible: {first_line(error)}") from error
    if asked > sum(tensors) or buffers > _MOST_INTEGER + sum(tensors):
        raise ValueError(
            f"{folder / CONFIG} asks for {asked:,} parameters, but the files have {sum(tensors):,}: the "
            "checkpoint is incomplete, or of another model"
        )


def tensor_sizes(path: Path) -> list[int]:
    """Elements of each tensor in a safetensors file, from its checked header; 0 for integers, which are no weights."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MOST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size:,} bytes instead of {8 + length + end:,}")
        return [_elements(name, entry) for name, entry in tensors.items()]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def _elements(name: str, entry: Mapping[str, Any]) -> int:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if len(shape) > _MOST_DIMENSIONS or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or offsets that are not whole numbers")
    elements = math.prod(shape)
    width = _BYTES.get(entry["dtype"]) or _OTHER_TYPES.get(entry["dtype"])
    if width is None:
        raise ValueError(f"{name} has dtype {entry['dtype']!r}: weights have {', '.join(_BYTES)}")
    if elements * width != end - start:
        raise ValueError(f"{name} has {elements:,} elements in {end - start:,} bytes")
    return elements if entry["dtype"] in _BYTES else 0


def check_finite(source: object, model: torch.nn.Module) -> None:
    """A NaN/Inf check of the weights."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{source} is damaged: {name} has values that are not finite numbers")
