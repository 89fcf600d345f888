"""The runs of test_distributed.py on 1, 2 and 4 processes: ``python parallel_runs.py FOLDER``.

One process imports everything and forks the others, which takes milliseconds instead of seconds. It never
computes a gradient itself: autograd's threads would not survive the fork.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.training import Callback, Trainer, TrainingConfig
from flash_experts.training.distributed import local_shard
from tests.test_training import TRAIN, VALIDATION

# Six experts: three on each of two processes; on four, where two cannot share them evenly, in two groups of two.
MODEL: dict[str, Any] = {
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "n_positions": 64,
    "num_experts": 6,
    "moe_layer_freq": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "router_bias_update_rate": 0.01,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
# Four micro-batches a step, for any number of processes. The norm is always clipped.
CONFIG = TrainingConfig(
    max_steps=4,
    tokens_per_batch=150,
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    clip_norm=0.5,
    log_every=1,
    eval_every=None,
    validation_names=9,
    checkpoint_every=None,
    sample_every=4,
    device="cpu",
)
ROWS = 4
VARIANTS = {
    "plain": CONFIG,
    "muon and average": replace(CONFIG, optimizer="muon", ema_decay=0.5, max_steps=2),
    "bfloat16": replace(CONFIG, precision="bfloat16", max_steps=2),
}


def fork(world: int, work: Callable[[], None], folder: Path) -> None:
    """Runs ``work`` in ``world`` processes, in the environment that torchrun sets, and waits for them.

    Each writes a log of its own: if one dies, the others only say that it is gone.
    """
    logs = [folder / f"{world}.{rank}.log" for rank in range(world)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if world > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                out = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                work()
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    tails = "\n".join(f"--- {log.name}: {log.read_text()[-2500:]}" for log in logs)
    assert not any(statuses), f"exit statuses {statuses}\n{tails}"


class Sampler(Callback):
    """Uses the full model, on the main process alone."""

    def on_sample(self, step: int, model: Any, tokenizer: Any) -> list[str]:
        logits = model(torch.arange(1, 6)[None]).logits
        return [f"{logits.double().abs().mean().item():.3f}"]


class BytesSent(TorchDispatchMode):
    """Counts the bytes that this process sends in all-to-alls of hidden states, forward and backward."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all_single" in str(function) and args[0].is_floating_point():
            rank = torch.distributed.get_rank() % len(args[2])
            away = sum(rows for to, rows in enumerate(args[2]) if to != rank)
            self.total += away * args[0].shape[1] * args[0].element_size()
        return function(*args, **(kwargs or {}))


class Runs:
    """All runs of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        texts = [f"Creature Goblin, red, 3: {card.name}" for card in TRAIN]
        self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts, vocab_size=300)

    def model(self, **fields: Any) -> GPT2MoEForCausalLM:
        torch.manual_seed(0)
        tokens = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return GPT2MoEForCausalLM(GPT2MoEConfig(vocab_size=len(self.tokenizer), **MODEL, **tokens, **fields))

    def config(self, variant: str, parallel: Any, world: int) -> TrainingConfig:
        accumulation = ROWS // world
        return replace(
            VARIANTS[variant],
            output_dir=str(self.folder),
            run_name=f"{variant} {parallel} {world}",
            parallel=parallel,
            gradient_accumulation_steps=accumulation,
        )

    def train(self, config: TrainingConfig, resume: str | None = None, **fields: Any) -> Trainer:
        trainer = Trainer(self.model(**fields), self.tokenizer, TRAIN, VALIDATION, config, [Sampler()])
        trainer.train(resume)
        return trainer

    def alone(self) -> None:
        for variant in VARIANTS:
            self.train(self.config(variant, "ddp", 1))
        self.train(self.one_row("ddp", 1), **GLOBAL)

    def together(self, world: int) -> None:
        for parallel in ("ddp", "fsdp", "expert"):
            trainer = self.train(self.config("plain", parallel, world))
            self.measure(trainer, f"{parallel} {world}")
            self.train(self.config("muon and average", parallel, world))
        if world == 2:
            for parallel in ("fsdp", "expert"):
                self.train(self.config("bfloat16", parallel, world))
            self.train(self.one_row("expert", world), **GLOBAL)
            self.train(replace(self.config("plain", "fsdp", world), run_name="moved", max_steps=2))
        else:  # resumes with other processes and another strategy; the micro-batches of a step stay the same
            self.train(replace(self.config("plain", "expert", world), run_name="moved"), resume="auto")

    def one_row(self, parallel: Any, world: int) -> TrainingConfig:
        """Without prompts, so that every token but the first of a name has a label."""
        name = f"global batch {parallel} {world}"
        base = replace(CONFIG, output_dir=str(self.folder), run_name=name, parallel=parallel)
        return replace(base, max_steps=2, attribute_dropout=1.0, clip_norm=None)

    def measure(self, trainer: Trainer, name: str) -> None:
        """One more step, measuring the memory and the traffic of this process."""
        held: dict[str, int] = {}
        clip = trainer.parallel.clip

        def clip_and_count(limit: float) -> torch.Tensor:
            norm = clip(limit)
            weights = list(trainer.model.parameters())
            held["parameters"] = sum(local_shard(weight).nbytes for weight in weights)
            held["gradients"] = sum(local_shard(weight.grad).nbytes for weight in weights if weight.grad is not None)
            return norm

        trainer.parallel.clip = clip_and_count  # type: ignore[method-assign]
        trainer.state.tokens = 0
        with BytesSent() as sent:
            trainer._step(1e-3)
        states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
        held["optimizer"] = sum(local_shard(value).nbytes for slots in states for value in slots.values() if value.ndim)
        world = trainer.world
        totals = torch.tensor([sent.total, *held.values()])
        every = [torch.zeros_like(totals) for _ in range(world)]
        torch.distributed.all_gather(every, totals)
        if trainer.is_main:
            columns = torch.stack(every).T.tolist()
            found = dict(zip(["all_to_all", *held], columns, strict=True))
            found["tokens"] = trainer.state.tokens
            (self.folder / f"measured {name}.json").write_text(json.dumps(found))


GLOBAL = {"router_aux_loss_scope": "global_batch", "router_aux_loss_coef": 0.1}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    runs = Runs(folder)
    fork(1, runs.alone, folder)
    for world in (2, 4):
        fork(world, lambda: runs.together(world), folder)  # noqa: B023


if __name__ == "__main__":
    main(Path(sys.argv[1]))
