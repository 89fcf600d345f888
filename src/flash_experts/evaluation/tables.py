"""Results as text for a terminal, and the rows that the HTML report shows as well."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from flash_experts.evaluation.compare import ComparisonResult, Difference
from flash_experts.evaluation.control import Recognition
from flash_experts.evaluation.evaluate import EvaluationResult
from flash_experts.evaluation.metrics import Estimate
from flash_experts.evaluation.name_lists import NamesResult
from flash_experts.evaluation.novelty import NameFigures
from flash_experts.plain_text import one_line

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

        table = RichTable(title=Text(one_line(self.title)), title_justify="left", box=SIMPLE_HEAD)
        for index, name in enumerate(map(one_line, self.header)):
            table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()

    def _plain(self) -> str:
        table = [tuple(map(one_line, row)) for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [one_line(self.title)] if self.title else []
        for row in table:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        return "\n".join(lines)


def _bits(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def _percent(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else f"{100 * estimate.value:.1f}%"


def bits_table(results: Sequence[EvaluationResult], differences: Sequence[Difference] = ()) -> Table:
    """Bits per character of each model on each held-out set.

    Args:
        results: of each model.
        differences: of each pair. With them a star marks the best, and each model not shown to be worse.
    """
    beaten = {
        (difference.split, difference.conditional, difference.second if difference.bits.value < 0 else difference.first)
        for difference in differences
        if difference.significant
    }
    splits = list(results[0].splits) if results else []
    rows = []
    for split in splits:
        for result in results:
            figures = result.splits[split]
            stars = [
                " *" if len(results) > 1 and (split, told, result.label) not in beaten else "" for told in (False, True)
            ]
            rows.append(
                (
                    result.label,
                    split,
                    _bits(figures.unconditional) + stars[0],
                    _bits(figures.conditional) + stars[1],
                    _bits(figures.shuffled),
                    _bits(figures.control),
                )
            )
    header = ("model", "held-out", "bits/char", "given attributes", "another card's", "control")
    title = "Bits per character of held-out names (95% interval; less is better)"
    return Table(f"{title}; * no other model is shown to be better" if differences else title, header, tuple(rows))


def association_table(results: Sequence[EvaluationResult]) -> Table:
    """How well each model knows which words go together."""
    rows = [
        (result.label, split, f"{figures.association:+.2f}")
        for split in (results[0].splits if results else ())
        for result in results
        if (figures := result.splits[split]).association is not None
    ]
    title = "Word association: bits that the first word of a two-word name saves on the second (95% interval)"
    return Table(f"{title}; more is better", ("model", "held-out", "bits a name"), tuple(rows))


def novelty_table(results: Sequence[EvaluationResult]) -> Table:
    """How many of each model's samples, and of real names, are or resemble cards that exist."""
    header = ("samples of", "names", "real cards", "near a card", "in train", "in test_iid", "hit ratio")
    rows = [
        (label, f"{figures.names:,}", _percent(figures.known), _percent(figures.near_known), *_memorization(figures))
        for label, figures in _names_of_all(results)
    ]
    return Table("Novelty of names drawn at temperature 1, nothing held back", header, tuple(rows))


def _memorization(figures: NameFigures) -> tuple[str, ...]:
    found = figures.memorization
    if found is None:
        return (MISSING,) * 3
    ratio = MISSING if found.ratio is None else f"{found.ratio:.1f}"
    return f"{found.train_hits:,}", f"{found.held_out_hits:,}", ratio


def variety_table(results: Sequence[EvaluationResult]) -> Table:
    """How varied each model's samples are, and how like real names in length."""
    header: tuple[str, ...] = ("samples of", "distinct", "in 10,000", "words in 10,000", "new words", "letters")
    header += ("length JS", "words JS")
    rows = [
        (
            label,
            f"{100 * figures.distinct:.1f}%",
            _count(figures.distinct_names),
            _count(figures.distinct_words),
            f"{100 * figures.words.unseen_share:.1f}%",
            f"{figures.mean_length:.1f}",
            f"{figures.length_divergence:.3f}",
            f"{figures.word_count_divergence:.3f}",
        )
        for label, figures in _names_of_all(results)
    ]
    return Table("Variety of the same names", header, tuple(rows))


