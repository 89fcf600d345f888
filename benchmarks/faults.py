"""Faults on purpose: kill -9 of every command that writes, and damage to every part of a checkpoint.

    python benchmarks/faults.py [--tries 100] [--seed 0] [--out results.json]

prepare, upcycle, generate and compare are forked, killed at a moment drawn evenly over the file operations that they
do, and run again. Survived: what the kill left is the old state or the new one, whole, and the second run ends as one
that nobody disturbed, with no file of the killed one left beside.
flip changes one byte in each range of every file of a checkpoint; survived: it is found before anything is resumed.
Training is `benchmarks/kill_resume.py`, whose counts are printed with these.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from command_line import make_workplace
from kill_resume import FILE_EVENTS

from flash_experts import cli
from flash_experts.training.checkpoint import CheckpointError, checkpoint_steps, verify_checkpoint

COMMANDS = {
    "prepare": "prepare --source names.txt --out data/new",
    "upcycle": "upcycle models/base --out models/new",
    "generate": "generate --model models/base --count 20 --seed 0 --out names/new.csv",
    "compare": "compare models/base --samples 20 --out pages/new.html",
}
OUTPUTS = ("data", "models", "names", "pages")  # where they write
RANGES = 8  # of each file of a checkpoint


def forked(work: Callable[[], object], folder: Path, kill_at: int | None) -> tuple[int, int]:
    """Does work in a child, which kills itself before its file operation ``kill_at`` below the folder.

    Returns:
        The child's exit status, as `os.waitstatus_to_exitcode` gives it, and the operations that it counted.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            os.chdir(folder)
            count = 0

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal count
                if event in FILE_EVENTS and str(arguments[0]).startswith(
                    (str(folder), "data", "models", "names", "pages")
                ):
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            work()
            os.write(writer, str(count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = int(os.read(reader, 20) or b"0")
    os.close(reader)
    return status, count


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file; pages and figures have speeds and dates, of which only that they are there counts."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        timed = path.suffix in (".html", ".json") and "pages" in path.parts
        found[str(path.relative_to(folder))] = "" if timed else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def kill_commands(name: str, place: Path, tries: int, rng: random.Random) -> dict[str, Any]:
    """Kills a command at ``tries`` moments and runs it again each time."""
    words = COMMANDS[name].split()
    with tempfile.TemporaryDirectory() as temporary:
        straight = Path(temporary, "straight")
        shutil.copytree(place, straight)
        status, operations = forked(lambda: cli.main(words), straight, None)
        assert status == 0 and operations > 0, (name, status)
        whole, lost = contents(straight), []
        for number in range(tries):
            folder = Path(temporary, str(number))
            shutil.copytree(place, folder)
            kill_at = rng.randrange(1, operations + 1)
            status, _ = forked(lambda: cli.main(words), folder, kill_at)
            left = contents(folder)
            torn = [path for path, digest in left.items() if path in whole and digest != whole[path]]
            again, _ = forked(lambda: cli.main(words), folder, None)
            difference = {path for path in contents(folder) if path not in whole} | set(torn)
            if status != -signal.SIGKILL or again or difference or contents(folder) != whole:
                lost.append({"operation": kill_at, "status": status, "again": again, "differs": sorted(difference)})
            shutil.rmtree(folder)
    return {"tried": tries, "survived": tries - len(lost), "lost": lost, "operations": operations}


def flip_bytes(place: Path, rng: random.Random) -> dict[str, Any]:
    """Changes a byte in each of `RANGES` ranges of every file of a checkpoint, in turn."""
    run = place / "models/base"
    checkpoint = run / "checkpoints" / f"step-{checkpoint_steps(run)[-1]:06d}"
    tried, lost = 0, []
    for path in sorted(checkpoint.iterdir()):
        good = path.read_bytes()
        for part in range(min(RANGES, len(good))):
            first, end = part * len(good) // RANGES, max((part + 1) * len(good) // RANGES, part + 1)
            at = rng.randrange(first, max(end, first + 1)) if first < len(good) else len(good) - 1
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            tried += 1
            try:
                verify_checkpoint(checkpoint)
            except CheckpointError:
                continue
            finally:
                path.write_bytes(good)
            lost.append({"file": path.name, "byte": at})
    verify_checkpoint(checkpoint)
    return {"tried": tried, "survived": tried - len(lost), "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="kills of each command, and of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[*COMMANDS, "flip", "train"], help="some of these")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, result = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "place")
        place.mkdir()
        status, _ = forked(lambda: make_workplace(place), place, None)  # a child, so that threads are not forked later
        assert status == 0
        for name in args.only:
            if name in COMMANDS:
                result[name] = kill_commands(name, place, args.tries, rng)
            elif name == "flip":
                result[name] = flip_bytes(place, rng)
            elif name == "train":
                script = Path(__file__).with_name("kill_resume.py")
                command = [sys.executable, str(script), "--kills", str(args.tries), "--seed", str(args.seed)]
                result[name] = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
            print(f"{name}: {result[name]['tried']} tried, {result[name]['survived']} survived", file=sys.stderr)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(any(found["lost"] for found in result.values()))


if __name__ == "__main__":
    main()
