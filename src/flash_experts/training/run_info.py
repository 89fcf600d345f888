"""Where a run comes from: what is written beside it, so that it can be done again."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import CONDITIONS
from flash_experts.files import whole_file
from flash_experts.models.moe_config import GPT2MoEConfig

_PACKAGES = ("flash-experts", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")

# Fields of a model's configuration that may differ when a run is resumed: how it is trained, what it can be conditioned
# on (which follows from the training names), and what libraries note.
MAY_CHANGE = {
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "router_aux_loss_coef", "router_aux_loss_scope"),
    *("router_z_loss_coef", "router_jitter_noise", "router_bias_update_rate", "allow_noncausal_generation", CONDITIONS),
    *("transformers_version", "architectures", "dtype", "use_cache", "attention_backend", "name_or_path"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
}

# Dense bfloat16 TFLOP/s by the makers' data sheets, tensor cores, without sparsity.
_PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70}


def fingerprint(cards: Sequence[Card]) -> str:
    """SHA-256 of a split: equal for equal cards in equal order."""
    digest = hashlib.sha256()
    for card in cards:
        digest.update(json.dumps(card.to_json(), sort_keys=True).encode())
    return digest.hexdigest()


def describe_data(train: Sequence[Card], validation: Sequence[Card], meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Counts and hashes of the splits, and what meta.json says of them."""
    described: dict[str, Any] = {
        "train_names": len(train),
        "train_sha256": fingerprint(train),
        "validation_names": len(validation),
        "validation_sha256": fingerprint(validation),
    }
    return described if meta is None else described | {"meta": dict(meta)}


def identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation_sha256: str | None
) -> dict[str, Any]:
    """What must be the same when a run is resumed: the tokenizer and the validation names, by their SHA-256, and the
    model's configuration (without `MAY_CHANGE`)."""
    config = model.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in MAY_CHANGE and not name.startswith("_")}
    return {
        "tokenizer": _sha256_of_tokenizer(tokenizer),
        "validation_names": validation_sha256,
        "model_config": json.loads(json.dumps(kept, default=str)),
    }


def _sha256_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # of the last call
        about.pop(name, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([about, special], sort_keys=True).encode()).hexdigest()


def describe_run(
    config: dict[str, Any], data: dict[str, Any], model: PreTrainedModel, device: torch.device, processes: int
) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "config": config,
        "data": data,
        "model": {"type": model.config.model_type, "parameters": multiplied_parameters(model)},
        "device": str(device),
        "processes": processes,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python's, the platform's and those of the packages that matter for a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this package's source, with "+" where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A copy installed below some other project's checkout is not that project's commit.
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def multiplied_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Weights of a model: ``total``; ``body``, those of its blocks that a token is multiplied with (its k
    experts alone); ``head``, those of the output layer. Embedding tables are looked up, not multiplied.

    ``body_flops`` and ``head_flops`` are the arithmetic of a training step for each token and each label: 2 a weight
    for the forward, 2 for the gradient of its input, where anything before it is trained, and 2 for its own gradient,
    where it is trained: 6 where nothing is frozen."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings().weight
    share = 1.0
    if isinstance(model.config, GPT2MoEConfig):
        share = model.config.num_experts_per_tok / model.config.num_experts
    body = body_flops = 0.0
    trained_before = False  # parameters are named in the order of the forward
    for name, parameter in model.named_parameters():
        if id(parameter) not in looked_up and parameter is not head:
            multiplied = parameter.numel() * (share if ".experts." in name else 1.0)
            body += multiplied
            body_flops += 2 * multiplied * (1 + trained_before + parameter.requires_grad)
        trained_before = trained_before or parameter.requires_grad
    head_flops = 2 * head.numel() * (1 + trained_before + head.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = {"total": total, "body": round(body), "head": head.numel()}
    return counts | {"body_flops": round(body_flops), "head_flops": head_flops}


def training_flops(counts: dict[str, int], tokens: int, labels: int) -> float:
    """Arithmetic of a forward and backward, by `multiplied_parameters`; the head sees labelled positions alone.
    Attention's own products are left out: names are short."""
    return float(counts["body_flops"] * tokens + counts["head_flops"] * labels)


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


def write_run_info(path: Path, info: dict[str, Any]) -> None:
    """Writes run.json."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(info, indent=2, default=str) + "\n", encoding="utf-8")
