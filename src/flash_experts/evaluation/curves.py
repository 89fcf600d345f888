"""Training curves (learning curves): reads the metrics.jsonl of runs and draws them side by side."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_experts.extras import require
from flash_experts.files import whole_file
from flash_experts.released import model_folder
from flash_experts.training.tracking import BITS_PER_CHAR, METRICS_FILE, read_metrics, read_untrusted_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of a training curve."""

    step: int
    seconds: float | None
    tokens: int | None
    train_loss: float | None
    validation_bits: float | None


def read_curve(path: Path) -> list[CurvePoint]:
    """Reads a metrics.jsonl as points in the order of steps; empty if there is no such file.

    Of a step repeated after a resume, the last values count.
    """
    points: dict[int, dict[str, Any]] = {}
    for record in read_untrusted_metrics(path):
        points.setdefault(record["step"], {}).update(record)
    return [
        CurvePoint(
            step=step,
            seconds=_number(record, "seconds"),
            tokens=_number(record, "tokens"),
            train_loss=_number(record, "loss"),
            validation_bits=_number(record, BITS_PER_CHAR),
        )
        for step, record in sorted(points.items())
    ]


def _number(record: dict[str, Any], key: str) -> Any:
    return finite_number(record.get(key))


Line = Mapping[str, Any]
Points = list[tuple[float, float]]
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    Attributes:
        event: train or validation.
        x: field of the horizontal axis: step, tokens or seconds.
    """

    name: str
    title: str
    event: str
    x: str
    value: Callable[[Line], float | None]


def finite_number(value: Any) -> Any:
    """The value if it is a number that a finite float can hold, else None: runs can be untrusted."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None


def load_imbalance(line: Line) -> float | None:
    """The coefficient of variation of expert loads, averaged over layers; 0 is balanced."""
    names = [name for name in line if name.startswith("router/") and name.endswith("/load_cv")]
    layers = [value for name in names if (value := finite_number(line[name])) is not None]
    return sum(layers) / len(layers) if layers else None


def _field(name: str) -> Callable[[Line], float | None]:
    return lambda line: line.get(name)


_BITS = "validation bits per character"
PANELS = (
    Panel("loss", "training loss", "train", "step", _field("loss")),
    Panel("lr", "learning rate", "train", "step", _field("lr")),
    Panel("load_imbalance", "router load, deviation / mean", "train", "step", load_imbalance),
    Panel("bits_per_step", _BITS, "validation", "step", _field(BITS_PER_CHAR)),
    Panel("bits_per_token", _BITS, "validation", "tokens", _field(BITS_PER_CHAR)),
    Panel("bits_per_second", _BITS, "validation", "seconds", _field(BITS_PER_CHAR)),
)
_AXES = {"step": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training"}


def read_curves(runs: Sequence[str | Path]) -> dict[str, dict[str, Points]]:
    """Reads the points of each panel by run name, or by path if two names are equal.

    ``runs`` are folders written by ``train``, or metrics.jsonl files.

    Raises:
        ValueError: a metrics.jsonl does not exist or has a damaged line, or a run is given twice.
    """
    found = [model_folder(run) or Path(run) for run in runs]
    paths = [path / METRICS_FILE if path.is_dir() else path for path in found]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run is given twice: name each once")
    labels = [path.parent.resolve().name if path.name == METRICS_FILE else path.stem for path in paths]
    if len(set(labels)) < len(labels):
        # All of them: a path may be the name of another run.
        labels = [str(path.parent if path.name == METRICS_FILE else path) for path in paths]
    curves = {}
    for path, label in zip(paths, labels, strict=True):
        lines = read_metrics(path)
        curves[label] = {panel.name: _points(lines, panel) for panel in PANELS}
    return curves


def write_curves(curves: Mapping[str, Mapping[str, Points]], out: Path) -> None:
    """Writes a picture, by the suffix of ``out``, atomically; raises a ValueError for any but `PICTURES`."""
    if out.suffix not in PICTURES:
        raise ValueError(f"{out} does not end in one of {', '.join(PICTURES)}")
    require("drawing", "matplotlib")
    content = _picture(draw(curves), out.suffix[1:])
    with whole_file(out) as path:
        path.write_bytes(content)


def plain_label(label: str) -> str:
    """Escapes a label: matplotlib reads a pair of dollars as mathematics, and leaves labels with _ first out."""
    return label.replace("$", r"\$") if not label.startswith("_") else plain_label(f" {label}")


def draw(curves: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Draws all panels that have points, one line per run."""
    from matplotlib.figure import Figure  # not pyplot: it has global state and may need a display

    panels = [panel for panel in PANELS if any(points[panel.name] for points in curves.values())]
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 0.8 + 3.1 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, points in curves.items():
            own = points[panel.name]
            axes.plot([x for x, _ in own], [y for _, y in own], label=plain_label(label), linewidth=1.2)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel(_AXES[panel.x])
        axes.grid(alpha=0.3)
    if panels:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _points(lines: Sequence[Line], panel: Panel) -> Points:
    pairs = [(line.get(panel.x), panel.value(line)) for line in lines if line["event"] == panel.event]
    numbers = [(finite_number(x), finite_number(y)) for x, y in pairs]
    return [(x, y) for x, y in numbers if x is not None and y is not None]


def _picture(figure: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # For reproducible files.
    with rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()
