"""Generated names as rows of a table, for files and screens."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import Any, TextIO

from flash_experts.generation.search import GeneratedName

COLUMNS = ("text", "log_prob", "score", "nearest_card", "similarity")


def row_of(name: GeneratedName) -> dict[str, Any]:
    """Plain values by `COLUMNS`, ready for json.dumps."""
    return {
        "text": name.text,
        "log_prob": round(name.log_prob, 4),
        "score": round(name.score, 4),
        "nearest_card": name.nearest_card,
        "similarity": round(name.similarity, 4),
    }


def write_csv(names: Iterable[GeneratedName], file: TextIO) -> int:
    """Writes a table with a header, and returns how many names it has."""
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    written = 0
    for name in names:
        table.writerow(row_of(name))
        written += 1
    return written
