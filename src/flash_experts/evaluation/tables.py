"""Results as text for a terminal, and the rows that the HTML report shows as well."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from flash_experts.evaluation.compare import ComparisonResult
from flash_experts.evaluation.evaluate import EvaluationResult, NamesResult
from flash_experts.evaluation.metrics import Estimate
from flash_experts.evaluation.novelty import NameFigures

MISSING = "-"
_FEWEST = 20  # names of a group: the bits of fewer say nothing


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_text(self, width: int = 120) -> str:
        """Drawn by rich where it is installed, otherwise aligned with spaces."""
        if find_spec("rich") is None:
            return self._plain()
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD)
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*map(Text, row))
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()

    def _plain(self) -> str:
        columns = list(zip(self.header, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [self.title] if self.title else []
        for row in (self.header, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        return "\n".join(lines)


def _bits(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def _percent(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else f"{100 * estimate.value:.1f}%"


def bits_table(results: Sequence[EvaluationResult]) -> Table:
    """Bits per character of each model on each held-out set."""
    rows = []
    for result in results:
        for split, figures in result.splits.items():
            rows.append(
                (
                    result.label,
                    split,
                    _bits(figures.unconditional),
                    _bits(figures.conditional),
                    _bits(figures.shuffled),
                    _bits(figures.control),
                )
            )
    header = ("model", "held-out", "bits/char", "given attributes", "shuffled attributes", "control")
    return Table("Bits per character of held-out names (95% interval; less is better)", header, tuple(rows))


def names_table(results: Sequence[EvaluationResult]) -> Table:
    """Novelty and variety of each model's samples, and of real names."""
    rows = [_names_row(result.label, result.samples) for result in results if result.samples is not None]
    if results:
        rows.append(_names_row("real names", results[0].real))
    header: tuple[str, ...] = (
        "samples of",
        "names",
        "real cards",
        "in train",
        "near train",
        "recall ratio",
        "distinct",
    )
    header += ("new words", "letters", "length JS", "words JS")
    return Table("Names drawn at temperature 1, nothing held back", header, tuple(rows))


def _names_row(label: str, figures: NameFigures) -> tuple[str, ...]:
    return (
        label,
        str(figures.names),
        _percent(figures.known),
        _percent(figures.in_train),
        _percent(figures.near_train),
        MISSING if figures.memorized is None else f"{figures.memorized:.1f}",
        f"{100 * figures.distinct:.1f}%",
        f"{100 * figures.words.unseen_share:.1f}%",
        f"{figures.mean_length:.1f}",
        f"{figures.length_divergence:.3f}",
        f"{figures.word_count_divergence:.3f}",
    )


def cost_table(results: Sequence[EvaluationResult]) -> Table:
    """Parameters and speed of each model."""
    rows = tuple(
        (
            result.label,
            f"{result.size.total:,}",
            f"{result.size.active:,}",
            f"{result.scored_per_second:,.0f}",
            MISSING if result.sampled_per_second is None else f"{result.sampled_per_second:,.0f}",
        )
        for result in results
    )
    return Table("Size and speed", ("model", "parameters", "active", "scored names/s", "sampled names/s"), rows)


def group_table(result: EvaluationResult, split: str) -> Table:
    """Bits per character of one model by card type and color, of groups large enough to say something."""
    figures = result.splits[split]
    every = {**figures.by_type, **figures.by_color}
    groups = {name: group for name, group in every.items() if group.names >= _FEWEST}
    rows = tuple((name, str(group.names), _bits(group.bits)) for name, group in groups.items())
    return Table(f"{result.label} on {split}, by type and color", ("cards", "names", "bits/char"), rows)


def difference_table(result: ComparisonResult) -> Table:
    """Which differences are more than chance."""
    rows = []
    for difference in result.differences:
        better = difference.first if difference.bits.value < 0 else difference.second
        shown = f"{difference.bits.value:.3f}" not in ("0.000", "-0.000")  # two loads of one model differ by rounding
        rows.append(
            (
                f"{difference.first} - {difference.second}",
                difference.split,
                "yes" if difference.conditional else "no",
                f"{difference.bits.value:+.3f} [{difference.bits.low:+.3f}, {difference.bits.high:+.3f}]",
                f"{better} is better" if shown and difference.significant else "no difference shown",
            )
        )
    header = ("models", "held-out", "attributes", "bits/char", "at 95%")
    return Table("Differences (paired bootstrap over names)", header, tuple(rows))


def format_evaluation(result: EvaluationResult, width: int = 120) -> str:
    """One model's figures as text."""
    tables = [bits_table([result]), *(group_table(result, split) for split in result.splits)]
    tables += [names_table([result]), cost_table([result])]
    return "\n\n".join(table.to_text(width) for table in tables)


def format_comparison(result: ComparisonResult, width: int = 120) -> str:
    """Several models' figures as text."""
    tables = [bits_table(result.models), names_table(result.models), cost_table(result.models)]
    if result.differences:
        tables.append(difference_table(result))
    return "\n\n".join(table.to_text(width) for table in tables)


def format_names(result: NamesResult, width: int = 120) -> str:
    """The bits of each name of a list, the likeliest first."""
    ordered = sorted(zip(result.bits_of_each, result.names, strict=True))
    rows = tuple((name, f"{bits:.2f}") for bits, name in ordered)
    title = f"{len(result.names)} names: {result.bits} bits per character"
    return Table(title, ("name", "bits/char"), rows).to_text(width)
