"""Fault tolerance of training: kill -9 at random moments, resume, and compare with an uninterrupted run.

    python benchmarks/kill_resume.py [--kills 100] [--seed 0] [--processes 1] [--out results.json]

Each try starts a run of a tiny model, kills it, sometimes kills the resumed run as well, and lets the next one finish.
It requires the same metrics.jsonl (losses, norms, router statistics, sample names; only times and memory may differ),
model and last checkpoint with optimizer state, byte for byte. Half of the kills are at random times, half at random
file operations, so that many interrupt a save. The last file of an interrupted save is then truncated.

Runs are forked from this process, which has imported everything, to start fast. With --processes 2 each run has two
processes (gloo), of which one or both are killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.commands.train import SampleNames
from flash_experts.data.cards import Card
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.run_state import checkpoint_path
from flash_experts.training.training_config import Stage

FIRST = "Goblin Elf Dragon Angel Storm Fire Blood Night".split()
SECOND = "Guide Lord Singer Wall Strike Bolt Ritual Growth".split()
MEASURED = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
WAIT_SECONDS = 120
WAIT_FOR_THE_DEAD_SECONDS = 10

# Seven steps per epoch; saves within epochs and within logging windows.
COMMON = TrainingConfig(
    max_steps=16,
    max_epochs=None,
    tokens_per_batch=100,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    log_every=1,
    eval_every=4,
    sample_every=5,
    checkpoint_every=3,
    early_stopping_patience=50,
    device="cpu",
)
STAGES = [Stage("short", max_length=11), Stage("all", epochs=None, learning_rate_scale=0.5, order="length")]
VARIANTS = {
    "accumulation": COMMON,
    "log of two steps": replace(COMMON, log_every=2, gradient_accumulation_steps=3),
    "stages": replace(COMMON, stages=STAGES, checkpoint_every=2, keep_checkpoints=1),
    "average, muon": replace(COMMON, ema_decay=0.9, optimizer="muon", layer_decay=0.8, label_smoothing=0.1),
    "experts": replace(COMMON, log_every=3, checkpoint_every=4, schedule="linear"),
    "saves in the foreground": replace(COMMON, save_in_background=False),
}
# With several processes, tried first.
DISTRIBUTED = {
    "experts, ddp": COMMON,
    "experts, fsdp": replace(COMMON, parallel="fsdp", log_every=2),
    "experts, expert": replace(COMMON, parallel="expert", ema_decay=0.9),
}


def make_cards() -> list[Card]:
    pairs = [(first, second) for first in FIRST for second in SECOND]
    random.Random(0).shuffle(pairs)
    return [
        Card(
            name=f"{first} {second}",
            type_line="Creature — Goblin",
            supertypes=(),
            types=("Creature",),
            subtypes=("Goblin",),
            colors=("R",),
            mana_value=len(first),
            source_id=first + second,
        )
        for first, second in pairs
    ]


def make_model(variant: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if variant.startswith("experts"):
        config: GPT2Config = GPT2MoEConfig(
            **shape, num_experts=4, router_bias_update_rate=0.01, router_jitter_noise=0.1
        )
    else:
        config = GPT2Config(**shape)
    config._attn_implementation = ATTENTION_IMPLEMENTATION
    return GPT2MoEForCausalLM(config) if isinstance(config, GPT2MoEConfig) else GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Straight:
    """An uninterrupted run: duration, number of file operations, and results."""

    seconds: float
    operations: int
    record: dict[str, Any]


class Lab:
    """Starts runs as child processes, and kills them."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        self.variants = VARIANTS if processes == 1 else DISTRIBUTED | VARIANTS
        self.cards = make_cards()
        texts = [f"creature goblin, red, 3: {card.name}" for card in self.cards]
        self.tokenizer = train_tokenizer(texts, vocab_size=300)

    def start(self, variant: str, run: str, kill_at: int | None = None) -> list[int]:
        """Forks the processes of a run and returns their ids; rank 0 kills itself before file operation ``kill_at``."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(self.processes):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    self._be_rank(rank, port, run)
                    self._train(variant, run, kill_at if rank == 0 else None)
                    status = 0
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                finally:
                    os._exit(status)
            children.append(child)
        return children

    def _be_rank(self, rank: int, port: int, run: str) -> None:
        log = os.open(self.folder / f"{run}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        if self.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def _train(self, variant: str, run: str, kill_at: int | None) -> None:
        config = replace(self.variants[variant], output_dir=str(self.folder), run_name=run)
        counter = _count_operations(str(config.run_dir), kill_at)
        model = make_model(variant, self.tokenizer)
        train, validation = self.cards[:48], self.cards[48:]
        Trainer(model, self.tokenizer, train, validation, config, [SampleNames(count=2)]).train("auto")
        if "RANK" not in os.environ or os.environ["RANK"] == "0":
            (self.folder / f"{run}.operations").write_text(str(counter()))

    def finish(self, children: list[int]) -> list[int]:
        """Waits for the processes of a run and returns their exit codes."""
        deadline = time.monotonic() + WAIT_SECONDS
        statuses: dict[int, int] = {}
        while len(statuses) < len(children):
            for child in children:
                if child in statuses or (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
                    continue
                statuses[child] = os.waitstatus_to_exitcode(found[1])
                if statuses[child] == -signal.SIGKILL:  # if killed before they connect, the others wait for it
                    deadline = min(deadline, time.monotonic() + WAIT_FOR_THE_DEAD_SECONDS)
            if time.monotonic() > deadline:
                for child in children:
                    if child not in statuses:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        return [statuses[child] for child in children]

    def straight(self, variant: str) -> Straight:
        run = f"straight-{variant.replace(' ', '-')}"
        start = time.monotonic()
        statuses = self.finish(self.start(variant, run))
        if any(statuses):
            raise RuntimeError(f"the uninterrupted run failed: {(self.folder / f'{run}.0.log').read_text()[-2000:]}")
        seconds = time.monotonic() - start
        operations = int((self.folder / f"{run}.operations").read_text())
        return Straight(seconds, operations, record_of(self.folder / run))

    def killed(self, variant: str, run: str, straight: Straight, rng: random.Random) -> str | None:
        """Starts or resumes a run and kills it. Returns the moment, or None if the run ended before."""
        if rng.random() < 0.5:
            kill_at = rng.randrange(1, straight.operations + 1)
            children = self.start(variant, run, kill_at)
            moment = f"file operation {kill_at} of {straight.operations}"
        else:
            delay = rng.uniform(0, straight.seconds)
            children = self.start(variant, run)
            time.sleep(delay)
            victims = rng.choice([children, children[:1], children[-1:]])
            for child in victims:
                os.kill(child, signal.SIGKILL)
            moment = f"{delay:.3f} s of {straight.seconds:.3f}"
        return moment if -signal.SIGKILL in self.finish(children) else None


def _count_operations(run_dir: str, kill_at: int | None) -> Callable[[], int]:
    """Counts file operations of this process below the run's folder, and kills it before operation ``kill_at``."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(arguments[0]).startswith(run_dir):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def record_of(run_dir: Path) -> dict[str, Any]:
    """Reads what must be equal: metrics, model, last checkpoint."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = checkpoint_path(run_dir, checkpoint_steps(run_dir)[-1])
    about = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    for measured in ("seconds", "evaluation_seconds"):
        about["state"].pop(measured)
    return {
        "metrics": [{key: value for key, value in line.items() if key not in MEASURED} for line in lines],
        "model": (run_dir / "model.safetensors").read_bytes(),
        "last": last.name,
        "weights": (last / "model.safetensors").read_bytes(),
        "tensors": (last / "trainer_state.safetensors").read_bytes(),
        "state": [about["state"], about["registered"]],
        "left over": sorted(path.name for path in run_dir.rglob(".*") if path.is_dir()),
    }


def tear(run_dir: Path, rng: random.Random) -> bool:
    """Truncates the newest file of an interrupted save. Returns whether there was one."""
    files = [path for folder in run_dir.rglob(".tmp-*") for path in folder.iterdir() if path.is_file()]
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime_ns)
        with newest.open("rb+") as file:
            file.truncate(rng.randrange(newest.stat().st_size + 1))
    return any(True for _ in run_dir.rglob(".tmp-*"))


def experiment(folder: Path, kills: int, seed: int, processes: int) -> dict[str, Any]:
    """Kills ``kills`` times. Returns how many were tried and survived, and what was lost."""
    lab, rng = Lab(folder, processes), random.Random(seed)
    straight: dict[str, Straight] = {}
    tried = amid_a_save = again = 0
    lost: list[dict[str, Any]] = []
    runs = 0
    while tried < kills:
        variant = list(lab.variants)[runs % len(lab.variants)]
        if variant not in straight:
            straight[variant] = lab.straight(variant)
        run, moments = f"run-{runs}", []
        runs += 1
        for _ in range(min(rng.choice([1, 1, 2, 3]), kills - tried)):
            moment = lab.killed(variant, run, straight[variant], rng)
            if moment is None:
                break
            moments.append(moment)
            amid_a_save += tear(folder / run, rng)
        tried += len(moments)
        again += len(moments) > 1
        statuses = lab.finish(lab.start(variant, run))
        difference = f"exit statuses {statuses}"
        if not any(statuses):
            found = record_of(folder / run)
            difference = ", ".join(key for key in found if found[key] != straight[variant].record[key])
        if difference:
            lost.append({"variant": variant, "run": run, "kills": len(moments), "at": moments, "differs": difference})
        with suppress(OSError):
            print(f"{tried}/{kills} {variant}: {'; then '.join(moments)} {difference or 'equal'}", file=sys.stderr)
    return {
        "tried": tried,
        "survived": tried - sum(loss["kills"] for loss in lost),
        "lost": lost,
        "amid_a_save": amid_a_save,
        "killed_more_than_once": again,
        "processes": processes,
        "variants": list(straight),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="processes per run")
    parser.add_argument("--folder", type=Path, default=None, help="folder that keeps the runs (default: none)")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = experiment(folder, args.kills, args.seed, args.processes)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if result["lost"] else 0)


if __name__ == "__main__":
    main()
