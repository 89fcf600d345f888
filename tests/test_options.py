"""Settings in YAML: every option of every command, left empty or with a value of a wrong type."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest

from flash_experts.cli import COMMANDS, main
from flash_experts.commands.common import CommandParser
from flash_experts.options import read_settings
from flash_experts.training.training_config import Stage

PARSERS = {name: command.make_parser() for name, command in COMMANDS.items() if name != "benchmark"}
KEYS = [(name, key) for name, parser in PARSERS.items() for key in parser.hints]


def settings(folder: Path, key: str, value: str, parser: CommandParser | None = None) -> Any:
    """Settings of a file with one line."""
    path = folder / "c.yaml"
    groups = key.split(".")
    path.write_text(
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(groups))[:-1] + f" {value}\n", "utf-8"
    )
    found: Any = read_settings(path, (parser or PARSERS["train"]).hints)
    for name in groups:
        found = found[name]
    return found


def test_every_empty_key_is_reported_or_null(tmp_path: Path) -> None:
    assert len(KEYS) > 150
    for name, key in KEYS:
        if NoneType in get_args(PARSERS[name].hints[key]):
            assert settings(tmp_path, key, "", PARSERS[name]) is None
        else:
            with pytest.raises(
                ValueError, match=rf"c\.yaml: {key} is empty, but it must be \S.*: write a value, or delete"
            ):
                settings(tmp_path, key, "", PARSERS[name])


@pytest.mark.parametrize("value", ["{a: null}", "[[1], null]", "12:30", "yes"])
def test_every_key_with_a_wrong_value_is_read_or_refused_in_one_line(tmp_path: Path, value: str) -> None:
    for name, key in KEYS:
        try:
            found = settings(tmp_path, key, value, PARSERS[name])
        except ValueError as error:
            assert key in str(error) and "\n" not in str(error)
        else:
            assert found in (value, [value], True) or value[0] in "{![", "what is read as text stays as it is written"


@pytest.mark.parametrize("name", PARSERS)
def test_commands_report_an_empty_key_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = next(key for key, hint in PARSERS[name].hints.items() if NoneType not in get_args(hint) and "." not in key)
    (tmp_path / "c.yaml").write_text(f"{key}:\n", "utf-8")
    with pytest.raises(SystemExit, match="2"):
        PARSERS[name].parse_args(["--config", str(tmp_path / "c.yaml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"c.yaml: {key} is empty" in line


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("training:\n  max_stepz: 5\n", "did you mean 'training.max_steps'?"),
        ("training:\n  stages: [{name: a, epoch: 1}]\n", "stages has no setting 'epoch': did you mean 'epochs'?"),
    ],
)
def test_a_misspelled_setting_within_a_group_gets_a_suggestion(
    text: str, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match="2"):
        PARSERS["train"].parse_args(["--config", str(tmp_path / "c.yaml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line


def test_a_null_that_is_allowed_and_a_number_for_a_name_reach_the_command(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "base:\ntraining:\n  max_epochs:\n  run_name: 2026\n  learning_rate: 1e-3\n", "utf-8"
    )
    args = PARSERS["train"].parse_args(["--config", str(tmp_path / "c.yaml")])
    found = args.training
    assert (args.base, found.max_epochs, found.run_name, found.learning_rate) == (None, None, "2026", 1e-3)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        *(("training.run_name", text, text) for text in ("2026", "no", "1e-3", "2026-11-29", "010", "12:30", "1.10")),
        ("training.run_name", "2026-13-45", "2026-13-45"),
        *(("training.learning_rate", text, 1e-3) for text in ("1e-3", "1E-3", ".001", "0.1e-2", "1.0e-3")),
        *(("training.seed", "010", 10), ("training.seed", "1e3", 1000), ("training.max_minutes", "3", 3)),
        *(("training.tracker", "none", "none"), ("training.compile", "yes", True)),
        (
            "training.stages",
            "[{name: 1, epochs: 1e-1, types: Creature}]",
            [{"name": "1", "epochs": 0.1, "types": ["Creature"]}],
        ),
    ],
)
def test_values_are_read_by_the_type_of_their_option(tmp_path: Path, key: str, value: str, found: Any) -> None:
    assert settings(tmp_path, key, value) == found
    assert {"name", "epochs", "types"} <= set(Stage.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("training:\n", "training is empty: write its settings under it, or delete the line"),
        ("training:\n  lr_scale:\n", "training.lr_scale is empty: write its settings"),
        ("training: 3\n", "training must have settings under it, not 3"),
        ("training:\n  stages: [{name: a, learning_rate_scale: }]\n", r"stages\[0\]\.learning_rate_scale is empty"),
        ("training:\n  stages: [a]\n", r"training\.stages\[0\] must be settings, not 'a'"),
        ("training:\n  betas: [0.9, null]\n", r"training\.betas\[1\] is empty, but it must be a number"),
        ("training:\n  betas: 0.9\n", "training.betas must be a list of 2, not '0.9'"),
        ("training:\n  max_minutes: 1:30\n", "training.max_minutes must be a number or null, not '1:30'"),
        ("training:\n  seed: yes\n", "training.seed must be a whole number, not 'yes'"),
        ("training:\n  compile: 1\n", "training.compile must be true or false, not '1'"),
        ("base: a\nseed: " + "9" * 5000 + "\n", r"c\.yaml:2 is not valid YAML: Exceeds the limit"),
        ("seed: !!int x\n", r"c\.yaml:1 is not valid YAML: invalid literal"),
        ("yes: 3\n", "the key True is not the name of a setting"),
        ("training:\n\tseed: 1\n", r"c\.yaml:2 is not valid YAML: .*: indent with spaces"),
        ("- seed: 1\n", "holds no settings: write `name: value`, one per line"),
        ("seed: 1\nseed: 2\n", r"c\.yaml:2 .*'seed' is given twice"),
    ],
)
def test_malformed_settings_are_reported(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "c.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=error) as raised:
        read_settings(tmp_path / "c.yaml", PARSERS["train"].hints)
    assert "\n" not in str(raised.value)


def test_an_unknown_key_gets_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("training:\n  weight_decoy: 0.1\n", "utf-8")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "did you mean 'training.weight_decay'?" in capsys.readouterr().err
