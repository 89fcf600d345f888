"""MoE layer benchmark: our experts, transformers' eager, grouped_mm and batched_mm, a dense MLP, installed packages.

Training (forward and backward) is compared with a dense MLP with the same FLOPs: T * k rows through the two matrices of
one expert, without routing. Decoding (forward of few tokens) is memory-bound, so it is compared with a dense MLP that
reads as many weights as the chosen experts have.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from flash_experts.benchmarks import moe_baselines as baselines
from flash_experts.benchmarks import report
from flash_experts.benchmarks.timing import (
    TOLERANCES,
    Deadline,
    Implementation,
    peak_memory,
    reason_of,
    relative_error,
    time_in_rounds,
)
from flash_experts.kernels.cpu_memory import freed_memory_returned
from flash_experts.models.moe_layer import TRITON_EXPERTS_IMPLEMENTATION

_SHAPES = {"gpt2": (768, 3072), "gpt2-medium": (1024, 4096), "gpt2-large": (1280, 5120), "gpt2-xl": (1600, 6400)}
_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["gpt2", "gpt2-medium", "gpt2-xl"], "tokens": [32768], "granularities": [1, 8]},
    "cpu": {"shapes": ["gpt2"], "tokens": [2048, 256, 16], "granularities": [1]},
}
_NAMES = ("dense", *baselines.IMPLEMENTATIONS, *baselines.PACKAGES)
_CHECK = {"width": 64, "hidden": 128, "tokens": 48}  # size of the comparison with float64


def run(args: Any) -> report.Report:
    """Time an MoE layer: ours, transformers' three ways, a dense MLP, sonic-moe and liger-kernel where installed."""
    return report.run_topic("moe", args, measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    measured = parser.add_argument_group("What is measured")
    measured.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="tokens per training step (default: 32768 on a GPU; 2048, 256 and 16 on a CPU)",
    )
    measured.add_argument(
        "--decode_tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="tokens per decoding step"
    )
    measured.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(_SHAPES),
        help="models whose shapes are measured: gpt2, gpt2-medium, gpt2-large, gpt2-xl (default: by device)",
    )
    measured.add_argument(
        "--width", type=int, help="width instead of --shapes, with 4 times as many hidden units (default: none)"
    )
    measured.add_argument("--num_experts", type=int, default=8, help="experts before granularity")
    measured.add_argument("--top_k", type=int, default=2, help="experts per token before granularity")
    measured.add_argument(
        "--granularities",
        type=int,
        nargs="+",
        help="granularities; 8: eight times the experts, an eighth of the size (default: by device)",
    )
    measured.add_argument(
        "--implementations", nargs="+", choices=_NAMES, default=list(_NAMES), help="implementations to measure, by name"
    )
    measured.add_argument("--rounds", type=int, default=5, help="rounds per implementation; the median is reported")
    measured.add_argument(
        "--budget", type=float, help="time in seconds after which no further size is measured (default: no limit)"
    )
    measured.add_argument("--seed", type=int, default=0, help="random seed of weights, tokens and routing")
    report.add_common_options(parser)


