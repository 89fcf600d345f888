"""Prepared data as evaluation uses it, and the judges that learn from it, made once for any number of models."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prepare import META, load_meta, load_split
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.classifiers import Detector
from flash_experts.evaluation.control import ControlJudge
from flash_experts.evaluation.novelty import IID, Reference, names_of
from flash_experts.evaluation.scorers import names_fit

SPLITS = (IID, "test")


def shuffled(attributes: Sequence[Attributes], seed: int) -> list[Attributes]:
    """The attributes of cards, each given to another card."""
    return random.Random(seed).sample(attributes, len(attributes))


def _too_long(
    cards: Sequence[Card], models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]], seed: int
) -> set[int]:
    """Cards whose name is too long after their own attributes, or after those that `shuffled` gives them."""
    own = [Attributes.of(card) for card in cards]
    found: set[int] = set()
    for config, tokenizer in models:
        for attributes in (own, shuffled(own, seed)):
            fits = names_fit(config, tokenizer, names_of(cards), attributes)
            found |= {index for index, fit in enumerate(fits) if not fit}
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out cards, and what names are held against.

    Attributes:
        splits: the held-out sets by name.
        reference: all real names.
        data: source and version, as meta.json has them.
    """

    splits: dict[str, list[Card]]
    reference: Reference
    data: dict[str, Any]

    @classmethod
    def load(
        cls, folder: str | Path, splits: Sequence[str] = SPLITS, max_names: int | None = None, seed: int = 0
    ) -> HeldOut:
        """Reads a folder that `flash-experts prepare` wrote.

        Args:
            folder: where it is.
            splits: the held-out sets.
            max_names: at most so many names of each, drawn at random by ``seed``; None is all.
            seed: of that draw.

        Raises:
            ValueError: it is not there, or a set has no name.
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

    def fitting(self, models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]], seed: int) -> HeldOut:
        """Without the names that are longer than the context of any of some models, with a warning that counts them.

        Args:
            models: the configuration and the tokenizer of each.
            seed: of `shuffled`, whose prompts must fit as well.

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
        """Held-out cards whose names are what a model's are compared with.

        Names of the family split have no near relative in train by construction; those of the other are what real
        names are like to somebody who knows the training names.
        """
        return self.splits[IID] if IID in self.splits else next(iter(self.splits.values()))

    @cached_property
    def detector(self) -> Detector | None:
        """Tells real names from generated ones; None, with a warning, without scikit-learn."""
        if not self._has_sklearn:
            return None
        return Detector(names_of(self.reference.train), names_of(self.real))

    @cached_property
    def control_judge(self) -> ControlJudge | None:
        """Tells from a name what was asked for; None without scikit-learn."""
        return ControlJudge(self.reference.train, self.real) if self._has_sklearn else None

    @cached_property
    def _has_sklearn(self) -> bool:
        if find_spec("sklearn") is not None:
            return True
        warnings.warn(
            "scikit-learn is not installed: going on without the classifiers (real or generated, control); to have "
            "them: pip install scikit-learn",
            stacklevel=2,
        )
        return False
