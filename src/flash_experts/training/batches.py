"""Which names an optimizer step sees: a pure function of (seed, epoch, step), so resuming needs no loader
state.

In each epoch the names are shuffled and the attributes of their prompts are dropped anew, both from (seed,
epoch). The shuffled names are cut into ``steps_per_epoch`` batches of nearly equal numbers of tokens: no name
is left out, none comes twice, and there is no small last batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import EncodedName, encode_names
from flash_experts.data.prompts import Attributes


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


class NameBatches:
    """The batches of names of every step of every epoch.

    Args:
        cards: what to train on.
        tokenizer: turns prompts and names into ids.
        tokens_per_batch: about how many tokens a step has; ``steps_per_epoch`` follows from it and epoch 0.
        attribute_dropout: chance that a part of a prompt is left out.
        seed: of the order and of what is left out.
        curriculum: ``length`` has the first epoch go from short names to long ones.

    Raises:
        ValueError: there are no cards.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int,
        attribute_dropout: float,
        seed: int,
        curriculum: str = "none",
    ):
        if not cards:
            raise ValueError("there are no training names: run `flash-experts prepare` or check the data folder")
        self.cards = cards
        self.tokenizer = tokenizer
        self.attribute_dropout = attribute_dropout
        self.seed = seed
        self.curriculum = curriculum
        self._names = [card.name for card in cards]
        self._attributes = [Attributes.of(card) for card in cards]
        first = self._encode(0)
        tokens = sum(_lengths(first))
        self.steps_per_epoch = min(len(cards), max(1, round(tokens / tokens_per_batch)))
        self._epoch, self._batches = 0, self._cut(first)

    def epoch_and_batch(self, step: int) -> tuple[int, int]:
        """Epoch of an optimizer step, and its place in it, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def names_of_step(self, step: int) -> list[EncodedName]:
        """The names that optimizer step ``step`` (from 0) learns from."""
        epoch, batch = self.epoch_and_batch(step)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._cut(self._encode(epoch))
        return self._batches[batch]

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

    def order(self, epoch: int) -> list[int]:
        """Indices of the cards in the order in which an epoch visits them."""
        indices = list(range(len(self.cards)))
        rng = random.Random(f"order/{self.seed}/{epoch}")
        rng.shuffle(indices)
        if self.curriculum == "length" and epoch == 0:
            indices.sort(key=lambda index: len(self._names[index]))  # stable: equal lengths stay shuffled
        return indices

    def _encode(self, epoch: int) -> list[EncodedName]:
        """The epoch's names in its order."""
        rng = random.Random(f"attributes/{self.seed}/{epoch}")
        attributes = [given.drop(rng, self.attribute_dropout) for given in self._attributes]
        encoded = encode_names(self._names, attributes, self.tokenizer)
        return [encoded[index] for index in self.order(epoch)]

    def _cut(self, names: list[EncodedName]) -> list[list[EncodedName]]:
        runs = split_evenly(_lengths(names), self.steps_per_epoch)
        return [names[run.start : run.stop] for run in runs]


def _lengths(names: Sequence[EncodedName]) -> list[int]:
    return [name.num_inputs for name in names]
