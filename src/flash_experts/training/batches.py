"""Which names an optimizer step sees: a pure function of (seed, step), so resuming needs no loader state.

A run is a row of stages (one, if it has no curriculum), a stage a row of epochs over its names. In each epoch the names
are shuffled and the attributes of their prompts are dropped anew, both from (seed, epoch), where epochs are counted
through all stages. The names in their order are cut into ``steps_per_epoch`` batches of nearly equal numbers of tokens:
no name is left out, none comes twice, and there is no small last batch.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import EncodedName, encode_names
from flash_experts.data.prompts import Attributes
from flash_experts.training.stages import Stage
from flash_experts.training.training_config import TrainingConfig

ALL_NAMES = Stage("all", epochs=None)


def split_evenly(lengths: Sequence[int], parts: int) -> list[range]:
    """Cuts a sequence into runs of nearly equal total length, none of them empty.

    ``split_evenly([5, 1, 1, 1, 4], 3) == [range(0, 1), range(1, 4), range(4, 5)]``

    Args:
        lengths: length of each item, in order.
        parts: number of runs, at most ``len(lengths)``.

    Returns:
        Index ranges that follow each other and cover every item.
    """
    assert 1 <= parts <= len(lengths), (parts, len(lengths))
    ends = np.fromiter(accumulate(lengths), dtype=np.int64)
    middles = ends - np.asarray(lengths) / 2
    cuts = np.searchsorted(middles, ends[-1] * np.arange(1, parts) / parts)
    # Every run keeps at least one item, whatever the lengths.
    bounds = [0]
    for part, cut in enumerate(cuts.tolist(), start=1):
        bounds.append(min(max(cut, bounds[-1] + 1), len(lengths) - (parts - part)))
    bounds.append(len(lengths))
    return [range(start, end) for start, end in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage, and where it is in the run.

    Attributes:
        stage: as it was asked for.
        cards: those whose names it learns.
        steps_per_epoch: optimizer steps of an epoch.
        first_step: the step it begins with.
        first_epoch: the epoch it begins with, counted through all stages.
        steps: how many it has; None if it goes on until the run ends.
    """

    stage: Stage
    cards: list[Card]
    steps_per_epoch: int
    first_step: int
    first_epoch: int
    steps: int | None


class NameBatches:
    """The batches of names of every step of every epoch of every stage.

    Args:
        cards: what to train on.
        tokenizer: turns prompts and names into ids.
        tokens_per_batch: about how many tokens a step has; the steps of an epoch follow from it and the stage's first
            epoch.
        attribute_dropout: chance that a part of a prompt is left out.
        seed: of the order and of what is left out.
        stages: one after the other.

    Attributes:
        plan: the stages and where they begin.

    Raises:
        ValueError: there are no cards, or a stage takes none of them.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int,
        attribute_dropout: float,
        seed: int,
        stages: Sequence[Stage] = (ALL_NAMES,),
    ):
        if not cards:
            raise ValueError("there are no training names: run `flash-experts prepare` or check the data folder")
        self.tokenizer = tokenizer
        self.attribute_dropout = attribute_dropout
        self.seed = seed
        self.plan: list[PlannedStage] = []
        self._cached: tuple[int, list[list[EncodedName]]] | None = None
        first_step = first_epoch = 0
        for stage in stages:
            chosen = stage.choose(cards)
            tokens = sum(_lengths(self._encode(stage, chosen, first_epoch)))
            per_epoch = min(len(chosen), max(1, round(tokens / tokens_per_batch)))
            steps = None if stage.epochs is None else math.ceil(stage.epochs * per_epoch)
            self.plan.append(PlannedStage(stage, chosen, per_epoch, first_step, first_epoch, steps))
            if steps is not None:
                first_step += steps
                first_epoch += math.ceil(steps / per_epoch)

    @classmethod
    def of(cls, cards: Sequence[Card], tokenizer: PreTrainedTokenizerBase, config: TrainingConfig) -> NameBatches:
        """Those of a run."""
        dropout, stages = config.attribute_dropout, config.planned_stages
        return cls(cards, tokenizer, config.tokens_per_batch, dropout, config.seed, stages)

    @property
    def planned_steps(self) -> int | None:
        """Steps of all stages together; None if the last goes on until the run ends."""
        last = self.plan[-1]
        return None if last.steps is None else last.first_step + last.steps

    def first_epochs(self) -> list[list[EncodedName]]:
        """The names of the first epoch of each stage, in their order."""
        return [self._encode(planned.stage, planned.cards, planned.first_epoch) for planned in self.plan]

    def stage_of(self, step: int) -> PlannedStage:
        """The stage of optimizer step ``step`` (from 0)."""
        return self.plan[bisect_right(self.plan, step, key=lambda planned: planned.first_step) - 1]

    def epochs_done(self, steps: int) -> float:
        """Passes over names after ``steps`` optimizer steps, those of former stages counted as they are begun."""
        planned = self.stage_of(steps)
        return planned.first_epoch + (steps - planned.first_step) / planned.steps_per_epoch

    def names_of_step(self, step: int) -> list[EncodedName]:
        """The names that optimizer step ``step`` (from 0) learns from."""
        planned = self.stage_of(step)
        epoch, batch = divmod(step - planned.first_step, planned.steps_per_epoch)
        epoch += planned.first_epoch
        if self._cached is None or self._cached[0] != epoch:
            names = self._encode(planned.stage, planned.cards, epoch)
            runs = split_evenly(_lengths(names), planned.steps_per_epoch)
            self._cached = epoch, [names[run.start : run.stop] for run in runs]
        return self._cached[1][batch]

    def rows_of_step(self, step: int, num_rows: int) -> list[list[EncodedName]]:
        """The names of a step in rows of nearly equal numbers of tokens.

        Raises:
            ValueError: there are fewer names than rows.
        """
        names = self.names_of_step(step)
        if len(names) < num_rows:
            raise ValueError(
                f"a step has {len(names)} names, too few for {num_rows} rows "
                "(gradient_accumulation_steps times processes): raise tokens_per_batch"
            )
        return [names[run.start : run.stop] for run in split_evenly(_lengths(names), num_rows)]

    def _encode(self, stage: Stage, cards: Sequence[Card], epoch: int) -> list[EncodedName]:
        """The names of an epoch in its order."""
        rng = random.Random(f"attributes/{self.seed}/{epoch}")
        attributes = [Attributes.of(card).drop(rng, self.attribute_dropout) for card in cards]
        encoded = encode_names([card.name for card in cards], attributes, self.tokenizer)
        return [encoded[index] for index in order_of_epoch(stage, cards, self.seed, epoch)]


def order_of_epoch(stage: Stage, cards: Sequence[Card], seed: int, epoch: int) -> list[int]:
    """Indices of a stage's cards in the order in which an epoch visits them."""
    indices = list(range(len(cards)))
    random.Random(f"order/{seed}/{epoch}").shuffle(indices)
    if stage.order == "length":
        indices.sort(key=lambda index: len(cards[index].name))  # stable: equal lengths stay shuffled
    return indices


def _lengths(names: Sequence[EncodedName]) -> list[int]:
    return [name.num_inputs for name in names]
