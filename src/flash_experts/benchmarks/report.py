"""Reports of benchmarks: measurements and machine facts as JSON, tables and plots; common options; regression check."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash_experts import terminal
from flash_experts.benchmarks.timing import Implementation, time_in_rounds
from flash_experts.extras import require
from flash_experts.files import check_out_file, whole_file
from flash_experts.models.loading import resolve_device

Row = dict[str, Any]
_FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
_PACKAGES = ("torch", "transformers", "triton", *_FLASH_PACKAGES, "sonic-moe", "liger-kernel")


@dataclass(slots=True)
class Report:
    """Results of one run."""

    topic: str
    machine: dict[str, Any]  # `machine_facts`
    settings: dict[str, Any]  # options
    rows: list[Row]  # by implementation and size; ``reason`` says why one was not measured
    text: str  # tables
    draw: Callable[[Any], None]  # into a matplotlib figure

    def to_json(self) -> dict[str, Any]:
        return {"topic": self.topic, "machine": self.machine, "settings": self.settings, "rows": self.rows}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Collects device, threads, versions and load average."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    return facts | {"versions": {name: version for name in _PACKAGES if (version := _version(name))}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures the roofline: TFLOP/s of a large matmul, and GB/s of a copy (reads plus writes)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.randn(size * size * (8 if device.type == "cuda" else 16), device=device)
    target = torch.empty_like(source)

    def multiply(lap: Callable[[], None]) -> None:
        a @ b
        lap()

    def copy(lap: Callable[[], None]) -> None:
        target.copy_(source)
        lap()

    timings = time_in_rounds(
        {"multiply": Implementation(multiply), "copy": Implementation(copy)}, device, rounds=5, seconds=0.2
    )
    return {
        "matmul_tflops": 2 * size**3 / timings["multiply"].total / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].total / 1e9,
    }


def say(text: str) -> None:
    """Logs a line of progress to stderr; only the result goes to stdout."""
    terminal.say(text, sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def not_run(rows: Sequence[Row], name: str) -> str:
    """Lists the reasons why implementations were not measured; empty if all were."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            cases.setdefault(row["reason"], []).append(row[name])
    lines = []
    for reason, names in cases.items():
        distinct = ", ".join(dict.fromkeys(names))
        lines.append(f"  {distinct}: {reason} ({len(names)} {'size' if len(names) == 1 else 'sizes'})")
    return "\n".join(["Not run:", *lines]) if lines else ""


def draw_bars(axes: Any, labels: Sequence[str], values: Sequence[float], title: str, unit: str) -> None:
    """Draws horizontal bars with their values, the first on top."""
    places = list(range(len(labels)))
    bars = axes.barh(places, values, color=["#b8582d" if "ours" in label else "#7a8ca3" for label in labels])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def rate_table(rows: Sequence[Row], rate: str, corner: str, unit: str) -> str:
    """Formats rates of implementations, each also as a multiple of the baseline."""
    lines = [[row["name"], f"{row[rate]:.1f}", f"{row['times_peer']:.2f} x"] for row in rows]
    return table((corner, unit, "times the baseline"), lines)


def draw_rates(rows: Sequence[Row], rate: str, title: str, unit: str, figure: Any) -> None:
    figure.set_size_inches(9, 3)
    draw_bars(figure.subplots(), [row["name"] for row in rows], [row[rate] for row in rows], title, unit)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("The run")
    run.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    run.add_argument("--out", help="JSON file for the results (default: none)")
    run.add_argument("--plot", help="PNG file for a plot (default: none)")
    run.add_argument(
        "--check",
        help="JSON file of an earlier --out, or a folder of them (benchmarks/results), to compare with: warns of "
        "ratios that are worse by more than a tenth on this machine in two runs (default: none)",
    )
    run.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run_topic(topic: str, args: Any, measure: Callable[[Any, torch.device], Report]) -> Report:
    """Checks the options before minutes of work, measures, and writes the files."""
    device = resolve_device(args.device)
    if args.out is not None and args.out == args.plot:
        raise ValueError(f"--out and --plot are both {args.out}: give each a file of its own")
    for option in ("out", "plot"):
        path = getattr(args, option)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{option} {path}: there is no folder {Path(path).parent}")
        if path is not None:
            check_out_file(path, args.overwrite, option=f"--{option}")
    if args.plot is not None:
        require("--plot", "matplotlib")
    recorded = None if args.check is None else find_recorded(Path(args.check), topic, device, args)
    report = measure(args, device)
    if recorded is not None:
        worse = find_worse(report.rows, recorded)
        if worse:
            say(f"{len(worse)} ratios look worse than recorded: measuring them again")
            worse = find_worse(measure(args, device).rows, recorded, among=worse)
        for line in worse.values():
            say(f"warning: {line}")
    if args.out is not None:
        write_json(Path(args.out), report.to_json())
    if args.plot is not None:
        _plot(report, Path(args.plot))
    return report


