"""Converts docs/ to Markdown for the site builder, in build/docs.

    python scripts/stage_docs.py          chapters without their output
    python scripts/stage_docs.py --run    runs the chapters that changed, and includes output and figures

Each chapter is a notebook too, with its output if it was run. Names such as `flash_experts.cli.main` become links into
the API reference, links to chapters become links to their pages, and formulas become MathML, which browsers show
without scripts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from chapter_notebook import FIGURE, last_of_lines, notebook
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
DOCS, STAGE, OUTPUTS = ROOT / "docs", ROOT / "build/docs", ROOT / "build/learn"
_FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_DOTTED = re.compile(r"`flash_experts\.(\w+(?:\.\w+)*)`")
_CHAPTER_LINK = re.compile(r"\]\(((?:solutions/)?\d\d[a-z]?_\w+)\.py\)")
_PACKAGE = re.compile(r"^::: flash_experts\.(\w+)$", re.MULTILINE)


def markdown_page(text: str) -> str:
    """Converts a page for the site."""
    text = _FORMULA.sub(lambda found: f'\n<div class="formula">{_formula(found[1])}</div>\n', text)
    text = _DOTTED.sub(r"[`\1`][flash_experts.\1]", text)
    text = _PACKAGE.sub(lambda found: "\n\n".join(f"::: {module}" for module in modules_of(found[1])), text)
    return (
        _CHAPTER_LINK.sub(r"](\1.md)", text)
        .replace("README.md)", "index.md)")
        .replace("](solutions/)", "](solutions/01_attention.md)")
    )


def _formula(latex: str) -> str:
    return str(convert(latex.strip(), display="block"))


def modules_of(part: str) -> list[str]:
    """Lists the modules of a package, or the single module."""
    folder = ROOT / "src/flash_experts" / part
    found = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("[a-z]*.py"))
    return [f"flash_experts.{part}.{'.'.join(path.parts)}" for path in found] or [f"flash_experts.{part}"]


def chapter_page(chapter: Path, outputs: list[str] | None) -> str:
    """Converts a chapter to a page: prose, code, and output if it was run."""
    parts, printed = [], iter(outputs or [])
    up = "../" * len(chapter.relative_to(DOCS / "learn").parts)
    picture = FIGURE.search("\n".join(outputs or []))
    for cell in jupytext.read(chapter, fmt="py:percent").cells:
        if cell.cell_type == "markdown":
            parts.append(markdown_page(cell.source))
            if len(parts) == 1:
                parts.append(f"[This chapter as a notebook]({chapter.stem}.ipynb){{ download }}")
            if picture and len(parts) == 2:  # a chapter begins with its picture, before any code
                parts.append(figure(picture[1], up))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += output_parts(next(printed, ""), up)
    return "\n\n".join(parts) + "\n"


def figure(name: str, up: str) -> str:
    return f'<figure markdown="span">![{name}]({up}figures/{name}.png)</figure>'


def output_parts(text: str, up: str) -> list[str]:
    """Splits output into texts and figures, in order."""
    parts = []
    for place, piece in enumerate(FIGURE.split(text)):
        if place % 2:
            parts.append(figure(piece, up))
        elif piece.strip():
            parts.append(f'```text title="prints"\n{last_of_lines(piece)}\n```')
    return parts


def outputs_of(chapter: Path) -> list[str]:
    """Returns the output of a chapter's cells, cached until the chapter, its tools or its data change."""
    name = "_".join(chapter.relative_to(DOCS / "learn").with_suffix("").parts)
    tools = b"".join(path.read_bytes() for path in sorted((DOCS / "learn").glob("[a-z]*.py")))
    data = [*(ROOT / "benchmarks/results").glob("*.json"), *(ROOT / "models").glob("*/metrics.jsonl")]
    read = b"".join(path.read_bytes() for path in sorted(data))
    digest = hashlib.sha256(chapter.read_bytes() + tools + read).hexdigest()[:16]
    found = OUTPUTS / f"{name}-{digest}.json"
    if not found.is_file():
        print(f"running {chapter.relative_to(ROOT)} ...", flush=True)
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        environment = {"MPLBACKEND": "Agg", "LEARN_FIGURES": str(OUTPUTS / "figures")}
        command = [sys.executable, str(ROOT / "scripts/run_cells.py"), str(chapter), str(found)]
        subprocess.run(command, env=os.environ | environment, check=True, stderr=subprocess.DEVNULL)
    return json.loads(found.read_text("utf-8"))


def stage(run: bool) -> None:
    """Replaces build/docs."""
    shutil.rmtree(STAGE, ignore_errors=True)
    for page in sorted(DOCS.rglob("*.md")):
        target = STAGE / page.relative_to(DOCS)
        target = target.with_name("index.md") if page.name == "README.md" else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(markdown_page(page.read_text("utf-8")), encoding="utf-8")
    for chapter in sorted((DOCS / "learn").rglob("[0-9][0-9]*_*.py")):
        target = (STAGE / chapter.relative_to(DOCS)).with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        outputs = outputs_of(chapter) if run else None
        target.write_text(chapter_page(chapter, outputs), encoding="utf-8")
        nbformat.write(notebook(chapter, outputs, OUTPUTS / "figures"), target.with_suffix(".ipynb"))
    if run:
        shutil.copytree(OUTPUTS / "figures", STAGE / "figures", dirs_exist_ok=True)
    shutil.copytree(DOCS / "images", STAGE / "images", dirs_exist_ok=True)
    shutil.copy(DOCS / "site.css", STAGE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run changed chapters and include their output")
    stage(parser.parse_args().run)
