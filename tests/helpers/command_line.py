"""Runs `flash-experts ...` as a user types it, in this process (fast) or in a new one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from transformers.utils import logging

from flash_experts.cli import main


@dataclass
class Done:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def run(*arguments: str | Path, cwd: Path) -> Done:
    """Runs a command in this process, in a folder, and restores the process state.

    An uncaught exception becomes a traceback and the status 1, as in Python.
    """
    with _streams() as (out, err), chdir(cwd), mock.patch.dict(os.environ), quiet_libraries():
        try:
            status = main([str(argument) for argument in arguments])
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return Done(status, out.read_text("utf-8"), err.read_text("utf-8"))


def run_process(*arguments: str | Path, cwd: Path, **environment: str) -> Done:
    """Runs a command in a new process, without a network."""
    command = [sys.executable, "-m", "flash_experts.cli", *map(str, arguments)]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, timeout=300)
    return Done(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def ok(*arguments: str | Path, cwd: Path) -> Done:
    """Runs a command that must succeed, in this process."""
    done = run(*arguments, cwd=cwd)
    assert done.status == 0, done.err
    return done


@contextmanager
def _streams() -> Iterator[tuple[Path, Path]]:
    """Redirects stdout and stderr to files, for C libraries too."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        kept = [os.dup(descriptor) for descriptor in (1, 2)]
        try:
            for descriptor, file in zip((1, 2), files, strict=True):
                new = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(new, descriptor)
                os.close(new)
            with (
                open(files[0], "a", encoding="utf-8") as out,
                open(files[1], "a", encoding="utf-8", buffering=1) as err,
                mock.patch.object(sys, "stdout", out),
                mock.patch.object(sys, "stderr", err),
            ):
                yield files
        finally:
            for descriptor, old in zip((1, 2), kept, strict=True):
                os.dup2(old, descriptor)
                os.close(old)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences transformers as the program's environment variables do before its import."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------- a place to work

TINY_RUN = (
    "--training.tokens-per-batch=1024 --training.max-epochs=null --training.eval-every=4 "
    "--training.validation-names=40 --training.log-every=2"
).split()
BASE_RUN = (
    *("train", "--model.num-experts=0", "--model.n-layer=2", "--model.n-embd=32", "--model.n-head=2"),
    *("--model.vocab-size=400", *TINY_RUN, "--training.run-name=base", "--training.max-steps=6"),
)
FIRST = "Ember Storm Grave Mire Thorn Frost Dawn Iron Hollow Silver Ash Raven Crystal Gale Dusk River Stone".split()
SECOND = "Seer Warden Colossus Adept Stalker Shaman Herald Sphinx Reaver Golem Druid Knight Serpent Titan".split()


def make_workplace(folder: Path) -> None:
    """Runs the first commands in a folder: prepared names, a tiny dense model, and its upcycled MoE."""
    names = [f"{first} {second}" for first in FIRST for second in SECOND]
    (folder / "names.txt").write_text("\n".join(names), "utf-8")
    ok("prepare", "--source", "names.txt", cwd=folder)
    ok(*BASE_RUN, cwd=folder)
    ok("upcycle", "models/base", "--num-experts", "4", "--out", "models/moe", cwd=folder)
