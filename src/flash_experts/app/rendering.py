"""Names and inspections as pieces of HTML. Every text is escaped here: nothing else puts text on the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import escape

from flash_experts.app.inspecting import Inspection
from flash_experts.app.service import Progress, Row
from flash_experts.evaluation.report import load_template
from flash_experts.evaluation.router_report import expert_hues, map_rows


def names_table(rows: Sequence[Row], caption: str, lockable: bool = True) -> str:
    """The table of names; "" without any."""
    if not rows:
        return ""
    return load_template(__package__, "names").render(rows=rows, caption=caption, lockable=lockable)


def inspection_panel(found: Inspection, model: str, block: int, head: int | None) -> str:
    """What was found of a name.

    Args:
        found: of the name.
        model: its name.
        block: of the attention to show.
        head: of it; the mean of all if None.

    Raises:
        ValueError: there is no such block or head.
    """
    if not 0 <= block < len(found.attention):
        raise ValueError(f"no block {block}: the model has {len(found.attention)}")
    weights_HTT = found.attention[block]
    if head is not None and not 0 <= head < len(weights_HTT):
        raise ValueError(f"no head {head}: the block has {len(weights_HTT)}")
    weights_TT = weights_HTT.mean(0) if head is None else weights_HTT[head]
    return load_template(__package__, "inspection").render(
        found=found,
        model=model,
        block=block,
        head=head,
        rows=[] if found.experts is None else _expert_rows(found),
        weights=np.rint(100 * weights_TT).astype(int).tolist(),
        percent=percent,
    )


def status(progress: Progress) -> str:
    """One line on how far a request has come."""
    count = len(progress.rows)
    counted = f"{count} of {progress.wanted} names" if count < progress.wanted else f"{count} names"
    parts = [counted, f"{progress.seconds:.1f} s", f"seed {progress.seed}", progress.note]
    return note(" · ".join(filter(None, parts)))


def note(message: str) -> str:
    """One line on how things stand."""
    return f'<p class="fe-status" role="status">{escape(message)}</p>'


def failure(message: str) -> str:
    """One line on what went wrong."""
    return f'<p class="fe-status fe-failure" role="alert">{escape(message)}</p>'


def percent(share: float) -> str:
    """Such as "42%", and "<1%" where nothing would be left of it."""
    return "<1%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


def _expert_rows(found: Inspection) -> list[tuple[str, list[dict[str, object]]]]:
    assert found.experts is not None
    colors = [f"oklch(var(--fe-lightness) .1 {hue})" for hue in expert_hues(found.num_experts)]
    _, rows = map_rows(found.experts)
    drawn = []
    for (title, cells), experts in zip(rows, found.experts.experts.values(), strict=True):
        drawn.append((title, [
            {
                "experts": cell.experts,
                "gates": cell.gates,
                "split": cell.split,
                "first": colors[pairs[0][0]] if pairs else "transparent",
                "second": colors[pairs[min(1, len(pairs) - 1)][0]] if pairs else "transparent",
            }
            for cell, pairs in zip(cells, experts, strict=True)
        ]))  # fmt: skip
    return drawn
