"""Trains the released models, and tests the claim behind them: does a mixture of experts beat the dense model?

    python benchmarks/train_released.py                              # everything: hours on two cores
    python benchmarks/train_released.py --contenders dense shared --seeds 0     # a part of it

Every contender starts from the same dense model that has read English (configs/english.yaml) and ends with the same
names in the same order for as many steps (configs/names.yaml, configs/names-dense.yaml). They differ in what grows,
and when: nothing (dense); more hidden units in each MLP (dense models of as many parameters as work on a token in the
mixture, or as it has in all; scripts/widen.py); experts. It grows before the names are learned, from models/mtg-base,
or a stage earlier, before the phrases that are told what card they could be (configs/told.yaml).

Other ways to make the experts are searched at the first seed; one that is the best mixture on the validation split
joins the others, which run at all seeds, and only then are both tests read, once. Runs that are finished are not run
again, and an interrupted one goes on.

Printed, and written as JSON to --out: bits per character on validation of every run; on the tests, of each contender at
each seed, the paired differences from the dense model, seconds and floating-point operations of training.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
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

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
EXPERTS = {  # as configs/names.yaml has them
    "model.upcycling": "shared",
    "model.granularity": "4",
    "model.num_experts": "8",
    "model.num_experts_per_tok": "1",
    "model.moe_layer_freq": "2",
    "model.router_aux_loss_coef": "0.01",
    "model.router_z_loss_coef": "0.001",
}


@dataclass(frozen=True, slots=True)
class Contender:
    """What grows, and when.

    Attributes:
        hidden: units of each MLP of a dense model that is widened; None leaves it as it is.
        early: it grows before configs/told.yaml, not after.
        options: of `flash-experts train` over configs/names.yaml; None for a dense model.
        searched: runs at the first seed only, unless it wins there.
    """

    hidden: int | None = None
    early: bool = False
    options: Mapping[str, str] | None = None
    searched: bool = False


ACTIVE, TOTAL = 1536, 5120  # hidden units with which a dense model has the mixture's parameters: per token, in all
DENSE = "dense"
CONTENDERS = {
    DENSE: Contender(),
    "dense-active": Contender(hidden=ACTIVE),
    "dense-active-early": Contender(hidden=ACTIVE, early=True),
    "dense-total": Contender(hidden=TOTAL),
    "shared": Contender(options={}),
    "shared-early": Contender(early=True, options={}),
} | {
    name: Contender(options=options, searched=True)
    for name, options in {
        "shared-fast": {"training.lr_scale.experts": "8"},
        "granular-16x2": {"model.upcycling": "granular", "model.granularity": "2"},  # no more arithmetic than dense
        "copy-8x2": {"model.upcycling": "copy", "model.granularity": "1", "model.num_experts_per_tok": "2"},
        "shared-every-block": {"model.moe_layer_freq": "1"},
    }.items()
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


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the runs begin and where they are kept."""

    english: Path
    base: Path
    data: Path
    told: Path
    models: Path
    epochs: float

    def start_of(self, name: str) -> Path:
        """The model that a contender learns names from, made if it is not there."""
        contender = CONTENDERS[name]
        start = self.english if contender.early else self.base
        if contender.hidden is not None:
            wide = self.models / f"wide-{contender.hidden}-{start.name}"
            if not wide.exists():
                command = [sys.executable, str(SCRIPTS / "widen.py"), str(start), str(wide)]
                subprocess.run([*command, "--hidden", str(contender.hidden)], check=True)
            start = wide
        if contender.early:
            grown = {} if contender.options is None else EXPERTS
            start = self._train("told", f"released-{name}-told", grown | {"base": str(start), "data": str(self.told)})
        return start

    def run(self, name: str, seed: int) -> Run:
        """Learns names, or reads what a finished run left."""
        options = CONTENDERS[name].options
        shared = {"base": str(self.start_of(name)), "data": str(self.data), "seed": str(seed)}
        config = "names-dense" if options is None else "names"
        folder = self._train(
            config,
            f"released-{name}-{seed}",
            {**(options or {}), **shared, "training.max_epochs": str(self.epochs)},
        )
        lines = read_metrics(folder / "metrics.jsonl")
        best = min(line[BITS_PER_CHAR] for line in lines if BITS_PER_CHAR in line)
        last = [line for line in lines if line.get("event") == "train"][-1]
        return Run(name, seed, folder, best, last["step"], last["seconds"])

    def _train(self, config: str, name: str, options: Mapping[str, str]) -> Path:
        if _is_finished(self.models / name):
            return self.models / name
        named = {"training.run_name": name, "training.output_dir": str(self.models)}
        command = [sys.executable, "-m", "flash_experts.cli", "train", "--config", f"configs/{config}.yaml"]
        subprocess.run([*command, *(f"--{key}={value}" for key, value in {**options, **named}.items())], check=True)
        return self.models / name


def _is_finished(folder: Path) -> bool:
    """Whether a run came to its end: its last line of training has nothing left to do."""
    if not (folder / "model.safetensors").exists():
        return False
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line.get("event") == "train"]
    return bool(lines) and lines[-1]["eta_seconds"] == 0


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


def compete(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The search at the first seed, the finals at all of them, the tests."""
    search = [bench.run(name, seeds[0]) for name in names]
    for run in search:
        print(f"{run.contender:>20}  validation {run.validation:.4f}  {run.steps:,} steps  {run.seconds:.0f} s")
    mixtures = [run for run in search if CONTENDERS[run.contender].options is not None]
    best = min(mixtures, key=lambda run: run.validation).contender if mixtures else None
    finals = [name for name in names if not CONTENDERS[name].searched or name == best]
    runs = {name: [bench.run(name, seed) for seed in seeds] for name in finals}  # those of the search are only read
    results = {name: [evaluate(run.folder, bench.data, samples=0) for run in some] for name, some in runs.items()}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "epochs": bench.epochs,
        "search": [asdict(run) for run in search],
        "best": best,
        "runs": {name: list(map(figures, runs[name], results[name])) for name in runs},
        "less_dense": {name: differences(results[name], results[DENSE]) for name in runs if name != DENSE},
    }


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--english", type=Path, default=Path("models/english"), help="what configs/english.yaml made")
    parser.add_argument("--base", type=Path, default=Path("models/mtg-base"), help="what configs/told.yaml made of it")
    parser.add_argument("--data", type=Path, default=Path("data/mtg"))
    parser.add_argument("--told", type=Path, default=Path("data/told"), help="what scripts/tell_phrases.py wrote")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the runs")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/released_2cores.json"))
    args = parser.parse_args()

    bench = Bench(args.english, args.base, args.data, args.told, args.models, args.epochs)
    report = compete(bench, list(dict.fromkeys([DENSE, *args.contenders])), args.seeds)
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    for name, difference in report["less_dense"].items():
        for split, of in difference.items():
            print(f"{name} less dense on {split}: {of['mean']:+.4f} bits per character, seeds {args.seeds}")
    released = args.models / f"released-{report['best']}-{args.seeds[0]}"
    print(f"written to {args.out}; release with scripts/release_model.py {released} models/mtg-names --overwrite")


if __name__ == "__main__":
    main()
