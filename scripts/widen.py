"""Widens the MLPs of a dense GPT-2 without changing its output: the dense baseline of upcycling.

    python scripts/widen.py models/mtg-base models/wide --hidden 1536

Upcycling adds parameters after pretraining. For a fair comparison, a dense model must get as many parameters at the
same point. The new units have small random input weights and zero output weights (Net2Net, Chen et al. 2016, arXiv
1511.05641, section 2.4, without copied units), as the routed experts of `upcycle --method shared`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_model
from flash_experts.models.saving import write_model


def widened(model: GPT2LMHeadModel, hidden: int, seed: int = 0) -> GPT2LMHeadModel:
    """Returns a dense GPT-2 with ``hidden`` units in each MLP and the same logits.

    Raises:
        ValueError: ``hidden`` is not larger than that of the model.
    """
    before = model.config.n_inner or 4 * model.config.n_embd
    if hidden <= before:
        raise ValueError(f"--hidden must be more than the {before} units that the model has, not {hidden}")
    config = type(model.config).from_dict(model.config.to_dict() | {"n_inner": hidden})
    wide = GPT2LMHeadModel(config).to(dtype=model.dtype)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(seed)
    weights = model.state_dict()
    for name, weight in wide.state_dict().items():
        old = weights[name]
        if old.shape == weight.shape:
            weight.copy_(old)
            continue
        weight.zero_()  # output weights (H, D) and biases (H,) of the new units
        if name.endswith("mlp.c_fc.weight"):  # (D, H)
            nn.init.normal_(weight, std=config.initializer_range, generator=generator)
        weight[tuple(slice(size) for size in old.shape)] = old
    return wide.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense model")
    parser.add_argument("out", type=Path, help="folder for the wide model")
    parser.add_argument("--hidden", type=int, required=True, help="hidden units of each MLP")
    args = parser.parse_args()
    model = load_model(args.model, "cpu")
    if type(model) is not GPT2LMHeadModel:
        parser.error(f"{args.model} is an MoE model: give a dense model")
    wide = widened(model, args.hidden)
    write_model(args.out, wide, load_tokenizer(args.model))
    print(f"{args.out}: {sum(parameter.numel() for parameter in wide.parameters()):,} parameters")


if __name__ == "__main__":
    main()
