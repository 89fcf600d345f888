"""A comparison as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from flash_experts.evaluation.compare import ComparisonResult, CurvePoint
from flash_experts.evaluation.evaluate import EvaluationResult
from flash_experts.evaluation.metrics import Estimate
from flash_experts.evaluation.tables import (
    bits_table,
    cost_table,
    difference_table,
    group_table,
    names_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_report(result: ComparisonResult, title: str = "Models compared") -> str:
    """The comparison as an HTML page. All text of models, names and data is escaped.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    first = result.models[0]
    return environment.from_string(template).render(
        title=title,
        data=first.data,
        seed=first.seed,
        labels=[model.label for model in result.models],
        bits=bits_table(result.models),
        differences=difference_table(result),
        names=names_table(result.models),
        cost=cost_table(result.models),
        groups=[group_table(model, split) for model in result.models for split in model.splits],
        prompts=result.prompts,
        plots={"bits": _plot_bits(result.models), "curves": _plot_curves(result.curves)},
    )


def write_report(result: ComparisonResult, path: str | Path, title: str = "Models compared") -> Path:
    """Writes `render_report` to a file, whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    target = Path(path)
    page = render_report(result, title)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"cannot write the report {target}: {error.strerror}") from error
    return target


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, caption: str) -> Markup:
    """A figure inline. matplotlib escapes the text in it; ids are made the same each time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": caption, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(Markup(svg[svg.index("<svg") :]), caption)


def _text(label: str) -> str:
    """A label that matplotlib shows as it is, where a pair of dollars would be mathematics."""
    return label.replace("$", r"\$")


def _plot_bits(models: Sequence[EvaluationResult]) -> Markup:
    """A panel for each held-out set: the figures of each model with their intervals."""
    splits = list(models[0].splits)
    figure = _figure(4.6 * len(splits), 1.4 + 0.5 * len(models))
    kinds: list[tuple[str, str, Callable[[EvaluationResult, str], Estimate | None]]] = [
        ("nothing told", "o", lambda model, split: model.splits[split].unconditional),
        ("attributes told", "s", lambda model, split: model.splits[split].conditional),
        ("shuffled attributes", "x", lambda model, split: model.splits[split].shuffled),
    ]
    for column, split in enumerate(splits):
        axes = figure.add_subplot(1, len(splits), column + 1)
        for shift, (name, marker, of) in enumerate(kinds):
            found = [(row, estimate) for row, model in enumerate(models) if (estimate := of(model, split))]
            axes.errorbar(
                [estimate.value for _, estimate in found],
                [row + 0.2 * (shift - 1) for row, _ in found],
                xerr=[
                    [estimate.value - estimate.low for _, estimate in found],
                    [estimate.high - estimate.value for _, estimate in found],
                ],
                fmt=marker,
                capsize=3,
                label=name,
            )
        axes.set_yticks(
            range(len(models)),
            [_text(model.label) for model in models] if column == 0 else [""] * len(models),
        )
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_title(_text(split))
        axes.set_xlabel("bits per character")
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
    return _svg(figure, "Bits per character of held-out names, with 95% intervals. Less is better.")


def _plot_curves(curves: dict[str, list[CurvePoint]]) -> Markup | None:
    """Validation bits (or, where no run has them, training loss) per step and per second."""
    validated = any(point.validation_bits is not None for points in curves.values() for point in points)
    if not curves:
        return None
    figure = _figure(9.2, 3.6)
    for column, unit in enumerate(("step", "seconds")):
        axes = figure.add_subplot(1, 2, column + 1)
        for label, points in curves.items():
            pairs = [
                (getattr(point, unit), point.validation_bits if validated else point.train_loss) for point in points
            ]
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], label=_text(label))
        axes.set_xlabel("optimizer steps" if unit == "step" else "seconds of training")
        axes.grid(alpha=0.3)
    what = "validation bits per character" if validated else "training loss, nats per token"
    figure.axes[0].set_ylabel(what)
    figure.axes[0].legend(fontsize="small")
    return _svg(figure, f"Training: {what}, per optimizer step and per second.")
