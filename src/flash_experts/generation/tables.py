"""Generated names as rows of a table, for files and screens."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from typing import Any, TextIO

from flash_experts.generation.search import GeneratedName
from flash_experts.generation.type_fit import judge_of_real_cards
from flash_experts.plain_text import one_line, to_cell

COLUMNS = ("text", "fits_type", "fits_probability", "log_prob", "score", "nearest_card", "similarity")


def row_of(name: GeneratedName) -> dict[str, Any]:
    """Plain values by `COLUMNS`, ready for json.dumps. The type that the name fits is judged here."""
    [fit] = judge_of_real_cards().best([name.text])
    return {
        "text": name.text,
        "fits_type": fit.type_line,
        "fits_probability": round(fit.probability, 4),
        "log_prob": round(name.log_prob, 4),
        "score": round(name.score, 4),
        "nearest_card": name.nearest_card,
        "similarity": round(name.similarity, 4),
    }


def write_csv(names: Iterable[GeneratedName], file: TextIO, raw: bool = False) -> int:
    """Writes a table with a header, and returns how many names it has.

    Unless ``raw``, texts that a spreadsheet would take for formulas begin with an apostrophe; our readers take it off.
    """
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    written = 0
    for name in names:
        row = row_of(name)
        table.writerow({key: _cell(value, raw) for key, value in row.items()})
        written += 1
    return written


def _cell(value: Any, raw: bool) -> Any:
    if not isinstance(value, str):
        return value
    return one_line(value) if raw else to_cell(one_line(value))
