"""Names per second: our generator's decoder, and transformers' `generate`, on one checkpoint with the same sampling.

Both draw from the model as it is (temperature 1, top-k 200, no filter) after the same prompt, in batches of one size,
taking turns, in float32 and both again with bfloat16 weights. `NameGenerator` with its filters (no real card,
well-formed, distinct) is timed besides: it does more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from flash_experts.benchmarks.report import (
    Report,
    Row,
    add_common_options,
    check_positive,
    draw_bars,
    machine_facts,
    main,
    run_topic,
    say,
    table,
)
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.presets import Sampling
from flash_experts.models.modes import evaluating

PROMPT = "legendary creature goblin, red, 3:"
LONGEST, TOP_K = 48, 200  # tokens of the longest name: in letters, nearly all real names


def run(args: Any) -> Report:
    """Time generation of names: ours, and transformers' generate."""
    return run_topic(args, measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser)
    parser.add_argument("--model", type=str, default="models/mtg-base", help="model folder or hub id")
    parser.add_argument("--count", type=int, default=512, help="names per round")
    parser.add_argument("--batch_size", type=int, default=64, help="names computed at once")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per implementation; the median is reported")


def _ours(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Finished names of our decoder."""
    prompt_ids = [generator.tokenizer.bos_token_id, *generator.vocabulary.encode(PROMPT)]
    end = generator.vocabulary.end_id
    with evaluating(generator.model), torch.no_grad():
        decoder = NameDecoder(generator.model, prompt_ids, end, Sampling(top_k=TOP_K), (), LONGEST, seed)
        return sum(name.is_whole for name in decoder.stream(range(count), batch_size))


def _transformers_generate(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Finished names of `model.generate`."""
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
    """Names that a user gets: new, distinct, well-formed, with the nearest card of each."""
    names = generator.generate(
        count,
        type_line="Legendary Creature — Goblin",
        colors="R",
        mana_value=3,
        top_k=TOP_K,
        seed=seed,
        batch_size=batch_size,
    )
    return len(names)


PEER = "transformers generate"
CONTESTANTS: dict[str, tuple[Callable[[NameGenerator, int, int, int], int], torch.dtype]] = {
    PEER: (_transformers_generate, torch.float32),
    "ours, the same sampling": (_ours, torch.float32),
    "ours, with filters and nearest cards": (_with_filters, torch.float32),
    f"{PEER}, bfloat16": (_transformers_generate, torch.bfloat16),
    "ours, bfloat16": (_ours, torch.bfloat16),
}


def measure(args: Any, device: torch.device) -> Report:
    """Each in turn, round after round.

    Raises:
        ValueError: no model, or a count that is not a multiple of the batch.
    """
    check_positive(count=args.count, batch_size=args.batch_size, rounds=args.rounds)
    if args.count % args.batch_size:
        raise ValueError(f"--count {args.count} must be a multiple of --batch-size {args.batch_size}")
    generators = {
        dtype: NameGenerator.from_pretrained(args.model, device, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    machine = machine_facts(device)
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(args.rounds + 1):  # the first, of one batch, warms up
        say(f"generate: round {turn} of {args.rounds}")
        count = args.count if turn else args.batch_size
        for name, (contestant, dtype) in CONTESTANTS.items():
            start = time.perf_counter()
            made = contestant(generators[dtype], count, args.batch_size, turn)
            if turn:
                rates[name].append(made / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows: list[Row] = [
        {"name": name, "names_per_second": rate, "times_peer": rate / medians[PEER], "reason": None}
        for name, rate in medians.items()
    ]
    settings = {key: getattr(args, key) for key in ("model", "count", "batch_size", "rounds")}
    text = _format(rows, machine, settings)
    return Report("generate", machine, settings, rows, text, lambda figure: _draw(rows, figure))


def _format(rows: list[Row], machine: Row, settings: Row) -> str:
    lines = [[row["name"], f"{row['names_per_second']:.1f}", f"{row['times_peer']:.2f} x"] for row in rows]
    head = (
        f"{machine['device']}, {machine['threads']} threads, load {machine['load_average']}; {settings['model']}, "
        f"{settings['count']} names, batches of {settings['batch_size']}"
    )
    return f"{head}\n\n{table(('', 'names/s', 'times the peer'), lines)}"


def _draw(rows: list[Row], figure: Any) -> None:
    figure.set_size_inches(9, 3)
    rates = [row["names_per_second"] for row in rows]
    draw_bars(figure.subplots(), [row["name"] for row in rows], rates, "generating names", "names/s")


if __name__ == "__main__":
    sys.exit(main(run, add_options))
