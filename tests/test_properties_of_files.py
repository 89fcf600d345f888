"""Any file content gives cards, settings, or a ValueError that names the file, and no other error."""

from __future__ import annotations

import json
import struct
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.data.cards import parse_colors
from flash_experts.data.cleaning import clean
from flash_experts.data.names import faces_of, normal_form, shown_form
from flash_experts.data.prompts import Attributes
from flash_experts.data.sources import MAX_NAME, load_source, read_file
from flash_experts.generation.text_rules import format_name
from flash_experts.models.loading import check_folder
from flash_experts.models.saving import MANIFEST, CheckpointError
from flash_experts.options import read_yaml
from flash_experts.training import TrainingConfig, checkpoint

FAST = settings(max_examples=60, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=8), parts, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["name", "type", "typeLine", "colors", "manaValue", "cmc", "mana_cost", "rarity", "layout", "x"])
CARD = st.dictionaries(KEYS, JSON | st.sampled_from(["Goblin Guide", "R", "Creature", "{1}{R}"]), max_size=6)


def read(suffix: str, content: bytes) -> Any:
    """Cards or settings of a file with this content, or the error that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"cards{suffix}")
        path.write_bytes(content)
        try:
            return read_yaml(path) if suffix == ".yaml" else read_file(path)
        except ValueError as error:
            assert "cards" in str(error)
            return error


@FAST
@given(st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".yaml"]), st.binary(max_size=200))
def test_any_bytes(suffix: str, content: bytes) -> None:
    read(suffix, content)


@FAST
@given(st.sampled_from([".txt", ".csv", ".json", ".jsonl", ".yaml"]), st.text(max_size=200))
def test_any_text(suffix: str, content: str) -> None:
    read(suffix, content.encode("utf-8", "surrogatepass"))


@FAST
@given(st.lists(CARD | JSON, max_size=5))
def test_any_cards(cards: list[Any]) -> None:
    lines = "".join(json.dumps(card) + "\n" for card in cards).encode()
    for found in (read(".json", json.dumps(cards).encode()), read(".jsonl", lines)):
        if not isinstance(found, ValueError):
            assert all(0 < len(row.name) <= MAX_NAME for row in found.rows)
            clean(found.rows)


@FAST
@given(JSON)
def test_any_settings(content: Any) -> None:
    found = read(".yaml", json.dumps(content).encode())
    assert isinstance(found, ValueError | dict)


@FAST
@given(st.text(max_size=60))
def test_display_forms_are_idempotent(text: str) -> None:
    shown = shown_form(text)
    assert shown_form(shown) == shown and normal_form(shown) == normal_form(text)
    assert shown == shown.strip() and "  " not in shown
    assert format_name(format_name(shown)) == format_name(shown)
    faces_of(text)


@FAST
@given(st.text(max_size=30), st.text(max_size=8), st.integers() | st.none())
def test_any_attributes(type_line: str, colors: str, mana_value: int | None) -> None:
    try:
        prompt = Attributes.parse(type_line, colors, mana_value).prompt()
    except ValueError as error:
        assert str(error)
    else:
        assert prompt and "\n" not in prompt


@FAST
@given(st.text(max_size=12))
def test_any_colors(text: str) -> None:
    try:
        assert set(parse_colors(text) or ()) <= set("WUBRG")
    except ValueError as error:
        assert "color" in str(error)


@FAST
@given(st.sampled_from(sorted(TrainingConfig().to_dict())), st.integers() | st.floats() | st.none())
def test_any_number_in_a_training_configuration(name: str, value: float | None) -> None:
    """Of the type that the command line gives: a number where a number is expected."""
    default = TrainingConfig().to_dict()[name]
    if isinstance(default, bool | str | list | dict) or name == "stages" or (value is None and default is not None):
        return
    try:
        TrainingConfig(**{name: value}).validate()
    except ValueError as error:
        assert name in str(error) or "nothing ends the run" in str(error)


@FAST
@given(JSON, st.binary(max_size=60), st.integers(0, 2**64 - 1))
def test_any_model_folder(config: Any, weights: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + weights)
        try:
            check_folder(folder)
        except ValueError as error:
            assert name in str(error)


NUMBERS = asdict(checkpoint.TrainerState(step=3))
STATE = {"state": NUMBERS, "config": {}, "data": {}, "registered": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"2",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"state": []}',
        json.dumps(STATE | {"state": NUMBERS | {"step": "3"}}).encode(),
        json.dumps(STATE | {"state": NUMBERS | {"step": 3.5}}).encode(),
        json.dumps(STATE | {"state": NUMBERS | {"stepp": 3}}).encode(),
        json.dumps(STATE | {"config": 1}).encode(),
        json.dumps({"state": {}}).encode(),
    ],
    ids=range(10),
)
def test_a_malformed_state_that_matches_its_manifest(content: bytes, tmp_path: Path) -> None:
    """Found by fuzzing: `"2"` was an AttributeError."""
    (tmp_path / checkpoint.STATE).write_bytes(json.dumps(STATE).encode())
    assert checkpoint.read_state(tmp_path)[0].step == 3
    (tmp_path / checkpoint.STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a trainer state") as caught:
        checkpoint.read_state(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["/config.json", "../config.json", "checkpoints/config.json"])
def test_a_manifest_that_names_files_elsewhere(name: str, tmp_path: Path) -> None:
    """Found by fuzz_files.py: "/config.json is missing" did not say which checkpoint is meant."""
    (tmp_path / MANIFEST).write_text(json.dumps({name: {"sha256": "0" * 64, "bytes": 2}}))
    with pytest.raises(CheckpointError, match="not a file in this folder") as caught:
        checkpoint.verify_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@FAST
@given(st.binary(max_size=60) | JSON.map(lambda found: json.dumps(found).encode()))
def test_any_manifest_and_state(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, read in (
            (MANIFEST, checkpoint.verify_checkpoint),
            (checkpoint.STATE, checkpoint.read_state),
        ):
            (folder / file).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                read(folder)


def test_a_source_that_is_a_folder() -> None:
    with pytest.raises(ValueError, match="is a folder"):
        load_source("/")
