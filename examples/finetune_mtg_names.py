"""Upcycles the dense GPT-2 of the repository into experts and fine-tunes it on card names, in Python.

    python examples/finetune_mtg_names.py [MINUTES]

The command line does the same: ``flash-experts train --config configs/quickstart.yaml``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.router_metrics import router_metrics
from flash_experts.training.trainer import Trainer
from flash_experts.training.training_config import TrainingConfig

ROOT = Path(__file__).parent.parent
BASE = ROOT / "models/mtg-base"  # any dense GPT-2 does: a folder, or "openai-community/gpt2" from the hub


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    data = ROOT / "data/mtg"
    prepare(out=data)  # says and does nothing new if it was done before

    # Four copies of each second block's MLP and a router that chooses two of them for each token. The copies are
    # equal and the gates sum to one, so the model computes what the dense one did, until training parts them.
    model = GPT2MoEForCausalLM.from_dense(BASE, num_experts=4, num_experts_per_tok=2, moe_layer_freq=2)

    config = TrainingConfig(
        output_dir=str(ROOT / "models"),
        run_name="example",
        max_epochs=None,
        max_minutes=minutes,
        tokens_per_batch=2048,
        learning_rate=5e-4,
        eval_every=100,
    )
    trainer = Trainer(model, load_tokenizer(BASE), load_split(data, "train"), load_split(data, "validation"), config)
    result = trainer.train(resume="auto")
    print(f"{result.step} steps, best {result.best_bits_per_char:.3f} bits per character, in {result.run_dir}")
    for name, value in router_metrics(model).items():
        print(f"    {name} {value:.2f}")


if __name__ == "__main__":
    main()
