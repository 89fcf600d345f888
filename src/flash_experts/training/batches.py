"""The dataloader: the names of a step are a pure function of (seed, step), so resuming needs no loader state.

A run is a sequence of stages (a curriculum; usually one), a stage a sequence of epochs. In each epoch the names are
shuffled and the attributes of their prompts dropped at random, both from (seed, epoch), and cut into
``steps_per_epoch`` batches of nearly equal numbers of tokens, every name once.
"""

from __future__ import annotations

import math
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import EncodedName, encode_names, split_by_context
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import check_fits
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, separates_packed_sequences
from flash_experts.models.scoring import TopLogits, context_length
from flash_experts.training.training_config import Stage, TrainingConfig


def split_evenly(lengths: Sequence[int], parts: int) -> list[range]:
    """Cuts into consecutive ranges of nearly equal total length, none of them empty.

    ``split_evenly([5, 1, 1, 1, 4], 3) == [range(0, 1), range(1, 4), range(4, 5)]``
    """
    assert 1 <= parts <= len(lengths), (parts, len(lengths))
    ends = np.fromiter(accumulate(lengths), dtype=np.int64)
    middles = ends - np.asarray(lengths) / 2
    cuts = np.searchsorted(middles, ends[-1] * np.arange(1, parts) / parts)
    bounds = [0]
    for part, cut in enumerate([*cuts.tolist(), len(lengths)], start=1):  # each range keeps an item, and leaves enough
        bounds.append(min(max(cut, bounds[-1] + 1), len(lengths) - (parts - part)))
    return [range(start, end) for start, end in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage with the cards that pass its filters, and its place in the run.

    Attributes:
        first_step: counted from 0 through all stages, as ``first_epoch`` is.
        steps: optimizer steps; None if the stage lasts until the run ends.
        fewest_names: names of the smallest step of the first epoch that the run reaches.
    """

    stage: Stage
    cards: list[Card]
    steps_per_epoch: int
    first_step: int
    first_epoch: int
    steps: int | None
    fewest_names: int


class NameBatches:
    """The names of every optimizer step; a ValueError if there are none, a stage has none, or the teacher knows none.

    Names that a teacher generated and cached ``top_logits`` for keep the prompts that it had.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
        top_logits: TopLogits | None = None,
    ):
        if not cards:
            raise ValueError("there are no training names: run `flash-experts prepare` or check the data folder")
        self.tokenizer, self.config, self.top_logits = tokenizer, config, top_logits
        self.plan: list[PlannedStage] = []
        self._most_steps = sys.maxsize if config.max_steps is None else config.max_steps
        first_step = first_epoch = 0
        has_teacher = top_logits is None
        for stage in config.planned_stages:
            chosen = stage.choose(cards)
            names = self._encode(stage, chosen, first_epoch)
            per_epoch = min(len(chosen), max(1, round(sum(_lengths(names)) / config.tokens_per_batch)))
            batches = _split(names, per_epoch)
            if not self.plan:
                self._epoch = first_epoch, batches
            # A rounding error over a whole number of steps is not a further step: 1.12 * 25 is 28.000000000000004.
            steps = None if stage.epochs is None else max(1, math.ceil(stage.epochs * per_epoch - 1e-6))
            fewest = min(map(len, batches[:steps][: max(1, self._most_steps - first_step)]))
            self.plan.append(PlannedStage(stage, chosen, per_epoch, first_step, first_epoch, steps, fewest))
            has_teacher = has_teacher or any(name.top_row >= 0 for name in names)
            if steps is not None:
                first_step += steps
                first_epoch += math.ceil(steps / per_epoch)
        if not has_teacher:
            raise ValueError(
                f"teacher {config.teacher} has no logits of any training name: give the names that were generated with "
                "them as extra_names"
            )

    @property
    def planned_steps(self) -> int | None:
        """None if the last stage lasts until the run ends."""
        last = self.plan[-1]
        return None if last.steps is None else last.first_step + last.steps

    def stage_of(self, step: int) -> PlannedStage:
        """The stage of step ``step`` (from 0)."""
        return self.plan[bisect_right(self.plan, step, key=lambda planned: planned.first_step) - 1]

    def epochs_done(self, steps: int) -> float:
        """Epochs after ``steps`` optimizer steps; a stage's partial last epoch counts as a whole one."""
        planned = self.stage_of(steps)
        return planned.first_epoch + (steps - planned.first_step) / planned.steps_per_epoch

    def names_of_step(self, step: int) -> list[EncodedName]:
        planned = self.stage_of(step)  # steps are counted from 0
        epoch, batch = divmod(step - planned.first_step, planned.steps_per_epoch)
        epoch += planned.first_epoch
        if self._epoch[0] != epoch:
            self._epoch = epoch, _split(self._encode(planned.stage, planned.cards, epoch), planned.steps_per_epoch)
        return self._epoch[1][batch]

    def check_micro_batches(self, num_micro_batches: int) -> None:
        """A ValueError if a step of the first epoch of some stage has fewer names than micro-batches.

        Later epochs, which would all have to be tokenized, are cut into nearly the same numbers of names.
        """
        for planned in self.plan:
            if planned.first_step < self._most_steps:
                self._check_enough(planned, planned.fewest_names, num_micro_batches)

    def _check_enough(self, planned: PlannedStage, num_names: int, num_micro_batches: int) -> None:
        if num_names >= num_micro_batches:
            return
        stage = f" of stage {planned.stage.name!r}" if self.config.stages else ""
        few = len(planned.cards) < num_micro_batches
        remedy = f"lower one of them to use all {len(planned.cards)}" if few else "raise tokens_per_batch"
        raise ValueError(
            f"a step{stage} has {num_names} names, too few for {num_micro_batches} micro-batches "
            f"(gradient_accumulation_steps times processes): {remedy}"
        )

    def micro_batches_of_step(self, step: int, num_micro_batches: int) -> list[list[EncodedName]]:
        """The names of a step in micro-batches of nearly equal numbers of tokens; a ValueError if they are too few."""
        names = self.names_of_step(step)
        self._check_enough(self.stage_of(step), len(names), num_micro_batches)
        return _split(names, num_micro_batches)

    def _encode(self, stage: Stage, cards: Sequence[Card], epoch: int) -> list[EncodedName]:
        seed = self.config.seed
        rng = random.Random(f"attributes/{seed}/{epoch}")
        attributes = [Attributes.of(card).drop(rng, self.config.attribute_dropout) for card in cards]
        cached = self.top_logits
        if cached is not None:
            pairs = zip(cards, attributes, strict=True)
            attributes = [Attributes.of(card) if card.source_id in cached else drawn for card, drawn in pairs]
        encoded = encode_names([card.name for card in cards], attributes, self.tokenizer)
        if cached is not None:
            encoded = [
                replace(name, top_row=cached.first_row(card.source_id, name.ids[name.prompt_length :]))
                for card, name in zip(cards, encoded, strict=True)
            ]
        order = list(range(len(cards)))
        random.Random(f"order/{seed}/{epoch}").shuffle(order)
        if stage.order == "length":
            order.sort(key=lambda index: len(cards[index].name))  # stable: equal lengths stay shuffled
        ordered = [encoded[index] for index in order]
        if stage.order == "length" or self.config.names_per_prompt == 1:
            return ordered
        return _group_by_prompt(ordered, self.config.names_per_prompt, random.Random(f"prompts/{seed}/{epoch}"))


