"""Draws docs/images/bits.png from benchmarks/results/bits_2cores.json and teacher_bits.json.

python scripts/result_figure.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from result_tables import SPLITS, load

OUT = Path(__file__).resolve().parent.parent / "docs/images/bits.png"
PROMPTS = (
    ("unconditional", "unconditional", "o", "#2a7fba"),
    ("conditional", "given type, colors, mana value", "s", "#d9730d"),
    ("shuffled", "given those of another card", "x", "#2ca06c"),
)


def main() -> None:
    models: dict[str, dict[str, Any]] = {each["label"]: each["splits"] for each in load("bits_2cores")["models"]}
    models["the teacher, 500 names"] = load("teacher_bits")["splits"]
    labels = list(models)
    figure = Figure(figsize=(11, 0.75 * len(labels) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(SPLITS), sharey=True)
    for axes, split in zip(panels, SPLITS, strict=True):
        for offset, (prompt, label, marker, color) in zip((-0.2, 0.0, 0.2), PROMPTS, strict=True):
            found = [
                (row, models[name][split][prompt]) for row, name in enumerate(labels) if models[name][split][prompt]
            ]
            x = [each["value"] for _, each in found]
            ends = [
                [each["value"] - each["low"] for _, each in found],
                [each["high"] - each["value"] for _, each in found],
            ]
            y = [row + offset for row, _ in found]
            axes.errorbar(x, y, xerr=ends, fmt=marker, color=color, capsize=4, linewidth=1.8, label=label)
        axes.set(title=split, xlabel="bits per character of unseen names (less is better)")
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(PROMPTS), frameon=False)
    figure.savefig(OUT, dpi=110, facecolor="white")
    print(f"{OUT.name} written")


if __name__ == "__main__":
    main()
