"""Generation throughput: names per second of our decoder and of transformers' `generate`, with the same sampling.

Both sample one checkpoint (temperature 1, top-k 200, no logits processors of ours) after the same prompt, in
alternating rounds. `NameGenerator` with its filters (no real card, well-formed, distinct) is timed too; it does more
work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from flash_experts.benchmarks import report
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.request import UNGUIDED, Sampling
from flash_experts.kernels.cpu import has_bfloat16
from flash_experts.models.scoring import evaluating

PROMPT = "legendary creature goblin, red, 3:"
LONGEST, TOP_K = 48, 200  # maximum tokens of a name; top-k


def run(args: Any) -> report.Report:
    """Time generation of names: ours, and transformers' generate."""
    return report.run_topic("generate", args, measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("What is measured")
    measured.add_argument("--model", default="models/mtg-base", help="model folder or hub id")
    measured.add_argument("--count", type=int, default=512, help="names per round")
    measured.add_argument("--batch_size", type=int, default=64, help="names computed at once")
    measured.add_argument("--rounds", type=int, default=3, help="rounds per implementation; the median is reported")
    report.add_common_options(parser)


def _ours(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    prompt_ids = [generator.tokenizer.bos_token_id, *generator.vocabulary.encode(PROMPT)]
    end = generator.vocabulary.eos_id
    with evaluating(generator.model), torch.no_grad():
        decoder = NameDecoder(generator.model, prompt_ids, end, Sampling(top_k=TOP_K), (), LONGEST, seed)
        return sum(name.is_whole for name in decoder.stream(range(count), batch_size))


def _transformers_generate(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    tokenizer, model = generator.tokenizer, generator.model
    ids = [tokenizer.bos_token_id, *generator.vocabulary.encode(PROMPT)]
    prompt = torch.tensor([ids] * batch_size, device=model.device)
    settings = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    torch.manual_seed(seed)
    finished = 0
    for _ in range(0, count, batch_size):
        rows = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        finished += int((rows[:, prompt.shape[1] :] == tokenizer.eos_token_id).any(1).sum())
    return finished


def _with_filters(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Counts names as they come with all filters: new, distinct, well-formed, with the nearest card of each."""
    card: dict[str, Any] = {"type_line": "Legendary Creature — Goblin", "colors": "R", "mana_value": 3}
    sampling = {"top_k": TOP_K, "quality": "fast", **UNGUIDED}  # one forward a token, as in the baseline
    return len(generator.generate(count, **card, **sampling, seed=seed, batch_size=batch_size))


BASELINE = "transformers generate"
IMPLEMENTATIONS: dict[str, tuple[Callable[[NameGenerator, int, int, int], int], torch.dtype]] = {
    BASELINE: (_transformers_generate, torch.float32),
    "ours, the same sampling": (_ours, torch.float32),
    "ours, with filters and nearest cards": (_with_filters, torch.float32),
    f"{BASELINE}, bfloat16": (_transformers_generate, torch.bfloat16),
    "ours, bfloat16": (_ours, torch.bfloat16),
}


def measure(args: Any, device: torch.device) -> report.Report:
    """Measures all implementations in rounds."""
    report.check_positive(count=args.count, batch_size=args.batch_size, rounds=args.rounds)
    if args.count % args.batch_size:
        raise ValueError(f"--count {args.count} must be a multiple of --batch-size {args.batch_size}")
    dtypes = [torch.float32] if device.type == "cpu" and not has_bfloat16() else [torch.float32, torch.bfloat16]
    generators = {dtype: NameGenerator.from_pretrained(args.model, device, dtype) for dtype in dtypes}
    machine = report.machine_facts(device)
    implementations = {name: each for name, each in IMPLEMENTATIONS.items() if each[1] in generators}
    rates: dict[str, list[float]] = {name: [] for name in implementations}
    for turn in range(args.rounds + 1):  # the first, with one batch, is a warm-up
        report.say(f"generate: round {turn} of {args.rounds}")
        count = args.count if turn else args.batch_size
        for name, (implementation, dtype) in implementations.items():
            start = time.perf_counter()
            made = implementation(generators[dtype], count, args.batch_size, turn)
            if turn:
                rates[name].append(made / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows: list[report.Row] = [
        {"name": name, "names_per_second": rate, "times_peer": rate / medians[BASELINE], "reason": None}
        for name, rate in medians.items()
    ]
    left_out: list[report.Row] = [
        {"name": name, "names_per_second": None, "times_peer": None, "reason": "bfloat16 is emulated on this processor"}
        for name in IMPLEMENTATIONS
        if name not in medians
    ]
    settings = {key: getattr(args, key) for key in ("model", "count", "batch_size", "rounds")}
    draw = partial(report.draw_rates, rows, "names_per_second", "generating names", "names/s")
    text = "\n\n".join(filter(None, [_format(rows, machine, settings), report.not_run(left_out, "name")]))
    return report.Report("generate", machine, settings, rows + left_out, text, draw)


def _format(rows: list[report.Row], machine: report.Row, settings: report.Row) -> str:
    head = (
        f"{machine['device']}, {machine['threads']} threads, load {machine['load_average']}; {settings['model']}, "
        f"{settings['count']} names, batches of {settings['batch_size']}"
    )
    return f"{head}\n\n{report.rate_table(rows, 'names_per_second', '', 'names/s')}"


if __name__ == "__main__":
    sys.exit(report.main(run, add_options))
