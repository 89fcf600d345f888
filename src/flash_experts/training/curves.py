"""The curves of runs from their metrics.jsonl: as numbers, and drawn side by side."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_experts.files import whole_file
from flash_experts.training.tracking import METRICS_FILE
from flash_experts.training.validation import BITS_PER_CHAR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
Points = list[tuple[float, float]]
PICTURES = (".png", ".svg", ".pdf")
_MOST_BYTES = 2**30
FORMATS = (*PICTURES, ".html", ".json")


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    Attributes:
        name: key in the JSON.
        title: what is drawn.
        event: which lines of metrics.jsonl have it: train or validation.
        x: their field that goes to the right: step, tokens or seconds.
        value: what is drawn of a line; None for a line without it.
    """

    name: str
    title: str
    event: str
    x: str
    value: Callable[[Line], float | None]


def finite_number(value: Any) -> Any:
    """A value of a line as it is, if a float can hold it and it is finite; else None. Runs can be untrusted."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None


def load_imbalance(line: Line) -> float | None:
    """Mean over the MoE layers of the standard deviation of the experts' loads over their mean; 0 is balanced."""
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
    """The points of each panel for each run, by the run's name (its path, where two names are equal).

    Args:
        runs: folders that ``train`` wrote, or metrics.jsonl files.

    Raises:
        ValueError: there is no metrics.jsonl, or a line of it is damaged.
    """
    paths = [path / METRICS_FILE if path.is_dir() else path for path in map(Path, runs)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run is given twice: name each once")
    names = [path.parent.resolve().name if path.name == METRICS_FILE else path.stem for path in paths]
    curves = {}
    for path, name in zip(paths, names, strict=True):
        lines = _read(path)
        curves[name if names.count(name) == 1 else str(path.parent)] = {
            panel.name: _points(lines, panel) for panel in PANELS
        }
    return curves


def write_curves(curves: Mapping[str, Mapping[str, Points]], out: Path) -> None:
    """Writes a picture, a page that needs nothing else, or JSON, by the ending of ``out``; whole or not at all.

    Raises:
        ValueError: the ending is none of `FORMATS`, or matplotlib is missing and it needs it.
        OSError: the file cannot be written.
    """
    check_format(out)
    if out.suffix == ".json":
        content = (json.dumps(curves, indent=2, ensure_ascii=False) + "\n").encode()
    elif out.suffix == ".html":
        content = _page(curves).encode()
    else:
        content = _picture(draw(curves), out.suffix[1:])
    with whole_file(out) as path:
        path.write_bytes(content)


def check_format(out: Path) -> None:
    """Whether a file of this ending can be written.

    Raises:
        ValueError: it cannot.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"{out} ends in none of {', '.join(FORMATS)}: the ending says what is written")
    if out.suffix != ".json" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install matplotlib, or give --out curves.json for the numbers")


def draw(curves: Mapping[str, Mapping[str, Points]]) -> Figure:
    """A figure of all panels, one line a run in each. Panels that no run has points for are left out."""
    from matplotlib.figure import Figure  # not pyplot: it keeps global state and may look for a display

    panels = [panel for panel in PANELS if any(points[panel.name] for points in curves.values())]
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 0.8 + 3.1 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, points in curves.items():
            own = points[panel.name]
            axes.plot([x for x, _ in own], [y for _, y in own], label=label.replace("$", r"\$"), linewidth=1.2)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel(_AXES[panel.x])
        axes.grid(alpha=0.3)
    if panels:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _read(path: Path) -> list[Line]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: give the folder of a run that `flash-experts train` wrote")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES:,} bytes: that is no metrics.jsonl of a run")
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no metrics.jsonl of a run: it is not UTF-8 text") from error
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["event"], line["step"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(texts) and lines:
                break  # a run that is being written, or was killed
            raise ValueError(f"{path}:{number} is no line of metrics: {error}") from error
        lines.append(line)
    return lines


def _points(lines: Sequence[Line], panel: Panel) -> Points:
    pairs = [(line.get(panel.x), panel.value(line)) for line in lines if line["event"] == panel.event]
    numbers = [(finite_number(x), finite_number(y)) for x, y in pairs]
    return [(x, y) for x, y in numbers if x is not None and y is not None]


def _picture(figure: Figure, kind: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # The same curves give the same file.
    with rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _page(curves: Mapping[str, Mapping[str, Points]]) -> str:
    svg = _picture(draw(curves), "svg").decode()
    data = json.dumps(curves).replace("</", "<\\/")
    title = html.escape(", ".join(curves))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>\n'
        f'{svg[svg.index("<svg") :]}\n<script type="application/json" id="curves">{data}</script>\n</body></html>\n'
    )
