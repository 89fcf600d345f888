"""Held-out data and the real names to compare with: novelty and diversity of names, and classifiers trained once."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_names
from flash_experts.data.prepare import KNOWN_NAMES, META, load_meta, load_split
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.classifiers import ControlClassifiers, Detector
from flash_experts.evaluation.metrics import (
    Estimate,
    Memorization,
    WordMetrics,
    distinct_in,
    hit_ratio,
    jensen_shannon,
    near_duplicates,
    share,
    word_metrics,
    words,
)
from flash_experts.evaluation.scorers import known_attributes
from flash_experts.extras import is_installed, missing
from flash_experts.models.scoring import context_length

IID = "test_iid"  # held-out names of the same families as the training names
PER = 10_000  # names or words among which distinct ones are counted
SPLITS = (IID, "test")


def names_of(cards: Sequence[Card]) -> list[str]:
    """The names of cards."""
    return [card.name for card in cards]


@dataclass(frozen=True, slots=True)
class NameMetrics:
    """Novelty and diversity metrics of a list of names.

    Attributes:
        known: share that is a real card of any set, joke or franchise; None for real names.
        near_known: share within 0.2 edits per character of a known card, for real names another one.
        memorization: None for real names.
        distinct: distinct names / names. It falls with their number, so compare lists of equal length.
        distinct_names: expected distinct names in 10,000; None for fewer. 10,000 for real names.
        distinct_words: the same for words.
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
    """Real names to compare with; ``test`` is of other families, ``test_iid`` of those of the training cards."""

    train: tuple[Card, ...]
    validation: tuple[Card, ...]
    test: tuple[Card, ...]
    test_iid: tuple[Card, ...]
    known_names: tuple[str, ...]

    @cached_property
    def known_keys(self) -> frozenset[str]:
        """The names of all cards in normal form."""
        return frozenset(map(normal_form, self.known_names)) - {""}

    @cached_property
    def _train_keys(self) -> frozenset[str]:
        return frozenset(normal_form(card.name) for card in self.train)

    @cached_property
    def train_words(self) -> frozenset[str]:
        """The words of the training names."""
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
        return normal_form(name) in self.known_keys

    def measure(self, names: Sequence[str], *, real: bool = False) -> NameMetrics:
        """Measures one name or more; those of real cards (``real``) are not compared with themselves."""
        keys = [normal_form(name) for name in names]
        near = near_duplicates(keys, sorted(self.known_keys), at_least=2 if real else 1)
        every_name = names_of((*self.train, *self.validation, *self.test, *self.test_iid)) if real else names
        validation = names_of(self.validation)
        word_counts = ([len(name.split()) for name in some] for some in (names, validation))
        unseen = {normal_form(card.name) for card in self.test_iid}
        return NameMetrics(
            names=len(names),
            known=None if real else share([key in self.known_keys for key in keys]),
            in_train=share([key in self._train_keys for key in keys]),
            near_known=share(near),
            memorization=None if real else hit_ratio(set(keys), self._train_keys, unseen),
            distinct=len(set(keys)) / len(keys),
            distinct_names=float(PER) if real else distinct_in(keys, PER),
            distinct_words=distinct_in([word for name in every_name for word in words(name)], PER),
            words=word_metrics(names, self.train_words),
            mean_length=sum(map(len, names)) / len(names),
            length_divergence=jensen_shannon(map(len, names), map(len, validation)),
            word_count_divergence=jensen_shannon(*word_counts),
        )


def shuffled(attributes: Sequence[Attributes], seed: int) -> list[Attributes]:
    """Permutes attributes among cards."""
    return random.Random(seed).sample(attributes, len(attributes))


def _too_long(
    cards: Sequence[Card], models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]], seed: int
) -> set[int]:
    own = [Attributes.of(card) for card in cards]
    found: set[int] = set()
    for config, tokenizer in models:
        if (context := context_length(config)) is None:
            continue
        for attributes in (own, shuffled(own, seed)):
            encoded = encode_names(names_of(cards), known_attributes(config, attributes), tokenizer)
            found |= {index for index, name in enumerate(encoded) if name.num_inputs > context}
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out cards by split, the real names to compare with, and the source of the data."""

    splits: dict[str, list[Card]]
    reference: Reference
    data: dict[str, Any]

    @classmethod
    def load(
        cls, folder: str | Path, splits: Sequence[str] = SPLITS, max_names: int | None = None, seed: int = 0
    ) -> HeldOut:
        """Loads a prepared folder, with at most ``max_names`` random names per set, or raises a ValueError."""
        if max_names is not None and max_names < 1:
            raise ValueError(f"max_names must be 1 or more, not {max_names}: leave it out to score all")
        path = Path(folder)
        if not (path / META).is_file():
            raise ValueError(f"no prepared data in {path}: run `flash-experts prepare --out {path}` first")
        chosen = {}
        for split in splits:
            cards = load_split(path, split)
            if max_names is not None and max_names < len(cards):
                cards = random.Random(seed).sample(cards, max_names)
            chosen[split] = cards
        meta = load_meta(path)
        data: dict[str, Any] = {key: meta[key] for key in ("source", "version", "cleaning_version") if key in meta}
        return cls(chosen, Reference.load(path), data)

    def within_context(self, models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]], seed: int) -> HeldOut:
        """Leaves out names that exceed the context of any model, with a warning; ``seed`` is that of `shuffled`.

        Raises:
            ValueError: no name of a set is left.
        """
        splits = {}
        for split, cards in self.splits.items():
            kept = cards
            while kept and (too_long := _too_long(kept, models, seed)):
                kept = [card for index, card in enumerate(kept) if index not in too_long]
            if not kept:
                raise ValueError(f"no name of {split} fits into the model's context")
            if len(kept) < len(cards):
                left_out = f"{len(cards) - len(kept):,} of {len(cards):,} names of {split} are left out"
                warnings.warn(f"{left_out}: with their prompts they are longer than a model's context", stacklevel=3)
            splits[split] = kept
        return replace(self, splits=splits)

    @property
    def real(self) -> list[Card]:
        """The reference for generated names: held-out cards of the training families, if they are there."""
        return self.splits[IID] if IID in self.splits else next(iter(self.splits.values()))

    @cached_property
    def detector(self) -> Detector | None:
        """Real-vs-generated classifier; None, with a warning, without scikit-learn."""
        if not self._has_sklearn:
            return None
        return Detector(names_of(self.reference.train), names_of(self.real))

    @cached_property
    def control_classifiers(self) -> ControlClassifiers | None:
        return ControlClassifiers(self.reference.train, self.real) if self._has_sklearn else None

    @cached_property
    def _has_sklearn(self) -> bool:
        if is_installed("sklearn"):
            return True
        left_out = "evaluating without the classifiers (real or generated, control)"
        warnings.warn(f"{left_out}: {missing('sklearn', 'that part')}", stacklevel=2)
        return False
