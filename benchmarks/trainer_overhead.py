"""Trainer overhead over a bare loop of forward, backward and optimizer step, on this machine.

    python benchmarks/trainer_overhead.py [--steps 30] [--tokens 2048] [--experts 8] [--out result.json]

Both train the same model (models/mtg-base, upcycled) from the same weights on the same packed sequences, alternating
every two steps, so that other load affects both. The bare loop has its batches ready; the trainer packs names, seeds
dropout, computes the gradient norm, checks for NaN/Inf, updates router biases and logs. Validations, samples and
checkpoints are not included. The losses of both must be equal, or the comparison is not valid.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as our commands set it, for both
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from flash_experts.data.packing import pack
from flash_experts.data.prepare import load_split
from flash_experts.training import Callback, Trainer, TrainingConfig
from flash_experts.training.build import build_model
from flash_experts.training.training_config import ModelConfig

TURN = 2
RATE = 1e-4


class BareLoop(Callback):
    """Trains a copy of the model for one turn each time the trainer logs."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.losses: dict[str, list[float]] = {"trainer": [], "bare": []}

    def begin(self, trainer: Trainer, steps: int) -> None:
        self.bfloat16 = trainer.autocast
        self.model = copy.deepcopy(trainer.model).train()
        decays = [group["weight_decay"] for group in trainer.optimizers["optimizer"].param_groups]
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        own = dict(self.model.named_parameters())
        groups = [
            {"params": [own[names[parameter]] for parameter in group["params"]], "weight_decay": decay}
            for group, decay in zip(trainer.optimizers["optimizer"].param_groups, decays, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.rows = [trainer.batches.micro_batches_of_step(step, 1)[0] for step in range(steps)]
        self.inputs = [pack(row) for row in self.rows]
        self.start = time.perf_counter()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Alternates (trainer, bare, bare, trainer): oneDNN compiles code for new shapes, which slows the first."""
        self.seconds["trainer"].append(time.perf_counter() - self.start)
        self.losses["trainer"].append(metrics["loss"])
        turn = step // TURN
        if turn % 2:
            self.turn(turn)
            if turn * TURN < len(self.inputs):
                self.turn(turn + 1)
        self.start = time.perf_counter()

    def turn(self, turn: int) -> None:
        start = time.perf_counter()
        total = torch.zeros(())
        for inputs in self.inputs[(turn - 1) * TURN : turn * TURN]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                loss = self.model(**inputs.inputs_with_loss(inputs.labels.numel())).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        self.losses["bare"].append(total.item() / TURN)
        self.seconds["bare"].append(time.perf_counter() - start)


def measure(steps: int, tokens: int, experts: int, base: str, data: str, precision: str = "float32") -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cards = load_split(data, "train")
        model, tokenizer = build_model(base, ModelConfig(num_experts=experts, dropout=0.0), cards, seed=0)
        config = TrainingConfig(
            output_dir=folder,
            run_name="run",
            max_steps=steps,
            max_epochs=None,
            tokens_per_batch=tokens,
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            clip_norm=None,
            log_every=TURN,
            eval_every=None,
            checkpoint_every=None,
            device="cpu",
            precision=precision,  # type: ignore[arg-type]
        )
        bare = BareLoop()
        trainer = Trainer(model, tokenizer, cards, [], config, [bare])
        bare.begin(trainer, steps)
        trainer.train()
    # The first two turns are warm-up, and create the optimizer states.
    seconds = {side: turns[2:] for side, turns in bare.seconds.items()}
    ratios = [mine / theirs for mine, theirs in zip(seconds["trainer"], seconds["bare"], strict=True)]
    difference = max(abs(a - b) for a, b in zip(bare.losses["trainer"], bare.losses["bare"], strict=True))
    return {
        "model": f"{base}, {experts} experts",
        "precision": precision,
        "tokens_per_step": tokens,
        "steps_each": TURN * len(ratios),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trainer_seconds_per_step": statistics.median(seconds["trainer"]) / TURN,
        "bare_seconds_per_step": statistics.median(seconds["bare"]) / TURN,
        "ratio_of_sums": sum(seconds["trainer"]) / sum(seconds["bare"]),
        "median_ratio_of_turns": statistics.median(ratios),
        "ratios_of_turns": [round(ratio, 3) for ratio in ratios],
        "largest_difference_of_losses": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of the trainer")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--experts", type=int, default=8, help="number of experts; 0: the dense model")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--base", default="models/mtg-base")
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    result = measure(args.steps, args.tokens, args.experts, args.base, args.data, args.precision)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    if result["largest_difference_of_losses"] > 1e-4:
        raise SystemExit("the losses of the two differ, so the comparison is not valid")


if __name__ == "__main__":
    main()
