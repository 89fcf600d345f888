"""Held-out data and the classifiers trained on prepared data, shared by all evaluated models."""

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
from flash_experts.data.prepare import META, load_meta, load_split
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.classifiers import AttributeClassifiers, Detector
from flash_experts.evaluation.novelty import IID, Reference, names_of
from flash_experts.evaluation.scorers import fits_context
from flash_experts.extras import is_installed, missing

SPLITS = (IID, "test")


def shuffled(attributes: Sequence[Attributes], seed: int) -> list[Attributes]:
    """Permutes attributes among cards."""
    return random.Random(seed).sample(attributes, len(attributes))


def _too_long(
    cards: Sequence[Card], models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]], seed: int
) -> set[int]:
    own = [Attributes.of(card) for card in cards]
    found: set[int] = set()
    for config, tokenizer in models:
        for attributes in (own, shuffled(own, seed)):
            fit = fits_context(config, tokenizer, names_of(cards), attributes)
            found |= {index for index, fits in enumerate(fit) if not fits}
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out cards by split, the real names to compare with, and source and version from meta.json."""

    splits: dict[str, list[Card]]
    reference: Reference
    data: dict[str, Any]

    @classmethod
    def load(
        cls, folder: str | Path, splits: Sequence[str] = SPLITS, max_names: int | None = None, seed: int = 0
    ) -> HeldOut:
        """Loads a folder written by `flash-experts prepare`, with at most ``max_names`` random names per set.

        Raises:
            ValueError: there is no prepared data, or a set is empty.
        """
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
        """Leaves out names that exceed the context of any model, with a warning.

        ``seed`` is that of `shuffled`.

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
        """The reference for generated names: held-out cards of the training families, if they are there.

        Other names have no similar training name by construction.
        """
        return self.splits[IID] if IID in self.splits else next(iter(self.splits.values()))

    @cached_property
    def detector(self) -> Detector | None:
        """Real-vs-generated classifier; None, with a warning, without scikit-learn."""
        if not self._has_sklearn:
            return None
        return Detector(names_of(self.reference.train), names_of(self.real))

    @cached_property
    def attribute_classifiers(self) -> AttributeClassifiers | None:
        return AttributeClassifiers(self.reference.train, self.real) if self._has_sklearn else None

    @cached_property
    def _has_sklearn(self) -> bool:
        if is_installed("sklearn"):
            return True
        left_out = "evaluating without the classifiers (real or generated, control)"
        warnings.warn(f"{left_out}: {missing('sklearn', 'that part')}", stacklevel=2)
        return False
