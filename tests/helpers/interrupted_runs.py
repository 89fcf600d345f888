"""The runs of test_interrupted.py: ``python interrupted_runs.py WORKPLACE FOLDER SECONDS ...``.

Each command is run in a process of its own, so that the state of an interrupted library dies with it. This
one imports what all need and forks the others: a start then takes milliseconds instead of seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
# As the command line has it where it imports transformers itself.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch

import flash_experts.generation.generator
import flash_experts.training.trainer  # noqa: F401  (for the forked ones)
from flash_experts.__main__ import main

COMMANDS = {
    "prepare": "prepare --source names.txt --out data/again",
    "upcycle": "upcycle models/base --out models/up",
    "export": "export hub models/moe --out models/exported",
    "evaluate": "evaluate models/base --samples 200",
    "compare": "compare models/base --samples 200 --out pages/report.html",
    "inspect": "inspect models/moe --out pages/inspect.html",
    "generate": "generate --model models/base --count 500 --out names/new.csv",
    "plot": "plot models/base --out curves.png",
    "train": "train --base models/base --model.num-experts 0 --training.run-name again --training.max-steps 40 "
    "--training.max-epochs null --training.tokens-per-batch 512 --training.checkpoint-every 2",
}
TIMEOUT_SECONDS = 120


def interrupted(words: str, seconds: float, folder: Path) -> dict[str, Any]:
    """Runs a command that gets SIGINT after ``seconds`` of computing.

    Returns:
        status: as `os.waitstatus_to_exitcode` gives it; None if it had to be killed.
        sent: whether SIGINT came before it was done.
        err: its stderr.
    """
    reader, writer = os.pipe()
    err = folder.with_name(f"{folder.name} stderr")
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        _run(words, seconds, writer)
    os.close(writer)
    end = time.monotonic() + TIMEOUT_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.005)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sent = os.read(reader, 1) != b""
    os.close(reader)
    status = None if ended == (0, 0) else os.waitstatus_to_exitcode(ended[1])
    return {"status": status, "sent": sent, "err": err.read_text("utf-8")}


def _run(words: str, seconds: float, writer: int) -> None:
    """The child process; it never returns."""

    def send(*_: object) -> None:
        os.write(writer, b"x")
        signal.raise_signal(signal.SIGINT)

    status = 99
    try:
        with mock.patch.object(sys, "argv", ["flash-experts", *words.split()]):
            signal.signal(signal.SIGVTALRM, send)
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            status = main()
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def runs(workplace: Path, folder: Path, moments: list[float]) -> Iterator[dict[str, Any]]:
    for name, words in COMMANDS.items():
        for seconds in moments:
            place = folder / f"{name} {seconds}"
            shutil.copytree(workplace, place, ignore=shutil.ignore_patterns("tuned", "*.html"))
            before = {path for path in place.rglob("*") if path.is_file()}
            ended = interrupted(words, seconds, place)
            new = {path for path in place.rglob("*") if path.is_file()} - before
            yield {"name": name, "seconds": seconds, "new": sorted(map(str, new)), **ended}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in runs(Path(sys.argv[1]), Path(sys.argv[2]), [float(text) for text in sys.argv[3:]]):
        print(json.dumps(found), flush=True)
