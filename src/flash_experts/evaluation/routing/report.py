"""Router report: text for a terminal, and a self-contained HTML page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from flash_experts.evaluation.report import load_template
from flash_experts.evaluation.routing.maps import BlockMetrics, NameMap, RouterMap
from flash_experts.evaluation.routing.specialization import Specialization
from flash_experts.evaluation.tables import MISSING, Table

_GATES_SHOWN = 3  # experts of a token for which a cell has room for gates
_METRICS = {
    "load_cv": "load: deviation / mean",
    "max_load": "load: largest / mean",
    "load_entropy": "load: entropy",
    "entropy": "router: entropy",
    "top1": "best expert's probability",
    "max_pair": "pairs: largest / mean",
    "pair_entropy": "pairs: entropy",
    "drop_rate": "would be dropped in training",
    "untaken_rate": "taken by no expert",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A number, its ``shade`` from 0 to 100, the ``mark`` next to it, and ``small`` text below it."""

    text: str
    shade: int
    mark: str = ""
    small: str = ""


@dataclass(frozen=True, slots=True)
class HeatTable:
    """A table of shaded numbers. Of several, the one with the largest ``weight`` is open at first."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class MapCell:
    """Experts of a token in one block; ``split`` is the percentage of the cell with the first one's color."""

    experts: tuple[int, ...]
    gates: str
    split: int


def render_router_report(result: RouterMap) -> str:
    """Renders the page. All text of models, names and tokens is escaped."""
    num_experts: int = result.settings["num_experts"]
    by_label = groupby(result.specializations, key=lambda each: each.title)
    return load_template(__package__, "report").render(
        result=result,
        expert_range=range(num_experts),
        hues=expert_hues(num_experts),
        verdicts=verdicts(result),
        troubles=[(each.block, each.trouble) for each in result.blocks if each.trouble],
        information=_information_table(result.specializations),
        loads=[_load_table(result.blocks, False), _load_table(result.blocks, True)],
        metrics=metrics_table(result.blocks),
        maps=[(each, map_rows(each)) for each in result.maps],
        labels=[(title, _in_order([_share_table(each) for each in group])) for title, group in by_label],
        together=_in_order([_together_table(each) for each in result.blocks]) if result.has_pairs else [],
        training=_training_tables(result),
    )


def format_router(result: RouterMap) -> str:
    """Formats the router metrics for a terminal."""
    lines = [f"{result.model}: {result.names:,} names, {result.tokens:,} tokens"]
    lines += [metrics_table(result.blocks).to_text(), *verdicts(result)]
    lines += [f"block {each.block}: {each.trouble}" for each in result.blocks if each.trouble]
    return "\n".join(lines)


def metrics_table(blocks: Sequence[BlockMetrics]) -> Table:
    """One row per metric and one column per block."""
    names = [name for name in _METRICS if any(name in each.metrics for each in blocks)]
    rows = tuple(
        (_METRICS[name], *(f"{each.metrics[name]:.3f}" if name in each.metrics else MISSING for each in blocks))
        for name in names
    )
    return Table("The routers", ("block", *(str(each.block) for each in blocks)), rows)


def verdicts(result: RouterMap) -> list[str]:
    """One sentence per label: whether experts specialize in it."""
    sentences = []
    for title, group in groupby(result.specializations, key=lambda each: each.title):
        each = list(group)
        real = [one for one in each if one.is_specialized]
        if not real:
            sentences.append(f"{title}: no more than chance gives, in any of {len(each)} blocks.")
            continue
        best = max(real, key=lambda one: one.information - one.shuffled)
        where = "every block" if len(real) == len(each) else f"{len(real)} of {len(each)} blocks"
        sentences.append(
            f"{title}: more than chance in {where}, most in block {best.block}: the expert has "
            f"{best.information:.3f} bits of information on it, where shuffled labels give {best.shuffled:.3f}."
        )
    for title in result.left_out_labels:
        sentences.append(f"{title}: too few tokens for a test (two groups with enough tokens are needed).")
    return sentences


def _shade(value: float, highest: float) -> int:
    return round(100 * min(1.0, max(0.0, value / highest))) if highest > 0 else 0


def _in_order(tables: Sequence[HeatTable]) -> list[tuple[HeatTable, bool]]:
    heaviest = max(range(len(tables)), key=lambda index: tables[index].weight, default=0)
    return [(table, index == heaviest) for index, table in enumerate(tables)]


