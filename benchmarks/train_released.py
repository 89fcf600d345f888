"""Trains the released models, and tests the claim behind them: does a mixture of experts beat the dense model?

    python benchmarks/train_released.py                       # everything: search, three seeds, evaluation, release
    python benchmarks/train_released.py --epochs 2 --seeds 0  # a quick look

One dense base (configs/english.yaml, models/english) is fine-tuned by configs/names.yaml, once as it is and once for
each way to make experts of it, on the same names in the same order for as many steps. The mixtures differ in what the
search is about; the best on the validation split is run with the other seeds too, and only then are both tests read,
once. Runs that are finished are not run again, and an interrupted one goes on.

Printed, and written as JSON to --out: bits per character on validation of every run; on the tests, of the dense model
and of the best mixture at each seed, their paired difference, seconds and floating-point operations of training.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers

from flash_experts.evaluation import EvaluationResult, evaluate
from flash_experts.evaluation.metrics import paired_bits_difference
from flash_experts.training.tracking import read_metrics
from flash_experts.training.validation import BITS_PER_CHAR

DENSE = "dense"
# What is searched: options of `flash-experts train` over configs/names.yaml.
CONTENDERS: dict[str, dict[str, str]] = {
    DENSE: {"model.num_experts": "0", "model.upcycling": "copy", "model.granularity": "1"},
    "shared-32x4": {},  # as configs/names.yaml has it
    "granular-16x2": {"model.upcycling": "granular", "model.granularity": "2"},  # no more arithmetic than dense
    "copy-8x1": {"model.upcycling": "copy", "model.granularity": "1"},
    "copy-8x2": {"model.upcycling": "copy", "model.granularity": "1", "model.num_experts_per_tok": "2"},
    "shared-every-block": {"model.moe_layer_freq": "1"},
}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: where it is, and what its record says."""

    contender: str
    seed: int
    folder: Path
    validation: float
    steps: int
    seconds: float


def train(contender: str, seed: int, args: argparse.Namespace) -> Run:
    """Runs `flash-experts train`, or reads what it left."""
    name = f"released-{contender}-{seed}"
    options = CONTENDERS[contender] | {
        "base": str(args.base),
        "data": str(args.data),
        "training.run_name": name,
        "training.output_dir": str(args.models),
        "training.max_epochs": str(args.epochs),
        "seed": str(seed),
    }
    command = [sys.executable, "-m", "flash_experts.cli", "train", "--config", "configs/names.yaml"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True)
    lines = read_metrics(args.models / name / "metrics.jsonl")
    best = min(line[BITS_PER_CHAR] for line in lines if BITS_PER_CHAR in line)
    last = [line for line in lines if line.get("event") == "train"][-1]
    return Run(contender, seed, args.models / name, best, last["step"], last["seconds"])


def differences(firsts: Sequence[EvaluationResult], seconds: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Bits of the first models less those of the second on the same names, seed by seed and in the mean."""
    found: dict[str, Any] = {}
    for split in firsts[0].splits:
        pairs = [
            paired_bits_difference(a.nats[split].unconditional, b.nats[split].unconditional, a.nats[split].characters)
            for a, b in zip(firsts, seconds, strict=True)
        ]
        values = [pair.value for pair in pairs]
        found[split] = {
            "each": [asdict(pair) for pair in pairs],
            "mean": mean(values),
            "deviation": stdev(values) if len(values) > 1 else None,
        }
    return found


def figures(run: Run, result: EvaluationResult) -> dict[str, Any]:
    """What is kept of one run's evaluation."""
    bits = {
        split: {"unconditional": asdict(of.unconditional), "conditional": asdict(of.conditional)}
        for split, of in result.splits.items()
    }
    return asdict(run) | {"size": asdict(result.size), "flops": result.costs.training_flops, "bits": bits}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--base", type=Path, default=Path("models/mtg-base"), help="the dense base")
    parser.add_argument("--data", type=Path, default=Path("data/mtg"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the runs")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/released.json"))
    args = parser.parse_args()

    search = [train(contender, args.seeds[0], args) for contender in dict.fromkeys([DENSE, *args.contenders])]
    for run in search:
        print(f"{run.contender:>14}  validation {run.validation:.4f}  {run.steps:,} steps  {run.seconds:.0f} s")
    best = min((run for run in search if run.contender != DENSE), key=lambda run: run.validation).contender
    runs = {
        contender: [train(contender, seed, args) for seed in args.seeds] for contender in (DENSE, best)
    }  # those of the search are read again, not run
    results = {name: [evaluate(run.folder, args.data, samples=0) for run in some] for name, some in runs.items()}
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "epochs": args.epochs,
        "search": [asdict(run) for run in search],
        "best": best,
        "runs": {name: list(map(figures, runs[name], results[name])) for name in runs},
        "best_less_dense": differences(results[best], results[DENSE]),
    }
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    for split, difference in report["best_less_dense"].items():
        print(f"{best} less dense on {split}: {difference['mean']:+.4f} bits per character, seeds {args.seeds}")
    print(f"written to {args.out}; release with scripts/release_model.py {runs[best][0].folder} models/mtg-names")


if __name__ == "__main__":
    main()
