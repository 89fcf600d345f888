"""Evaluates one model: held-out bits per character (normalized perplexity), control, novelty, cost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.sources import read_file, read_text
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.baselines import MixedWithNGrams, SwapBaseline, without_suffix
from flash_experts.evaluation.classifiers import ControlMetrics, Detection
from flash_experts.evaluation.held_out import SPLITS, HeldOut, NameMetrics, names_of, shuffled
from flash_experts.evaluation.metrics import (
    NATS_PER_BIT,
    Estimate,
    FloatArray,
    GroupBits,
    bits_by_group,
    bits_estimate,
    colors_of,
    paired_bits_difference,
    word_association,
    years_of,
)
from flash_experts.evaluation.scorers import Costs, LanguageModel, ModelSize, NGramBaseline, Scorer
from flash_experts.generation.name_files import BY_SUFFIX
from flash_experts.models.loading import load_config

SAMPLES = 10_000  # with fewer, too few are real cards for a reliable hit ratio
ASSOCIATED = 700  # two-word names for word association, at most
_FEWEST_ASSOCIATED = 16
EXAMPLES = 40  # samples that the report shows
_CONTROL_SHARE = 4  # samples per name for the attribute classifiers
_PASSES = 3  # over the held-out names: unconditional, conditional, with another card's attributes
NGRAM, SWAP = "ngram", "swap"  # stand for baselines in place of a model


@dataclass(frozen=True, slots=True)
class SplitMetrics:
    """Bits per character of one held-out set.

    Attributes:
        shuffled: conditioned on another card's attributes.
        control: shuffled - conditional, paired. Zero means that the model ignores its prompt.
        by_year: cards first printed until 2024 and since 2025 (embedded table only): a check for contamination, since a
            teacher pretrained on the web of 2024 cannot have read the latter.
        association: `word_association` of up to `ASSOCIATED` names; None for very few.
    """

    names: int
    unconditional: Estimate
    conditional: Estimate
    shuffled: Estimate
    control: Estimate
    by_type: dict[str, GroupBits]
    by_color: dict[str, GroupBits]
    by_year: dict[str, GroupBits] = field(default_factory=dict)
    association: Estimate | None = None


@dataclass(frozen=True, slots=True)
class NameNats:
    """Nats and characters of each name, (N,) each, for paired comparisons."""

    characters: FloatArray
    unconditional: FloatArray
    conditional: FloatArray


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """All metrics of one model.

    Attributes:
        samples: drawn unfiltered at temperature 1.
        expert_loads: over the mean load on held-out names, by block.
        nats: by split; not in the JSON.
    """

    label: str
    size: ModelSize
    costs: Costs
    splits: dict[str, SplitMetrics]
    samples: NameMetrics | None
    real: NameMetrics
    detection: Detection | None
    control: tuple[ControlMetrics, ...]
    expert_loads: dict[str, tuple[float, ...]]
    scored_per_second: float
    sampled_per_second: float | None
    seed: int
    data: dict[str, Any]
    examples: tuple[str, ...]
    nats: dict[str, NameNats] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        fields = asdict(replace(self, nats={}))
        del fields["nats"]
        return fields


def load_scorer(
    model: str | Path | PreTrainedModel,
    held_out: HeldOut,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    label: str | None = None,
) -> Scorer:
    """Loads what is evaluated; ``model`` as in `evaluate`."""
    language = partial(language_model, tokenizer=tokenizer, device=device, label=label)
    if isinstance(model, PreTrainedModel):
        return language(model)
    reference = held_out.reference
    if str(model) == NGRAM:
        return NGramBaseline(reference.train)
    if str(model) == SWAP:
        return SwapBaseline(reference.train, reference.validation)
    if (alone := without_suffix(str(model))) is not None:
        return MixedWithNGrams(language(alone), NGramBaseline(reference.train), reference.validation)
    return language(model)


def is_baseline(model: str | Path) -> bool:
    """Whether this stands for a baseline, or for a model mixed with one, rather than for a model alone."""
    return str(model) in (NGRAM, SWAP) or without_suffix(str(model)) is not None


def config_and_tokenizer(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[PretrainedConfig, PreTrainedTokenizerBase]]:
    """Configuration and tokenizer without weights; empty for baselines, which take names of any length."""
    if isinstance(model, PreTrainedModel):
        return [] if tokenizer is None else [(model.config, tokenizer)]
    if str(model) in (NGRAM, SWAP):
        return []
    model = without_suffix(str(model)) or model
    config = load_config(model)
    return [(config, load_tokenizer(model, config.vocab_size))]


def language_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    label: str | None = None,
) -> LanguageModel:
    """Wraps or loads a language model with its tokenizer."""
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
    samples: int = SAMPLES,
    seed: int = 0,
    max_names: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
) -> EvaluationResult:
    """Evaluates a model on the held-out names of a folder written by `flash-experts prepare`.

    Args:
        model: a folder or hub id, either with "+ngram" to mix it with the baseline, "ngram" or "swap" for a baseline,
            or a model with its tokenizer.
        max_names: of each set.

    Raises:
        ValueError: the data or the model does not exist, or a set is empty.
    """
    held_out = HeldOut.load(data_dir, splits, max_names, seed)
    held_out = held_out.within_context(config_and_tokenizer(model, tokenizer), seed)
    return evaluate_scorer(load_scorer(model, held_out, tokenizer, device), held_out, samples=samples, seed=seed)


def evaluate_scorer(scorer: Scorer, held_out: HeldOut, *, samples: int = SAMPLES, seed: int = 0) -> EvaluationResult:
    """As `evaluate`, on loaded data and a loaded model."""
    if not held_out.splits:
        raise ValueError("no held-out names to measure: name at least one set")
    if samples < 0:
        raise ValueError(f"samples must be 0 (draw none) or more, not {samples}")
    metrics, nats = {}, {}
    start = time.perf_counter()
    for split, cards in held_out.splits.items():
        metrics[split], nats[split] = _evaluate_split(scorer, cards, seed)
    scored_per_second = _PASSES * sum(map(len, held_out.splits.values())) / (time.perf_counter() - start)
    for split, cards in held_out.splits.items():
        association = _association(scorer, names_of(cards), nats[split].unconditional, seed)
        metrics[split] = replace(metrics[split], association=association)
    drawn: list[str] = []
    sampled_per_second = None
    if samples:
        start = time.perf_counter()
        drawn = scorer.sample(samples, seed)
        sampled_per_second = samples / (time.perf_counter() - start)
    detector, classifiers = (held_out.detector, held_out.control_classifiers) if drawn else (None, None)
    real = held_out.real
    return EvaluationResult(
        label=scorer.label,
        size=scorer.size,
        costs=scorer.costs,
        splits=metrics,
        samples=held_out.reference.measure(drawn) if drawn else None,
        real=held_out.reference.measure(names_of(real), real=True),
        detection=None if detector is None else detector.detect(drawn),
        control=()
        if classifiers is None
        else tuple(classifiers.measure(scorer, max(1, samples // _CONTROL_SHARE), seed)),
        expert_loads=scorer.expert_loads(names_of(real), [Attributes.of(card) for card in real]),
        scored_per_second=scored_per_second,
        sampled_per_second=sampled_per_second,
        seed=seed,
        data=held_out.data,
        examples=tuple(drawn[:EXAMPLES]),
        nats=nats,
    )


def _evaluate_split(scorer: Scorer, cards: Sequence[Card], seed: int) -> tuple[SplitMetrics, NameNats]:
    names = names_of(cards)
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    attributes = [Attributes.of(card) for card in cards]
    unconditional = scorer.nats(names, [UNCONDITIONAL] * len(names))
    conditional = scorer.nats(names, attributes)
    others = scorer.nats(names, shuffled(attributes, seed))
    return SplitMetrics(
        names=len(names),
        unconditional=bits_estimate(unconditional, characters),
        conditional=bits_estimate(conditional, characters),
        shuffled=bits_estimate(others, characters),
        control=paired_bits_difference(others, conditional, characters),
        by_type=bits_by_group(unconditional, conditional, characters, cards, lambda card: card.types),
        by_color=bits_by_group(unconditional, conditional, characters, cards, colors_of),
        by_year=bits_by_group(unconditional, conditional, characters, cards, years_of),
    ), NameNats(characters, unconditional, conditional)


def _association(scorer: Scorer, names: Sequence[str], nats_N: FloatArray, seed: int) -> Estimate | None:
    """`word_association` of two-word names; ``nats_N`` are the unconditional nats of all names."""
    of_two = [index for index, name in enumerate(names) if len(name.split()) == 2]
    random.Random(f"word association/{seed}").shuffle(of_two)
    of_two = of_two[:ASSOCIATED]
    if len(of_two) < _FEWEST_ASSOCIATED:
        return None
    half = len(of_two) // 2
    pairs = np.array([of_two[:half], of_two[half : 2 * half]]).T
    swapped = []
    for one, other in pairs.tolist():
        (first, second), (third, fourth) = names[one].split(), names[other].split()
        swapped += [f"{first} {fourth}", f"{third} {second}"]
    nats_swapped = scorer.nats(swapped, [UNCONDITIONAL] * len(swapped)).reshape(-1, 2).sum(axis=1)
    return word_association(nats_N[pairs].sum(axis=1), nats_swapped, seed=seed)


@dataclass(frozen=True, slots=True)
class NamesResult:
    """Bits per character of a list of names, and of each name."""

    bits: Estimate
    names: tuple[str, ...]
    bits_of_each: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_names(path: str | Path) -> list[str]:
    """Reads names from a text file, one per line, or from csv, json or jsonl as `generate` and cards have them.

    Raises:
        ValueError: the file is of another kind that `generate` writes, or malformed (``file:line``).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot read the names in {path}: it is a folder: give a text file with one name per line")
    try:
        is_text = BY_SUFFIX.get(path.suffix.lower(), "text") == "text"
        names = [row.name.strip() for row in (read_text(path) if is_text else read_file(path).rows)]
    except OSError as error:
        raise ValueError(f"cannot read the names in {path}: {error.strerror}") from error
    if not names:
        raise ValueError(f"{path} has no names: write one per line")
    return names


def evaluate_names(
    names: Sequence[str],
    model: str | Path | PreTrainedModel,
    data_dir: str | Path = "data/mtg",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
) -> NamesResult:
    """Unconditional bits per character of any names; ``model`` as in `evaluate`.

    ``data_dir`` is read for "ngram", "swap" and "MODEL+ngram" alone.
    """
    if not names:
        raise ValueError("no names to measure: give at least one")
    scorer: Scorer
    if isinstance(model, (str, Path)) and is_baseline(model):
        scorer = load_scorer(model, HeldOut.load(data_dir, ()))
    else:
        scorer = language_model(model, tokenizer, device)
    nats = scorer.nats(names, [UNCONDITIONAL] * len(names))
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    each = nats / NATS_PER_BIT / characters
    return NamesResult(bits_estimate(nats, characters), tuple(names), tuple(float(bits) for bits in each))
