"""Prepare card names for training: read, clean, split by family, write data/mtg/*.jsonl.

    python examples/prepare_mtg_data.py                                  # the embedded table of real cards
    python examples/prepare_mtg_data.py --source scryfall --out data/new # the newest, over the network, with rarities
    python examples/prepare_mtg_data.py --source my_set.csv --out data/mine

The same in one command: ``flash-experts prepare``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.prompts import Attributes


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare card names for training.")
    parser.add_argument(
        "--source", default="embedded", help="embedded, scryfall, mtgjson, or a csv, json, jsonl or txt file"
    )
    parser.add_argument("--out", type=Path, default=Path("data/mtg"))
    args = parser.parse_args()

    # Cleans, splits by family and writes everything at once. The same source gives the same bytes.
    meta = prepare(args.source, args.out)
    print(f"{meta['rows']:,} cards with {meta['faces']:,} names, {meta['names']:,} of them to learn from.")
    print("Left out:", ", ".join(f"{count:,} {reason}" for reason, count in meta["dropped"].items()))
    print("Written:", ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items()), "to", args.out)

    # What a model reads: a prompt of the attributes, some of them left out at random, then the name.
    rng = random.Random(0)
    print("\nA few of them, as a model reads them:")
    for card in rng.sample(load_split(args.out, "train"), 8):
        attributes = Attributes.of(card).drop(rng, probability=0.3)
        print(f"  {attributes.prompt()} {card.name}")


if __name__ == "__main__":
    main()
