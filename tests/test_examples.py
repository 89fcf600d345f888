"""The examples and the commands of the README, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def example(name: str, *arguments: str) -> str:
    """Runs examples/NAME from another folder than its own, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_prepare_example() -> None:
    assert "train" in example("prepare_mtg_data.py")


@pytest.mark.slow
def test_generate_examples_make_names_with_the_released_base() -> None:
    base = str(ROOT / "models/mtg-base")
    assert len(example("generate_names.py", base).strip().splitlines()) >= 10
    said = example("generate_mtg_names.py", base)
    assert "Goblin" in said and said.count(";") == 7 * 19, "twenty names for each of seven kinds of cards"


@pytest.mark.slow
def test_custom_filter_example_keeps_its_word() -> None:
    lines = dict(line.split(": ", 1) for line in example("extending/custom_filter.py").splitlines())
    assert len(lines["NoLetterE"].split("; ")) == 8
    assert "e" not in (lines["NoLetterE"] + lines["model.generate"]).lower()
    assert not re.search(r"[b-df-hj-np-tv-xz]{3}", lines["FewConsonants"], re.IGNORECASE)


def readme_commands() -> list[str]:
    """Each line of the README's shell blocks that calls our program."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip().startswith("flash-experts")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_understood(command: str) -> None:
    """Each parses with its options as the program takes them; what they do is tested elsewhere."""
    import shlex

    from flash_experts.cli import COMMANDS, _dashes_to_underscores

    _, name, *arguments = shlex.split(command)
    COMMANDS[name].make_parser().parse_args([_dashes_to_underscores(argument) for argument in arguments])


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_parse_and_are_valid(config: Path) -> None:
    from flash_experts.cli import COMMANDS

    parser = COMMANDS["train"].make_parser()
    args = parser.instantiate(parser.parse_args(["--config", str(config)]))
    args.training.validate()


def test_every_key_of_the_quickstart_is_commented() -> None:
    text = (ROOT / "configs/quickstart.yaml").read_text("utf-8")
    keys = [line for line in text.splitlines() if re.match(r"\s*[a-z_]+:\s*\S", line)]
    assert len(keys) > 20 and all("#" in line for line in keys)
