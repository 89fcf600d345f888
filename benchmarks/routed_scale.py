"""How much do the routed experts of a model add? Their output is multiplied by several factors, without training.

    python benchmarks/routed_scale.py [MODEL] [--split validation] [--factors 0 1 2 4 8 16]

Prints the mean length of the routed and the shared experts' output in each block, and bits per character given all
attributes for each factor (0: without the routed experts), with the paired difference from the model as it is.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from flash_experts.data.prepare import load_split
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.scorers import LanguageModel
from flash_experts.models.moe_layer import MoELayer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/mtg-names")
    parser.add_argument("--data", default="data/mtg")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--names", type=int, default=1500)
    parser.add_argument("--factors", type=float, nargs="+", default=[0, 1, 2, 4, 8, 16])
    options = parser.parse_args()
    scorer = LanguageModel.load(options.model)
    cards = load_split(options.data, options.split)[: options.names]
    names, attributes = [card.name for card in cards], [Attributes.of(card) for card in cards]
    characters = sum(len(name) + 1 for name in names)
    factor = 1.0
    lengths: dict[tuple[int, str], list[float]] = defaultdict(list)

    def watch(block: int, part: str, module: torch.nn.Module) -> None:
        def scale(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            if factor == 1:
                lengths[block, part].append(output.norm(dim=-1).mean().item())
            return output * factor if part == "routed" else output

        module.register_forward_hook(scale)

    model: Any = scorer.model
    for number, block in enumerate(model.transformer.h):
        if isinstance(block.mlp, MoELayer):
            watch(number, "routed", block.mlp.experts)
            if block.mlp.shared_experts is not None:
                watch(number, "shared", block.mlp.shared_experts)
    as_it_is = scorer.nats(names, attributes)
    for (number, part), measured in lengths.items():
        print(f"block {number}, {part} experts: mean length of the output {np.mean(measured):.2f}")
    for factor in options.factors:
        nats = scorer.nats(names, attributes)
        bits, apart = nats.sum() / characters / np.log(2), (nats - as_it_is).sum() / characters / np.log(2)
        print(f"routed output x {factor:g}: {bits:.4f} bits per character, {apart:+.4f}")


if __name__ == "__main__":
    main()
