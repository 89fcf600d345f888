"""Tables and plot of the attention benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flash_experts.benchmarks.attention_baselines import OURS, SELECTABLE
from flash_experts.benchmarks.report import Row, draw_bars, not_run, table


def format_report(rows: Sequence[Row], machine: Row, settings: Row) -> str:
    """Formats speed and memory, packed names, decoding, errors, what did not run, and what `auto` should pick."""
    done = [row for row in rows if row["reason"] is None]
    head = (
        f"{machine['device']}, {settings['dtype']}, {settings['width']} wide, {machine['threads']} threads, load "
        f"{machine['load_average']}; a matmul reaches {machine['matmul_tflops']:.3g} TFLOP/s, a copy "
        f"{machine['copy_gb_per_s']:.3g} GB/s"
    )
    parts = [head, *_batch_tables(done), *_packed_tables(done), *_decode_tables(done)]
    parts += [_wrong(done), not_run(rows, "backend"), _auto_table(done)]
    return "\n\n".join(part for part in parts if part)


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _values(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _grid(rows: Sequence[Row], across: str, cell: Callable[[Row], str], corner: str) -> str:
    """Makes a table with one row per backend and one column per value of ``across``."""
    columns = _values(rows, across)
    lines = []
    for backend in _values(rows, "backend"):
        own = {row[across]: cell(row) for row in _of(rows, backend=backend)}
        lines.append([backend, *(own.get(column, "-") for column in columns)])
    return table([corner, *map(str, columns)], lines)


def _batch_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    batches = _of(rows, section="batch")
    for head_dim in _values(batches, "head_dim"):
        for causal in _values(batches, "causal"):
            chosen = _of(batches, head_dim=head_dim, causal=causal)
            if not chosen:
                continue
            title = f"Head dim {head_dim}, {_mask(causal)}, {chosen[0]['tokens']} tokens"
            speed = _grid(
                chosen, "length", lambda row: f"{row['forward_tflops']:.3g} {row['backward_tflops']:.3g}", "backend"
            )
            parts.append(f"{title}: TFLOP/s forward, backward\n{speed}")
            memory = _grid(chosen, "length", lambda row: f"{row['peak_mib']:.4g}", "backend")
            parts.append(f"{title}: peak MiB of both, beyond the inputs\n{memory}")
    return parts


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _share(row: Row) -> str:
    return "-" if row["forward_share"] is None else f"{row['forward_share']:.0%}"


def _packed_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    packed = _of(rows, section="packed")
    for head_dim in _values(packed, "head_dim"):
        chosen = _of(packed, head_dim=head_dim)
        baseline = min((row["both_ms"] for row in chosen if _is_sdpa(row)), default=None)
        lines = [
            [
                row["backend"],
                *(f"{row[name]:.4g}" for name in ("forward_ms", "backward_ms", "both_ms")),
                f"{row['call_ms']:.4g}" if row["call_ms"] is not None else "-",
                f"{baseline / row['both_ms']:.2f} x" if baseline else "-",
                _share(row),
                f"{row['peak_mib']:.4g}",
            ]
            for row in chosen
        ]
        header = ("backend", "forward ms", "backward ms", "both ms", "call ms", "best SDPA", "of a copy", "peak MiB")
        first = chosen[0]
        title = (
            f"{first['batch']} packed names of {first['tokens']} tokens, the longest {first['length']}, head dim "
            f"{head_dim} (sdpa_flash, _efficient, _cudnn, _math and eager: padded before the clock starts)"
        )
        parts.append(f"{title}\n{table(header, lines)}")
    return parts


def _decode_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    decoding = _of(rows, section="decode")
    for head_dim in _values(decoding, "head_dim"):
        for batch in _values(decoding, "batch"):
            chosen = _of(decoding, head_dim=head_dim, batch=batch)
            if chosen:
                grid = _grid(chosen, "length", lambda row: f"{row['forward_ms'] * 1e3:.4g} {_share(row)}", "backend")
                parts.append(
                    f"Decoding {batch} sequences, head dim {head_dim}, by cache: microseconds, share of a copy\n{grid}"
                )
    return parts


def _wrong(rows: Sequence[Row]) -> str:
    lines = []
    for backend in _values(rows, "backend"):
        own = _of(rows, backend=backend)
        forward = max(row["error_forward"] for row in own)
        backward = max((row["error_backward"] for row in own if row["error_backward"] is not None), default=None)
        wrong = sum(not row["right"] for row in own)
        lines.append(
            [
                backend,
                f"{forward:.1e}",
                "-" if backward is None else f"{backward:.1e}",
                f"WRONG at {wrong} of {len(own)}" if wrong else "right",
            ]
        )
    if not lines:
        return ""
    header = ("backend", "output", "gradients", "")
    return f"Largest error against float64, relative to the largest value\n{table(header, lines)}"


def _is_sdpa(row: Row) -> bool:
    return row["backend"].startswith("sdpa_") or row["backend"] == "varlen_attn"


def _time(row: Row) -> float:
    return float(row["both_ms" if "both_ms" in row else "forward_ms"])


def choices(rows: Sequence[Row]) -> list[Row]:
    """Finds the backend that `auto` should pick at each size: the fastest selectable one with a correct result; with
    the fastest SDPA, and the speedup of ours over it in ``forward`` and ``backward`` (None without one of them)."""
    size = ("section", "head_dim", "batch", "length", "causal")
    good = [row for row in rows if row["reason"] is None and row["right"]]
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in size) for row in good):
        own = _of(good, **dict(zip(size, key, strict=True)))
        candidates = [row for row in own if row["backend"] in SELECTABLE]
        if not candidates:
            continue
        pick = min(candidates, key=_time)
        baselines = [row for row in own if _is_sdpa(row)]
        ours = min((row for row in own if row["backend"] in OURS), key=_time, default=None)
        fastest = min(baselines, key=_time, default=None)
        entry = dict(zip(size, key, strict=True)) | {"pick": pick["backend"], "pick_ms": _time(pick)}
        entry |= {"baseline": fastest and fastest["backend"], "baseline_ms": fastest and _time(fastest)}
        entry |= {"ours": ours and ours["backend"]}
        for part in ("forward_ms", "backward_ms"):
            best = min((row[part] for row in baselines if part in row), default=None)
            entry[part.removesuffix("_ms")] = best / ours[part] if best and ours and part in ours else None
        found.append(entry)
    return found


def _auto_table(rows: Sequence[Row]) -> str:
    lines = []
    for entry in choices(rows):
        shape = {"batch": _mask(entry["causal"]), "packed": "names", "decode": f"decode {entry['batch']}"}
        ratios = (f"{entry[part]:.2f} x" if entry[part] else "-" for part in ("forward", "backward"))
        baseline = f"{entry['baseline']} {entry['baseline_ms']:.4g}" if entry["baseline"] else "-"
        head = (str(entry["head_dim"]), shape[entry["section"]], str(entry["length"]))
        lines.append([*head, entry["pick"], f"{entry['pick_ms']:.4g}", baseline, entry["ours"] or "-", *ratios])
    if not lines:
        return ""
    header = ("head dim", "work", "length", "auto: pick", "ms", "fastest SDPA, ms", "ours", "forward", "backward")
    return f"What `auto` should pick, and the speed of ours over the fastest of SDPA\n{table(header, lines)}"


def draw(rows: Sequence[Row], figure: Any) -> None:
    done = [row for row in rows if row["reason"] is None]
    batches, packed = _of(done, section="batch"), _of(done, section="packed")
    kinds = [
        (head_dim, causal)
        for head_dim in _values(batches, "head_dim")
        for causal in _values(batches, "causal")
        if _of(batches, head_dim=head_dim, causal=causal)
    ]
    decoding = list(dict.fromkeys((row["head_dim"], row["batch"]) for row in _of(done, section="decode")))
    names = _values(packed, "head_dim")
    panels = [*((kind, part) for kind in kinds for part in ("forward", "backward")), *names, *decoding]
    lines = max((len(panels) + 1) // 2, 1)
    figure.set_size_inches(12, 3.6 * lines)
    axes = iter(figure.subplots(lines, 2, squeeze=False).flat)
    for head_dim, causal in kinds:
        for part in ("forward", "backward"):
            chosen = _of(batches, head_dim=head_dim, causal=causal)
            _lines(next(axes), chosen, f"{part}_tflops", f"head dim {head_dim}, {_mask(causal)}, {part}", "TFLOP/s")
    for head_dim in names:
        chosen = _of(packed, head_dim=head_dim)
        labels = [f"{row['backend']} (ours)" if row["backend"] in OURS else row["backend"] for row in chosen]
        title = f"packed names, head dim {head_dim}, forward and backward"
        draw_bars(next(axes), labels, [row["both_ms"] for row in chosen], title, "ms")
    for head_dim, batch in decoding:
        chosen = _of(done, section="decode", head_dim=head_dim, batch=batch)
        _lines(next(axes), chosen, "forward_gb_per_s", f"decoding {batch}, head dim {head_dim}", "GB/s of the cache")
    for unused in axes:
        unused.set_visible(False)


def _lines(axes: Any, rows: Sequence[Row], value: str, title: str, unit: str) -> None:
    for backend in _values(rows, "backend"):
        own = _of(rows, backend=backend)
        style = {"linewidth": 2.5, "color": "#b8582d"} if backend == "triton" else {"linewidth": 1.2}
        axes.plot([row["length"] for row in own], [row[value] for row in own], marker="o", label=backend, **style)
    axes.set_xscale("log", base=2)
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
