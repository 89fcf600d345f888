"""The examples, run as they stand, and the configurations."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent


def example(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    """Runs examples/NAME as `python examples/NAME ...` does, but in this process. Returns what it prints."""
    capsys.readouterr()
    script = ROOT / "examples" / name
    path = [str(script.parent), *sys.path]  # one example imports another
    with mock.patch.object(sys, "argv", [name, *arguments]), mock.patch.object(sys, "path", path), chdir(ROOT):
        runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_prepare_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train" in example(capsys, "prepare_mtg_data.py")


@pytest.mark.slow
def test_generate_examples_make_names_with_the_released_base(capsys: pytest.CaptureFixture[str]) -> None:
    base = str(ROOT / "models/mtg-base")
    assert len(example(capsys, "generate_names.py", base).strip().splitlines()) >= 10
    said = example(capsys, "generate_mtg_names.py", base)
    assert "Goblin" in said and said.count(";") == 7 * 19, "twenty names for each of seven kinds of cards"


@pytest.mark.slow
def test_custom_filter_example_keeps_its_word(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dict(line.split(": ", 1) for line in example(capsys, "extending/custom_filter.py").splitlines())
    assert len(lines["NoLetterE"].split("; ")) == 8
    assert "e" not in (lines["NoLetterE"] + lines["model.generate"]).lower()
    assert not re.search(r"[b-df-hj-np-tv-xz]{3}", lines["FewConsonants"], re.IGNORECASE)


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
