"""Chapters as notebooks: what `make docs` puts into the site, and one of them run cell by cell by Jupyter's kernel."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("jupytext", reason="jupytext is in the docs extra")
import nbformat

ROOT = Path(__file__).parent.parent
LEARN = ROOT / "docs/learn"
CHAPTERS = sorted(LEARN.rglob("[0-9][0-9]_*.py"))
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chapter_notebook", ROOT / "scripts/chapter_notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_notebook_has_a_setup_cell_and_the_cells_of_its_chapter(path: Path, maker: ModuleType) -> None:
    book = maker.notebook(path, None, Path("nowhere"))
    nbformat.validate(book)
    assert book.cells[0].source == maker.setup_code()
    assert book.cells[1].source.startswith("# "), "then the title"
    assert not [cell for cell in book.cells if cell.cell_type == "markdown" and ".py)" in cell.source]
    assert nbformat.writes(book) == nbformat.writes(maker.notebook(path, None, Path("nowhere"))), "the same each time"


def test_output_and_figures_are_in_their_cells(maker: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "01_look.png").write_bytes(PIXEL)
    outputs = ["1\n[figure: 01_look]\na\rb\n", ""]
    book = maker.notebook(LEARN / "01_attention.py", outputs, tmp_path)
    nbformat.validate(book)
    first = next(cell for cell in book.cells[1:] if cell.cell_type == "code")
    assert [output.output_type for output in first.outputs] == ["stream", "display_data", "stream"]
    assert [first.outputs[place].text for place in (0, 2)] == ["1\n", "b\n"]
    assert base64.b64decode(first.outputs[1].data["image/png"]) == PIXEL


def test_the_setup_cell_fetches_what_is_missing(maker: ModuleType, tmp_path: Path) -> None:
    """In a Python without flash-experts: the archive is unpacked, and pip is asked to install it."""
    inside = tmp_path / "inside/flash-experts-main"
    for path in ("src/flash_experts/__init__.py", "docs/learn/chapter_tools.py", "distributions/models/pyproject.toml"):
        (inside / path).parent.mkdir(parents=True, exist_ok=True)
        (inside / path).touch()
    (inside / "pyproject.toml").touch()
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "inside")
    code = "import subprocess\nsubprocess.run = lambda command, check: print(command[3:])\n" + maker.setup_code()
    code += "\nimport chapter_tools, flash_experts\nprint(flash_experts.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for address in (archive, Path(archive).as_uri()):
        place = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],  # without site-packages
            cwd=place,
            env=environment | {"FLASH_EXPERTS_ARCHIVE": address},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        home = place.resolve() / "flash-experts/flash-experts-main"
        asked, imported = done.stdout.splitlines()
        assert asked == str(["install", "--quiet", "-e", f"{home}[all]"])
        assert imported == str(home / "src/flash_experts/__init__.py")
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "set ARCHIVE to the archive of its repository" in done.stderr


@pytest.mark.solutions
def test_a_notebook_runs_in_a_kernel_of_jupyter(maker: ModuleType, tmp_path: Path) -> None:
    """The quickest chapter, from a folder that is not the chapters'."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is in the docs extra")
    pytest.importorskip("ipykernel", reason="ipykernel is in the docs extra")
    book = maker.notebook(LEARN / "01_attention.py", None, Path("nowhere"))
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("[holds] ") >= 8 and "[figure:" not in text
    assert [output for output in outputs if "image/png" in output.get("data", {})], "figures between the numbers"
    assert not list(tmp_path.iterdir())
