"""Every chapter of the learning path, and every file of solutions, runs as a script, and its checked claims hold."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

LEARN = Path(__file__).parent.parent / "docs/learn"
CHAPTERS = sorted(LEARN.glob("[0-9][0-9]*_*.py"))
SOLUTIONS = sorted((LEARN / "solutions").glob("[0-9][0-9]*_*.py"))


# What chapters import, and what takes most of the time of a start.
IMPORTS = ["torch", "transformers", "matplotlib.pyplot", "sklearn.svm", "flash_experts", "flash_experts.training"]
# No network, no screen; read when the libraries are imported.
SETTINGS = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def as_script(path: Path, folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Runs a script in this process as the command `python PATH` would, its streams in files."""
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= environment
    os.chdir(folder)
    sys.argv, sys.path[0] = [str(path)], str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


@pytest.fixture(scope="module")
def fork_server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Starts processes that have imported everything already: twenty scripts would spend two minutes on it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
        yield context


@pytest.fixture
def run_script(
    fork_server: multiprocessing.context.ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """What a script prints, run from another folder than its own."""
    streams = tmp_path_factory.mktemp("streams")

    def run(path: Path, folder: Path, **environment: str) -> str:
        out, err = streams / "out", streams / "err"
        process = fork_server.Process(target=as_script, args=(path, folder, environment, out, err))
        process.start()
        process.join(900)
        process.kill()
        assert process.exitcode == 0, err.read_text("utf-8")
        return out.read_text("utf-8")

    return run


def skip_without_triton(path: Path) -> None:
    if "triton" in path.stem:
        pytest.importorskip("triton", reason="Triton is for Linux: without it the chapter ends after its picture")


@pytest.mark.slow
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_and_draws(path: Path, tmp_path: Path, run_script: Callable[..., str]) -> None:
    skip_without_triton(path)
    printed = run_script(path, tmp_path, LEARN_FIGURES=str(tmp_path / "figures"))
    named = re.findall(r"^\[figure: (.+)\]$", printed, re.MULTILINE)
    assert named and all(name.startswith(path.stem.split("_")[0] + "_") for name in named)
    assert sorted(figure.stem for figure in (tmp_path / "figures").iterdir()) == sorted(named)
    assert [left.name for left in tmp_path.iterdir()] == ["figures"], "a chapter leaves nothing where it is run"
    assert not re.search(r"\bnan\b", printed)
    assert printed.count("[holds] ") >= 8, "sentences that rest on numbers are checked"


@pytest.mark.slow
@pytest.mark.solutions
@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_run(path: Path, tmp_path: Path, run_script: Callable[..., str]) -> None:
    skip_without_triton(path)
    assert run_script(path, tmp_path).count("[holds] ") >= 3
    assert not list(tmp_path.iterdir())


def test_every_chapter_has_solutions_and_a_line_in_the_readme() -> None:
    assert CHAPTERS and [path.name for path in CHAPTERS] == [path.name for path in SOLUTIONS]
    readme = (LEARN / "README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        assert f"({path.name})" in readme, path.name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_its_picture_early_and_ends_with_linked_reading(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first = text.split("# %%")[1]
    assert first.count("**The question: ") == 1 and "](../glossary.md" in first
    assert text.index("# ## The picture first") < text.index("show(figure, ") < text.index("# ## Exercises")
    assert text.split("# ## Reading")[1].count("](") >= 3


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

    # jupytext registers this with a base class, which has no effect once jsonargparse has changed SafeDumper itself.
    yaml.SafeDumper.add_representer(NotebookNode, yaml.SafeDumper.represent_dict)
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    again = jupytext.reads(jupytext.writes(notebook, fmt="py:percent"), fmt="py:percent")
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in again.cells]
    assert {kind for kind, _ in cells} == {"markdown", "code"}
    assert cells[0][1].startswith("# "), "the first cell is the title"
    assert jupytext.writes(notebook, fmt="py:percent").split("# %%")[1:] == text.split("# %%")[1:]
