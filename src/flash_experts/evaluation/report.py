"""The report of a comparison: one self-contained HTML page, and its plots, as SVG in the page or as PNG files."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from flash_experts.evaluation import tables
from flash_experts.evaluation.compare import REAL, ComparisonResult
from flash_experts.evaluation.curves import CurvePoint, plain_label
from flash_experts.evaluation.evaluate import EvaluationResult
from flash_experts.evaluation.metrics import Estimate
from flash_experts.files import whole_file, whole_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALETTE = ("#2f7ebc", "#d9730d", "#2e9e6b", "#b4509e", "#c03b3b", "#8a7a1f", "#5a6fd8", "#7a7a7a")
_MARKERS = "osD^vPX*"
_INK = "#010203"  # placeholder for the text color of the page, light or dark
_PNG_DPI = 160


def render_report(result: ComparisonResult, day: date | None = None) -> str:
    """Renders a comparison as an HTML page, with all text of models, names and data escaped.

    The same result and ``day`` (default: today) give the same bytes.
    """
    script = _resource("blind_test.js")
    first = result.models[0]
    return load_template(__package__, "report").render(
        day=day or date.today(),
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=first.data,
        seed=first.seed,
        labels=[model.label for model in result.models],
        bits=tables.bits_table(result.models, result.differences),
        differences=tables.difference_table(result),
        association=tables.association_table(result.models),
        novelty=tables.novelty_table(result.models),
        variety=tables.variety_table(result.models),
        detection=tables.detection_table(result.models),
        control=tables.control_table(result.models),
        cost=tables.cost_table(result.models),
        groups=[tables.group_table(model, split) for model in result.models for split in model.splits],
        prompts=result.prompts,
        blind_test=result.blind_test,
        real=REAL,
        plots={name: svg(draw(), caption) for name, (draw, caption) in all_plots(result).items()},
    )


@cache
def load_template(package: str, name: str) -> Template:
    """Loads the template ``name.html.jinja`` of a package, with escaping and strict variables."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(package).joinpath(f"{name}.html.jinja").read_text(encoding="utf-8"))


def _resource(name: str) -> str:
    return files("flash_experts.evaluation").joinpath(name).read_text(encoding="utf-8")


def write_report(result: ComparisonResult, path: str | Path) -> Path:
    """Writes the page atomically and returns its path; raises a ValueError if it cannot be written."""
    write_pages({Path(path): render_report(result)})
    return Path(path)


def write_pages(pages: Mapping[Path, str]) -> None:
    """Writes several text files, all or none; raises a ValueError if one cannot be written."""
    try:
        with whole_files(list(pages)) as temporaries:
            for temporary, page in zip(temporaries, pages.values(), strict=True):
                temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the report {', '.join(map(str, pages))}: {error.strerror}") from error


def all_plots(result: ComparisonResult) -> dict[str, tuple[Callable[[], Figure], str]]:
    """A drawing function and a caption for each plot that has data, by name."""
    models = result.models
    plots: dict[str, tuple[Callable[[], Figure], str]] = {
        "bits": (
            lambda: _plot_bits(models),
            "Bits per character of held-out names, with 95% intervals. Lower is better.",
        ),
        "speed_quality": (
            lambda: _plot_speed_quality(models),
            "Quality against cost: unconditional bits per character, against names sampled per second on this machine, "
            "and against active parameters per token. Lower is better; faster is to the right, smaller to the left.",
        ),
    }
    if any(point.validation_bits or point.train_loss for points in result.curves.values() for point in points):
        what = "validation bits per character" if _validated(result.curves) else "training loss, nats per token"
        flops = {model.label: model.costs.flops_per_token for model in models}
        plots["training"] = (
            lambda: _plot_curves(result.curves, flops),
            f"Training: {what}, by optimizer steps, FLOPs, and seconds on the machine that trained. Each run alone, "
            "without the cost of the model that it started from.",
        )
    if any(model.expert_loads for model in models):
        plots["experts"] = (
            lambda: _plot_experts(models),
            "Router maps: the load of each expert (columns) in each MoE block (rows) on held-out names with their "
            "prompts, over the mean load. 1 is balanced, 0 is an unused expert.",
        )
    return plots


def svg(figure: Figure, caption: str) -> Markup:
    """Renders a figure as inline SVG, reproducibly. matplotlib escapes its text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": caption, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    return Markup('<figure><div class="plot">{}</div><figcaption>{}</figcaption></figure>').format(
        Markup(drawn), caption
    )


def write_plots(result: ComparisonResult, folder: str | Path) -> list[Path]:
    """Writes each plot as a PNG file; raises a ValueError if the folder cannot be written. Needs matplotlib."""
    from matplotlib import rc_context

    target = Path(folder)
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, (draw, _) in all_plots(result).items():
            path = target / f"{name}.png"
            with rc_context({"savefig.facecolor": "white"}), whole_file(path) as temporary:
                draw().savefig(temporary, dpi=_PNG_DPI, metadata={"Software": None})
            written.append(path)
    except OSError as error:
        raise ValueError(f"cannot write the plots to {target}: {error.strerror}") from error
    return written


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it has global state and may need a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _INK
    )
    with rc_context({**ink, "font.size": 9.5, "axes.titlesize": 10.5}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
            one.title.set_color(_INK)
    return figure, axes


def _text(label: str) -> str:
    """A label as matplotlib takes it, shortened if it is long."""
    return plain_label(label if len(label) <= 28 else label[:13] + "…" + label[-14:])


def _error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above; of very few names, rounding may put a bound on the wrong side of the estimate."""
    below = [max(0.0, estimate.value - estimate.low) for estimate in estimates]
    return [below, [max(0.0, estimate.high - estimate.value) for estimate in estimates]]


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, labelcolor=_INK, frameon=False
    )


