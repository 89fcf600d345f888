"""The generate command as a user runs it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts import NameGenerator
from flash_experts.cli import main

COLUMNS = {"text", "log_prob", "score", "nearest_card", "similarity"}


@pytest.fixture
def command(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--count", "6", "--seed", "3"]


def test_the_same_names_in_every_format(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in rows] == lines and set(rows[0]) == COLUMNS
    assert main([*command, "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["text"] for row in table] == lines and set(table[0]) == COLUMNS
    for suffix in ("txt", "csv", "json", "jsonl"):
        file = tmp_path / "new" / f"names.{suffix}"
        assert main([*command, "--out", str(file)]) == 0
        captured = capsys.readouterr()
        assert captured.out == "" and "6 names written" in captured.err
        text = file.read_text("utf-8")
        if suffix == "jsonl":
            assert [json.loads(line) for line in text.splitlines()] == rows
        elif suffix == "json":
            assert json.loads(text) == rows
        elif suffix == "csv":
            assert list(csv.DictReader(io.StringIO(text))) == table
        else:
            assert text.splitlines() == lines
    assert {file.suffix for file in (tmp_path / "new").iterdir()} == {".txt", ".csv", ".json", ".jsonl"}


def test_one_name_is_singular(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--count", "1", "--out", str(tmp_path / "names.csv")]) == 0
    assert "1 name written to " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "creativ"], "unknown preset 'creativ'"),
        (["--temperature", "0"], "temperature is 0"),
        (["--colors", "X"], "unknown color 'X'"),
        (["--type", "Gobln"], "unknown type 'Gobln'"),
        (["--contains", "ß"], "no card's name has 'ß' in it"),
    ],
)
def test_what_needs_no_model_is_checked_first(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "nowhere", *options]) == 1
    assert message in capsys.readouterr().err, "loading would fail with another message"


def test_ranked_names_are_the_same_names_best_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*command, "--json"])
    rows = json.loads(capsys.readouterr().out)
    main([*command, "--json", "--rank"])
    assert json.loads(capsys.readouterr().out) == sorted(rows, key=lambda row: -row["score"])


def test_raw_names_are_without_selection_and_guidance(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def names(*options: str) -> list[str]:
        assert main([*command, "--type", "Creature — Goblin", *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert names("--raw") == names("--quality", "fast", "--guidance", "1") != names("--quality", "fast")
    assert names("--raw", "--guidance", "1.25") == names("--quality", "fast"), "the preset's, given by itself"


def test_every_constraint_is_an_option(command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    presets = tmp_path / "presets.yaml"
    presets.write_text("wild: {temperature: 1.4}")
    options = ["--ends-with", "ing", "--contains", "a", "--min-words", "2", "--max-words", "3", "--min-length", "8"]
    options += ["--max-length", "30", "--min-distance", "0.2", "--allow-profanity", "--ban", "[elf]", "--best-of", "2"]
    options += ["--preset", "wild", "--presets", str(presets), "--regex", "[^,]*"]
    assert main([*command, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert (
            line.lower().endswith("ing")
            and "a" in line.lower()
            and 8 <= len(line) <= 30
            and len(line.split()) in (2, 3)
        )
    assert main([*command, "--words", "1", "--dtype", "bfloat16"]) == 0
    assert all(" " not in line for line in capsys.readouterr().out.splitlines())
    assert main([*command, "--alliterate", "--count", "1", "--like", "Goblin Guide"]) == 0


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_only_where_the_processor_has_it(
    has_it: bool, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In software its matmuls take more than forty times as long as in float32."""
    monkeypatch.setattr("flash_experts.kernels.cpu.has_bfloat16", lambda: has_it)
    dtypes = []
    loaded = NameGenerator.from_pretrained

    def watched(source: Any, device: Any, dtype: torch.dtype) -> NameGenerator:
        dtypes.append(dtype)
        return loaded(source, device, dtype)

    monkeypatch.setattr(NameGenerator, "from_pretrained", watched)
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert dtypes == [torch.bfloat16 if has_it else torch.float32]
    assert ("bfloat16 in software" in capsys.readouterr().err) != has_it


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--out names.pdf", 2, "must end in"),
        ("--json --format csv", 2, "choose one"),
        ("--format mse", 2, "give --out NAMES.mse-set"),
        ("--cards set.csv --type Land --out names.csv", 2, "leave out --type"),
        ("--cards set.csv", 2, "give --out"),
        ("--cards set.csv --rank --out names.csv", 2, "--cards keeps the order of the cards: leave out --rank"),
        ("--top-logits 5", 2, "only --attributes-from uses it: leave out --top-logits"),
        ("--attribute-dropout 0.9", 2, "leave out --attribute-dropout"),
        ("--cards set.csv --data nowhere --out names.csv", 2, "leave out --data"),
        ("--raw-cells", 2, "only CSV has cells: leave out --raw-cells"),
        ("--raw-cells --out names.json", 2, "leave out --raw-cells"),
        ("--out names.csv --json", 2, "leave out"),
        ("--words two", 2, "words"),
        ("--min-words 3 --max-words 2", 1, "more than max_words"),
        ("--regex (", 1, "unclosed group"),
        ("--regex x{99}", 1, "matches no name"),
        ("--presets nowhere.yaml", 1, "there is no file"),
        ("--min-distance 7", 1, "min_distance"),
        ("--rarity odd", 1, "rarity"),
        ("--set ZEN", 1, "not trained with sets"),
        ("--released 2019", 1, "not trained with years"),
    ],
)
def test_bad_values_are_reported_in_one_line(
    command: list[str], options: str, status: int, message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*command, *options.split()]) == status
    captured = capsys.readouterr()
    ours = captured.err[
        captured.err.index("flash-experts") :
    ]  # after transformers' progress bar, which a separate process does not show
    assert captured.out == "" and message in ours and ours.count("\n") == 1
    assert not list(tmp_path.glob("names*"))


def test_an_interrupted_file_is_not_there(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_experts.generation import NameGenerator

    answer = NameGenerator.answer

    def stopped(self: NameGenerator, *args: object, **options: object):
        yield next(answer(self, *args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(NameGenerator, "answer", stopped)
    assert main([*command, "--out", str(tmp_path / "names.csv")]) == 130
    assert not list(tmp_path.glob("names*"))


@pytest.mark.parametrize(("options", "counted"), [([], True), (["--json"], True), (["--format", "csv"], False)])
def test_a_terminal_shows_how_many_names_there_are(command: list[str], options: list[str], counted: bool) -> None:
    """Where the names come all at once; a bar between lines that are printed one by one would tear them."""
    pty = pytest.importorskip("pty", reason="a terminal of its own needs POSIX")
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "flash_experts", *command, *options]
    output = subprocess.PIPE if options else terminal
    done = subprocess.Popen(program, stdout=output, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the end of a terminal, on Linux
        while part := os.read(controller, 4096):
            shown += part
    os.close(controller)
    piped = done.communicate()[0]
    assert done.returncode == 0
    assert (b"6/6" in shown) == counted
    assert (b"per character" in shown) != bool(options)
    assert not piped or b"6/6" not in piped
