"""Tables and plot of the attention benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
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


def _groups(rows: Sequence[Row], *names: str) -> Iterator[list[Row]]:
    """The rows of each combination of values in these columns."""
    for values in product(*(_values(rows, name) for name in names)):
        if own := _of(rows, **dict(zip(names, values, strict=True))):
            yield own


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Makes a table with one row per backend and one column per length."""
    columns = _values(rows, "length")
    lines = []
    for own in _groups(rows, "backend"):
        cells = {row["length"]: cell(row) for row in own}
        lines.append([own[0]["backend"], *(cells.get(column, "-") for column in columns)])
    return table(["backend", *map(str, columns)], lines)


def _batch_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    for chosen in _groups(_of(rows, section="batch"), "head_dim", "causal"):
        title = f"Head dim {chosen[0]['head_dim']}, {_mask(chosen[0])}, {chosen[0]['tokens']} tokens"
        speed = _grid(chosen, lambda row: f"{row['forward_tflops']:.3g} {row['backward_tflops']:.3g}")
        parts.append(f"{title}: TFLOP/s forward, backward\n{speed}")
        memory = _grid(chosen, lambda row: f"{row['peak_mib']:.4g}")
        parts.append(f"{title}: peak MiB of both, beyond the inputs\n{memory}")
    return parts


def _mask(row: Row) -> str:
    return "causal" if row["causal"] else "full"


def _share(row: Row) -> str:
    return "-" if row["forward_share"] is None else f"{row['forward_share']:.0%}"


def _packed_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    for chosen in _groups(_of(rows, section="packed"), "head_dim"):
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
            f"{first['head_dim']} (sdpa_flash, _efficient, _cudnn, _math and eager: padded before the clock starts)"
        )
        parts.append(f"{title}\n{table(header, lines)}")
    return parts


def _decode_tables(rows: Sequence[Row]) -> list[str]:
    parts = []
    for chosen in _groups(_of(rows, section="decode"), "head_dim", "batch"):
        title = f"Decoding {chosen[0]['batch']} sequences, head dim {chosen[0]['head_dim']}, by cache"
        grid = _grid(chosen, lambda row: f"{row['forward_ms'] * 1e3:.4g} {_share(row)}")
        parts.append(f"{title}: microseconds, share of a copy\n{grid}")
    return parts


def _wrong(rows: Sequence[Row]) -> str:
    lines = []
    for own in _groups(rows, "backend"):
        forward = max(row["error_forward"] for row in own)
        backward = max((row["error_backward"] for row in own if row["error_backward"] is not None), default=None)
        wrong = sum(not row["right"] for row in own)
        verdict = f"WRONG at {wrong} of {len(own)}" if wrong else "right"
        gradients = "-" if backward is None else f"{backward:.1e}"
        lines.append([own[0]["backend"], f"{forward:.1e}", gradients, verdict])
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
        shape = {"batch": _mask(entry), "packed": "names", "decode": f"decode {entry['batch']}"}
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
    kinds, names = list(_groups(batches, "head_dim", "causal")), list(_groups(packed, "head_dim"))
    decoding = list(_groups(_of(done, section="decode"), "head_dim", "batch"))
    lines = max((2 * len(kinds) + len(names) + len(decoding) + 1) // 2, 1)
    figure.set_size_inches(12, 3.6 * lines)
    axes = iter(figure.subplots(lines, 2, squeeze=False).flat)
    for chosen, part in product(kinds, ("forward", "backward")):
        title = f"head dim {chosen[0]['head_dim']}, {_mask(chosen[0])}, {part}"
        _lines(next(axes), chosen, f"{part}_tflops", title, "TFLOP/s")
    for chosen in names:
        labels = [f"{row['backend']} (ours)" if row["backend"] in OURS else row["backend"] for row in chosen]
        title = f"packed names, head dim {chosen[0]['head_dim']}, forward and backward"
        draw_bars(next(axes), labels, [row["both_ms"] for row in chosen], title, "ms")
    for chosen in decoding:
        title = f"decoding {chosen[0]['batch']}, head dim {chosen[0]['head_dim']}"
        _lines(next(axes), chosen, "forward_gb_per_s", title, "GB/s of the cache")
    for unused in axes:
        unused.set_visible(False)


def _lines(axes: Any, rows: Sequence[Row], value: str, title: str, unit: str) -> None:
    for own in _groups(rows, "backend"):
        backend = own[0]["backend"]
        style = {"linewidth": 2.5, "color": "#b8582d"} if backend == "triton" else {"linewidth": 1.2}
        axes.plot([row["length"] for row in own], [row[value] for row in own], marker="o", label=backend, **style)
    axes.set_xscale("log", base=2)
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
