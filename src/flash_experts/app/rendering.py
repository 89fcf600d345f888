"""HTML of names and inspections. All text on the page is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from flash_experts.app.service import Inspection, Progress, Row
from flash_experts.app.session import Request
from flash_experts.app.sets import SetProgress, reports
from flash_experts.app.settings import Settings, words_of
from flash_experts.data.cards import COLOR_WORDS, COLORLESS
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.report import load_template
from flash_experts.evaluation.routing.report import expert_hues, map_rows
from flash_experts.generation.name_files import type_line_of


def names_table(rows: Sequence[Row], caption: str, lockable: bool = True) -> str:
    """The table of names; "" if there are none."""
    if not rows:
        return ""
    titles = {id(row.settings): title_of(row.settings) for row in rows if not row.locked}
    groups = [("", list(rows))]
    if len(titles) > 1:
        runs = groupby(rows, lambda row: 0 if row.locked else id(row.settings))
        groups = [(titles.get(which, ""), list(run)) for which, run in runs]
    return load_template(__package__, "names").render(groups=groups, caption=caption, lockable=lockable)


def title_of(settings: Settings) -> str:
    card = settings.attributes()
    return " · ".join([type_line_of(card) or "Any type", *_facts(card)])


def history(requests: Sequence[tuple[Request, str]]) -> str:
    return load_template(__package__, "history").render(requests=requests)


def panel(row: Row, card: Attributes, inspection: str) -> str:
    """The panel of a name: its card in a frame, and the inspection (HTML)."""
    letters = card.colors or ("C",) * (card.colors == ())
    stops = [f"var(--fe-{letter})" for letter in letters] or ["var(--fe-any)"]
    paint = ", ".join(stops * (2 if len(stops) == 1 else 1))
    return load_template(__package__, "card").render(
        row=row,
        card=card,
        letters=letters,
        paint=f"linear-gradient(100deg, {paint})",
        type_line=type_line_of(card),
        facts=_facts(card),
        words=words_of(row.name.text),
        inspection=Markup(inspection),  # made by `inspection` or `failure`, which escape
    )


def _facts(card: Attributes) -> list[str]:
    colors = None if card.colors is None else " and ".join(COLOR_WORDS[each] for each in card.colors) or COLORLESS
    value = None if card.mana_value is None else f"mana value {card.mana_value}"
    return [str(fact) for fact in (colors, value, card.rarity, card.set_code, card.released) if fact is not None]


def inspection(found: Inspection, model: str, block: int, head: int | None) -> str:
    """How a model reads a name: attention of a block's head, or the mean of all heads for None.

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
        prompt_words=_prompt_words(found, weights_TT),
        rows=[] if found.experts is None else map_rows(found.experts),
        colors=[f"oklch(var(--fe-lightness) .1 {hue})" for hue in expert_hues(found.num_experts)],
        weights=np.rint(100 * weights_TT).astype(int).tolist(),
        percent=percent,
    )


def status(progress: Progress) -> str:
    count = len(progress.rows)
    counted = f"{count} of {progress.wanted} names" if count < progress.wanted else f"{count} names"
    parts = [counted, f"{progress.seconds:.1f} s", f"seed {progress.seed}", progress.note]
    announced = ", ".join(filter(None, [counted, progress.note])) if progress.is_over else ""
    return note(" · ".join(filter(None, parts)), announced)


def set_status(progress: SetProgress) -> str:
    """The status line of a request for several cards, and the cards without a name."""
    count = len(progress.before) + len(progress.new)
    cards = [one for one in progress.named if not one.row.name]
    with_names = sum(bool(one.names) for one in cards)
    counted = f"{count} names for {with_names} of {len(cards)} cards"
    items = reports(progress.named)
    if any(one.problem.startswith("not reached") for one in cards):
        items.append("Download the set and open it again: the cards without a name are named then")
    announced = f"{counted}, cards without a name are listed" if items else counted
    line = note(f"{counted} · {progress.seconds:.1f} s", announced if progress.is_over else "")
    rows = Markup("").join(Markup("<li>{}</li>").format(item) for item in items)
    return line + (f'<ul class="fe-report" aria-label="Cards without a name">{rows}</ul>' if items else "")


def note(message: str, announced: str | None = None) -> str:
    """A status line, which the page's script announces to screen readers in these words (default: the line's)."""
    spoken = escape(message if announced is None else announced)
    return f'<p class="fe-status" data-announced="{spoken}">{escape(message)}</p>'


def failure(message: str) -> str:
    return f'<p class="fe-status fe-failure" data-announced="{escape(message)}">{escape(message)}</p>'


def percent(share: float) -> str:
    """A share such as "42%"; "<1%" where it would round to 0."""
    return "<1%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


def _prompt_words(found: Inspection, weights_TT: npt.NDArray[np.float32]) -> list[tuple[str, int]]:
    """The words of the prompt, without BOS token and punctuation, and the name's mean attention to each in percent."""
    shares_T = 100 * weights_TT[found.prompt_length - 1 :].mean(0)
    words: list[tuple[str, float]] = []
    for token, share in list(zip(found.tokens, shares_T.tolist(), strict=True))[1 : found.prompt_length]:
        text = token.strip("·")
        if words and not token.startswith("·") and text.isalnum():
            words[-1] = words[-1][0] + text, words[-1][1] + share
        else:
            words.append((text, share))
    return [(word, round(share)) for word, share in words if any(map(str.isalnum, word))]