def _information_table(found: Sequence[Specialization]) -> HeatTable | None:
    if not found:
        return None
    highest = max(each.information for each in found)
    rows = []
    for title, group in groupby(found, key=lambda each: each.title):
        cells = tuple(
            Cell(
                f"{each.information:.3f}",
                _shade(each.information, highest) if each.is_specialized else 0,
                "✓" if each.is_specialized else "",
                f"chance {each.shuffled:.3f}",
            )
            for each in group
        )
        rows.append((title, cells))
    blocks = list(dict.fromkeys(each.block for each in found))
    return HeatTable("Mutual information of expert and label, in bits", "label", _blocks(blocks), tuple(rows))


def _blocks(blocks: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"block {block}" for block in blocks)


def _load_cells(loads: Sequence[float]) -> tuple[Cell, ...]:
    return tuple(Cell(f"{load:.2f}", _shade(load, 3.0)) for load in loads)


def _load_table(blocks: Sequence[BlockMetrics], of_names: bool) -> HeatTable:
    loads = [each.load_of_names if of_names else each.load for each in blocks]
    what = "tokens of the names only" if of_names else "all input tokens"
    rows = tuple(zip(_blocks([each.block for each in blocks]), map(_load_cells, loads), strict=True))
    return HeatTable(f"Load over the mean, {what}", "expert", _numbers(len(loads[0])), rows)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _share_table(found: Specialization) -> HeatTable:
    highest = max(max(row) for row in found.share)
    rows = []
    for group, tokens, share, marks in zip(found.groups, found.tokens, found.share, found.marks, strict=True):
        cells = tuple(
            Cell(f"{100 * value:.0f}", _shade(value, highest), {1: "▲", 0: "", -1: "▽"}[mark])
            for value, mark in zip(share, marks, strict=True)
        )
        rows.append((f"{group} ({tokens:,})", cells))
    verdict = "more than chance" if found.is_specialized else "no more than chance gives"
    title = (
        f"Block {found.block}: {found.information:.3f} bits, shuffled {found.shuffled:.3f} "
        f"(95%: {found.shuffled_high:.3f}), p {found.p_value:.3f}: {verdict}"
    )
    columns = _numbers(len(found.share[0]))
    return HeatTable(
        title, f"{found.title} (tokens), by expert", columns, tuple(rows), found.information - found.shuffled
    )


def _together_table(block: BlockMetrics) -> HeatTable:
    others = [share for i, row in enumerate(block.together) for j, share in enumerate(row) if i != j]
    rows = []
    for expert, row in enumerate(block.together):
        cells = tuple(
            Cell("·", 0) if other == expert else Cell(f"{100 * share:.0f}", _shade(share, max(others)))
            for other, share in enumerate(row)
        )
        rows.append((str(expert), cells))
    weight = block.metrics.get("max_pair", 0.0)
    title = f"Block {block.block}: percent of the row's tokens that go to the column's expert too"
    return HeatTable(title, "expert", _numbers(len(block.together)), tuple(rows), weight)


def _training_tables(result: RouterMap) -> list[tuple[HeatTable, bool]]:
    if result.training is None:
        return []
    steps = tuple(f"step {step:,}" for step in result.training.steps)
    tables = []
    for block, loads in result.training.loads.items():
        rows = tuple((str(expert), _load_cells(series)) for expert, series in enumerate(zip(*loads, strict=True)))
        largest = max(max(row) for row in loads)
        tables.append(HeatTable(f"Block {block}: load over the mean", "expert", steps, rows, largest))
    return _in_order(tables)


def expert_hues(num_experts: int) -> list[int]:
    """Evenly spaced hues of the experts, in degrees."""
    return [round(20 + 360 * expert / num_experts) for expert in range(num_experts)]


def map_rows(found: NameMap) -> list[tuple[str, list[MapCell]]]:
    """One row of cells per block."""
    return [(f"block {block}", list(map(_map_cell, of_tokens))) for block, of_tokens in found.experts.items()]


def _map_cell(experts: Sequence[tuple[int, float]]) -> MapCell:
    gates = [gate for _, gate in experts]
    total = sum(gates[:2])
    return MapCell(
        experts=tuple(expert for expert, _ in experts),
        gates=" ".join(f"{100 * gate:.0f}" for gate in gates) if len(gates) <= _GATES_SHOWN else "",
        split=round(100 * gates[0] / total) if total > 0 else 100,
    )
