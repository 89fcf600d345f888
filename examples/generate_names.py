"""New card names from any model folder.

python examples/generate_names.py                        # the best model that is here
python examples/generate_names.py models/my-run --count 10 --starts-with Storm --seed 7
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flash_experts import NameGenerator

MODELS = Path(__file__).resolve().parents[1] / "models"
# Your own fine-tuned models first, then the one that comes with the repository.
CANDIDATES = (MODELS / "mtg-names", MODELS / "quickstart", MODELS / "mtg-base")


def default_model() -> Path:
    """The first model folder that exists."""
    for folder in CANDIDATES:
        if (folder / "config.json").is_file():
            return folder
    raise SystemExit("no model here yet: run `make demo`, or give a model folder as the argument")


def main() -> None:
    parser = argparse.ArgumentParser(description="New card names, none of them a real card")
    parser.add_argument("model", nargs="?", help="a folder that save_pretrained wrote, or a hub id")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--preset", default="balanced", help="conservative, balanced or creative")
    parser.add_argument("--starts-with")
    parser.add_argument("--max-words", type=int)
    parser.add_argument("--like", help='examples: "Goblin Guide; Lightning Bolt"')
    parser.add_argument("--best-of", type=int, default=1, help="draw so many for each name, keep the most natural")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()

    try:
        # Loads the model and its tokenizer; every real card's name is known to it, so none comes out.
        generator = NameGenerator.from_pretrained(options.model or default_model())
        names = generator.generate(
            options.count,
            preset=options.preset,
            starts_with=options.starts_with,
            max_words=options.max_words,
            like=options.like,
            best_of=options.best_of,
            seed=options.seed,
        )
    except ValueError as error:  # says what is wrong and what to do
        raise SystemExit(f"error: {error}") from None

    for name in names:
        # log_prob: how natural the model finds the name. similarity: how near it is to a card that exists.
        print(f"{name.text:<42}{name.log_prob:8.1f}   {name.similarity:4.0%} like {name.nearest_card}")


if __name__ == "__main__":
    main()
