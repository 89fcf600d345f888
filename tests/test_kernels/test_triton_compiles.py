"""The Triton kernels compiled for a Hopper GPU (none is needed), which finds what the interpreter accepts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "scripts/hopper_report.py"


@pytest.mark.parametrize(
    ("head_dim", "variants"),
    [(64, ["packed dropout", "softcap", "alibi"]), (128, ["causal"]), (40, ["window"])],
    ids=str,
)
def test_kernels_reach_the_tensor_cores_and_hardly_spill(head_dim: int, variants: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--first", "--json", "--head-dims", str(head_dim), "--variants", *variants]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["program"] for row in rows} == {"forward", "keys", "queries", "decode"}
    for row in rows:
        if row["program"] != "decode":  # a tile of 16 rows is below what wgmma takes
            assert row["hgmma"] > 0, row
        if "dropout" not in row["variant"]:
            assert row["spilled_bytes"] <= 64, row
