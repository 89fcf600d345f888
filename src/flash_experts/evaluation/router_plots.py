"""The tables of `flash_experts.evaluation.router_report` as PNG pictures, for slides and papers. Needs matplotlib."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flash_experts.evaluation.router_maps import NameMap, RouterMap
from flash_experts.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = 6  # in the picture of tokens
_DPI = 150


def write_plots(result: RouterMap, folder: str | Path) -> list[Path]:
    """Draws load, labels, pairs, tokens and training, each to a PNG.

    Returns:
        The files, in that order; without what there is nothing to draw of.

    Raises:
        ValueError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib, or leave --png out") from error
    figures: dict[str, Figure] = {"load": _plot_load(result)}
    for title, group in groupby(result.specializations, key=lambda each: each.title):
        panels = [
            (
                f"block {each.block}, {each.information:.3f} bits (chance {each.shuffled:.3f})",
                100 * np.array(each.share),
                each.groups,
            )
            for each in group
        ]
        figures[title.replace(" ", "_")] = _heatmaps(panels, "percent of the row")
    if result.has_pairs:
        panels = []
        for each in result.blocks:
            together = 100 * np.array(each.together)
            np.fill_diagonal(together, np.nan)
            panels.append((f"block {each.block}", together, tuple(map(str, range(len(together))))))
        figures["together"] = _heatmaps(panels, "percent of the row")
    if result.maps:
        figures["tokens"] = _plot_tokens(result.maps[:_NAMES], result.settings["num_experts"])
    if result.training is not None:
        figures["training"] = _plot_training(result)
    written = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            written.append(Path(folder) / f"{name}.png")
            with whole_file(written[-1]) as temporary:
                figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})
    except OSError as error:
        raise ValueError(f"cannot write pictures to {folder}: {error.strerror}") from error
    return written


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _text(label: str) -> str:
    """A label that matplotlib shows as it is, where a pair of dollars would be mathematics."""
    return label.replace("$", r"\$")


def _plot_load(result: RouterMap) -> Figure:
    figure = _figure(2.6 * len(result.blocks) + 0.6, 2.8)
    for column, block in enumerate(result.blocks):
        axes = figure.add_subplot(1, len(result.blocks), column + 1)
        axes.bar(range(len(block.load)), block.load, color="#c06c1e")
        axes.axhline(1.0, color="#444444", linestyle="--", linewidth=1)
        axes.set_title(f"block {block.block}")
        axes.set_xlabel("expert")
    figure.axes[0].set_ylabel("load over the mean")
    return figure


def _heatmaps(panels: list[tuple[str, npt.NDArray[np.float64], tuple[str, ...]]], unit: str) -> Figure:
    """Tables side by side under one color scale."""
    rows, columns = panels[0][1].shape
    width = 1.4 + 0.42 * columns
    figure = _figure(width * len(panels) + 1.2, 1.3 + 0.36 * rows)
    highest = max(float(np.nanmax(table)) for _, table, _ in panels)
    image: Any = None
    for index, (title, table, labels) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        image = axes.imshow(table, cmap="Oranges", vmin=0, vmax=highest, aspect="auto")
        axes.set_title(_text(title), fontsize="small")
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows), [_text(label) for label in labels] if index == 0 else [""] * rows)
        axes.set_xlabel("expert")
        for (row, column), value in np.ndenumerate(table):
            if columns <= 16 and np.isfinite(value):
                color = "white" if value > 0.65 * highest else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=figure.axes, label=unit, fraction=0.03)
    return figure


def _plot_tokens(maps: tuple[NameMap, ...], num_experts: int) -> Figure:
    from matplotlib import colormaps

    longest = max(len(each.tokens) for each in maps)
    figure = _figure(1.5 + 0.75 * longest, sum(0.9 + 0.3 * len(each.experts) for each in maps))
    heights = [0.9 + 0.3 * len(each.experts) for each in maps]
    grid = figure.add_gridspec(len(maps), 1, height_ratios=heights)
    for index, each in enumerate(maps):
        _draw_name(figure.add_subplot(grid[index, 0]), each, longest, colormaps["hsv"], num_experts)
    return figure


def _draw_name(axes: Axes, found: NameMap, longest: int, colors: Any, num_experts: int) -> None:
    """Rows of blocks, columns of tokens: the color of the first expert, the numbers of all."""
    blocks = list(found.experts)
    for row, block in enumerate(blocks):
        for column, experts in enumerate(found.experts[block]):
            color = (*colors(experts[0][0] / num_experts)[:3], 0.35) if experts else (1, 1, 1, 1)
            axes.add_patch(_rectangle(column, row, color))
            numbers = " ".join(str(expert) for expert, _ in experts) or "–"
            axes.text(column + 0.5, row + 0.5, numbers, ha="center", va="center", fontsize=7)
    axes.set_xlim(0, longest)
    axes.set_ylim(len(blocks), 0)
    axes.set_xticks([at + 0.5 for at in range(len(found.tokens))], [_text(token) for token in found.tokens], fontsize=7)
    axes.set_yticks([at + 0.5 for at in range(len(blocks))], [f"block {block}" for block in blocks], fontsize=7)
    axes.tick_params(length=0)
    axes.set_title(_text(found.name), fontsize="small", loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


def _rectangle(column: int, row: int, color: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), 0.96, 0.92, facecolor=color, edgecolor="none")


def _plot_training(result: RouterMap) -> Figure:
    assert result.training is not None
    loads = result.training.loads
    figure = _figure(3.4 * len(loads) + 0.6, 2.9)
    markers = "osv^<>DPX*"
    for column, (block, series) in enumerate(loads.items()):
        axes = figure.add_subplot(1, len(loads), column + 1)
        for expert, load in enumerate(zip(*series, strict=True)):
            marker = markers[expert % len(markers)]
            axes.plot(result.training.steps, load, marker=marker, markersize=3, linewidth=1, label=str(expert))
        axes.set_title(f"block {block}")
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("load over the mean")
    if result.settings["num_experts"] <= 16:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, title="expert", fontsize="x-small", loc="outside right upper")
    return figure
