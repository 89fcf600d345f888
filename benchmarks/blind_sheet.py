"""Blind evaluation by a reader, human or not: a shuffled sheet of names from several sources for the same requests.

    python benchmarks/blind_sheet.py make SHEET.csv KEY.csv raw=models/mtg-names:raw good=models/mtg-names:good ngram
    python benchmarks/blind_sheet.py score SHEET.csv KEY.csv

A rater writes 1 (acceptable) or 0 into the column `acceptable`: well-formed words, grammatical, coherent, and matching
type, subtype, legendary and colors. `score` prints the share of each source with its 95% Wilson interval. Names are the
first that `generate` gives for a model's folder and a quality (or `--raw`), with seed 3; those of the n-gram baseline
are the first that are not real cards; real names from both test sets are added.
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from flash_experts import NameGenerator
from flash_experts.data.cards import Card
from flash_experts.data.prepare import load_known_names, load_split
from flash_experts.evaluation.scorers import NGramBaseline, PromptAttributes
from flash_experts.generation.request import UNGUIDED

REQUESTS: tuple[tuple[str, str | None], ...] = (
    ("Legendary Creature — Goblin", "R"),
    ("Creature — Angel", "W"),
    ("Creature — Zombie", "B"),
    ("Creature — Merfolk Wizard", "U"),
    ("Legendary Creature — Elf", "G"),
    ("Creature — Dragon", "R"),
    ("Creature — Beast", "G"),
    ("Instant", "U"),
    ("Instant", "R"),
    ("Sorcery", "B"),
    ("Sorcery", "G"),
    ("Enchantment", "W"),
    ("Enchantment — Aura", "U"),
    ("Artifact — Equipment", None),
    ("Land", None),
)
SEED = 3
PER_REQUEST = 24  # names from all sources together


def is_of(card: Card, type_line: str, colors: str | None) -> bool:
    """Whether a real card matches the request."""
    words, own = type_line.replace("—", " ").split(), [*card.supertypes, *card.types, *card.subtypes]
    return set(words) <= set(own) and (colors is None or card.colors == tuple(colors))


def sampler_of(source: str, data: str) -> Callable[[int, str, str | None], list[str]]:
    """Names from ``FOLDER:QUALITY`` or from the n-gram baseline."""
    if source == "ngram":
        train = load_split(data, "train")
        baseline, known = NGramBaseline(train), sorted(load_known_names(data))
        return lambda count, type_line, colors: baseline.show(
            [PromptAttributes(type_line, colors)], count, SEED, known
        )[0]
    folder, _, quality = source.partition(":")
    generator = NameGenerator.from_pretrained(folder)
    options = {"quality": "fast", **UNGUIDED} if quality == "raw" else {"quality": quality or "good"}
    return lambda count, type_line, colors: [
        name.text for name in generator.generate(count, type_line=type_line, colors=colors, seed=SEED, **options)
    ]


def make(sheet: Path, key: Path, models: dict[str, str], data: str = "data/mtg") -> None:
    """Writes both files, which must not exist."""
    held_out = load_split(data, "test") + load_split(data, "test_iid")
    labels = [*models, "real"]
    share, rest = divmod(PER_REQUEST, len(labels))
    rng = random.Random("blind sheet")
    rows: list[tuple[str, str, str]] = []
    samplers = {label: sampler_of(source, data) for label, source in models.items()}
    for type_line, colors in REQUESTS:
        request = f"{type_line}, {colors or 'any color'}"
        for place, label in enumerate(labels):
            count = share + (place < rest)
            if label == "real":
                matching = [card.name for card in held_out if is_of(card, type_line, colors)]
                names = rng.sample(matching, min(count, len(matching)))
            else:
                names = samplers[label](count, type_line, colors)
            rows += [(request, name, label) for name in names]
    order = list(range(len(rows)))
    rng.shuffle(order)
    order.sort(key=lambda place: rows[place][0])  # by request, with shuffled sources
    with (
        sheet.open("x", encoding="utf-8", newline="") as questions,
        key.open("x", encoding="utf-8", newline="") as answers,
    ):
        writers = csv.writer(questions), csv.writer(answers)
        writers[0].writerow(("number", "asked for", "name", "acceptable"))
        writers[1].writerow(("number", "source"))
        for number, place in enumerate(order, start=1):
            request, name, label = rows[place]
            writers[0].writerow((number, request, name, ""))
            writers[1].writerow((number, label))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Computes the 95% interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, hits / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def score(sheet: Path, key: Path) -> None:
    """Prints the share of acceptable names by source."""
    with sheet.open(encoding="utf-8", newline="") as file:
        ratings = {row["number"]: row["acceptable"] for row in csv.DictReader(file)}
    with key.open(encoding="utf-8", newline="") as file:
        source = {row["number"]: row["source"] for row in csv.DictReader(file)}
    if missing := [number for number in source if ratings.get(number) not in ("0", "1")]:
        raise SystemExit(f"{sheet}: write 0 or 1 for number {', '.join(missing[:10])}")
    marks: dict[str, list[int]] = defaultdict(list)
    for number, label in source.items():
        marks[label].append(int(ratings[number]))
    for label, given in sorted(marks.items()):
        low, high = wilson(sum(given), len(given))
        print(
            f"{label}: {sum(given)} of {len(given)} acceptable, {sum(given) / len(given):.0%} [{low:.0%}, {high:.0%}]"
        )


def main() -> None:
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "make" and len(arguments) > 2:
        make(
            Path(arguments[0]), Path(arguments[1]), dict((argument.split("=", 1) * 2)[:2] for argument in arguments[2:])
        )
    elif command == "score" and len(arguments) == 2:
        score(Path(arguments[0]), Path(arguments[1]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
