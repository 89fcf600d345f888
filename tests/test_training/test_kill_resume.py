"""kill -9 at random moments: what comes after is as if nobody had killed. The experiments are the benchmarks' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

if not hasattr(os, "fork"):
    pytest.skip("the runs are forked", allow_module_level=True)


def experiment(folder: Path, *arguments: str, script: str = "kill_resume.py") -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(folder / "result.json"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (folder / "result.json").exists(), done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert done.returncode == 0, result
    return result


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    result = experiment(tmp_path, "--kills", "20", "--seed", "0")
    assert result["survived"] == result["tried"] == 20
    # Were it otherwise, the moments would not be those that matter.
    assert result["amid_a_save"] >= 3 and result["killed_more_than_once"] >= 2


@pytest.mark.slow
def test_kills_of_two_processes_lose_nothing(tmp_path: Path) -> None:
    """DDP, FSDP2 and expert parallel."""
    result = experiment(tmp_path, "--kills", "3", "--processes", "2", "--seed", "1")
    assert result["survived"] == result["tried"] == 3 and result["processes"] == 2
    # A kill that comes too late is tried again with the next one.
    assert result["variants"][:3] == ["experts, ddp", "experts, fsdp", "experts, expert"]


@pytest.mark.slow
def test_kills_of_a_download_and_of_evaluate_lose_nothing(tmp_path: Path) -> None:
    """And a byte flipped in each part of a checkpoint is found."""
    names = ("prepare scryfall", "evaluate", "flip")
    result = experiment(tmp_path, "--tries", "2", "--only", *names, script="faults.py")
    assert result.keys() == set(names)
    assert all(found["survived"] == found["tried"] >= 2 and found["lost"] == [] for found in result.values())
    assert result["prepare scryfall"]["killed"] and result["flip"]["tried"] >= 50
