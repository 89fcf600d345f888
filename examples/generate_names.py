"""New card names from your own fine-tuned model, or from the released one, with several sampling settings.

python examples/generate_names.py                        # the newest run under models/, else models/mtg-names
python examples/generate_names.py models/my-run --count 10 --starts-with Storm --seed 7
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
MODELS = Path(__file__).resolve().parents[1] / "models"
RELEASED = "mtg-names", "mtg-base"  # models in the repository
FILES = "config.json", "model.safetensors", "tokenizer.json", "run.json"
PRESETS = "conservative", "balanced", "creative"


def find_model(given: str | None = None) -> str:
    """The model given, else the newest complete run of your own, else the released model. Prints which one it is."""
    found = [folder for folder in MODELS.glob("*") if all((folder / name).is_file() for name in FILES)]
    own = [folder for folder in found if folder.name not in RELEASED]
    newest = max(own, key=lambda folder: (folder / "model.safetensors").stat().st_mtime, default=None)
    model, source = given, "given"
    if model is None and newest is not None:
        model, source = str(newest), "your newest run"
    elif model is None:
        model, source = str(MODELS / RELEASED[0]), "released with the repository; no run of your own is in models/"
    print(f"model: {model} ({source})", flush=True)
    return model


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(str(message).split())}\n")
    parser.add_argument("model", nargs="?", help="folder or hub id (default: your newest run under models/)")
    parser.add_argument("--count", type=int, default=20, help="number of names (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    return parser


def print_columns(columns: Mapping[str, Sequence[str]]) -> None:
    """Prints lists side by side, each under its label."""
    widths = [max(map(len, (label, *values))) + 3 for label, values in columns.items()]
    for row in (tuple(columns), *zip(*columns.values(), strict=False)):
        print("    " + "".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def main() -> None:
    parser = make_parser("New card names, none of them a real card.")
    parser.add_argument("--starts-with", help="first characters of each name")
    parser.add_argument("--max-words", type=int, help="most words of a name")
    parser.add_argument("--like", help='examples: "Goblin Guide; Lightning Bolt"')
    options = parser.parse_args()
    source = find_model(options.model)
    from flash_experts import NameGenerator

    wishes = {"starts_with": options.starts_with, "max_words": options.max_words, "like": options.like}
    try:
        # Loads the model and its tokenizer. Names of real cards are never generated.
        generator = NameGenerator.from_pretrained(source)
        names = generator.generate(options.count, seed=options.seed, **wishes)
        settings = {preset: generator.generate(8, preset=preset, seed=options.seed, **wishes) for preset in PRESETS}
    except (ValueError, OSError) as error:
        parser.error(error)

    print(f"\n{'name':<42}{'log-probability':>15}   nearest real card")
    for name in names:
        print(f"{name.text:<42}{name.log_prob:15.1f}   {name.nearest_card} ({name.similarity:.0%} alike)")
    print(
        "\nThe same seed with each preset, from likely to surprising (temperature, top-p and min-p; see presets.yaml):"
    )
    print_columns({preset: [name.text for name in column] for preset, column in settings.items()})


if __name__ == "__main__":
    main()
