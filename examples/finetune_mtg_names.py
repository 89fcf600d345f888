"""Upcycles the dense GPT-2 of this checkout to a Mixture of Experts (MoE) model and fine-tunes it on card names.

    python examples/finetune_mtg_names.py                       # three minutes on two cores
    python examples/finetune_mtg_names.py --minutes 30 --base openai-community/gpt2 --run-name gpt2-moe

All settings are those of configs/quickstart.yaml. The command line does the same, and continues the same run:
``flash-experts prepare``, then ``flash-experts train --config quickstart``.
docs/monitoring.md explains what wandb records, in ./wandb of this checkout.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def finetune(base: str | None, overrides: list[str]) -> None:
    from flash_experts.cli import parse

    settings = parse("train", ["--config", "configs/quickstart.yaml", *overrides])
    settings.training.validate()
    base = base or settings.base

    say("importing PyTorch and transformers")
    from flash_experts.commands.train import SampleNames
    from flash_experts.data.prepare import load_meta, load_split, prepare
    from flash_experts.training import Trainer
    from flash_experts.training.build import build_model, settings_in_force
    from flash_experts.training.tracking import read_metrics

    if not Path(settings.data, "meta.json").is_file():
        say(f"preparing card names in {settings.data}")
        prepare(out=settings.data)
    train, validation = load_split(settings.data, "train"), load_split(settings.data, "validation")

    # Every second block's MLP becomes experts and a router that sends each token to two of them. The experts are equal
    # copies and the gates sum to one: the model computes what the dense one did, until training makes them differ.
    # `build_model` calls GPT2MoEForCausalLM.from_dense(base, num_experts=8, num_experts_per_tok=2, moe_layer_freq=2).
    settings.model = settings_in_force(base, settings.model)  # a base with experts has its own
    say(f"loading {base} and upcycling its MLPs to {settings.model.num_experts} experts")
    model, tokenizer = build_model(base, settings.model, train, settings.training.seed)

    trainer = Trainer(
        model,
        tokenizer,
        train,
        validation,
        settings.training,
        callbacks=[SampleNames()],
        data_info=load_meta(settings.data),
        origin={"base": base, "data": settings.data, "extra_names": None, "model": asdict(settings.model)},
    )
    result = trainer.train(resume="auto")
    bits = {line["step"]: line for line in read_metrics(result.run_dir / "metrics.jsonl", "validation")}
    print(f"\n{'bits per character':24}{'unconditional':>16}{'given attributes':>20}{'mean':>8}")
    for label, step in ("before", 0), (f"best, step {result.best_step}", result.best_step):
        values = [bits[step][f"validation/bits_per_char{kind}"] for kind in ("", "_given_attributes", "_mean")]
        print("{:24}{:16.3f}{:20.3f}{:8.3f}".format(label, *values))
    print(f"The best model is in {result.run_dir.resolve()}\nNext: python examples/generate_mtg_names.py")


def say(text: str) -> None:
    print(f"{text} ...", flush=True)


def main() -> None:
    more = (
        "Keys of the YAML file can follow, as on the command line: --training.learning-rate 1e-3 --model.num-experts 4"
    )
    parser = argparse.ArgumentParser(
        description="Fine-tune a MoE model on card names.", epilog=more, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(str(message).split())}\n")
    parser.add_argument("--minutes", type=float, help="time for training and all validations (default: 3)")
    parser.add_argument("--base", help="dense GPT-2, a folder or a hub id (default: models/mtg-base)")
    parser.add_argument("--run-name", help="folder under models/ (default: quickstart); an existing run is continued")
    options, keys = parser.parse_known_args()
    if keys and not keys[0].startswith(("--training.", "--model.")):
        parser.error(f"unknown argument {keys[0]!r}: see --help")
    given = {"max_minutes": options.minutes, "run_name": options.run_name}
    keys += [f"--training.{key}={value}" for key, value in given.items() if value is not None]
    base = os.path.abspath(options.base) if options.base and os.path.exists(options.base) else options.base
    say(f"fine-tuning with configs/quickstart.yaml in {ROOT}")
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our lines alone, without transformers' in between
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        finetune(base, keys)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
