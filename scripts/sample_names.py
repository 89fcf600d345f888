"""Writes examples/sample_names.md: names of the released model, none picked, each list with its command.

python scripts/sample_names.py [MODEL]
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from flash_experts import NameGenerator

MODEL = sys.argv[1] if len(sys.argv) > 1 else "models/mtg-names"
OUT = Path(__file__).resolve().parents[1] / "examples" / "sample_names.md"
COUNT = 30
# Options of `flash-experts generate`, by their names in Python.
ASKED: tuple[dict[str, str | int], ...] = (
    {},
    {"type": "Legendary Creature — Goblin", "colors": "R", "mana_value": 3},
    {"type": "Creature — Angel", "colors": "W"},
    {"type": "Creature — Zombie", "colors": "B"},
    {"type": "Creature — Merfolk Wizard", "colors": "U"},
    {"type": "Legendary Creature — Elf", "colors": "G"},
    {"type": "Instant", "colors": "U", "mana_value": 1},
    {"type": "Sorcery", "colors": "B"},
    {"type": "Enchantment", "colors": "GW"},
    {"type": "Artifact — Equipment"},
    {"type": "Land"},
    {"type": "Creature — Angel", "colors": "W", "guidance": 2.0},
    {"type": "Creature — Angel", "colors": "W", "best_of": 16, "best_by": "fit"},
    {"type": "Legendary Creature — Elf", "colors": "G", "best_of": 16, "best_by": "fit"},
    {"type": "Sorcery", "colors": "B", "best_of": 16, "best_by": "fit"},
    {"preset": "conservative"},
    {"preset": "creative"},
    {"starts_with": "Storm", "type": "Creature", "colors": "UR"},
    {"regex": ".* of the .*"},
)
INTRODUCTION = f"""# Names

Made by `python scripts/sample_names.py`: the first {COUNT} that `{MODEL}` gives for each request, seed 0. None is
picked, none left out, and none is the name of a real card. Preset `balanced` unless another is named.
"""


def main() -> None:
    generator = NameGenerator.from_pretrained(MODEL)
    sections = [INTRODUCTION]
    for asked in ASKED:
        options = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in asked.items()]
        command = " ".join([f"flash-experts generate --model {MODEL} --count {COUNT} --seed 0", *options])
        given = {"type_line" if key == "type" else key: value for key, value in asked.items()}
        names = generator.generate(COUNT, seed=0, **given)  # type: ignore[arg-type]
        sections.append(f"```sh\n{command}\n```\n\n" + "; ".join(name.text for name in names) + ".\n")
    OUT.write_text("\n".join(sections), encoding="utf-8")
    print(f"{OUT}: {len(ASKED)} lists of {COUNT}")


if __name__ == "__main__":
    main()
