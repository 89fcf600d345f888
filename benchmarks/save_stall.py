"""Checkpoint stall: how long saving GPT-2 small with AdamW's state blocks training, in foreground and background.

    python benchmarks/save_stall.py [--saves 5] [--tokens 128]

Training continues after each save until it is on the disk. "Call" is the time of the call itself. "Lost" is the total
cost: the time of the call and of the steps after it, minus that of as many undisturbed steps, so it includes the
slowdown by the background thread. Both kinds alternate in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.training.checkpointer import Checkpointer
from flash_experts.training.optimizer import OptimizerState
from flash_experts.training.run_state import TrainerState
from flash_experts.training.training_config import TrainingConfig


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5, help="saves per kind")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per step")
    parser.add_argument("--folder", type=Path, default=None, help="folder on the measured disk (default: temporary)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT2LMHeadModel(GPT2Config())
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokenizer = train_tokenizer(["Goblin Guide"], vocab_size=300)
    ids = torch.randint(50_000, (1, args.tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    info = {"config": {}, "data": {}, "processes": 1, "device": str(device), "identity": {}}
    calls: dict[str, list[float]] = {"foreground": [], "background": []}
    lost: dict[str, list[float]] = {"foreground": [], "background": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        savers = {}
        for kind in calls:
            config = TrainingConfig(
                output_dir=temporary, run_name=kind, keep_checkpoints=1, save_in_background=kind == "background"
            )
            saver = Checkpointer(config, model, tokenizer, info, print, True)
            saver.register("optimizer", OptimizerState(model, optimizer))
            savers[kind] = saver
        step()
        undisturbed = []
        for number in range(args.saves + 1):  # the first of each kind is a warm-up
            for kind, saver in savers.items():
                undisturbed += [seconds(step) for _ in range(3)]
                state = TrainerState(step=number + 1)
                call = seconds(lambda saver=saver, state=state: saver.save(state))  # type: ignore[misc]
                total, steps = call, 0
                while steps < 2 or saver.is_writing:
                    total += seconds(step)
                    steps += 1
                saver.wait()
                if number:
                    calls[kind].append(call)
                    lost[kind].append(total - steps * statistics.median(undisturbed))
        size = sum(path.stat().st_size for path in Path(temporary).rglob("*") if path.is_file()) / len(savers)
    result = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "checkpoint_gb": round(size / 1e9, 3),
        "step_seconds": round(statistics.median(undisturbed), 3),
        "call_seconds": {kind: round(statistics.median(times), 3) for kind, times in calls.items()},
        "lost_seconds": {kind: round(statistics.median(times), 3) for kind, times in lost.items()},
        "all": {
            kind: [[round(value, 3) for value in pair] for pair in zip(calls[kind], lost[kind], strict=True)]
            for kind in calls
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
