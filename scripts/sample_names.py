"""Writes examples/sample_names.md: names of the released model and of its teacher, none picked, each with its command.

    python scripts/sample_names.py [TEACHER]

Without the teacher's folder (models/teacher, where configs/teacher.yaml writes it) its section stays as it is.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flash_experts import NameGenerator

MODEL = "models/mtg-names"
OUT = Path(__file__).resolve().parents[1] / "examples" / "sample_names.md"
COUNT, TEACHER_COUNT = 30, 15
TEACHER = "## The teacher's names\n"
Request = dict[str, Any]
# Options of `flash-experts generate`, by their names in Python.
REQUESTS: tuple[Request, ...] = (
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
    {"type": "Creature — Angel", "colors": "W", "guidance": 1.0},
    {"type": "Creature — Angel", "colors": "W", "quality": "best"},
    {"type": "Legendary Creature — Elf", "colors": "G", "quality": "best"},
    {"type": "Sorcery", "colors": "B", "quality": "best"},
    {"type": "Creature — Angel", "colors": "W", "quality": "fast"},
    {"type": "Legendary Creature — Goblin", "colors": "R", "quality": "fast"},
    {"type": "Land", "quality": "fast"},
    {"preset": "conservative"},
    {"preset": "creative"},
    {"starts_with": "Storm", "type": "Creature", "colors": "UR"},
    {"regex": ".* of the .*"},
)
INTRODUCTION = f"""# Names

Made by `python scripts/sample_names.py`: the first {COUNT} that `{MODEL}` gives for each request, seed 0. None is
picked by hand, none left out, and none is the name of a real card. Each is the best of 8 drawn, of 32 with `--quality
best`; `--quality fast` shows what is drawn unselected. Preset `balanced` unless another is named.
"""


def lists(folder: str, shown: str, count: int, requests: Iterable[Request]) -> list[str]:
    """A section for each request: its command and its names."""
    generator = NameGenerator.from_pretrained(folder)
    sections = []
    for request in requests:
        options = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in request.items()]
        command = " ".join([f"flash-experts generate --model {shown} --count {count} --seed 0", *options])
        given = {"type_line" if key == "type" else key: value for key, value in request.items()}
        names = generator.generate(count, seed=0, **given)
        sections.append(f"```sh\n{command}\n```\n\n" + "; ".join(name.text for name in names) + ".\n")
    return sections


def main() -> None:
    teacher = OUT.read_text("utf-8").partition(TEACHER)[2].strip()
    if len(sys.argv) > 1:
        plain = [request for request in REQUESTS if not request.keys() - {"type", "colors", "mana_value"}]
        introduction = (
            "SmolLM2-135M after one pass over the training names (`configs/teacher.yaml`), which is not in this\n"
            f"repository: the first {TEACHER_COUNT} for each of the plain requests, seed 0.\n"
        )
        teacher = "\n".join([introduction, *lists(sys.argv[1], "models/teacher", TEACHER_COUNT, plain)])
    sections = [INTRODUCTION, *lists(MODEL, MODEL, COUNT, REQUESTS), f"{TEACHER}\n{teacher.strip()}\n"]
    OUT.write_text("\n".join(sections), encoding="utf-8")
    print(f"{OUT}: {len(REQUESTS)} lists of {COUNT}")


if __name__ == "__main__":
    main()
