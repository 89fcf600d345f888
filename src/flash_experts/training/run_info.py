"""Where a run comes from: what is written beside it, so that it can be done again."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flash_experts.data.cards import Card

_PACKAGES = ("flash-experts", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")

# Dense bfloat16 TFLOP/s by the makers' data sheets, tensor cores, without sparsity.
_PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70}


def fingerprint(cards: Sequence[Card]) -> str:
    """SHA-256 of a split: equal for equal cards in equal order."""
    digest = hashlib.sha256()
    for card in cards:
        digest.update(json.dumps(card.to_json(), sort_keys=True).encode())
    return digest.hexdigest()


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


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Weights in all, and those that a token is multiplied with (its k experts, and no embedding table but the head)."""
    total = active = 0
    experts_per_token, num_experts = 1, 1
    if hasattr(model, "config") and getattr(model.config, "num_experts", None):
        experts_per_token, num_experts = model.config.num_experts_per_tok, model.config.num_experts
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if ".experts." in name:
            active += parameter.numel() * experts_per_token // num_experts
        else:
            active += parameter.numel()
    return {"parameters": total, "active_parameters": active}


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


def write_run_info(path: Path, info: dict[str, Any]) -> None:
    """Writes run.json."""
    path.write_text(json.dumps(info, indent=2, default=str) + "\n", encoding="utf-8")
