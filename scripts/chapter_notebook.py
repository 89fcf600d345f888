"""A chapter of the learning path as a notebook with its output, from the cells that `scripts/run_cells.py` has run."""

from __future__ import annotations

import base64
import re
import tomllib
from pathlib import Path

import jupytext
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parent.parent
FIGURE = re.compile(r"^\[figure: (\w+)\]\n?", re.MULTILINE)
_CHAPTER_LINK = re.compile(r"\]\(((?:\.\./|solutions/)?\d\d[a-z]?_\w+)\.py\)")
# The chapters import each other's tools and read models, cards and results of the repository: a package alone has none
# of them, so where there is no checkout its archive is fetched.
_SETUP = """# Where there is no checkout of flash-experts, as on Colab or Kaggle, this cell fetches and installs it.
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ARCHIVE = os.environ.get("FLASH_EXPERTS_ARCHIVE", "{archive}")  # address or path of the repository's .zip or .tar.gz

found = importlib.util.find_spec("flash_experts")
home = None if found is None else Path(found.origin).resolve().parents[2]
if home is None or not (home / "docs/learn").is_dir():
    if not ARCHIVE:
        raise ValueError("there is no checkout of flash-experts: set ARCHIVE to the archive of its repository")
    file = urllib.request.urlretrieve(ARCHIVE, Path(ARCHIVE).name)[0] if "://" in ARCHIVE else ARCHIVE
    shutil.unpack_archive(file, "flash-experts")
    home = min(Path("flash-experts").resolve().rglob("pyproject.toml"), key=lambda path: len(path.parts)).parent
    if found is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", f"{{home}}[all]"], check=True)
sys.path[:0] = [str(home / "src"), str(home / "docs/learn")]
"""


def notebook(chapter: Path, outputs: list[str] | None, figures: Path) -> NotebookNode:
    """Makes the notebook of a chapter; its first cell installs flash-experts where it is missing.

    Args:
        outputs: what each code cell printed, with ``[figure: NAME]`` where it showed a figure; None for no output.
        figures: folder with NAME.png.
    """
    printed = iter(outputs or [])
    cells = [v4.new_code_cell(setup_code(), metadata={"tags": ["setup"]})]
    for cell in jupytext.read(chapter, fmt="py:percent").cells:
        if cell.cell_type == "markdown":
            cells.append(v4.new_markdown_cell(_CHAPTER_LINK.sub(r"](\1.ipynb)", cell.source)))
            continue
        count = sum(each.cell_type == "code" for each in cells) + 1
        shown = _outputs(next(printed, ""), figures)
        cells.append(v4.new_code_cell(cell.source, outputs=shown, execution_count=count if outputs else None))
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"  # random ones would differ from build to build
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def setup_code() -> str:
    """The first cell; the address of the archive is that of the repository in pyproject.toml, if there is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    return _SETUP.format(archive=f"{repository}/archive/HEAD.zip" if repository else "").rstrip()


def last_of_lines(text: str) -> str:
    """What a terminal shows in the end: a progress bar writes over its line."""
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in text.rstrip().split("\n")).strip("\n")


def _outputs(text: str, figures: Path) -> list[NotebookNode]:
    """Texts and figures of a cell, in order."""
    outputs = []
    for place, piece in enumerate(FIGURE.split(text)):
        if place % 2:
            image = base64.b64encode((figures / f"{piece}.png").read_bytes()).decode()
            data = {"image/png": image, "text/plain": f"<figure {piece}>"}
            outputs.append(v4.new_output("display_data", data=data))
        elif piece.strip():
            outputs.append(v4.new_output("stream", name="stdout", text=last_of_lines(piece) + "\n"))
    return outputs
