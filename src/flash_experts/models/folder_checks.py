"""A model folder looked at before transformers opens it: it may come from a stranger.

Nothing in it is run, no file outside of it is read, and what its files claim is held against what they are, so that a
kilobyte cannot ask for a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, initialization

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST_BYTES = {"config.json": 2**20, "generation_config.json": 2**20, INDEX: 2**24, "tokenizer_config.json": 2**24}
_MOST_BYTES |= {"tokenizer.json": 2**26}
_MOST_HEADER = 10**8  # bytes; as safetensors has it
# Keys of config.json that make transformers run or fetch something besides this folder's weights.
_REFUSED = {
    "auto_map": "names code of its own to run: this program runs none, and takes models of transformers' own classes",
    "quantization_config": "is quantized, which needs other packages: save the model in float32 or bfloat16",
}


def check_folder(folder: Path) -> None:
    """Says what is wrong with a folder before transformers tries (its messages name hub options).

    Raises:
        ValueError: it is no folder, a file is missing, too large or no JSON, the weights are pickled or somewhere else,
            or the configuration asks for code to run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model: config.json is missing (a checkpoint folder has one)")
    for name, most in _MOST_BYTES.items():
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) > most:
            raise ValueError(f"{folder / name} is damaged: {size:,} bytes, where {most:,} are plenty")
    config = _read_json(folder / "config.json")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{folder / 'config.json'} {reason}")
    for key, value in config.items():
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{folder / 'config.json'} names kernels of a hub to run, {value}: this program runs none")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is an adapter to another model: merge the two first (PEFT: merge_and_unload)")
    for path in weight_files(folder):
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{folder / INDEX} names weights that are not in its folder: {path}")


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, by name: not looked for yet.

    Raises:
        ValueError: there are none, or pickles alone.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{folder / INDEX} is damaged: it says of no weight where it is")
        return sorted({folder / name for name in places.values()})
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise ValueError(
            f"{folder / pickled[0]} is a pickle, which can run code when loaded: refused. Save the model with "
            "save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing")


def weights_sha256(source: str | Path) -> str:
    """What tells one model's weights from another's: the SHA-256 of a folder's weight files; a hub id as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    digests = []
    for path in weight_files(folder):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {str(error).split(':')[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return content


def check_sizes(folder: Path, config: PretrainedConfig) -> None:
    """Holds what a configuration asks for against the weights that are there.

    Raises:
        ValueError: the weights are fewer, or their files are damaged.
    """
    tensors = [size for path in weight_files(folder) for size in tensor_sizes(path)]
    layers = getattr(config, "num_hidden_layers", 1)  # some classes of transformers have none
    if not 1 <= layers <= max(1, len(tensors)):  # else making the model, empty as it is, would take for ever
        raise ValueError(f"{folder / 'config.json'} asks for {layers:,} layers, but the weights are {len(tensors):,}")
    try:
        with initialization.no_init_weights(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        tied = model.all_tied_weights_keys  # second names of weights that are saved once
        asked = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
    except Exception as error:  # whatever a library says of sizes that cannot be
        raise ValueError(f"{folder / 'config.json'} asks for what cannot be: {_first_line(error)}") from error
    if asked > sum(tensors):
        raise ValueError(
            f"{folder / 'config.json'} asks for {asked:,} parameters, but the weights are {sum(tensors):,}: the "
            "checkpoint is not whole, or of another model"
        )


def tensor_sizes(path: Path) -> list[int]:
    """Elements of each tensor of a safetensors file, from its header; the file must be as long as that says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MOST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size:,} bytes, but {8 + length + end:,} were written")
        return [math.prod(entry["shape"]) for entry in tensors.values()]
    except (struct.error, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error


def check_finite(source: object, model: torch.nn.Module) -> None:
    """Refuses a model with a weight that is NaN or infinite.

    Raises:
        ValueError: the first such weight; ``source`` names the model.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{source} is damaged: {name} has values that are not finite numbers")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
