"""Every chapter of the learning path, and every file of solutions, runs as a script and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LEARN = Path(__file__).parent.parent / "docs/learn"
CHAPTERS = sorted(LEARN.glob("[0-9][0-9]_*.py"))
SOLUTIONS = sorted((LEARN / "solutions").glob("[0-9][0-9]_*.py"))


def run_script(path: Path, folder: Path, **environment: str) -> str:
    """What a script prints, run from another folder than its own, without a network and without a screen."""
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_and_draws(path: Path, tmp_path: Path) -> None:
    said = run_script(path, tmp_path, LEARN_FIGURES=str(tmp_path / "figures"))
    named = re.findall(r"^\[figure: (.+)\]$", said, re.MULTILINE)
    assert named and all(name.startswith(path.stem[:2]) for name in named)
    assert sorted(figure.stem for figure in (tmp_path / "figures").iterdir()) == sorted(named)
    assert [left.name for left in tmp_path.iterdir()] == ["figures"], "a chapter leaves nothing where it is run"
    assert not re.search(r"\bnan\b", said)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_run(path: Path, tmp_path: Path) -> None:
    assert run_script(path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_chapter_has_solutions_and_a_line_in_the_readme() -> None:
    assert CHAPTERS and [path.name for path in CHAPTERS] == [path.name for path in SOLUTIONS]
    readme = (LEARN / "README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        assert f"({path.name})" in readme, path.name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_each_exercise_has_a_solution(path: Path) -> None:
    """Exercise 2 of the chapter is answered under "## 2." in the solutions, in the order of the exercises."""
    exercises = path.read_text(encoding="utf-8").split("# ## Exercises")[1]
    asked = re.findall(r"^# (\d)\. \*\*(.+?)\.?\*\*", exercises, re.MULTILINE)
    solved = (LEARN / "solutions" / path.name).read_text(encoding="utf-8")
    answered = re.findall(r"^# ## (\d)\. (.+?)\.?$", solved, re.MULTILINE)
    assert 3 <= len(asked) <= 4
    assert [(number, title.rstrip("?")) for number, title in answered] == [(n, title.rstrip("?")) for n, title in asked]


@pytest.mark.parametrize("path", [*CHAPTERS, *SOLUTIONS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_notebook_and_back(path: Path) -> None:
    """A notebook made of the file, and made a file again, has the same cells."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is in the docs extra")
    from nbformat import NotebookNode

    # jupytext says this to a base class, which no longer counts once jsonargparse has told the dumper something else.
    yaml.SafeDumper.add_representer(NotebookNode, yaml.SafeDumper.represent_dict)
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    again = jupytext.reads(jupytext.writes(notebook, fmt="py:percent"), fmt="py:percent")
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in again.cells]
    assert {kind for kind, _ in cells} == {"markdown", "code"}
    assert cells[0][1].startswith("# "), "the first cell is the title"
    assert jupytext.writes(notebook, fmt="py:percent").split("# %%")[1:] == text.split("# %%")[1:]
