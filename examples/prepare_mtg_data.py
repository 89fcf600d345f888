"""Prepares card names for training: reads, cleans, splits by family, writes data/mtg/*.jsonl, and shows tokens.

    python examples/prepare_mtg_data.py                                     # the embedded table of real cards
    python examples/prepare_mtg_data.py --source scryfall --out data/new    # the newest, over the network
    python examples/prepare_mtg_data.py --source my_set.csv --out data/mine

The same in one command: ``flash-experts prepare``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def show_tokens(data: Path) -> None:
    """Prints names as a model reads them: a prompt of attributes with random dropout, then the name."""
    from flash_experts.data.packing import encode_cards
    from flash_experts.data.prepare import load_split
    from flash_experts.data.prompts import Attributes
    from flash_experts.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "models/mtg-base")
    rng = random.Random(0)
    cards = rng.sample(load_split(data, "train"), 6)
    encoded = encode_cards(cards, tokenizer, lambda card: Attributes.of(card).drop(rng, probability=0.3))
    print("\nSix of them as a model reads them, a bar between tokens. The loss is on the name and the EOS token alone.")
    print(f"{'tokens':>6}  prompt  ->  name")
    for name in encoded:
        tokens = ["<BOS>", *(tokenizer.decode([token]) for token in name.ids[1:-1]), "<EOS>"]
        prompt, learned = tokens[: name.prompt_length], tokens[name.prompt_length :]
        print(f"{len(tokens):6}  {'|'.join(prompt)}  ->  {'|'.join(learned)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare card names for training and show how they are tokenized.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(str(message).split())}\n")
    sources = "embedded, scryfall, mtgjson, or a csv, json, jsonl or txt file (default: embedded)"
    parser.add_argument("--source", default="embedded", help=sources)
    parser.add_argument("--out", type=Path, default=ROOT / "data/mtg", help="folder to write (default: data/mtg here)")
    options = parser.parse_args()
    print(f"preparing the names of {options.source} in {options.out} ...", flush=True)
    from flash_experts.data.prepare import prepare

    try:
        # Cleans, splits by family and writes everything at once. The same source gives the same bytes.
        meta = prepare(options.source, options.out)
    except (ValueError, OSError) as error:
        parser.error(error)
    print(f"{meta['rows']:,} cards with {meta['faces']:,} names, {meta['names']:,} of them to learn from.")
    print("Left out:", ", ".join(f"{count:,} {reason}" for reason, count in meta["dropped"].items()) or "none")
    print("Written:", ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items()))
    show_tokens(options.out)


if __name__ == "__main__":
    main()
