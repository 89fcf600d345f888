"""Runs a chapter of the learning path cell by cell and writes the output of each cell.

    python scripts/run_cells.py docs/learn/01_attention.py OUT.json

OUT.json is a list of texts, one per code cell. Figures go to the folder in the environment variable LEARN_FIGURES.
"""

from __future__ import annotations

import io
import json
import linecache
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jupytext


def run_cells(chapter: Path) -> list[str]:
    """Runs code cells in one namespace, as a notebook does, and returns their outputs."""
    namespace = {"__name__": "__main__", "__file__": str(chapter)}
    outputs = []
    for number, cell in enumerate(jupytext.read(chapter, fmt="py:percent").cells):
        if cell.cell_type == "code":
            name = f"{chapter}[{number}]"  # Triton reads the source of a kernel, as inspect.getsource does
            linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(keepends=True), name)
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(cell.source, name, "exec"), namespace)
            outputs.append(printed.getvalue())
    return outputs


if __name__ == "__main__":
    chapter, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    sys.path.insert(0, str(chapter.parent))
    out.write_text(json.dumps(run_cells(chapter)), encoding="utf-8")
