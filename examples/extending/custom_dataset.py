"""A custom dataset: here names of cities. Any list works, one name per line.

python examples/extending/custom_dataset.py [NAMES.txt] [MODEL]

`prepare` cleans the list and splits it by family, `Trainer` fine-tunes a model on it, and `NameGenerator` makes new
names, none of them in the list. Other columns of CSV or JSON files (type_line, colors, mana_value) are attributes that
names can be conditioned on. The commands do the same:

flash-experts prepare --source NAMES.txt --out data/cities
flash-experts train --config quickstart --data data/cities --training.run-name cities
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flash_experts import NameGenerator
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_model
from flash_experts.training import Callback, Trainer, TrainingConfig

HERE = Path(__file__).resolve().parent
BASE = HERE.parents[1] / "models/mtg-base"


class Curve(Callback):
    """Records the bits per character of each validation."""

    def __init__(self) -> None:
        self.bits: list[float] = []

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self.bits.append(metrics["validation/bits_per_char"])


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "cities.txt"
    base = sys.argv[2] if len(sys.argv) > 2 else BASE
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(source, Path(folder) / "data")
        print(f"{facts['names']} names, {facts['counts']}")
        train, validation = (load_split(Path(folder) / "data", split) for split in ("train", "validation"))
        model, tokenizer = load_model(base, "cpu"), load_tokenizer(base)
        config = TrainingConfig(
            output_dir=folder,
            run_name="cities",
            max_steps=30,
            max_epochs=None,
            tokens_per_batch=400,
            learning_rate=2e-4,
            attribute_dropout=1.0,  # a plain list has no attributes
            log_every=10,
            eval_every=10,
            checkpoint_every=None,
        )
        curve = Curve()
        result = Trainer(model, tokenizer, train, validation, config, [curve]).train()
        print("validation, bits per character:", *(f"{bits:.2f}" for bits in curve.bits))

        # Names that are never generated: those of the list instead of all real cards.
        listed = source.read_text("utf-8").splitlines()
        generator = NameGenerator(load_model(result.run_dir, "cpu"), tokenizer, known_names=listed)
    for name in generator.generate(12, max_words=1, seed=7):
        print(f"  {name.text:16} nearest in the list: {name.nearest_card}")


if __name__ == "__main__":
    main()
