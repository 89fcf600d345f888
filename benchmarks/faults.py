"""Fault injection: kill -9, full or read-only disks, damaged checkpoints, misbehaving servers and clients.

    python benchmarks/faults.py [--tries 100] [--seed 0] [--only NAME ...] [--out results.json]

Every command that writes, evaluate, and prepare from the two live sources (with a local server that disconnects, fails
and truncates) runs in a fork, is killed at a random file operation or a random CPU time, and runs again, until the
given number of kills came before the end. Survived: the kill leaves the complete old or new state, and the second run
ends like an undisturbed one, without leftover files. disk gives each command a file system in memory that is full after
part of its output, or read-only, empty or with the output of an earlier run; survived: one line, exit status 1, nothing
changed, and a second run with space succeeds. flip changes one byte in each range of every file of a checkpoint;
survived: the damage is detected before resuming. train is `benchmarks/kill_resume.py`, server
`benchmarks/server_faults.py`; their counts are printed with these.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
# As the command line sets it.
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from kill_resume import FILE_EVENTS

from flash_experts import cli
from flash_experts.data.live import sites as live
from flash_experts.data.live.download import Downloader
from flash_experts.models.saving import CheckpointError
from flash_experts.training.checkpoint import checkpoint_steps, verify_checkpoint
from tests.helpers.command_line import BASE_RUN, make_workplace
from tests.helpers.misbehaving import SITES, misbehaving_server

COMMANDS = {
    "prepare": "prepare --source names.txt --out data/new",
    "upcycle": "upcycle models/base --out models/new",
    "export": "export dense models/moe --out models/new",
    "generate": "generate --model models/base --count 20 --seed 0 --out names/new.csv",
    "evaluate": "evaluate models/base --samples 20",
    "compare": "compare models/base --samples 20 --out pages/new.html",
    "inspect": "inspect models/moe --out pages/new.html",
    "plot": "plot models/base --out pages/new.json",
}
DOWNLOADS = {f"prepare {site}": f"prepare --source {site} --out data/new" for site in SITES}
TRAIN = " ".join(BASE_RUN).replace("run-name=base", "run-name=new")  # kill_resume.py kills it
OUTPUTS = ("data", "models", "names", "pages", "cache")  # folders that commands write to
KILLED = (-signal.SIGKILL, -signal.SIGPROF)
RANGES = 8  # per file of a checkpoint
FULL_AFTER = (0.0, 0.3, 0.6, 0.9)  # share of the output of a command


@dataclass(frozen=True)
class Ended:
    """How a forked command ended.

    Attributes:
        status: from `os.waitstatus_to_exitcode`.
        seconds: CPU time.
        stderr: text on stderr.
        operations: file operations; 0 if it was killed.
        modules: imported modules.
    """

    status: int
    seconds: float
    stderr: str
    operations: int = 0
    modules: tuple[str, ...] = ()


def forked(
    work: Callable[[], object], folder: Path, kill_at: int | None = None, kill_after: float | None = None
) -> Ended:
    """Runs work in a forked child; kills it before file operation ``kill_at`` below the folder, or after ``kill_after``
    seconds of CPU time."""
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            status: Any = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(stderr.fileno(), 2)
                os.chdir(folder)
                count = 0

                def hook(event: str, arguments: tuple[Any, ...]) -> None:
                    nonlocal count
                    if event in FILE_EVENTS and str(arguments[0]).startswith((str(folder), *OUTPUTS)):
                        count += 1
                        if count == kill_at:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                if kill_after is not None:  # without a handler for SIGPROF, the kernel ends the process at once
                    signal.setitimer(signal.ITIMER_PROF, kill_after)
                status = work() or 0
                signal.setitimer(signal.ITIMER_PROF, 0)
                report.write(json.dumps({"operations": count, "modules": list(sys.modules)}).encode())
                report.flush()
            except Exception:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 0)
        _, status, used = os.wait4(child, 0)
        stderr.seek(0)
        report.seek(0)
        reported = json.loads(report.read() or b"{}")
        return Ended(
            os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, stderr.read().decode(), **reported
        )


def command(words: str) -> Callable[[], int]:
    """Makes the work of a child. A failed download is retried without delay."""

    def work() -> int:
        with mock.patch.object(live, "Downloader", partial(Downloader, sleep=lambda _: None)):
            return cli.main(words.split())

    return work


def contents(folder: Path) -> dict[str, str]:
    """Hashes each file. Files with dates (pages, their JSON, cache metadata) have an empty digest.

    Without locks, and without temporary files: those of a killed process stay, as their names are unguessable and
    another process may be writing there.
    """
    found = {}
    hidden = (".lock", ".flash-experts-")
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(hidden)):
        dated = path.suffix in (".html", ".json") and not {"pages", "cache"}.isdisjoint(path.parts)
        found[str(path.relative_to(folder))] = "" if dated else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def import_all(work: Callable[[], int], place: Path, folder: Path) -> None:
    """Imports the modules of a command before forking, since importing would dominate the time of each child."""
    shutil.copytree(place, folder)
    for name in set(forked(work, folder).modules) - sys.modules.keys():
        with suppress(Exception):  # some modules are synthetic
            importlib.import_module(name)
    shutil.rmtree(folder)


def kill(words: str, place: Path, tries: int, rng: random.Random) -> dict[str, Any]:
    """Kills a command ``tries`` times before its end, and runs it again each time."""
    work = command(words)
    with tempfile.TemporaryDirectory() as temporary:
        straight = Path(temporary, "straight")
        import_all(work, place, straight)
        shutil.copytree(place, straight)
        first = forked(work, straight)
        assert first.status == 0 and first.operations > 0, (words, first)
        whole, lost, killed, tried = contents(straight), [], 0, 0
        while killed < tries and tried < 2 * tries:
            folder = Path(temporary, str(tried))
            shutil.copytree(place, folder)
            by_time = rng.random() < 0.5
            kill_at = None if by_time else rng.randrange(1, first.operations + 1)
            kill_after = rng.uniform(0, first.seconds) if by_time else None
            status = forked(work, folder, kill_at, kill_after).status
            tried, killed = tried + 1, killed + (status in KILLED)
            torn = {path for path, digest in contents(folder).items() if path in whole and digest != whole[path]}
            again = forked(work, folder)
            after = contents(folder)
            if status not in (0, *KILLED) or again.status or torn or after != whole:
                differs = sorted(torn | {path for path, _ in after.items() ^ whole.items()})
                moment = f"operation {kill_at}" if kill_after is None else f"{kill_after:.3f} s"
                lost.append({"at": moment, "status": status, "again": again.stderr, "differs": differs})
            shutil.rmtree(folder)
    return {"tried": tried, "survived": tried - len(lost), "lost": lost, "killed": killed}


# --------------------------------------------------------------------------------------------- full and read-only disks


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mounts a file system in memory (needs the permission to mount)."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def used_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def fill_disk(name: str, words: str, place: Path, temporary: Path) -> dict[str, Any]:
    """Runs a command on a disk that becomes full during its output, or is read-only."""
    work, tried, lost = command(words), 0, []
    import_all(work, place, temporary / "imports")
    with small_disk(temporary / "straight") as straight:
        shutil.copytree(place, straight, dirs_exist_ok=True)
        before = used_bytes(straight)
        assert forked(work, straight).status == 0, words
        whole, written = contents(straight), used_bytes(straight) - before
        former = temporary / "former"
        shutil.copytree(straight, former)
    starts = {"empty": place} if name == "train" else {"empty": place, "former": former}
    for start, source in starts.items():
        for share in (*FULL_AFTER, None):
            tried += 1
            with small_disk(temporary / f"{start} {share}") as disk:
                shutil.copytree(source, disk, dirs_exist_ok=True)
                found = contents(disk)
                remount(disk, "ro" if share is None else f"size={used_bytes(disk) + int(share * written)}")
                failed = forked(work, disk)
                left = contents(disk)
                remount(disk, "rw,size=64m")
                again = forked(work, disk)
                wrong = _wrong(name, failed, found, left, whole)
                if again.status or (name != "train" and contents(disk) != whole):
                    wrong.append(f"the second run: {again.stderr}")
                if wrong:
                    lost.append({"start": start, "full_after": share, "wrong": wrong})
    shutil.rmtree(former)
    return {"tried": tried, "survived": tried - len(lost), "lost": lost, "bytes": written}


def _wrong(name: str, failed: Ended, before: dict[str, str], left: dict[str, str], whole: dict[str, str]) -> list[str]:
    """Lists what is wrong after a run without space."""
    if failed.status == 0:  # there was enough space, or it replaced files in place
        return [] if left == whole else ["exit status 0, but the output is not complete"]
    wrong = []
    lines = failed.stderr.splitlines()
    if failed.status != 1 or (len(lines) != 1 and name != "train") or not lines[-1].startswith("flash-experts "):
        wrong.append(f"status {failed.status}: {failed.stderr[-300:]}")
    if not any(words in failed.stderr for words in ("No space left", "read-only", "Read-only")):
        wrong.append(f"no reason in the message: {failed.stderr[-300:]}")
    if name == "train":  # complete checkpoints stay
        left = {path: digest for path, digest in left.items() if not path.startswith("models/new/") or "/." in path}
    if left != before:
        wrong.append(f"left: {sorted(path for path, _ in left.items() ^ before.items())}")
    return wrong


# ----------------------------------------------------------------------------------------------- damaged checkpoints


def flip_bytes(place: Path, rng: random.Random) -> dict[str, Any]:
    """Changes one byte in each of `RANGES` ranges of every file of a checkpoint, one at a time."""
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


def run_one(name: str, place: Path, temporary: Path, tries: int, seed: int) -> dict[str, Any]:
    """Runs one experiment of --only."""
    rng = random.Random(f"{seed} {name}")
    here = Path(__file__).parent
    if name in COMMANDS:
        return kill(COMMANDS[name], place, tries, rng)
    if name in DOWNLOADS:
        with misbehaving_server() as environment, mock.patch.dict(os.environ, environment):
            return kill(DOWNLOADS[name], place, tries, rng)
    if name == "flip":
        return flip_bytes(place, rng)
    if name == "disk":
        words = {name: words for name, words in COMMANDS.items() if name != "evaluate"} | {"train": TRAIN}
        each = {
            name: fill_disk(name, text, place, Path(tempfile.mkdtemp(dir=temporary))) for name, text in words.items()
        }
        lost = [{"command": name, **loss} for name, found in each.items() for loss in found["lost"]]
        tried = sum(found["tried"] for found in each.values())
        return {"tried": tried, "survived": tried - len(lost), "lost": lost, "commands": list(each)}
    script = ["kill_resume.py", "--kills", str(tries)] if name == "train" else ["server_faults.py"]
    done = subprocess.run([sys.executable, str(here / script[0]), *script[1:]], stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100, help="kills of each command, and of training")
    parser.add_argument("--seed", type=int, default=0)
    everything = [*COMMANDS, *DOWNLOADS, "disk", "flip", "train", "server"]
    parser.add_argument(
        "--only", nargs="+", default=everything, choices=everything, help="experiments to run (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file for the results; other results in it are kept"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(args.out.read_text("utf-8")) if args.out is not None and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "place")
        place.mkdir()
        assert forked(lambda: make_workplace(place), place).status == 0  # in a child: threads would not survive a fork
        for name in args.only:
            found = result[name] = run_one(name, place, Path(temporary), args.tries, args.seed)
            print(f"{name}: {found['tried']} tried, {found['survived']} survived", file=sys.stderr, flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(any(result[name]["lost"] for name in args.only))


if __name__ == "__main__":
    main()