def _settings(args: Any, device: torch.device) -> dict[str, Any]:
    names = ("decode_tokens", "width", "num_experts", "top_k", "implementations", "rounds", "budget", "seed")
    settings = {name: getattr(args, name) for name in names}
    for name, default in _SIZES["cuda" if device.type == "cuda" else "cpu"].items():
        chosen = getattr(args, name)
        settings[name] = default if chosen is None else chosen
    if args.width is not None:
        settings["shapes"] = []
    counts = ("tokens", "decode_tokens", "width", "num_experts", "top_k", "granularities", "rounds", "budget")
    report.check_positive(**{name: settings[name] for name in counts})
    if args.top_k > args.num_experts:
        raise ValueError(f"--top-k {args.top_k} must be at most --num-experts {args.num_experts}")
    settings["dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    return settings


def _shapes(settings: dict[str, Any]) -> Iterator[baselines.Shape]:
    sizes = {name: _SHAPES[name] for name in settings["shapes"]}
    if settings["width"] is not None:
        sizes = {f"width {settings['width']}": (settings["width"], 4 * settings["width"])}
    for name, (width, hidden) in sizes.items():
        for g in settings["granularities"]:
            if hidden % g:
                raise ValueError(f"--granularities {g} must divide the {hidden} hidden units of {name}")
            yield baselines.Shape(name, width, hidden // g, settings["num_experts"] * g, settings["top_k"] * g)


def measure(args: Any, device: torch.device) -> report.Report:
    """Measures every implementation at every size."""
    settings = _settings(args, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    deadline = Deadline(args.budget)
    shapes = list(_shapes(settings))
    machine = report.machine_facts(device) | report.ceilings(device, dtype)
    rows: list[report.Row] = []
    for shape in shapes:
        errors = _errors(shape, settings["implementations"], device, dtype, args.seed)
        torch.manual_seed(args.seed)
        work = [("training", tokens) for tokens in settings["tokens"]]
        work += [("decoding", tokens) for tokens in settings["decode_tokens"]]
        for section, tokens in work:
            what = {
                "section": section, "shape": shape.name, "width": shape.width, "hidden": shape.hidden,
                "num_experts": shape.num_experts, "top_k": shape.top_k, "tokens": tokens,
            }  # fmt: skip
            if deadline.is_over():
                late = {"reason": "out of time (--budget)"}
                rows += [what | {"implementation": name} | late for name in settings["implementations"]]
                continue
            report.say(f"moe: {section}, {shape.name}, {shape.num_experts} experts of {shape.hidden}, {tokens} tokens")
            rows += _measure_one(what, shape, errors, settings, device, dtype, machine)
            report.write_partial(args, "moe", machine, settings, rows)
    return report.Report("moe", machine, settings, rows, _format(rows, machine, settings), partial(_draw, rows))


def _experts(
    name: str,
    shape: baselines.Shape,
    section: str,
    layer: baselines.Layer | None,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Makes the experts of an implementation; ours and transformers' share the weights of ``layer``."""
    if name == "dense":
        assert layer is not None
        if section == "decoding":
            distinct = int(layer.choices_TK.unique().numel())
            return baselines.DenseMLP(shape.width, shape.hidden * distinct, 1, device, dtype)
        return baselines.DenseMLP(shape.width, shape.hidden, shape.top_k, device, dtype)
    if name in baselines.GATED:
        package, compute = baselines.GATED[name]
        if device.type != "cuda":
            raise ValueError("needs a GPU")
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is not installed")
        return baselines.GatedExperts(shape, compute, device, dtype)
    if name == TRITON_EXPERTS_IMPLEMENTATION and device.type != "cuda":
        raise ValueError("needs a GPU")
    if name == baselines.MEMORY_RETURNED:
        if device.type == "cuda" or section == "decoding":
            raise ValueError("applies only to training on a CPU")
        name = "fe_experts"
    if layer is None:
        return baselines.using(baselines.make_experts(shape, device, dtype), name)
    tokens = layer.x_TD.shape[0]
    needed = baselines.batched_bytes(shape, tokens, dtype)
    if name == "batched_mm" and needed > _memory(device) / 8:
        raise ValueError(f"it would copy {needed / 1e9:.0f} GB of weights: the experts of each token")
    assert not isinstance(layer.experts, baselines.GatedExperts | baselines.DenseMLP)
    return baselines.using(layer.experts, name)  # type: ignore[arg-type]


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _errors(
    shape: baselines.Shape, names: Sequence[str], device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, tuple[float, float] | str]:
    """Computes the largest errors of output and gradients against a loop over experts in float64, at a small size."""
    small = baselines.Shape("check", _CHECK["width"], _CHECK["hidden"], shape.num_experts, shape.top_k)
    found: dict[str, tuple[float, float] | str] = {}
    torch.manual_seed(seed)
    for name in names:
        if name == "dense":
            continue
        try:
            experts = _experts(name, small, "training", None, device, dtype)
            layer = baselines.routed(experts, small, _CHECK["tokens"], device, dtype, seed)
            mine, truth = layer.run(lambda: None), layer.exact()
            found[name] = relative_error(mine[:1], truth[:1]), relative_error(mine[1:], truth[1:])
        except Exception as error:  # from a package or compiler: the others still run
            found[name] = reason_of(error)
    return found


def _measure_one(
    what: report.Row,
    shape: baselines.Shape,
    errors: dict[str, tuple[float, float] | str],
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    machine: report.Row,
) -> list[report.Row]:
    section, tokens, seed = what["section"], what["tokens"], settings["seed"]
    rows = {name: what | {"implementation": name, "reason": None} for name in settings["implementations"]}
    layer = baselines.routed(baselines.make_experts(shape, device, dtype), shape, tokens, device, dtype, seed)
    implementations = {}
    for name, row in rows.items():
        error = errors.get(name)
        if isinstance(error, str):
            row["reason"] = error
            continue
        row["error_output"], row["error_gradients"] = error if error is not None else (None, None)
        row["right"] = error is None or max(error) <= TOLERANCES[dtype]
        try:
            own = baselines.routed(
                _experts(name, shape, section, layer, device, dtype), shape, tokens, device, dtype, seed
            )
            passed = own.run if section == "training" else own.decode
            row["peak_mib"] = peak_memory(lambda run=passed: run(lambda: None), device) / 2**20  # type: ignore[misc]
            context = freed_memory_returned if name == baselines.MEMORY_RETURNED else nullcontext
            implementations[name] = Implementation(passed, context)
        except Exception as failure:  # as above
            row["reason"] = reason_of(failure)
    timings = time_in_rounds(implementations, device, settings["rounds"])
    dense = timings.get("dense")
    for name, timing in timings.items():
        flops = shape.flops(tokens) * (3 if section == "training" else 1)
        row = rows[name]
        row |= {"seconds": timing.total, "call_seconds": timing.call, "forward_seconds": timing.parts[0]}
        row["backward_seconds"] = timing.parts[1] if section == "training" else None
        row["times_dense"] = timing.times(dense) if dense else None
        if section == "training":
            row["tflops"] = flops / timing.total / 1e12
            row["share"] = row["tflops"] / machine["matmul_tflops"]
    del layer, implementations
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return list(rows.values())


def _format(rows: Sequence[report.Row], machine: report.Row, settings: report.Row) -> str:
    parts = [
        f"{machine['device']}, {settings['dtype']}, {machine['threads']} threads, load {machine['load_average']}; a "
        f"matmul reaches {machine['matmul_tflops']:.3g} TFLOP/s"
    ]
    done = [row for row in rows if row["reason"] is None]
    titles = {
        "training": "forward and backward; dense: a dense MLP with the same FLOPs",
        "decoding": "forward; dense: a dense MLP that reads as many weights",
    }
    for group, own in _groups(done).items():
        section, name, num_experts, hidden, top_k = group
        tokens = list(dict.fromkeys(row["tokens"] for row in own))
        lines = []
        for implementation in dict.fromkeys(row["implementation"] for row in own):
            cells = {row["tokens"]: row for row in own if row["implementation"] == implementation}
            memory = f"{cells[tokens[0]]['peak_mib']:.4g}" if tokens[0] in cells else "-"
            lines.append([implementation, *(_cell(cells.get(count)) for count in tokens), memory])
        header = (name, *(f"{count} tokens" for count in tokens), f"peak MiB, {tokens[0]}")
        title = f"{num_experts} experts of {hidden}, {top_k} per token, {titles[section]}: ms, times dense"
        parts.append(f"{title}\n{report.table(header, lines)}")
    checked = {
        row["implementation"]: (row["error_output"], row["error_gradients"], row["right"])
        for row in done
        if row["error_output"] is not None
    }
    if checked:
        lines = [[name, f"{o:.1e}", f"{g:.1e}", "right" if ok else "WRONG"] for name, (o, g, ok) in checked.items()]
        header = ("implementation", "output", "gradients", "")
        parts.append(
            f"Largest error against a loop over experts in float64, at a small size\n{report.table(header, lines)}"
        )
    parts.append(report.not_run(rows, "implementation"))
    return "\n\n".join(part for part in parts if part)


def _groups(rows: Sequence[report.Row]) -> dict[tuple[Any, ...], list[report.Row]]:
    groups: dict[tuple[Any, ...], list[report.Row]] = {}
    for row in rows:
        key = (row["section"], row["shape"], row["num_experts"], row["hidden"], row["top_k"])
        groups.setdefault(key, []).append(row)
    return groups


def _cell(row: report.Row | None) -> str:
    if row is None:
        return "-"
    times = f" {row['times_dense']:.2f} x" if row["times_dense"] is not None else ""
    return f"{row['seconds'] * 1e3:.4g}{times}"


def _draw(rows: Sequence[report.Row], figure: Any) -> None:
    panels: dict[tuple[Any, ...], list[report.Row]] = {}
    for group, own in _groups([row for row in rows if row["reason"] is None]).items():
        for row in own:
            panels.setdefault((*group, row["tokens"]), []).append(row)
    lines = max((len(panels) + 1) // 2, 1)
    figure.set_size_inches(12, 2.6 * lines)
    axes = iter(figure.subplots(lines, 2, squeeze=False).flat)
    for (section, name, num_experts, *_, tokens), own in panels.items():
        labels = [
            row["implementation"] + (" (ours)" if row["implementation"].startswith("fe_experts") else "") for row in own
        ]
        title = f"{section}, {name}, {num_experts} experts, {tokens} tokens"
        report.draw_bars(next(axes), labels, [row["seconds"] * 1e3 for row in own], title, "ms")
    for unused in axes:
        unused.set_visible(False)


if __name__ == "__main__":
    sys.exit(report.main(run, add_options))
