"""Trains the released models and tests their claim: does an MoE model beat dense baselines?

    python benchmarks/train_released.py                              # everything: hours on two cores
    python benchmarks/train_released.py --contenders dense moe --seeds 0     # a part of it

Every contender has the same two training stages: distillation on names from a teacher and real names at a constant
learning rate (configs/student.yaml), then the same data while it falls to 0 (configs/names.yaml). They differ in added
parameters: none (dense); more hidden units in each MLP (scripts/widen.py), for dense models with the active or the
total parameters of the MoE model; experts. Parameters are added between the stages, to models/student, or before the
first (early).

Both test sets are used once, at the end. Finished runs are not repeated, and interrupted runs resume.

Prints, and writes as JSON to --out: validation bits per character of every run; on the tests, bits of each contender
and seed, paired differences from the dense model, seconds and FLOPs of training.
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
import yaml

from flash_experts.evaluation import EvaluationResult, evaluate
from flash_experts.evaluation.metrics import paired_bits_difference
from flash_experts.training.tracking import BITS_PER_CHAR, read_metrics

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
MOE_FIELDS = ("upcycling", "granularity", "num_experts", "num_experts_per_tok", "moe_layer_freq")


@dataclass(frozen=True, slots=True)
class Contender:
    """Added parameters of a contender.

    Attributes:
        hidden: hidden units of each MLP after widening; None for no widening.
        experts: whether it has the experts of configs/names.yaml.
        early: whether they are added before configs/student.yaml.
    """

    hidden: int | None = None
    experts: bool = False
    early: bool = False


ACTIVE, TOTAL = 1792, 2304  # hidden units of dense models with the active and the total parameters of the MoE model
DENSE = "dense"
CONTENDERS = {
    DENSE: Contender(),
    "dense-active": Contender(hidden=ACTIVE),
    "dense-total": Contender(hidden=TOTAL),
    "moe": Contender(experts=True),
    "moe-early": Contender(experts=True, early=True),
}


def experts_of_release() -> dict[str, str]:
    """Reads the options of the experts from configs/names.yaml."""
    model = yaml.safe_load((ROOT / "configs/names.yaml").read_text("utf-8"))["model"]
    return {f"model.{name}": str(model[name]) for name in MOE_FIELDS if name in model}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run and its recorded metrics."""

    contender: str
    seed: int
    folder: Path
    validation: float
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Bench:
    """Folders of the base model, the data and the runs."""

    base: Path
    data: Path
    models: Path

    def run(self, name: str, seed: int) -> Run:
        """Trains a contender, or reads its finished run."""
        contender = CONTENDERS[name]
        options = {"base": str(self._start_of(name, seed)), "data": str(self.data), "seed": str(seed)}
        if not contender.experts or contender.early:
            options["model.num_experts"] = "0"  # keep the experts of the start
        folder = self._train("names", f"released-{name}-{seed}", options)
        lines = read_metrics(folder / "metrics.jsonl")
        best = min(line[BITS_PER_CHAR] for line in lines if BITS_PER_CHAR in line)
        last = [line for line in lines if line.get("event") == "train"][-1]
        return Run(name, seed, folder, best, last["step"], last["seconds"])

    def _start_of(self, name: str, seed: int) -> Path:
        """Returns the model at the start of the second stage, and makes it if it does not exist."""
        contender = CONTENDERS[name]
        if contender.early:
            options = experts_of_release() | {"data": str(self.data), "seed": str(seed)}
            return self._train("student", f"released-{name}-student-{seed}", options)
        if contender.hidden is None:
            return self.base
        wide = self.models / f"wide-{contender.hidden}-{self.base.name}"
        if not wide.exists():
            command = [sys.executable, str(SCRIPTS / "widen.py"), str(self.base), str(wide)]
            subprocess.run([*command, "--hidden", str(contender.hidden)], check=True)
        return wide

    def _train(self, config: str, name: str, options: Mapping[str, str]) -> Path:
        if _is_finished(self.models / name):
            return self.models / name
        named = {"training.run_name": name, "training.output_dir": str(self.models)}
        command = [sys.executable, "-m", "flash_experts.cli", "train", "--config", f"configs/{config}.yaml"]
        subprocess.run([*command, *(f"--{key}={value}" for key, value in {**options, **named}.items())], check=True)
        return self.models / name


def _is_finished(folder: Path) -> bool:
    """Whether a run is finished: the last training line has no time left."""
    if not (folder / "model.safetensors").exists():
        return False
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line.get("event") == "train"]
    return bool(lines) and lines[-1]["eta_seconds"] == 0


def differences(firsts: Sequence[EvaluationResult], seconds: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Computes paired differences of bits on the same names, by seed and on average."""
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


def results_of(run: Run, result: EvaluationResult) -> dict[str, Any]:
    """Collects the results of one run."""
    bits = {
        split: {"unconditional": asdict(of.unconditional), "conditional": asdict(of.conditional)}
        for split, of in result.splits.items()
    }
    return asdict(run) | {"size": asdict(result.size), "flops": result.costs.training_flops, "bits": bits}


def compete(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Trains all runs, then evaluates them on the tests."""
    runs = {name: [bench.run(name, seed) for seed in seeds] for name in names}
    for run in (run for some in runs.values() for run in some):
        print(f"{run.contender:>20}  validation {run.validation:.4f}  {run.steps:,} steps  {run.seconds:.0f} s")
    results = {name: [evaluate(run.folder, bench.data, samples=0) for run in some] for name, some in runs.items()}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": {name: list(map(results_of, runs[name], results[name])) for name in runs},
        "less_dense": {name: differences(results[name], results[DENSE]) for name in runs if name != DENSE},
    }


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--base", type=Path, default=Path("models/student"), help="model from configs/student.yaml")
    parser.add_argument("--data", type=Path, default=Path("data/mtg"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/released_2cores.json"))
    args = parser.parse_args()

    bench = Bench(args.base, args.data, args.models)
    report = compete(bench, list(dict.fromkeys([DENSE, *args.contenders])), args.seeds)
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    for name, difference in report["less_dense"].items():
        for split, of in difference.items():
            print(f"{name} minus dense on {split}: {of['mean']:+.4f} bits per character, seeds {args.seeds}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
