"""Do experts or width help a student from its first step on? It learns with MLPs of 1,280 hidden units, of 5,120, and
with 16 experts of 320 in every block.

    python benchmarks/student_capacity.py --names data/teacher-names.jsonl [--steps 1000] [--only wide] [--out FILE]

The three start with the same embeddings and attention and read the same names in the same order (the teacher's, with
cached logits, and the real ones), as in configs/student.yaml. Of the 16 experts a token takes four: the FLOPs of the
first model, the weights of the second. A run that was interrupted resumes; finished ones are only collected.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2LMHeadModel, PreTrainedModel

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.scoring import SUFFIX
from flash_experts.training.build import build_model
from flash_experts.training.tracking import read_metrics
from flash_experts.training.training_config import ModelConfig

HIDDEN, EXPERTS, PER_TOKEN = 5120, 16, 4
KINDS = ("dense", "wide", "experts")
_OWN = ("model_type", "architectures", "transformers_version")


def make_bases(folder: Path) -> None:
    """Writes untrained students that share everything but their MLPs."""
    settings = yaml.safe_load(Path("configs/student.yaml").read_text(encoding="utf-8"))["model"]
    dense, tokenizer = build_model(None, ModelConfig(**settings), [], 0)
    torch.manual_seed(1)
    config: Any = copy.deepcopy(dense.config)
    config.n_inner = HIDDEN
    shared = {name: value for name, value in dense.config.to_dict().items() if name not in _OWN}
    experts = GPT2MoEConfig(
        **shared, num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, moe_layer_freq=1,
        moe_intermediate_size=HIDDEN // EXPERTS, router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
    )  # fmt: skip
    models: tuple[PreTrainedModel, ...] = (dense, GPT2LMHeadModel(config), GPT2MoEForCausalLM(experts))
    for kind, model in zip(KINDS, models, strict=True):
        own = model.state_dict()
        for name, value in dense.state_dict().items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
        model.save_pretrained(folder / f"{kind}0")
        tokenizer.save_pretrained(folder / f"{kind}0")


def train(kind: str, names: Path, folder: Path, steps: int) -> None:
    settings = {
        "output_dir": folder, "run_name": kind, "seed": 0, "max_steps": steps, "max_epochs": "null", "schedule": "wsd",
        "decay_share": 0.25, "warmup_steps": 100, "eval_every": 250, "teacher": names.with_suffix(SUFFIX),
        # The output of four experts is their mean, and each is a quarter of the dense MLP.
        "lr_scale.experts": 2 if kind == "experts" else 1,
    }  # fmt: skip
    given = [f"--training.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "flash_experts", "train", "--config", "names", "--extra-names", str(names)]
    model = ["--base", str(folder / f"{kind}0"), "--model.num-experts", "0", "--model.num-experts-per-tok", "1"]
    subprocess.run([*command, *model, *given], check=True)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Parameters, tokens per second and validations of the runs that are there."""
    found = []
    for kind in KINDS:
        if not (folder / kind / "metrics.jsonl").exists():
            continue
        run = json.loads((folder / kind / "run.json").read_text(encoding="utf-8"))
        validations = read_metrics(folder / kind / "metrics.jsonl", "validation")
        speeds = sorted(line["tokens_per_second"] for line in read_metrics(folder / kind / "metrics.jsonl", "train"))
        keys = ("step", "tokens", "validation/bits_per_char", "validation/bits_per_char_given_attributes")
        found.append(
            {
                "kind": kind,
                "parameters": run["model"]["parameters"]["total"],
                "tokens_per_second": speeds[len(speeds) // 2],
                "validations": [{key: line[key] for key in keys} for line in validations],
            }
        )
    return found


def compared(folder: Path) -> dict[str, Any]:
    """Bits on both tests with 95% intervals, and the paired differences (first less second)."""
    command = [sys.executable, "-m", "flash_experts", "compare", *(str(folder / kind) for kind in KINDS)]
    options = ["--samples", "0", "--json", "--overwrite", "--out", str(folder / "report.html")]
    found = json.loads(subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE).stdout)
    keys = ("unconditional", "conditional")
    bits = {
        model["label"]: {split: {key: scores[key] for key in keys} for split, scores in model["splits"].items()}
        for model in found["models"]
    }
    return {"tests": bits, "differences": found["differences"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=Path, required=True, help="names of a teacher, with their top logits beside")
    parser.add_argument("--folder", type=Path, default=Path("build/student_capacity"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.folder / "experts0").exists():
        make_bases(args.folder)
    for kind in [args.only] if args.only else KINDS:
        train(kind, args.names, args.folder, args.steps)
    result: dict[str, Any] = {"torch": torch.__version__, "threads": os.environ.get("OMP_NUM_THREADS")}
    result["rows"] = collect(args.folder)
    if len(result["rows"]) == len(KINDS):
        result |= compared(args.folder)
    text = json.dumps(result, indent=2) + "\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
