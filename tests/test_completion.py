"""Completion in the shell: what bash offers at a cursor."""

from __future__ import annotations

import shlex
import shutil
import subprocess
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


def test_zsh_reads_the_same_script(script: Path) -> None:
    zsh = ok("completion", "zsh", cwd=script.parent).out
    assert zsh == "autoload -U +X bashcompinit && bashcompinit\n" + script.read_text("utf-8")