def _names_of_all(results: Sequence[EvaluationResult]) -> list[tuple[str, NameFigures]]:
    found = [(result.label, result.samples) for result in results if result.samples is not None]
    return [*found, ("real names", results[0].real)] if results else []


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def detection_table(results: Sequence[EvaluationResult]) -> Table:
    """Whether each model's names are told from real ones, and real ones from each other."""
    rows = []
    found = [(result.label, result.detection) for result in results if result.detection is not None]
    pairs = [(label, detection.generated) for label, detection in found]
    if found:
        pairs.append(("real names, two halves", found[0][1].real))
    for label, separation in pairs:
        rows.append((label, f"{separation.names:,}", f"{separation.weak:.3f}", f"{separation.strong:.3f}"))
    header = ("names of", "of each side", "weak: char n-grams", "strong: boosting")
    return Table("Real or generated: AUC of two classifiers (95% interval; 0.5 cannot tell)", header, tuple(rows))


def control_table(results: Sequence[EvaluationResult]) -> Table:
    """How often what was asked for is recognized from names alone."""
    rows = []
    tasks = next((result.control for result in results if result.control), ())
    for index, task in enumerate(tasks):
        for result in results:
            if result.control:
                found = result.control[index]
                rows.append((task.task, result.label, "the whole card", *_recognized(found.model)))
                rows.append((task.task, result.label, "this alone", *_recognized(found.alone)))
        rows.append((task.task, "real names", f"(commonest: {100 * task.majority:.0f}%)", *_recognized(task.real)))
    header = ("asked for", "names of", "told", "names", "recognized, classes alike", "as classes are")
    return Table("Control: a classifier of char n-grams reads what was asked for (95% interval)", header, tuple(rows))


def _recognized(found: Recognition) -> tuple[str, ...]:
    return f"{found.names:,}", _percent_interval(found.balanced), _percent_interval(found.plain)


def _percent_interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def cost_table(results: Sequence[EvaluationResult]) -> Table:
    """Parameters, memory, speed and training of each model."""
    rows = []
    for result in results:
        costs = result.costs
        rows.append(
            (
                result.label,
                f"{result.size.total:,}",
                f"{result.size.active:,}",
                f"{costs.memory_bytes / 1e6:,.1f}",
                MISSING if costs.disk_bytes is None else f"{costs.disk_bytes / 1e6:,.1f}",
                f"{result.scored_per_second:,.0f}",
                _count(result.sampled_per_second),
                _count(costs.training_tokens),
                MISSING if costs.training_flops is None else f"{costs.training_flops:.1e}",
                MISSING if costs.training_seconds is None else f"{costs.training_seconds / 60:,.1f}",
            )
        )
    header: tuple[str, ...] = ("model", "parameters", "active", "MB", "on disk", "scored/s", "sampled/s")
    header += ("trained on", "FLOPs", "minutes")
    title = "Size, speed (names a second) and training (tokens, operations, minutes)"
    return Table(title, header, tuple(rows))


def group_table(result: EvaluationResult, split: str) -> Table:
    """Bits per character of one model by card type and color, of groups large enough to say something."""
    figures = result.splits[split]
    every = {**figures.by_type, **figures.by_color}
    groups = {name: group for name, group in every.items() if group.names >= _FEWEST}
    rows = tuple(
        (name, str(group.names), _bits(group.bits), _bits(group.conditional)) for name, group in groups.items()
    )
    header = ("cards", "names", "bits/char", "given attributes")
    return Table(f"{result.label} on {split}, by type and color", header, rows)


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
                f"{difference.bits:+.3f}",
                f"{better} is better" if shown and difference.significant else "no difference shown",
            )
        )
    header = ("models", "held-out", "attributes", "bits/char", "at 95%")
    return Table("Differences (paired bootstrap over names)", header, tuple(rows))


def format_evaluation(result: EvaluationResult, width: int = 120) -> str:
    """One model's figures as text."""
    tables = [bits_table([result]), *(group_table(result, split) for split in result.splits)]
    return _text([*tables, *_common_tables([result])], width)


def format_comparison(result: ComparisonResult, width: int = 120) -> str:
    """Several models' figures as text."""
    return _text(
        [bits_table(result.models, result.differences), *_common_tables(result.models), difference_table(result)], width
    )


def _common_tables(results: Sequence[EvaluationResult]) -> list[Table]:
    return [
        association_table(results),
        novelty_table(results),
        variety_table(results),
        detection_table(results),
        control_table(results),
        cost_table(results),
    ]


def _text(tables: Sequence[Table], width: int) -> str:
    return "\n\n".join(table.to_text(width) for table in tables if table.rows)


def format_names(result: NamesResult, width: int = 120) -> str:
    """The bits of each name of a list, the likeliest first."""
    ordered = sorted(zip(result.bits_of_each, result.names, strict=True))
    rows = tuple((name, f"{bits:.2f}") for bits, name in ordered)
    title = f"{len(result.names)} names: {result.bits} bits per character"
    return Table(title, ("name", "bits/char"), rows).to_text(width)
