"""What a list of names looks like beside the cards there are: copies, near copies, words, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prepare import KNOWN_NAMES, load_split
from flash_experts.evaluation.metrics import (
    Estimate,
    WordFigures,
    distinct_share,
    exact_known_rate,
    length_divergence,
    near_duplicates,
    share,
    word_count_divergence,
    word_figures,
    words,
)

_FEW_HITS = 5  # a ratio of fewer real hits than this says nothing


@dataclass(frozen=True, slots=True)
class NameFigures:
    """Figures of a list of names.

    Attributes:
        names: how many.
        known: share that is a real card (of any set, jokes and franchises and all); for real names None.
        in_train: share that is a training name.
        near_train: share within 0.2 edits per letter of a training name (copies included); None without
            rapidfuzz.
        memorized: hits in train per training name / hits in held-out per held-out name, over distinct names.
            1 is what a model that has learned the names' kind and none by heart gives; more is recall. None
            where too few held-out names were hit to tell: take 10,000 samples or more.
        distinct: distinct names / names.
        words: their words, and the share of them that no training name has.
        mean_length: characters.
        length_divergence: Jensen-Shannon divergence from the lengths of real held-out names, bits.
        word_count_divergence: the same of the numbers of words.
    """

    names: int
    known: Estimate | None
    in_train: Estimate
    near_train: Estimate | None
    memorized: float | None
    distinct: float
    words: WordFigures
    mean_length: float
    length_divergence: float
    word_count_divergence: float


@dataclass(frozen=True)
class Reference:
    """The real names that others are held against.

    Attributes:
        train: the training names.
        held_out: names that no model was trained on: validation and both tests.
        validation: names whose lengths others are compared with (the tests are compared with them as well).
        known_names: every name that is already a card.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    validation: tuple[str, ...]
    known_names: tuple[str, ...]

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(map(normal_form, self.known_names))

    @cached_property
    def _train_keys(self) -> frozenset[str]:
        return frozenset(map(normal_form, self.train))

    @cached_property
    def _train_words(self) -> frozenset[str]:
        return frozenset(word for name in self.train for word in words(name))

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """From a prepared folder. Raises ValueError where a file of it is missing."""
        names: dict[str, tuple[str, ...]] = {}
        for split in ("train", "validation", "test", "test_iid"):
            names[split] = tuple(card.name for card in load_split(folder, split))
        if not (folder / KNOWN_NAMES).is_file():
            raise ValueError(f"{folder / KNOWN_NAMES} is missing: run `flash-experts prepare --out {folder}` again")
        lines = (folder / KNOWN_NAMES).read_text(encoding="utf-8").splitlines()
        return cls(
            train=names["train"],
            held_out=names["validation"] + names["test"] + names["test_iid"],
            validation=names["validation"],
            known_names=tuple(line for line in lines if line),
        )

    def figures(self, names: Sequence[str], *, real: bool = False) -> NameFigures:
        """Measures names.

        Args:
            names: what to measure.
            real: they are real cards, so that "is a real card" is no question.

        Raises:
            ValueError: there is no name.
        """
        keys = [normal_form(name) for name in names]
        near = near_duplicates(keys, sorted(self._train_keys))
        return NameFigures(
            names=len(names),
            distinct=distinct_share(keys),
            known=None if real else exact_known_rate(keys, self._known),
            in_train=exact_known_rate(keys, self._train_keys),
            near_train=None if near is None else share(near),
            memorized=None if real else self._memorized(set(keys)),
            words=word_figures(names, self._train_words),
            mean_length=sum(map(len, names)) / len(names),
            length_divergence=length_divergence(names, self.validation),
            word_count_divergence=word_count_divergence(names, self.validation),
        )

    def _memorized(self, keys: set[str]) -> float | None:
        held_out = {normal_form(name) for name in self.held_out} - self._train_keys
        hits_in_train, hits_in_held_out = len(keys & self._train_keys), len(keys & held_out)
        if hits_in_held_out < _FEW_HITS:
            return None
        return (hits_in_train / len(self._train_keys)) / (hits_in_held_out / len(held_out))


def names_of(cards: Sequence[Card]) -> list[str]:
    """The names of cards."""
    return [card.name for card in cards]
