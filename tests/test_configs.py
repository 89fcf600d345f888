"""The presets: they are accepted, and quickstart.yaml shows every option of training with a comment."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from flash_experts.commands.train import make_parser
from flash_experts.training.training_config import ModelConfig, TrainingConfig

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml"))
# A key that is set, or one that is offered in a comment; both with a word on it.
_LINE = re.compile(r"^  (?:# )?(\w+):.*?(?:\s# (.+))$", re.MULTILINE)
_OFFERED = re.compile(r"^  # ((?: {2}- \{)|\w+:)", re.MULTILINE)


def is_of_training(path: Path) -> bool:
    return "training" in yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", filter(is_of_training, PRESETS), ids=lambda path: path.name)
def test_a_preset_is_accepted(path: Path) -> None:
    parser = make_parser()
    args = parser.instantiate(parser.parse_args([f"--config={path}"]))
    args.training.validate()


def test_quickstart_shows_every_option_of_training_with_a_comment() -> None:
    text = (CONFIGS / "quickstart.yaml").read_text("utf-8").split("\ntraining:\n")[1]
    commented = {key for key, _ in _LINE.findall(text)}
    assert {field.name for field in fields(TrainingConfig)} - commented == set()
    assert commented - {field.name for field in fields(TrainingConfig)} == set(), "and none that does not exist"


def test_every_option_of_the_model_is_shown_somewhere() -> None:
    shown: set[str] = set()
    for path in PRESETS:
        shown |= set(re.findall(r"^  (?:# )?(\w+):", path.read_text("utf-8"), re.MULTILINE))
    assert {field.name for field in fields(ModelConfig)} - shown == set()


@pytest.mark.parametrize("path", filter(is_of_training, PRESETS), ids=lambda path: path.name)
def test_what_is_offered_in_comments_is_accepted(path: Path, tmp_path: Path) -> None:
    offered = tmp_path / path.name
    offered.write_text(_uncommented(path.read_text("utf-8")), "utf-8")
    parser = make_parser()
    args = parser.instantiate(parser.parse_args([f"--config={offered}"]))
    args.training.validate()


def _uncommented(text: str) -> str:
    """Every offered key is set; where it is set already, the offer goes."""
    lines, section, seen = [], "", set()
    for line in text.splitlines():
        if match := re.match(r"^(\w+):", line):
            section = match[1]
        if _OFFERED.match(line):
            line = "  " + line[4:]
        if match := re.match(r"^  (\w+):", line):
            if (section, match[1]) in seen:
                continue
            seen.add((section, match[1]))
        lines.append(line)
    return "\n".join(lines)
