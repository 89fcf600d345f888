"""Completion in the shell: what bash offers at a cursor."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flash_experts.cli import COMMANDS
from tests.helpers.command_line import ok


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    folder = tmp_path_factory.mktemp("shell")
    (folder / "completion.bash").write_text(ok("completion", "bash", cwd=folder).out, "utf-8")
    return folder / "completion.bash"


def offered(script: Path, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    words = line.replace("=", " = ").split(" ") if "=" in line else line.split(" ")
    text = f"set -u; . {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
    text += '_flash_experts; printf "%s\\n" ${COMPREPLY[@]+"${COMPREPLY[@]}"}'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_every_command_is_offered(script: Path) -> None:
    assert set(offered(script, "flash-experts ")) == {*COMMANDS, "help"}
    assert offered(script, "flash-experts gen") == ["generate"]
    assert offered(script, "flash-experts help fe") == ["fetch-teacher"]


def test_options_are_offered_as_the_help_spells_them(script: Path) -> None:
    assert offered(script, "flash-experts generate --min-d") == ["--min-distance"]
    assert offered(script, "flash-experts train --training.learning") == ["--training.learning-rate"]
    assert "--lengths" in offered(script, "flash-experts benchmark attention --")


def test_the_values_of_an_option_are_offered(script: Path) -> None:
    assert offered(script, "flash-experts train --config qu") == ["quickstart"]
    assert offered(script, "flash-experts train --training.optimizer ") == ["adamw", "muon"]
    assert offered(script, "flash-experts train --training.optimizer=mu") == ["muon"]
    assert offered(script, "flash-experts configs stu") == ["student"]
    assert offered(script, "flash-experts benchmark mo") == ["moe"]


def test_elsewhere_bash_offers_file_names(script: Path) -> None:
    assert offered(script, "flash-experts evaluate mod") == []
    assert "complete -o default -F _flash_experts flash-experts" in script.read_text("utf-8")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_what_is_typed(tmp_path: Path) -> None:
    (tmp_path / "completion.zsh").write_text(ok("completion", "zsh", cwd=tmp_path).out, "utf-8")
    for typed, completed in (
        ("flash-experts gen", "flash-experts generate "),
        ("flash-experts generate --min-d", "flash-experts generate --min-distance "),
        ("flash-experts train --config qu", "flash-experts train --config quickstart "),
        ("flash-experts train --training.optimizer=mu", "flash-experts train --training.optimizer=muon "),
        ("flash-experts evaluate comp", "flash-experts evaluate completion.zsh "),
    ):
        assert typed_in_zsh(tmp_path, typed) == completed
    assert typed_in_zsh(tmp_path, "flash-experts gen", before=":") == "flash-experts generate ", "without compinit"


def typed_in_zsh(folder: Path, typed: str, before: str = "autoload -Uz compinit && compinit -u -D") -> str:
    """The command line of an interactive zsh after the tab key; a key of its own writes it to a file."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe("zsh", ["zsh", "-f"], os.environ | {"TERM": "dumb", "HOME": str(folder)})
    line = folder / "line.txt"
    line.unlink(missing_ok=True)
    setup = (
        f"{before} && . ./completion.zsh",
        "save() { print -rn -- $BUFFER > part; mv part line.txt }",
        "zle -N save; bindkey '^O' save",
    )
    os.write(terminal, "\n".join([*setup, f"{typed}\t\x0f"]).encode())
    deadline = time.monotonic() + 60
    while not line.exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)  # what it prints would fill the terminal's buffer
    os.close(terminal)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return line.read_text("utf-8")
