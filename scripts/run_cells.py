"""Runs a chapter of the learning path cell by cell and writes what each cell printed.

    python scripts/run_cells.py docs/learn/01_attention.py OUT.json

OUT.json is a list of texts, one for each code cell. Figures are saved where the environment's LEARN_FIGURES says.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jupytext


def run_cells(chapter: Path) -> list[str]:
    """The output of each code cell, run one after the other in one namespace, as a notebook does."""
    namespace = {"__name__": "__main__", "__file__": str(chapter)}
    outputs = []
    for cell in jupytext.read(chapter, fmt="py:percent").cells:
        if cell.cell_type == "code":
            with redirect_stdout(io.StringIO()) as said:
                exec(compile(cell.source, str(chapter), "exec"), namespace)
            outputs.append(said.getvalue())
    return outputs


if __name__ == "__main__":
    chapter, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    sys.path.insert(0, str(chapter.parent))
    out.write_text(json.dumps(run_cells(chapter)), encoding="utf-8")
