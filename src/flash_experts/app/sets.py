"""Names for several cards in one request: lines of the page, or a set as ``generate --cards`` takes it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flash_experts.app import form
from flash_experts.app.service import Playground, Row
from flash_experts.app.settings import LARGEST_SEED, Settings
from flash_experts.data.prompts import UNCONDITIONAL, Attributes, read_conditions
from flash_experts.generation import card_files, card_sets

LONGEST_SET = 48_000  # characters of a set; as JSON it fits into the body of a request
MOST_IN_A_SET = 300  # names of one request
MOST_EACH = 10  # names for each card
_MOST_REPORTED = 5  # different problems, and cards with the same one
_OF_A_LINE = ("type_line", "colors", "mana_value")


@dataclass(frozen=True, slots=True)
class SetProgress:
    """The progress of a request for several cards."""

    settings: Settings  # of the last card
    before: tuple[Row, ...]  # names of the cards before it
    new: tuple[Row, ...]  # its names
    named: tuple[card_sets.NamedRow, ...]  # all cards with their names so far
    seconds: float

    @property
    def is_over(self) -> bool:
        return all(one.row.name or one.names or one.problem for one in self.named)


def cards_of(text: object) -> list[card_files.CardRow]:
    """The cards of a text: a set (see `card_rows_of`), or a line for each, such as "Creature — Angel, W, 5".

    Raises a ValueError if there are none, or the text is too long.
    """
    text = text if isinstance(text, str) else ""
    if len(text) > LONGEST_SET:
        raise ValueError(f"the cards have {len(text):,} characters: the most is {LONGEST_SET:,}")
    if card_files.is_card_table(text):
        return card_files.card_rows_of(text, "the cards")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError("no cards: write a line for each, such as Creature — Angel, W, 5, or open a file")
    return [_row_of_line(line, f"line {number}") for number, line in lines]


def _row_of_line(line: str, where: str) -> card_files.CardRow:
    parts = [part.strip() for part in line.split(",", len(_OF_A_LINE) - 1)]
    cells = dict(zip(_OF_A_LINE, parts + [""] * len(_OF_A_LINE), strict=False))
    card, problem = UNCONDITIONAL, ""
    try:
        if "," in cells["mana_value"]:
            raise ValueError("give a type line, colors and a mana value, such as Creature — Angel, W, 5")
        mana_value = form.whole("mana_value", cells["mana_value"])
        card = Attributes.parse(cells["type_line"] or None, cells["colors"] or None, mana_value)
    except ValueError as error:
        problem = f"{line!r:.60}: {error}"
    return card_files.CardRow(where, cells, "", card, problem=problem)


def number_for_each(count: object) -> int:
    """Names for each card, 1 to `MOST_EACH`, else a ValueError."""
    number = form.whole("count", str(count)) or 1
    if number > MOST_EACH:
        raise ValueError(f"{number} names for each card: the most is {MOST_EACH}")
    return number


def name_set(
    playground: Playground,
    settings: Settings,
    model: str,
    rows: Sequence[card_files.CardRow],
    without: Sequence[str],
    is_wanted: Callable[[], bool],
) -> Iterator[SetProgress]:
    """Names for each card that has none, in order, within the time limit of one request.

    No name and no last word is used twice in the set. A card's attributes replace those of ``settings``, whose
    ``count`` is of names for each.

    Raises:
        ValueError: no card can be named, or the model is unknown.
    """
    named, settings_of_each = _checked(playground, settings, model, rows)
    if not settings_of_each:
        raise ValueError("; ".join(reports(named)) or "each of these cards has a name: leave out those to be made")
    asked = deque(settings_of_each.items())
    start, taken = time.monotonic(), card_sets.TakenNames(row.name for row in rows)
    before: tuple[Row, ...] = ()
    last = settings

    def stopped() -> str:
        if time.monotonic() - start >= playground.time_limit:
            return f"not reached within {playground.time_limit:g} s, the time limit of a request"
        is_full = len(before) + settings.count > MOST_IN_A_SET
        return f"not reached: a request gives at most {MOST_IN_A_SET} names" if is_full else ""

    while asked and not stopped():
        place, last = asked.popleft()
        begun = time.monotonic()
        left = playground.time_limit - (begun - start)
        left = left / 2 if asked else left  # a card that hardly any name suits leaves time for the others
        try:
            new = _names_of_card(playground, last, model, taken, without, left, is_wanted)
        except ValueError as error:
            new, named[place] = (), card_sets.without_names(rows[place], error)
        else:
            named[place] = taken.named(rows[place], [row.name for row in new])
            if not new and time.monotonic() - begun >= left:
                named[place] = card_sets.NamedRow(rows[place], (), f"none found in {left:.1f} s")
        if not is_wanted():
            return
        yield SetProgress(last, before, new, tuple(named), time.monotonic() - start)
        before += new
    if asked:
        for place, _ in asked:
            named[place] = card_sets.NamedRow(rows[place], (), stopped())
        yield SetProgress(last, before, (), tuple(named), time.monotonic() - start)


def reports(named: Sequence[card_sets.NamedRow]) -> list[str]:
    """The problems of a set with their cards, each problem once, the first few."""
    cards: dict[str, list[str]] = {}
    for one in named:
        if one.problem:
            cards.setdefault(one.problem, []).append(one.row.where)
    found = []
    for problem, places in cards.items():
        more = f" and {len(places) - _MOST_REPORTED} more" if len(places) > _MOST_REPORTED else ""
        found.append(f"{', '.join(places[:_MOST_REPORTED])}{more}: no name: {problem}")
    if len(found) > _MOST_REPORTED:
        found[_MOST_REPORTED:] = [f"and {len(found) - _MOST_REPORTED} more"]
    return found


def _checked(
    playground: Playground, settings: Settings, model: str, rows: Sequence[card_files.CardRow]
) -> tuple[list[card_sets.NamedRow], dict[int, Settings]]:
    """The cards with the problems that need no model, and the settings of those to be named, by place."""
    conditions = read_conditions(playground.model(model).generator.model.config.to_dict())
    named = [card_sets.NamedRow(row, (), row.problem) for row in rows]
    found = {}
    for place, row in enumerate(rows):
        if row.name or row.problem:
            continue
        given = card_sets.asked_for(row, conditions)
        given["rarity"] = given["rarity"] or settings.rarity
        seed = None if settings.seed is None else (settings.seed + place) % (LARGEST_SEED + 1)
        try:
            found[place] = replace(settings, **given, seed=seed)
        except ValueError as error:
            named[place] = card_sets.NamedRow(row, (), form.with_labels(str(error)))
    return named, found


def _names_of_card(
    playground: Playground,
    settings: Settings,
    model: str,
    taken: card_sets.TakenNames,
    without: Sequence[str],
    seconds: float,
    is_wanted: Callable[[], bool],
) -> tuple[Row, ...]:
    """The first names that are not taken, ``settings.count`` or fewer; few more are drawn."""
    found: list[Row] = []
    more = replace(settings, count=settings.count + card_sets.EXTRA)
    for progress in playground.names(more, model, without, seconds, is_wanted):
        found = [row for row in progress.rows if taken.allows(row.name.text)][: settings.count]
        if len(found) == settings.count:
            break
    shown = replace(settings, seed=found[0].settings.seed) if found else settings
    return tuple(replace(row, settings=shown) for row in found)
