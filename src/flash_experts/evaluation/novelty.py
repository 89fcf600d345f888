"""Novelty and diversity of a list of names: copies, near-duplicates, memorization, words, lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prepare import KNOWN_NAMES, load_split
from flash_experts.evaluation.metrics import (
    Estimate,
    WordMetrics,
    distinct_in,
    distinct_share,
    exact_known_rate,
    length_divergence,
    near_duplicates,
    share,
    word_count_divergence,
    word_metrics,
    words,
)


@dataclass(frozen=True, slots=True)
class Memorization:
    """The hit ratio and its counts.

    Attributes:
        ratio: hit rate of training names / hit rate of held-out names. 1 is no memorization; 10 means that nine of ten
            generated training names were memorized. None without hits. Use 10,000 samples or more.
    """

    train_hits: int
    held_out_hits: int
    ratio: Estimate | None


def hit_ratio(samples: Set[str], train: Set[str], held_out: Set[str]) -> Memorization:
    """Measures memorization by the hit ratio.

    Half a hit is added on each side (Haldane 1956). The interval is the normal approximation of the logarithm (Katz et
    al. 1978).

    Args:
        samples: distinct generated names in `flash_experts.data.names.normal_form`.
        held_out: unseen names of the same families; other families are hit less often, which looks like memorization.
    """
    held_out = held_out - train
    in_train, in_held_out = len(samples & train), len(samples & held_out)
    if not (in_train or in_held_out) or not train or not held_out:
        return Memorization(in_train, in_held_out, None)
    value = ((in_train + 0.5) / len(train)) / ((in_held_out + 0.5) / len(held_out))
    spread = 1.959964 * math.sqrt(1 / (in_train + 0.5) + 1 / (in_held_out + 0.5))
    return Memorization(in_train, in_held_out, Estimate(value, value * math.exp(-spread), value * math.exp(spread)))


IID = "test_iid"  # held-out names of the same families as the training names


PER = 10_000  # names or words among which distinct ones are counted


@dataclass(frozen=True, slots=True)
class NameMetrics:
    """Novelty and diversity metrics of a list of names.

    Attributes:
        known: share that is a real card of any set, joke or franchise; None for real names.
        in_train: share that is a training name.
        near_known: share within 0.2 edits per character of a known card (another card, for real names, many of which
            are).
        memorization: hit ratio; None for real names.
        distinct: distinct names / names.
        distinct_names: expected distinct names in 10,000; None for fewer. 10,000 for real names.
        distinct_words: expected distinct words in 10,000 words; None for fewer.
        length_divergence: Jensen-Shannon divergence from the lengths of real held-out names, in bits.
        word_count_divergence: the same for the number of words.
    """

    names: int
    known: Estimate | None
    in_train: Estimate
    near_known: Estimate
    memorization: Memorization | None
    distinct: float
    distinct_names: float | None
    distinct_words: float | None
    words: WordMetrics
    mean_length: float
    length_divergence: float
    word_count_divergence: float


@dataclass(frozen=True)
class Reference:
    """Real names to compare with.

    Attributes:
        test: held-out cards of other families.
        test_iid: held-out cards of the training families, the reference for memorization.
    """

    train: tuple[Card, ...]
    validation: tuple[Card, ...]
    test: tuple[Card, ...]
    test_iid: tuple[Card, ...]
    known_names: tuple[str, ...]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(map(normal_form, self.known_names)) - {""}

    @cached_property
    def _train_keys(self) -> frozenset[str]:
        return frozenset(normal_form(card.name) for card in self.train)

    @cached_property
    def _train_words(self) -> frozenset[str]:
        return frozenset(word for card in self.train for word in words(card.name))

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Loads a prepared folder; raises ValueError if a file is missing."""
        splits = {split: tuple(load_split(folder, split)) for split in ("train", "validation", "test", IID)}
        if not (folder / KNOWN_NAMES).is_file():
            raise ValueError(f"{folder / KNOWN_NAMES} is missing: run `flash-experts prepare --out {folder}` again")
        lines = (folder / KNOWN_NAMES).read_text(encoding="utf-8").splitlines()
        return cls(**splits, known_names=tuple(line for line in lines if line))

    def is_known(self, name: str) -> bool:
        """Whether a name is an existing card."""
        return normal_form(name) in self._known

    def measure(self, names: Sequence[str], *, real: bool = False) -> NameMetrics:
        """Measures names; those of real cards (``real``) are not compared with themselves.

        Raises:
            ValueError: there are no names.
        """
        keys = [normal_form(name) for name in names]
        near = near_duplicates(keys, sorted(self._known), at_least=2 if real else 1)
        every_name = names_of((*self.train, *self.validation, *self.test, *self.test_iid)) if real else names
        validation = names_of(self.validation)
        return NameMetrics(
            names=len(names),
            known=None if real else exact_known_rate(keys, self._known),
            in_train=exact_known_rate(keys, self._train_keys),
            near_known=share(near),
            memorization=None if real else self._memorization(keys),
            distinct=distinct_share(keys),
            distinct_names=float(PER) if real else distinct_in(keys, PER),
            distinct_words=distinct_in([word for name in every_name for word in words(name)], PER),
            words=word_metrics(names, self._train_words),
            mean_length=sum(map(len, names)) / len(names),
            length_divergence=length_divergence(names, validation),
            word_count_divergence=word_count_divergence(names, validation),
        )

    def _memorization(self, keys: Sequence[str]) -> Memorization:
        return hit_ratio(set(keys), self._train_keys, {normal_form(card.name) for card in self.test_iid})


def names_of(cards: Sequence[Card]) -> list[str]:
    """The names of cards."""
    return [card.name for card in cards]
