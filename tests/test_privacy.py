"""Nobody is called and no secret is kept: telemetry of libraries is off, and tokens are in no file and on no stream."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from flash_experts.cli import NO_TELEMETRY
from tests.helpers.command_line import ok, run

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


def test_telemetry_is_off_before_a_library_is_imported() -> None:
    script = """
import os
from flash_experts import cli
cli._set_up_libraries()
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY, *(os.environ[name] for name in cli.NO_TELEMETRY))
"""
    environment = {name: value for name, value in os.environ.items() if name not in NO_TELEMETRY}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", *NO_TELEMETRY.values()], done.stderr


_contacted: list[object] | None = None  # while somebody listens


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _contacted is not None and event in ("socket.connect", "socket.getaddrinfo"):
        _contacted.append(arguments[-1] if event == "socket.connect" else arguments[0])


@contextmanager
def who_is_called() -> Iterator[list[object]]:
    """Addresses that this process connects to or looks up, those of this machine left out when it ends."""
    global _contacted
    found: list[object] = []
    _contacted = found
    try:
        yield found
    finally:
        _contacted = None
        found[:] = [one for one in found if not str(one).strip("('").startswith(("/", "127.", "localhost", "::1"))]


@pytest.fixture(scope="module", autouse=True)
def _listening() -> None:
    sys.addaudithook(_hook)  # it cannot be taken away again: it does nothing while nobody listens


def test_training_and_generating_call_nobody_and_keep_no_secret(workplace: Path, tmp_path: Path) -> None:
    """A run tracked by the real wandb, offline; then every byte that it left is searched."""
    shutil.copytree(workplace, tmp_path / "w", ignore=shutil.ignore_patterns("checkpoints"))
    tracked = "--training.tracker wandb --training.run-name tracked --training.max-steps 2 --training.max-epochs null"
    dense = "--base models/base --model.num-experts 0 --training.tokens-per-batch 512 --training.validation-names 20"
    with mock.patch.dict(os.environ, SECRETS | {"WANDB_MODE": "offline"}), who_is_called() as called:
        said = [
            ok("train", *tracked.split(), *dense.split(), cwd=tmp_path / "w"),
            ok("generate", "--model", "models/tracked", "--count", "2", cwd=tmp_path / "w"),
            run("evaluate", "models/nowhere", cwd=tmp_path / "w"),
        ]
    assert called == []
    files = [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".wandb"], "wandb has written its run"
    for secret in SECRETS.values():
        assert not any(secret in done.out + done.err for done in said)
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
