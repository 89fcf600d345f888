"""Result tables, for the terminal and for the HTML report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from flash_experts.evaluation.classifiers import Recognition
from flash_experts.evaluation.compare import ComparisonResult, Difference
from flash_experts.evaluation.evaluate import EvaluationResult, NamesResult
from flash_experts.evaluation.held_out import NameMetrics
from flash_experts.evaluation.lists import ListMetrics
from flash_experts.evaluation.metrics import SINCE_2025, UNTIL_2024, Estimate, GroupBits
from flash_experts.terminal import one_line

MISSING = "-"
_FEWEST = 20  # names of a group, at least


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; the first column is left-aligned, the others right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_text(self, width: int = 120) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(one_line(self.title)), title_justify="left", box=SIMPLE_HEAD)
        for index, name in enumerate(map(one_line, self.header)):
            table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        console = Console(file=io.StringIO(), width=width, color_system=None)  # also where FORCE_COLOR is set
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()


def _bits(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def _percent(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else f"{100 * estimate.value:.1f}%"


def bits_table(results: Sequence[EvaluationResult], differences: Sequence[Difference] = ()) -> Table:
    """Bits per character; with ``differences``, a star marks models that are not significantly worse than another."""
    beaten = {
        (difference.split, difference.conditional, difference.second if difference.bits.value < 0 else difference.first)
        for difference in differences
        if difference.significant
    }
    splits = list(results[0].splits) if results else []
    rows = []
    for split in splits:
        for result in results:
            metrics = result.splits[split]
            stars = [
                " *" if len(results) > 1 and (split, given, result.label) not in beaten else ""
                for given in (False, True)
            ]
            marked = [_bits(metrics.unconditional) + stars[0], _bits(metrics.conditional) + stars[1]]
            rows.append((result.label, split, *marked, _bits(metrics.shuffled), _bits(metrics.control)))
    header = ("model", "held-out", "bits/char", "given attributes", "another card's", "control")
    title = "Bits per character of held-out names (95% interval; lower is better)"
    return Table(f"{title}; * no other model is shown to be better" if differences else title, header, tuple(rows))


def association_table(results: Sequence[EvaluationResult]) -> Table:
    rows = [
        (result.label, split, f"{metrics.association:+.2f}")
        for split in (results[0].splits if results else ())
        for result in results
        if (metrics := result.splits[split]).association is not None
    ]
    title = "Word association: bits that the first word of a two-word name saves on the second (95% interval)"
    return Table(f"{title}; more is better", ("model", "held-out", "bits a name"), tuple(rows))


def novelty_table(results: Sequence[EvaluationResult]) -> Table:
    header = ("samples of", "names", "real cards", "near a card", "in train", "in test_iid", "hit ratio")
    rows = [
        (label, f"{metrics.names:,}", _percent(metrics.known), _percent(metrics.near_known), *_memorization(metrics))
        for label, metrics in _names_of_all(results)
    ]
    return Table("Novelty of names sampled at temperature 1, without filters", header, tuple(rows))


def _memorization(metrics: NameMetrics) -> tuple[str, ...]:
    found = metrics.memorization
    if found is None:
        return (MISSING,) * 3
    ratio = MISSING if found.ratio is None else f"{found.ratio:.1f}"
    return f"{found.train_hits:,}", f"{found.held_out_hits:,}", ratio


def variety_table(results: Sequence[EvaluationResult]) -> Table:
    header: tuple[str, ...] = ("samples of", "distinct", "in 10,000", "words in 10,000", "new words", "characters")
    header += ("length JS", "words JS")
    rows = [
        (
            label,
            f"{100 * metrics.distinct:.1f}%",
            _count(metrics.distinct_names),
            _count(metrics.distinct_words),
            f"{100 * metrics.words.unseen_share:.1f}%",
            f"{metrics.mean_length:.1f}",
            f"{metrics.length_divergence:.3f}",
            f"{metrics.word_count_divergence:.3f}",
        )
        for label, metrics in _names_of_all(results)
    ]
    return Table("Diversity of the same names", header, tuple(rows))


def _names_of_all(results: Sequence[EvaluationResult]) -> list[tuple[str, NameMetrics]]:
    found = [(result.label, result.samples) for result in results if result.samples is not None]
    return [*found, ("real names", results[0].real)] if results else []


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def detection_table(results: Sequence[EvaluationResult]) -> Table:
    """The AUC of generated against real names, and of real names against each other."""
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
    rows = []
    tasks = next((result.control for result in results if result.control), ())
    for index, task in enumerate(tasks):
        for result in results:
            if result.control:
                found = result.control[index]
                rows.append((task.task, result.label, "all attributes", *_recognized(found.model)))
                rows.append((task.task, result.label, "this only", *_recognized(found.alone)))
        rows.append((task.task, "real names", f"(most common: {100 * task.majority:.0f}%)", *_recognized(task.real)))
    header = ("attribute", "names of", "given", "names", "balanced accuracy", "accuracy")
    title = "Control: accuracy of attribute classifiers on char n-grams of the names (95% interval)"
    return Table(title, header, tuple(rows))


def _recognized(found: Recognition) -> tuple[str, ...]:
    return f"{found.names:,}", _percent_interval(found.balanced), _percent_interval(found.plain)


def _percent_interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def cost_table(results: Sequence[EvaluationResult]) -> Table:
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
    title = "Size, speed (names per second) and training (tokens, FLOPs at most, minutes)"
    return Table(title, header, tuple(rows))


def group_table(result: EvaluationResult, split: str) -> Table:
    """Bits per character by card type and color, for groups of at least 20 names."""
    metrics = result.splits[split]
    every = {**metrics.by_type, **metrics.by_color}
    groups = {name: group for name, group in every.items() if group.names >= _FEWEST}
    rows = tuple((name, str(each.names), _bits(each.bits), _bits(each.conditional)) for name, each in groups.items())
    header = ("cards", "names", "bits/char", "given attributes")
    return Table(f"{result.label} on {split}, by type and color", header, rows)


def year_table(results: Sequence[EvaluationResult]) -> Table:
    """Bits of cards that pretraining data may contain, and of cards printed since."""
    rows = [
        (
            result.label,
            split,
            *(value for group in (metrics.by_year[UNTIL_2024], metrics.by_year[SINCE_2025]) for value in _group(group)),
        )
        for result in results
        for split, metrics in result.splits.items()
        if metrics.by_year.keys() == {UNTIL_2024, SINCE_2025}
    ]
    header: tuple[str, ...] = ("model", "held-out", UNTIL_2024, "bits/char", "given attributes")
    header += (SINCE_2025, "bits/char", "given attributes")
    return Table("Contamination: names of cards first printed until 2024 and since 2025", header, tuple(rows))


def _group(group: GroupBits) -> tuple[str, str, str]:
    return str(group.names), _bits(group.bits), _bits(group.conditional)


def difference_table(result: ComparisonResult) -> Table:
    rows = []
    for difference in result.differences:
        better = difference.first if difference.bits.value < 0 else difference.second
        shown = f"{difference.bits.value:.3f}" not in ("0.000", "-0.000")  # two copies of one model differ by rounding
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
    """Formats the metrics of one model as text."""
    tables = [bits_table([result]), *(group_table(result, split) for split in result.splits)]
    return _text([*tables, *_common_tables([result])], width)


def format_comparison(result: ComparisonResult, width: int = 120) -> str:
    """Formats the metrics of several models as text."""
    first = bits_table(result.models, result.differences)
    return _text([first, *_common_tables(result.models), difference_table(result)], width)


def format_lists(results: Sequence[ListMetrics], width: int = 120) -> str:
    """Formats the metrics of lists: one row for the real names and each quality."""
    tasks = list(results[0].recognized)
    rows = []
    for one in results:
        strong = MISSING if one.separation is None else f"{one.separation.strong.value:.2f}"
        rows.append((
            one.label,
            *(_percent(one.recognized.get(task)) for task in tasks),
            strong,
            *(f"{100 * value:.0f}%" for value in (one.distinct_words, one.distinct_heads)),
            _percent(one.unknown_words),
            _percent(one.near_known),
            MISSING if one.per_second is None else f"{one.per_second:.0f}",
        ))  # fmt: skip
    header = ("lists", *tasks, "AUC", "words", "last words", "unknown", "near a card", "names/s")
    title = "Lists of names: attributes recognized, distinct words, names with an unknown word"
    return Table(title, header, tuple(rows)).to_text(width)


def _common_tables(results: Sequence[EvaluationResult]) -> list[Table]:
    return [
        association_table(results),
        year_table(results),
        novelty_table(results),
        variety_table(results),
        detection_table(results),
        control_table(results),
        cost_table(results),
    ]


def _text(tables: Sequence[Table], width: int) -> str:
    return "\n\n".join(table.to_text(width) for table in tables if table.rows)


def format_names(result: NamesResult, width: int = 120) -> str:
    """Formats the bits of each name, the most likely first."""
    ordered = sorted(zip(result.bits_of_each, result.names, strict=True))
    rows = tuple((name, f"{bits:.2f}") for bits, name in ordered)
    found = f"1 name: {result.bits.value:.3f}" if len(rows) == 1 else f"{len(rows)} names: {result.bits}"
    title = f"{found} bits per character"
    return Table(title, ("name", "bits/char"), rows).to_text(width)
