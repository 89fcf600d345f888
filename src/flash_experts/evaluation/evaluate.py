"""Everything that is measured of one model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prepare import META, load_meta, load_split
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.metrics import (
    Estimate,
    FloatArray,
    GroupBits,
    bits_by_group,
    bits_estimate,
    colors_of,
    paired_bits_difference,
    types_of,
)
from flash_experts.evaluation.novelty import NameFigures, Reference, names_of
from flash_experts.evaluation.scorers import LanguageModel, ModelSize, NGramBaseline, Scorer

SPLITS = ("test_iid", "test")
NGRAM = "ngram"  # the name under which the baseline is asked for


@dataclass(frozen=True, slots=True)
class SplitFigures:
    """Bits per character of one held-out set.

    Attributes:
        names: how many.
        unconditional: nothing is told of the card.
        conditional: type line, colors and mana value are told. None for a model that takes no attributes.
        shuffled: the same attributes, each told of another card.
        control: shuffled - conditional, paired: how much the model listens. Zero means that it ignores its
            prompt.
        by_type: the unconditional figure for the cards of each type.
        by_color: the same for each color.
    """

    names: int
    unconditional: Estimate
    conditional: Estimate | None
    shuffled: Estimate | None
    control: Estimate | None
    by_type: dict[str, GroupBits]
    by_color: dict[str, GroupBits]


@dataclass(frozen=True, slots=True)
class NameNats:
    """What `SplitFigures` are made of, kept for paired comparisons: nats of each name, (N,) each."""

    characters: FloatArray
    unconditional: FloatArray
    conditional: FloatArray | None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """All figures of one model.

    Attributes:
        label: the model's name in tables.
        size: its parameters.
        splits: bits per character of each held-out set.
        samples: figures of names drawn from the model as it is (temperature 1, nothing held back), or None.
        real: the same figures of as many real held-out names, to compare with.
        scored_per_second: names a second, conditional and unconditional alike.
        sampled_per_second: names a second, or None.
        seed: of the shuffling and the sampling.
        data: source and version of the data, as meta.json has them.
        examples: the first of the samples.
        nats: nats of each name, by split. Not in the JSON.
    """

    label: str
    size: ModelSize
    splits: dict[str, SplitFigures]
    samples: NameFigures | None
    real: NameFigures
    scored_per_second: float
    sampled_per_second: float | None
    seed: int
    data: dict[str, Any]
    examples: tuple[str, ...]
    nats: dict[str, NameNats] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "nats"}
        return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class HeldOut:
    """Prepared data as evaluation uses it, read once for any number of models."""

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


def load_scorer(
    model: str | Path | PreTrainedModel,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    label: str | None = None,
) -> Scorer:
    """A model to measure: a folder or hub id, "ngram" for the baseline, or a model with its tokenizer.

    Raises:
        ValueError: there is no such model, or a model came without tokenizer.
    """
    if isinstance(model, (str, Path)) and str(model) == NGRAM:
        return NGramBaseline(held_out.reference.train)
    return _language_model(model, tokenizer, device, label)


def _language_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    label: str | None = None,
) -> LanguageModel:
    if not isinstance(model, PreTrainedModel):
        return LanguageModel.load(model, device, label)
    if tokenizer is None:
        raise ValueError("a model was given without its tokenizer: pass tokenizer=, or the path of both")
    return LanguageModel(model, tokenizer, label or model.config.model_type)


def evaluate(
    model: str | Path | PreTrainedModel,
    data_dir: str | Path = "data/mtg",
    splits: Sequence[str] = SPLITS,
    *,
    samples: int = 500,
    seed: int = 0,
    max_names: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
) -> EvaluationResult:
    """Measures a model on held-out names.

    Args:
        model: a folder, a hub id, "ngram", or a model (then with ``tokenizer``).
        data_dir: what `flash-experts prepare` wrote.
        splits: held-out sets.
        samples: names to draw for novelty and distributions; 0 draws none.
        seed: of shuffling, sampling and ``max_names``.
        max_names: at most so many names of each set; None is all.
        tokenizer: the model's, where ``model`` is no path.
        device: where to load a model to; CUDA if there is one, when None.

    Raises:
        ValueError: the data or the model is not there, or a set is empty.
    """
    held_out = HeldOut.load(data_dir, splits, max_names, seed)
    return evaluate_scorer(load_scorer(model, held_out, tokenizer, device), held_out, samples=samples, seed=seed)


def evaluate_scorer(scorer: Scorer, held_out: HeldOut, *, samples: int = 500, seed: int = 0) -> EvaluationResult:
    """`evaluate` on data and a model that are loaded already."""
    figures, nats = {}, {}
    start = time.perf_counter()
    for split, cards in held_out.splits.items():
        figures[split], nats[split] = _evaluate_split(scorer, cards, seed)
    passes = 3 if scorer.takes_attributes else 1
    scored_per_second = passes * sum(map(len, held_out.splits.values())) / (time.perf_counter() - start)
    drawn: list[str] = []
    if samples:
        start = time.perf_counter()
        drawn = scorer.sample(samples, seed)
        sampled_per_second = samples / (time.perf_counter() - start)
    # Names of the family split have no near relative in train by construction: the other is what real names
    # are like.
    real_split = "test_iid" if "test_iid" in held_out.splits else next(iter(held_out.splits))
    real = names_of(held_out.splits[real_split])
    return EvaluationResult(
        label=scorer.label,
        size=scorer.size,
        splits=figures,
        samples=held_out.reference.figures(drawn) if drawn else None,
        real=held_out.reference.figures(real[: samples or len(real)], real=True),
        scored_per_second=scored_per_second,
        sampled_per_second=sampled_per_second if drawn else None,
        seed=seed,
        data=held_out.data,
        examples=tuple(drawn[:20]),
        nats=nats,
    )


def _evaluate_split(scorer: Scorer, cards: Sequence[Card], seed: int) -> tuple[SplitFigures, NameNats]:
    names = names_of(cards)
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    unconditional = scorer.nats(names, [Attributes()] * len(names))
    conditional = shuffled = None
    if scorer.takes_attributes:
        attributes = [Attributes.of(card) for card in cards]
        conditional = scorer.nats(names, attributes)
        shuffled = scorer.nats(names, random.Random(seed).sample(attributes, len(attributes)))
    return SplitFigures(
        names=len(names),
        unconditional=bits_estimate(unconditional, characters),
        conditional=None if conditional is None else bits_estimate(conditional, characters),
        shuffled=None if shuffled is None else bits_estimate(shuffled, characters),
        control=None
        if conditional is None or shuffled is None
        else paired_bits_difference(shuffled, conditional, characters),
        by_type=bits_by_group(unconditional, characters, cards, types_of),
        by_color=bits_by_group(unconditional, characters, cards, colors_of),
    ), NameNats(characters, unconditional, conditional)


@dataclass(frozen=True, slots=True)
class NamesResult:
    """Bits per character of a list of names, and of each."""

    bits: Estimate
    names: tuple[str, ...]
    bits_of_each: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return asdict(self)


def read_names(path: str | Path) -> list[str]:
    """Names from a text file, one a line; blank lines are skipped.

    Raises:
        ValueError: there is no such file, it is not UTF-8 text, or it holds no name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the names in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8, one name a line") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} holds no name: write one a line")
    return names


def evaluate_names(
    names: Sequence[str],
    model: str | Path | PreTrainedModel,
    data_dir: str | Path = "data/mtg",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
) -> NamesResult:
    """Bits per character of any names, nothing told of their cards.

    Args:
        names: what to measure.
        model: a folder, a hub id, "ngram", or a model (then with ``tokenizer``).
        data_dir: what "ngram" is fitted on; no other model reads it.
        tokenizer: the model's, where ``model`` is no path.
        device: where to load a model to; CUDA if there is one, when None.

    Raises:
        ValueError: no name is given, or the model is not there.
    """
    if not names:
        raise ValueError("no names to measure: give at least one")
    scorer: Scorer
    if isinstance(model, (str, Path)) and str(model) == NGRAM:
        scorer = load_scorer(NGRAM, HeldOut.load(data_dir, ()))
    else:
        scorer = _language_model(model, tokenizer, device)
    nats = scorer.nats(names, [Attributes()] * len(names))
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    each = nats / np.log(2.0) / characters
    return NamesResult(bits_estimate(nats, characters), tuple(names), tuple(float(bits) for bits in each))
