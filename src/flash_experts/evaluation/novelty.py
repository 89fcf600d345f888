"""What a list of names looks like beside the cards there are: copies, near copies, words, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prepare import KNOWN_NAMES, load_split
from flash_experts.evaluation.memorization import Memorization, hit_ratio
from flash_experts.evaluation.metrics import (
    Estimate,
    WordFigures,
    distinct_in,
    distinct_share,
    exact_known_rate,
    length_divergence,
    near_duplicates,
    share,
    word_count_divergence,
    word_figures,
    words,
)

IID = "test_iid"  # the held-out names of the training names' own families
PER = 10_000  # distinct names and words are counted in so many


@dataclass(frozen=True, slots=True)
class NameFigures:
    """Figures of a list of names.

    Attributes:
        names: how many.
        known: share that is a real card (of any set, jokes and franchises and all); for real names None.
        in_train: share that is a training name.
        near_known: share within 0.2 edits per letter of a known card (copies included; of a real name, of another
            card than its own); None without rapidfuzz. It should be as for real names: they have relatives.
        memorization: training names hit against held-out names hit; for real names None.
        distinct: distinct names / names.
        distinct_names: distinct names to expect in 10,000; None for fewer. For real names 10,000.
        distinct_words: distinct words to expect in 10,000 words; None for fewer. For real names, in all of them.
        words: their words, and the share of them that no training name has.
        mean_length: characters.
        length_divergence: Jensen-Shannon divergence from the lengths of real held-out names, bits.
        word_count_divergence: the same of the numbers of words.
    """

    names: int
    known: Estimate | None
    in_train: Estimate
    near_known: Estimate | None
    memorization: Memorization | None
    distinct: float
    distinct_names: float | None
    distinct_words: float | None
    words: WordFigures
    mean_length: float
    length_divergence: float
    word_count_divergence: float


@dataclass(frozen=True)
class Reference:
    """The real names that others are held against.

    Attributes:
        train: the training cards.
        validation: cards whose lengths others are compared with (the tests are compared with them as well).
        test: cards of other families.
        test_iid: held-out cards of the training cards' families: memorization is measured against them.
        known_names: every name that is already a card.
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
        """From a prepared folder. Raises ValueError where a file of it is missing."""
        splits = {split: tuple(load_split(folder, split)) for split in ("train", "validation", "test", IID)}
        if not (folder / KNOWN_NAMES).is_file():
            raise ValueError(f"{folder / KNOWN_NAMES} is missing: run `flash-experts prepare --out {folder}` again")
        lines = (folder / KNOWN_NAMES).read_text(encoding="utf-8").splitlines()
        return cls(**splits, known_names=tuple(line for line in lines if line))

    def is_known(self, name: str) -> bool:
        """Whether a name is already a card's."""
        return normal_form(name) in self._known

    def figures(self, names: Sequence[str], *, real: bool = False) -> NameFigures:
        """Measures names.

        Args:
            names: what to measure.
            real: they are real cards, so that "is a real card" is no question.

        Raises:
            ValueError: there is no name.
        """
        keys = [normal_form(name) for name in names]
        near = near_duplicates(keys, sorted(self._known), at_least=2 if real else 1)
        every_name = names_of((*self.train, *self.validation, *self.test, *self.test_iid)) if real else names
        validation = names_of(self.validation)
        return NameFigures(
            names=len(names),
            known=None if real else exact_known_rate(keys, self._known),
            in_train=exact_known_rate(keys, self._train_keys),
            near_known=None if near is None else share(near),
            memorization=None if real else self._memorization(keys),
            distinct=distinct_share(keys),
            distinct_names=float(PER) if real else distinct_in(keys, PER),
            distinct_words=distinct_in([word for name in every_name for word in words(name)], PER),
            words=word_figures(names, self._train_words),
            mean_length=sum(map(len, names)) / len(names),
            length_divergence=length_divergence(names, validation),
            word_count_divergence=word_count_divergence(names, validation),
        )

    def _memorization(self, keys: Sequence[str]) -> Memorization:
        return hit_ratio(set(keys), self._train_keys, {normal_form(card.name) for card in self.test_iid})


def names_of(cards: Sequence[Card]) -> list[str]:
    """The names of cards."""
    return [card.name for card in cards]
