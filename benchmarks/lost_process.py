"""Failure detection in distributed training: how soon a run ends when one process is killed or hangs.

    python benchmarks/lost_process.py [--tries 5] [--processes 2] [--seed 0] [--out results.json]

Each try starts `flash-experts train` under torchrun (gloo), stops one process at a random moment with SIGKILL or
SIGSTOP (which leaves its connections open), and measures the time until all others have exited. Survived: less than a
minute, with a line that gives the reason. It needs an idle machine; the model is tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.helpers.command_line import BASE_RUN, FIRST, SECOND, ok

WITHIN_SECONDS = 60
MESSAGES = {signal.SIGKILL: "another process of this run is gone", signal.SIGSTOP: "has been silent for"}
ENDLESS = (*BASE_RUN, "--training.max-steps=1000000", "--training.eval-every=null", "--training.checkpoint-every=null")


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    """Whether a process runs; zombies do not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Any, seconds: float) -> float:
    """Waits for a condition and returns the seconds.

    Raises:
        TimeoutError: it was not true in time.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError
        time.sleep(0.05)
    return time.monotonic() - start


def lose_one(place: Path, processes: int, how: signal.Signals, rng: random.Random) -> dict[str, Any]:
    """Stops one process and measures the seconds until the others have exited."""
    run = f"{how.name}-{rng.randrange(10**9)}"
    metrics = place / "models" / run / "metrics.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, "-m", "flash_experts.cli", *ENDLESS, f"--training.run-name={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as stderr:
        launcher = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            until(lambda: metrics.is_file() and metrics.stat().st_size > 0, 300)
            ranks = children_of(launcher.pid)
            assert len(ranks) == processes, ranks
            time.sleep(rng.uniform(0, 3))
            lost = rng.randrange(processes)
            os.kill(ranks[lost], how)
            others = [rank for rank in ranks if rank != ranks[lost]]
            seconds = until(lambda: not any(map(is_alive, others)), 600)
            with suppress(ProcessLookupError):
                os.kill(ranks[lost], signal.SIGKILL)
        finally:
            launcher.terminate()
            launcher.wait(120)
        stderr.seek(0)
        said = MESSAGES[how] in stderr.read().decode()
    return {"how": how.name, "rank": lost, "seconds": round(seconds, 1), "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5, help="tries per signal")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tries = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        names = [f"{first} {second}" for first in FIRST for second in SECOND]
        (place / "names.txt").write_text("\n".join(names), "utf-8")
        ok("prepare", "--source", "names.txt", cwd=place)
        for _ in range(args.tries):
            for how in MESSAGES:
                tries.append(lose_one(place, args.processes, how, rng))
                print(tries[-1], file=sys.stderr, flush=True)
    lost = [one for one in tries if one["seconds"] >= WITHIN_SECONDS or not one["said"]]
    slowest = {how.name: max(one["seconds"] for one in tries if one["how"] == how.name) for how in MESSAGES}
    result = {"processes": args.processes, "tried": len(tries), "survived": len(tries) - len(lost), "lost": lost}
    result |= {"slowest_seconds": slowest, "tries": tries}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