def _plot_bits(models: Sequence[EvaluationResult]) -> Figure:
    splits = list(models[0].splits)
    figure, panels = _figure(4.6 * len(splits), 1.4 + 0.5 * len(models), 1, len(splits))
    kinds: list[tuple[str, str, Callable[[EvaluationResult, str], Estimate]]] = [
        ("unconditional", "o", lambda model, split: model.splits[split].unconditional),
        ("given attributes", "s", lambda model, split: model.splits[split].conditional),
        ("given another card's attributes", "x", lambda model, split: model.splits[split].shuffled),
    ]
    for column, (split, axes) in enumerate(zip(splits, panels, strict=True)):
        for shift, (name, marker, of) in enumerate(kinds):
            found = [of(model, split) for model in models]
            values = [estimate.value for estimate in found]
            rows = [row + 0.2 * (shift - 1) for row in range(len(models))]
            bars = _error_bars(found)
            axes.errorbar(values, rows, xerr=bars, fmt=marker, color=_PALETTE[shift], capsize=3, label=name)
        labels = [_text(model.label) for model in models] if column == 0 else [""] * len(models)
        axes.set_yticks(range(len(models)), labels)
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_title(_text(split))
        axes.set_xlabel("bits per character")
        axes.grid(axis="x", alpha=0.25)
    _legend(figure, panels[0], len(kinds))
    return figure


def _plot_speed_quality(models: Sequence[EvaluationResult]) -> Figure:
    splits = list(models[0].splits)
    figure, panels = _figure(9.2, 3.6, 1, 2)
    costs: list[tuple[str, Callable[[EvaluationResult], float | None]]] = [
        ("names sampled per second", lambda model: model.sampled_per_second),
        ("active parameters", lambda model: float(model.size.active)),
    ]
    for axes, (unit, cost_of) in zip(panels, costs, strict=True):
        for index, model in enumerate(models):
            cost, bits = cost_of(model), model.splits[splits[0]].unconditional
            if cost is None:
                continue
            axes.errorbar(
                [cost],
                [bits.value],
                yerr=_error_bars([bits]),
                fmt=_MARKERS[index % len(_MARKERS)],
                color=_PALETTE[index % len(_PALETTE)],
                capsize=3,
                label=_text(model.label),
            )
        axes.set_xscale("log")
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"bits per character, {_text(splits[0])}")
    _legend(figure, panels[1], min(4, len(models)))
    return figure


def _validated(curves: Mapping[str, Sequence[CurvePoint]]) -> bool:
    return any(point.validation_bits is not None for points in curves.values() for point in points)


def _plot_curves(curves: Mapping[str, Sequence[CurvePoint]], flops_per_token: Mapping[str, float]) -> Figure:
    """Validation bits (or training loss, if no run has them) by steps, FLOPs and seconds."""
    validated = _validated(curves)
    figure, panels = _figure(9.2, 3.6, 1, 3)
    units: list[tuple[str, Callable[[str, CurvePoint], float | None]]] = [
        ("optimizer steps", lambda label, point: float(point.step)),
        ("FLOPs", lambda label, point: None if point.tokens is None else flops_per_token[label] * point.tokens),
        ("seconds of training", lambda label, point: point.seconds),
    ]
    for axes, (unit, of) in zip(panels, units, strict=True):
        for index, (label, points) in enumerate(curves.items()):
            values = [point.validation_bits if validated else point.train_loss for point in points]
            pairs = [(of(label, point), value) for point, value in zip(points, values, strict=True)]
            # The point before the first step would compress the axis.
            known = [(x, y) for x, y in pairs if x and y is not None]
            style = "-o" if len(known) < 40 else "-"
            color = _PALETTE[index % len(_PALETTE)]
            axes.plot([x for x, _ in known], [y for _, y in known], style, ms=3, color=color, label=_text(label))
        axes.set_xlabel(unit)
        axes.grid(alpha=0.25)
        axes.xaxis.get_offset_text().set_color(_INK)
    panels[0].set_ylabel("validation bits per character" if validated else "training loss, nats per token")
    _legend(figure, panels[0], min(4, len(curves)))
    return figure


def _plot_experts(models: Sequence[EvaluationResult]) -> Figure:
    moe_models = [model for model in models if model.expert_loads]
    rows = sum(1.3 + 0.34 * len(model.expert_loads) for model in moe_models)
    figure, panels = _figure(9.2, rows, len(moe_models), 1)
    highest = max(load for model in moe_models for loads in model.expert_loads.values() for load in loads)
    for axes, model in zip(panels, moe_models, strict=True):
        loads = np.array(list(model.expert_loads.values()))
        image = axes.imshow(loads, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(2.0, highest))
        axes.set_yticks(range(len(loads)), [f"block {block}" for block in model.expert_loads])
        axes.set_title(_text(model.label))
        axes.set_xlabel("expert")
        if loads.shape[1] <= 16:
            axes.set_xticks(range(loads.shape[1]))
            for (row, column), load in np.ndenumerate(loads):
                dark = load < 0.6 * max(2.0, highest)
                axes.text(column, row, f"{load:.2f}", ha="center", va="center", color="white" if dark else "black")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.ax.tick_params(colors=_INK)
        bar.outline.set_edgecolor(_INK)
    return figure
