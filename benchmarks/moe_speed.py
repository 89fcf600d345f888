"""Seconds of one MoE layer, forward and backward, against a dense MLP of the same arithmetic and transformers' paths.

    python benchmarks/moe_speed.py [--tokens 2048] [--rounds 5]

The dense MLP multiplies T * k rows through one pair of matrices of an expert's size: the same products, none of the
routing, an E-th of the weights. All variants take turns in each round, so a slow moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from flash_experts import GPT2MoEConfig
from flash_experts.models.moe_layer import Experts

WIDTH, HIDDEN, NUM_EXPERTS, TOP_K = 768, 3072, 8, 2
VARIANTS = ("dense", "fe_experts", "grouped_mm", "eager")


def make_dense() -> nn.Sequential:
    return nn.Sequential(Conv1D(HIDDEN, WIDTH), nn.GELU(approximate="tanh"), Conv1D(WIDTH, HIDDEN))


def make_experts() -> Experts:
    config = GPT2MoEConfig(
        n_embd=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        activation_function="gelu_pytorch_tanh",
    )
    experts = Experts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def measure(tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward of each variant over the rounds, after one round of warm-up."""
    torch.manual_seed(0)
    dense, experts = make_dense(), make_experts()
    x_TD = torch.randn(tokens, WIDTH, requires_grad=True)
    choices_TK = torch.rand(tokens, NUM_EXPERTS).topk(TOP_K).indices
    gates_TK = torch.full((tokens, TOP_K), 1 / TOP_K, requires_grad=True)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds + 1):
        for variant in VARIANTS:
            dense.zero_grad()
            experts.zero_grad()
            start = time.perf_counter()
            if variant == "dense":
                out = dense(x_TD.repeat(TOP_K, 1))
            else:
                experts.config._experts_implementation = variant
                out = experts(x_TD, choices_TK, gates_TK)
            out.sum().backward()
            if turn:
                seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 256, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    results = {tokens: measure(tokens, args.rounds) for tokens in args.tokens}
    print(f"{'tokens':>8}" + "".join(f"{variant:>20}" for variant in VARIANTS) + "   (seconds, times dense)")
    for tokens, seconds in results.items():
        cells = (f"{seconds[v]:10.4f} {seconds[v] / seconds['dense']:6.2f} x " for v in VARIANTS)
        print(f"{tokens:>8}" + "".join(cells))
    if args.out:
        machine = {"threads": torch.get_num_threads(), "processor": platform.machine()}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        args.out.write_text(json.dumps({"machine": machine, "versions": versions, "seconds": results}, indent=2))


if __name__ == "__main__":
    main()
