"""Without any extra a user prepares, trains, evaluates and generates; what needs an extra names it in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flash_experts.extras import EXTRAS, install_command
from tests.helpers.command_line import run

ROOT = Path(__file__).parent.parent
PACKAGES = {"sklearn": "scikit-learn"}  # of modules that have another name

SCRIPT = """
import sys

extras = set(sys.argv.pop(1).split(","))


class Missing:
    '''Answers as if the packages were not installed.'''

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.modules.update(dict.fromkeys(extras))  # importlib.util.find_spec finds none of them
sys.meta_path.insert(0, Missing())
from flash_experts.cli import main

folder = sys.argv[1]
shape = "--model.num-experts=4 --model.n-layer=2 --model.n-embd=32 --model.n-head=2 --model.vocab-size=400"
run = "--training.run-name=run --training.output-dir=. --training.tracker=wandb"
steps = "--training.max-steps=2 --training.tokens-per-batch=512 --training.validation-names=20"
for line in (
    "prepare --source names.txt --out data",
    f"train --data data {shape} {run} {steps}",
    "evaluate run --data data --samples 20",
    "generate --model run --count 2 --max-length 8 --preset creative --seed 0 --regex [A-Z].* --min-distance 0.1",
):
    assert main(line.split()) == 0, line
print("done")
"""


@pytest.mark.slow
def test_everything_but_extras_runs_without_them(workplace: Path, tmp_path: Path) -> None:
    shutil.copy(workplace / "names.txt", tmp_path)
    # huggingface-hub 1 needs httpx itself.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(EXTRAS.keys() - {"httpx"}), str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert "Bits per character" in done.stdout
    for extra in ("track", "eval"):
        assert done.stderr.count(install_command(extra)) == 1, done.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("compare models/base", "matplotlib"),
        ("plot models/base", "matplotlib"),
        ("serve --model models/base", "gradio"),
        ("prepare --source scryfall --out new", "ijson"),
        ("prepare --source mtgjson --out new", "httpx"),
        ("fetch-teacher --out new", "gguf"),
        ("export gguf models/base --out new.gguf", "gguf"),
        ("export onnx models/base --out new", "onnxruntime"),
        ("benchmark attention --plot new.png", "matplotlib"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    command: str, module: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    before = sorted(workplace.iterdir())
    done = run(*command.split(), cwd=workplace)
    assert done.status == 1 and done.err.count("\n") == 1
    assert done.err.endswith(f"{install_command(EXTRAS[module])}\n") and f"{module} is not installed" in done.err
    assert sorted(workplace.iterdir()) == before


def test_a_missing_dependency_is_one_line_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    done = run("prepare", "--source", "names.txt", "--out", "new", cwd=workplace)
    assert done.status == 1 and done.err.count("\n") == 1 and "pip install" in done.err
    assert not (workplace / "new").exists()


def test_each_extra_brings_the_packages_that_it_is_named_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert any(wanted.startswith(PACKAGES.get(module, module)) for wanted in extras[extra]), module
    core = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert not [wanted for wanted in core if any(wanted.startswith(PACKAGES.get(each, each)) for each in EXTRAS)]
