"""Attention benchmark: our kernels, SDPA backends, FlexAttention, transformers' eager attention, flash-attn packages.

Three kinds of work: batches of one length (forward and backward; the number of tokens is constant as the length grows),
card names in one packed sequence (forward and backward), and one new token against a KV cache (forward).
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from flash_experts.benchmarks import attention_baselines as baselines
from flash_experts.benchmarks import report
from flash_experts.benchmarks.attention_tables import draw, format_report
from flash_experts.benchmarks.timing import (
    TOLERANCES,
    Deadline,
    Implementation,
    Timing,
    peak_memory,
    reason_of,
    relative_error,
    time_in_rounds,
)

# On a GPU the sizes of the FlashAttention papers: 16k tokens, width 2048.
_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": "bfloat16", "width": 2048, "tokens": 16384, "lengths": [512, 1024, 2048, 4096, 8192, 16384],
        "names_tokens": 32768, "decode_lengths": [1024, 2048, 4096, 8192, 16384, 32768], "decode_batches": [1, 8, 64],
    },
    "cpu": {
        "dtype": "float32", "width": 512, "tokens": 1024, "lengths": [128, 512, 1024],
        "names_tokens": 2048, "decode_lengths": [256, 1024], "decode_batches": [1, 8],
    },
}  # fmt: skip
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SECTIONS = ("batch", "packed", "decode")


def run(args: Any) -> report.Report:
    """Time attention: ours, PyTorch's SDPA and FlexAttention, transformers' eager, flash-attn."""
    return report.run_topic("attention", args, measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("What is measured")
    measured.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="parts to measure: batch, packed, decode",
    )
    measured.add_argument(
        "--backends",
        nargs="+",
        choices=tuple(baselines.IMPLEMENTATIONS),
        default=list(baselines.IMPLEMENTATIONS),
        help="implementations to measure, by name",
    )
    measured.add_argument("--head_dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    measured.add_argument("--lengths", type=int, nargs="+", help="sequence lengths in tokens (default: by device)")
    measured.add_argument("--tokens", type=int, help="tokens per batch (default: 16384 on a GPU, 1024 on a CPU)")
    measured.add_argument(
        "--width", type=int, help="width of all heads together (default: 2048 on a GPU, 512 on a CPU)"
    )
    measured.add_argument(
        "--masks",
        nargs="+",
        choices=("causal", "full"),
        default=["causal", "full"],
        help="masks of the batches: causal, full",
    )
    measured.add_argument(
        "--names_tokens", type=int, help="tokens of the packed names (default: 32768 on a GPU, 2048 on a CPU)"
    )
    measured.add_argument("--tokenizer", default="models/mtg-base", help="folder or hub id of the tokenizer")
    measured.add_argument(
        "--decode_lengths", type=int, nargs="+", help="KV cache lengths in tokens (default: by device)"
    )
    measured.add_argument("--decode_batches", type=int, nargs="+", help="batch sizes of decoding (default: by device)")
    measured.add_argument(
        "--dtype", choices=tuple(_DTYPES), help="data type (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    measured.add_argument("--rounds", type=int, default=5, help="rounds per implementation; the median is reported")
    measured.add_argument(
        "--budget", type=float, help="time in seconds after which no further size is measured (default: no limit)"
    )
    measured.add_argument("--seed", type=int, default=0, help="random seed of the inputs")
    report.add_common_options(parser)


def _settings(args: Any, device: torch.device) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("sections", "backends", "head_dims", "masks", "tokenizer")}
    settings |= {"rounds": args.rounds, "budget": args.budget, "seed": args.seed}
    for name, default in _SIZES["cuda" if device.type == "cuda" else "cpu"].items():
        chosen = getattr(args, name)
        settings[name] = default if chosen is None else chosen
    counts = ("head_dims", "lengths", "tokens", "width", "names_tokens", "decode_lengths", "decode_batches", "rounds")
    report.check_positive(**{name: settings[name] for name in (*counts, "budget")})
    for head_dim in settings["head_dims"]:
        if settings["width"] % head_dim:
            raise ValueError(f"--head-dims {head_dim} must divide --width {settings['width']}")
    for length in settings["lengths"]:
        if settings["tokens"] % length:
            raise ValueError(f"--lengths {length} must divide --tokens {settings['tokens']}")
    return settings


def measure(args: Any, device: torch.device) -> report.Report:
    """Measures every implementation at every size; raises a ValueError for sizes that do not divide."""
    settings = _settings(args, device)
    deadline = Deadline(args.budget)
    machine = report.machine_facts(device) | report.ceilings(device, _DTYPES[settings["dtype"]])
    rows: list[report.Row] = []
    for what, make in _problems(settings, device):
        backends = [
            name for name in settings["backends"] if what["section"] == "packed" or name not in baselines.PACKED_ONLY
        ]
        if deadline.is_over():
            rows += [what | {"backend": name, "reason": "out of time (--budget)"} for name in backends]
            continue
        report.say(f"attention: {_describe(what)}")
        rows += _measure_one(what, make, backends, settings["rounds"], device, machine)
        report.write_partial(args, "attention", machine, settings, rows)
    return report.Report(
        "attention", machine, settings, rows, format_report(rows, machine, settings), partial(draw, rows)
    )


def _describe(what: report.Row) -> str:
    kind = {"batch": "causal" if what["causal"] else "full", "packed": "packed names", "decode": "decoding"}
    return f"{kind[what['section']]}, head dim {what['head_dim']}, batch {what['batch']}, length {what['length']}"


def _problems(
    settings: dict[str, Any], device: torch.device
) -> Iterator[tuple[report.Row, Callable[[], baselines.Problem]]]:
    """Yields the description of each problem and a function that makes its tensors."""
    dtype, width = _DTYPES[settings["dtype"]], settings["width"]
    wanted = settings["sections"]
    lengths = name_lengths(settings["names_tokens"], settings["tokenizer"]) if "packed" in wanted else []
    heads_of = {head_dim: width // head_dim for head_dim in settings["head_dims"]}

    # The most important comes first, in case --budget runs out.
    masks = settings["masks"] if "batch" in wanted else ()
    for mask, (head_dim, heads), length in product(masks, heads_of.items(), settings["lengths"]):
        batch, causal = settings["tokens"] // length, mask == "causal"
        yield (
            _what("batch", head_dim, heads, batch, length, causal, settings["tokens"]),
            partial(baselines.BatchProblem, batch, length, heads, head_dim, causal, device, dtype),
        )
    for head_dim, heads in heads_of.items() if "packed" in wanted else ():
        yield (
            _what("packed", head_dim, heads, len(lengths), max(lengths), True, sum(lengths)),
            partial(baselines.PackedProblem, lengths, heads, head_dim, device, dtype),
        )
    batches = settings["decode_batches"] if "decode" in wanted else ()
    for (head_dim, heads), batch, length in product(heads_of.items(), batches, settings["decode_lengths"]):
        yield (
            _what("decode", head_dim, heads, batch, length, True, batch),
            partial(baselines.DecodeProblem, batch, length, heads, head_dim, device, dtype),
        )


def name_lengths(tokens: int, tokenizer: str) -> list[int]:
    """The lengths in tokens of real names with full prompts, about ``tokens`` in total."""
    from flash_experts.data.cleaning import clean
    from flash_experts.data.packing import encode_cards
    from flash_experts.data.sources import load_source
    from flash_experts.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    cards = list(clean(load_source("embedded").rows).cards)
    random.Random(0).shuffle(cards)
    lengths: list[int] = []
    for name in encode_cards(cards[: tokens // 4 + 1], loaded):  # a name has more than four tokens
        if sum(lengths) + name.num_inputs > tokens:
            break
        lengths.append(name.num_inputs)
    if not lengths:
        raise ValueError(f"--names-tokens {tokens} is less than one name: give 100 or more")
    return lengths


def _what(section: str, head_dim: int, heads: int, batch: int, length: int, causal: bool, tokens: int) -> report.Row:
    return {
        "section": section, "head_dim": head_dim, "heads": heads, "batch": batch, "length": length, "causal": causal,
        "tokens": tokens,
    }  # fmt: skip


def _measure_one(
    what: report.Row,
    make: Callable[[], baselines.Problem],
    backends: list[str],
    rounds: int,
    device: torch.device,
    machine: report.Row,
) -> list[report.Row]:
    torch.manual_seed(0)
    rows = {name: what | {"backend": name, "reason": None} for name in backends}
    try:
        problem = make()
        truth = problem.truth()
    except torch.OutOfMemoryError:
        return [row | {"reason": "out of memory for the inputs"} for row in rows.values()]
    trials: dict[str, baselines.Trial] = {}
    for name, row in rows.items():
        trial = _first_run(name, problem, truth, row)
        if trial is not None:
            trials[name] = trial
    timings = time_in_rounds(
        {name: Implementation(trial.run, trial.context) for name, trial in trials.items()}, device, rounds
    )
    for name, timing in timings.items():
        rows[name] |= _metrics(problem, timing, machine)
    del problem, truth, trials
    _free(device)
    return list(rows.values())


def _first_run(
    name: str, problem: baselines.Problem, truth: baselines.Tensors, row: report.Row
) -> baselines.Trial | None:
    """Compiles, tunes, checks the result and measures memory; writes the reason of a failure into the row."""
    with warnings.catch_warnings(record=True) as noted:  # PyTorch warns why a backend is not available
        warnings.simplefilter("always")
        try:
            trial = baselines.IMPLEMENTATIONS[name](problem)
            with trial.context():
                found = trial.picked()
                row["error_forward"] = relative_error(found[:1], truth[:1])
                row["error_backward"] = relative_error(found[1:], truth[1:]) if trial.dout is not None else None
                row["right"] = max(row["error_forward"], row["error_backward"] or 0) <= TOLERANCES[problem.dtype]
                del found
                row["peak_mib"] = peak_memory(lambda: trial.run(lambda: None), problem.device) / 2**20
            return trial
        except baselines.Unavailable as error:
            row["reason"] = str(error)
        except Exception as error:  # from a compiler, driver or package: the others still run
            details = [str(note.message) for note in noted if "kernel" in str(note.message).lower()]
            row["reason"] = reason_of(error, details)
            del error
    _free(problem.device)
    return None


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _metrics(problem: baselines.Problem, timing: Timing, machine: report.Row) -> report.Row:
    """Returns milliseconds, TFLOP/s or GB/s, and their share of the machine's peak (roofline): matmul or copy."""
    passes = {"forward": timing.parts[0]}
    if len(timing.parts) > 1:
        passes |= {"backward": timing.parts[1], "both": timing.total}
    row: report.Row = {f"{name}_ms": seconds * 1e3 for name, seconds in passes.items()}
    row["call_ms"] = timing.call * 1e3 if timing.call is not None else None
    if isinstance(problem, baselines.BatchProblem):
        factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}
        for name, seconds in passes.items():
            row[f"{name}_tflops"] = factor[name] * problem.flops / seconds / 1e12
            row[f"{name}_share"] = row[f"{name}_tflops"] / machine["matmul_tflops"]
    else:
        row["forward_gb_per_s"] = problem.bytes / passes["forward"] / 1e9
        on_gpu = problem.device.type == "cuda"  # on a CPU small inputs fit into caches, so the share has no meaning
        row["forward_share"] = row["forward_gb_per_s"] / machine["copy_gb_per_s"] if on_gpu else None
    return row


if __name__ == "__main__":
    sys.exit(report.main(run, add_options))