# Fields that compare two implementations within one run, and whether larger is better.
_RATIOS = {"times_dense": False, "times_peer": True}
_WORSE = 1.1
_SAME_MACHINE = ("device", "cpu_capability", "threads", "cuda")
_SAME_WORK = ("model", "batch_size", "names_per_step", "experts", "layers")  # other sizes are in the rows

Key = tuple[tuple[str, Any], ...]


def find_recorded(path: Path, topic: str, device: torch.device, args: Any = None) -> list[Row]:
    """The rows of the latest recorded run of a topic on a machine like this one, from a file written by ``--out`` or a
    folder of them; raises a ValueError if there is none. With ``args``: of the same work (`_SAME_WORK`)."""
    facts = machine_facts(device)
    here = {name: facts[name] for name in _SAME_MACHINE}
    work = {name: value for name, value in vars(args or argparse.Namespace()).items() if name in _SAME_WORK}
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    runs: list[tuple[str, list[Row]]] = []
    for file in files:
        try:
            run = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--check {file}: not a results file that can be read ({error})") from error
        if not isinstance(run, dict) or run.get("topic") != topic:
            continue
        machine, rows = run.get("machine"), run.get("rows")
        if not isinstance(machine, dict) or not isinstance(rows, list):
            raise ValueError(f"--check {file}: not a results file: it has no machine and rows, as --out writes them")
        settings = run.get("settings") or {}
        is_same_work = all(settings.get(name, value) == value for name, value in work.items())
        if is_same_work and all(machine.get(name) == here[name] for name in _SAME_MACHINE):
            runs.append((str(machine.get("date") or ""), rows))
    if not runs:
        of = ", ".join(f"{name} {value}" for name, value in {**here, **work}.items() if value is not None)
        raise ValueError(f"--check {path}: no results of {topic} on this machine ({of}): record some with --out FILE")
    return max(runs, key=lambda dated: dated[0])[1]


def find_worse(rows: Sequence[Row], recorded: Sequence[Row], among: Collection[Key] | None = None) -> dict[Key, str]:
    """Finds rows (with one of the keys ``among``, if given) whose ratio is worse than recorded by more than 10%, with a
    message for each."""
    before = {_key(row): row for row in recorded}
    worse: dict[Key, str] = {}
    for row in rows:
        key = _key(row)
        for name in _RATIOS.keys() & row.keys():
            old, new = before.get(key, {}).get(name), row[name]
            if not old or not new or (among is not None and key not in among):
                continue
            if (old / new if _RATIOS[name] else new / old) > _WORSE:
                what = ", ".join(f"{field} {value}" if isinstance(value, int) else value for field, value in key)
                worse[key] = f"{name} is {new:.2f}, recorded {old:.2f}: {what}"
    return worse


def _key(row: Row) -> Key:
    """The names and sizes of a row, without measurements."""
    return tuple((name, value) for name, value in row.items() if type(value) in (str, int))


def check_positive(**numbers: int | Sequence[int] | float | None) -> None:
    """Raises a ValueError if an option is not positive."""
    for name, value in numbers.items():
        values = [value] if isinstance(value, int | float) else value or []
        if any(number <= 0 for number in values):
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0, not {value}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_partial(args: Any, topic: str, machine: Row, settings: Row, rows: list[Row]) -> None:
    """Writes the results so far to ``--out``, since a long run may be stopped."""
    if args.out is not None:
        so_far = {"topic": topic, "machine": machine, "settings": settings, "rows": rows}
        write_json(Path(args.out), so_far)


def _plot(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.suptitle(f"{report.topic}: {report.machine['device']}, PyTorch {report.machine['versions']['torch']}")
    report.draw(figure)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main(
    run: Callable[[Any], Report],
    add_options: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs ``python -m flash_experts.benchmarks.TOPIC``, without the dependencies of the command line."""
    topic = sys.modules[run.__module__].__spec__
    name = f"python -m {topic.name if topic else run.__module__}"
    parser = argparse.ArgumentParser(prog=name, description=run.__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_options(parser)
    arguments = [_underscores(text) for text in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(arguments)
    try:
        report = run(args)
    except (ValueError, OSError) as error:
        say(f"{parser.prog}: {' '.join(str(error).split())}")
        return 1
    terminal.say(json.dumps(report.to_json(), indent=2) if args.json else report.text)
    return 0


def _underscores(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if option.startswith("--") else argument
