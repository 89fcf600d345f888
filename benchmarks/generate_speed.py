"""Names per second: our generator's decoder, and transformers' `generate`, on one checkpoint with the same sampling.

    python benchmarks/generate_speed.py [--model models/mtg-base] [--count 512] [--batch-size 64]

Both draw from the model as it is (temperature 1, top-k 200, no filter) after the same prompt, in batches of one size,
taking turns. `NameGenerator` with its filters (no real card, well-formed, distinct) is timed besides: it does more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

from flash_experts import NameGenerator
from flash_experts.generation.decoding import NameDecoder, evaluating
from flash_experts.generation.presets import Sampling

PROMPT = "Legendary Creature Goblin, red, 3:"
LONGEST, TOP_K = 32, 200


def ours(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Finished names of our decoder."""
    prompt_ids = [generator.tokenizer.bos_token_id, *generator.vocabulary.encode(PROMPT)]
    end = generator.vocabulary.end_id
    with evaluating(generator.model), torch.no_grad():
        decoder = NameDecoder(generator.model, prompt_ids, end, Sampling(top_k=TOP_K), (), LONGEST, seed)
        batches = [decoder.decode(range(start, start + batch_size)) for start in range(0, count, batch_size)]
    return sum(name.is_whole for batch in batches for name in batch)


def transformers_generate(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Finished names of `model.generate`."""
    tokenizer, model = generator.tokenizer, generator.model
    prompt = torch.tensor([[tokenizer.bos_token_id, *generator.vocabulary.encode(PROMPT)]] * batch_size)
    settings = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    finished = 0
    for _ in range(0, count, batch_size):
        rows = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        finished += int((rows[:, prompt.shape[1] :] == tokenizer.eos_token_id).any(1).sum())
    return finished


def with_filters(generator: NameGenerator, count: int, batch_size: int, seed: int) -> int:
    """Names that a user gets: new, distinct, well-formed, with the nearest card of each."""
    options = {"type_line": "Legendary Creature — Goblin", "colors": "R", "mana_value": 3}
    return len(generator.generate(count, **options, top_k=TOP_K, seed=seed, batch_size=batch_size))


CONTESTANTS: dict[str, Callable[[NameGenerator, int, int, int], int]] = {
    "transformers generate": transformers_generate,
    "ours, the same sampling": ours,
    "ours, with filters and nearest cards": with_filters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/mtg-base")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    generator = NameGenerator.from_pretrained(args.model)
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, contestant in CONTESTANTS.items():
            start = time.perf_counter()
            made = contestant(generator, args.count, args.batch_size, turn)
            if turn:
                rates[name].append(made / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peer = medians["transformers generate"]
    print(f"{args.count} names, batches of {args.batch_size}, {torch.get_num_threads()} threads, {args.model}")
    for name, rate in medians.items():
        print(f"{name:40}{rate:8.1f} names/s {rate / peer:6.2f} x")
    if args.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        figures = {"threads": torch.get_num_threads(), "batch_size": args.batch_size, "names_per_second": medians}
        args.out.write_text(json.dumps(figures | {"versions": versions}, indent=2))


if __name__ == "__main__":
    main()
