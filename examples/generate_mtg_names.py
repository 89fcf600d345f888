"""Names for particular cards: the model was told type, colors and cost of each card it learned from.

python examples/generate_mtg_names.py [MODEL]
"""

from __future__ import annotations

import sys
import textwrap

from generate_names import default_model

from flash_experts import NameGenerator

# What `generate` takes: any part of a type line, colors in the letters of mana costs, a mana value.
CARDS = (
    {"type_line": "Legendary Creature — Goblin", "colors": "R", "mana_value": 3},
    {"type_line": "Creature — Angel", "colors": "W"},
    {"type_line": "Instant", "colors": "U", "mana_value": 1},
    {"type_line": "Sorcery", "colors": "B"},
    {"type_line": "Enchantment", "colors": "GW"},
    {"type_line": "Artifact — Equipment"},
    {"type_line": "Land"},
)
COUNT = 20


def main() -> None:
    try:
        generator = NameGenerator.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else default_model())
        for card in CARDS:
            # The same seed gives the same names again; another seed gives others.
            names = generator.generate(COUNT, **card, seed=0)
            print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in card.items()))
            print(textwrap.indent(textwrap.fill("; ".join(name.text for name in names), 105), "    "))
            print()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
