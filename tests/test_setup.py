"""Setting up as README says: setup_env.sh in real shells, and what pip is told to install."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = "setup_env.sh"
SHELLS = ("dash", "sh", "bash", "bash --posix", "bash --login", "zsh", "zsh --emulate sh", "ksh", "mksh", "busybox sh")

# Variables that change by themselves, from one command to the next.
VOLATILE = re.compile(
    r"(?:_|!|\?|status|pipestatus|PIPESTATUS|LINENO|RANDOM|SRANDOM|SECONDS|TTYIDLE|EPOCH\w+|BASH_\w+|FUNCNAME|\.sh\.\w+"
    r"|zsh_eval_context|ZSH_EVAL_CONTEXT|func\w*trace|PYTHONPATH)="
)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    command: list[str] = shlex.split(request.param)
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return command


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a blank, a quote and a bracket in its name, and what setup_env.sh looks for in it."""
    home = tmp_path.resolve() / "it's a [checkout]"
    (home / "src/flash_experts").mkdir(parents=True)
    (home / "src/flash_experts/__init__.py").touch()
    shutil.copy(ROOT / SCRIPT, home)
    (home / "inner").mkdir()
    return home


def run(shell: list[str], text: str, cwd: Path, *arguments: str, python_path: str | None = None) -> str:
    """Runs a script of a few lines; returns what it prints. A status other than 0 fails the test."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HOME"] = "/nonexistent"  # none of the user's own start-up files
    if python_path is not None:
        environment["PYTHONPATH"] = python_path
    done = subprocess.run(
        [*shell, "-c", text, "caller", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_sourcing_puts_src_first_on_the_path_from_any_directory(shell: list[str], checkout: Path) -> None:
    source = checkout / "src"
    show = 'set -eu; . "$1"; sh -c "printf %s \\"\\$PYTHONPATH\\""'
    for cwd, script in (
        (Path("/"), str(checkout / SCRIPT)),
        (checkout, f"./{SCRIPT}"),
        (checkout / "inner", f"../{SCRIPT}"),
    ):
        assert run(shell, show, cwd, script) == str(source), "exported, and nothing but src"
    script = str(checkout / SCRIPT)
    for before, after in (("", ""), ("/a b:/c", ":/a b:/c"), (f"/a:{source}:/c", ":/a:/c"), (f"{source}:/c", ":/c")):
        assert run(shell, show, checkout.parent, script, python_path=before) == f"{source}{after}"
        again = f'. "$1"; {show}'
        assert run(shell, again, checkout.parent, script, python_path=before) == f"{source}{after}", "once more"


def test_nothing_else_changes_in_the_shell(shell: list[str], checkout: Path) -> None:
    text = "state() { set -o; set; umask; pwd; }; file=mine home=mine IFS=/ CDPATH=/ PYTHONPATH=\n"
    text += 'state >before.txt; . "$1"; state >after.txt'
    run(shell, text, checkout.parent, str(checkout / SCRIPT))
    before, after = (
        [line for line in (checkout.parent / name).read_text("utf-8").splitlines() if not VOLATILE.match(line)]
        for name in ("before.txt", "after.txt")
    )
    assert any(line.startswith("file=") for line in before) and after == before
    assert run(shell, "false; . ./setup_env.sh; false || echo alive", checkout) == "alive\n", "set -e is not on"


def test_run_instead_of_sourced_it_says_how_to_source_it(shell: list[str], checkout: Path) -> None:
    done = subprocess.run([*shell, str(checkout / SCRIPT)], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and f'. "{checkout / SCRIPT}"' in done.stderr


def test_a_copy_outside_a_checkout_says_so_and_changes_nothing(shell: list[str], checkout: Path) -> None:
    stray = checkout.parent / SCRIPT
    shutil.copy(ROOT / SCRIPT, stray)
    text = '. "$1" 2>/dev/null && echo found; echo "${PYTHONPATH-unset}"'
    assert run(shell, text, Path("/"), str(stray)) == "unset\n"
    home = f"FLASH_EXPERTS_HOME={shlex.quote(str(checkout))}; {text}"
    assert run(shell, home, Path("/"), str(stray)) == f"found\n{checkout / 'src'}\n"


def test_the_package_of_this_checkout_is_the_one_that_is_imported() -> None:
    find = "import importlib.util; print(importlib.util.find_spec('flash_experts').origin)"
    text = f". {shlex.quote(str(ROOT / SCRIPT))}; {shlex.quote(sys.executable)} -c {shlex.quote(find)}"
    assert run(["sh"], text, Path("/")).strip() == str(ROOT.resolve() / "src/flash_experts/__init__.py")


def test_requirements_pin_nothing_and_bring_what_the_tests_import() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert lines == ["-e .[all,test]"], "constraints.txt would replace what `pip install -e .` has just installed"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    brought = " ".join(extras["test"])
    for package in ("pytest", "hypothesis", "peft", "tensorboard", "jupytext", "triton;"):
        assert package in brought
    assert "flash-experts[all,test]" in extras["dev"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_what_set_up_and_training_make_is_ignored_by_git() -> None:
    made = ["venv/bin/python", ".venv", "wandb/offline-run-1/x", "data/mtg/train.jsonl", "models/run/x"]
    done = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == made