def _group_by_prompt(names: Sequence[EncodedName], most: int, rng: random.Random) -> list[EncodedName]:
    """Reorders names in shuffled runs of at most ``most`` with one prompt, whose tokens each run shares."""
    names_of: dict[tuple[int, ...], list[EncodedName]] = {}
    for name in names:
        names_of.setdefault(name.ids[: name.prompt_length], []).append(name)
    runs = [same[start : start + most] for same in names_of.values() for start in range(0, len(same), most)]
    rng.shuffle(runs)
    return [name for run in runs for name in run]


def _lengths(names: Sequence[EncodedName]) -> list[int]:
    return [name.num_inputs for name in names]


def _split(names: list[EncodedName], parts: int) -> list[list[EncodedName]]:
    """Cuts names into parts of nearly equal numbers of tokens."""
    return [names[one.start : one.stop] for one in split_evenly(_lengths(names), parts)]


def check_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cards: Iterable[Card]) -> None:
    """A ValueError if the tokenizer is another model's, or names are not given as cards."""
    check_fits(tokenizer, model.config.vocab_size)
    if others := [type(card).__name__ for card in cards if not isinstance(card, Card)]:
        raise ValueError(
            f"names are given as cards, not as {others[0]}: read them with flash_experts.data.prepare.load_split, or "
            "make flash_experts.data.cards.Card objects"
        )


def check_packing(model: PreTrainedModel, names_per_prompt: int, notify: Callable[[str], None]) -> None:
    """Warns if names of a packed sequence may see each other; a ValueError if the model cannot share their prompts."""
    config, family = model.config, model.config.model_type
    is_separated = separates_packed_sequences(config)
    # transformers' own attention functions ignore where shared prompts belong.
    if names_per_prompt > 1 and not (is_separated and config._attn_implementation == ATTENTION_IMPLEMENTATION):
        raise ValueError(
            f"names_per_prompt is {names_per_prompt}, but only a GPT-2 or a Llama with attn_implementation "
            f"{ATTENTION_IMPLEMENTATION} can share prompts, not this {family} model: set it to 1"
        )
    if not is_separated:
        notify(
            f"a {family} model may not separate names in a packed sequence: if it does not, each name is trained and "
            "validated as if it came after others"
        )


def fitting_cards(
    train: Sequence[Card],
    validation: Sequence[Card],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    notify: Callable[[str], None],
) -> tuple[list[Card], list[Card]]:
    """Leaves out names longer than the model's context, and reports how many; a ValueError if no training name fits."""
    context, kept, left_out = context_length(model.config), [], []
    for kind, cards in (("training", train), ("validation", validation)):
        fit, too_long = split_by_context(cards, tokenizer, context)
        kept.append(fit)
        if too_long:
            left_out.append(f"{len(too_long):,} of {len(cards):,} {kind} names ({too_long[0].name[:40]!r}, ...)")
    if train and not kept[0]:
        raise ValueError(f"no training name fits into the model's {context} tokens: use a model with a longer context")
    if left_out:
        notify(f"left out, since prompt and name take more than the model's {context} tokens: {', '.join(left_out)}")
    return kept[0], kept[1]
