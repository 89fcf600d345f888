"""A curriculum: stages one after the other, each with its own names, epochs and rate.

A run without stages has one stage, all names for ``max_epochs``. Which stage, epoch and batch an optimizer step is in
follows from its number alone, so resuming needs no more than that number.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flash_experts.data.cards import RARITIES, TYPES, Card


@dataclass(frozen=True)
class Stage:
    """A part of a run. The filters are joined by "and"; each one that is null lets all names through.

    Attributes:
        name: shown when the stage begins.
        epochs: passes over the names of the stage (fractions are fine); null, for the last stage alone: until the run
            ends by max_steps or max_minutes.
        learning_rate_scale: times the rate of the schedule, which goes over the whole run.
        types: names of cards that have one of these types, such as [Creature, Artifact].
        min_length: shortest name, in letters and spaces.
        max_length: longest name.
        rarities: names of cards of these rarities: common, uncommon, rare, mythic.
        order: of the names in each epoch: shuffled, or length (short ones first, equal lengths shuffled).
    """

    name: str
    epochs: float | None = 1.0
    learning_rate_scale: float = 1.0
    types: list[str] | None = None
    min_length: int | None = None
    max_length: int | None = None
    rarities: list[str] | None = None
    order: Literal["shuffled", "length"] = "shuffled"

    def takes(self, card: Card) -> bool:
        """Whether a card's name is learned in this stage."""
        length = len(card.name)
        return (
            (self.types is None or not set(self.types).isdisjoint(card.types))
            and (self.min_length is None or length >= self.min_length)
            and (self.max_length is None or length <= self.max_length)
            and (self.rarities is None or card.rarity in self.rarities)
        )

    def choose(self, cards: Sequence[Card]) -> list[Card]:
        """The cards of this stage, in their order.

        Raises:
            ValueError: there are none.
        """
        chosen = [card for card in cards if self.takes(card)]
        if chosen:
            return chosen
        if self.rarities is not None and all(card.rarity is None for card in cards):
            raise ValueError(
                f"stage {self.name!r} asks for rarities, which this data does not tell (the embedded cards do not): "
                "run `flash-experts prepare --source scryfall`, or leave rarities out"
            )
        raise ValueError(f"no training name passes the filters of stage {self.name!r}: loosen them")

    def problems(self, is_last: bool) -> list[str]:
        """What is wrong with it, for `TrainingConfig.validate`."""
        found = [
            *_unknown("types", self.types, TYPES),
            *_unknown("rarities", self.rarities, RARITIES),
            *_unknown("order", [self.order], ("shuffled", "length")),
        ]
        if self.epochs is None and not is_last:
            found.append("epochs is null, but only the last stage may go on until the run ends")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            found.append(f"epochs is {self.epochs}, but it must be more than 0")
        if not 0 < self.learning_rate_scale < math.inf:
            found.append(f"learning_rate_scale is {self.learning_rate_scale}, but it must be more than 0")
        lengths = [length for length in (self.min_length, self.max_length) if length is not None]
        if any(length < 1 for length in lengths) or lengths != sorted(lengths):
            found.append(f"lengths from {self.min_length} to {self.max_length} hold no name")
        return [f"stage {self.name!r}: {problem}" for problem in found]


def stage_problems(stages: Sequence[Stage]) -> list[str]:
    """What is wrong with a curriculum, for `TrainingConfig.validate`."""
    if not stages:
        return ["stages is empty: set it to null for a run without stages"]
    problems = [problem for stage in stages for problem in stage.problems(stage is stages[-1])]
    names = [stage.name for stage in stages]
    problems += [f"two stages are named {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
    return problems


def _unknown(field: str, values: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    if values is None:
        return []
    if not values:
        return [f"{field} is an empty list: leave it out to let all through"]
    problems = []
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(str(value).title(), known, 1) or difflib.get_close_matches(value, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(known)}"
            problems.append(f"{field} has {value!r}: {hint}")
    return problems
