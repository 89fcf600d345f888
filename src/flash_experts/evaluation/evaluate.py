"""Everything that is measured of one model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.baseline import NGramBaseline
from flash_experts.evaluation.classifiers import Detection
from flash_experts.evaluation.control import ControlFigures
from flash_experts.evaluation.costs import Costs, ModelSize
from flash_experts.evaluation.held_out import SPLITS, HeldOut, shuffled
from flash_experts.evaluation.metrics import (
    Estimate,
    FloatArray,
    GroupBits,
    bits_by_group,
    bits_estimate,
    colors_of,
    paired_bits_difference,
    types_of,
    word_association,
)
from flash_experts.evaluation.novelty import NameFigures, names_of
from flash_experts.evaluation.scorers import LanguageModel, Scorer
from flash_experts.models.loading import load_config

SAMPLES = 10_000  # of fewer, few are real cards, and the hit ratio says little
ASSOCIATED = 700  # two-word names for word association
_FEWEST_ASSOCIATED = 16
EXAMPLES = 40  # samples that are shown
_CONTROL_SHARE = 4  # names for the control classifiers, one for so many samples
_PASSES = 3  # over the held-out names: nothing told, attributes told, another card's told
NGRAM = "ngram"  # the name under which the baseline is asked for


@dataclass(frozen=True, slots=True)
class SplitFigures:
    """Bits per character of one held-out set.

    Attributes:
        names: how many.
        unconditional: nothing is told of the card.
        conditional: type line, colors and mana value are told.
        shuffled: the same attributes, each told of another card.
        control: shuffled - conditional, paired: how much the model listens. Zero means that it ignores its
            prompt.
        by_type: the figures for the cards of each type.
        by_color: the same for each color.
        association: `word_association` of up to `ASSOCIATED` two-word names, unconditional; None of very few names.
    """

    names: int
    unconditional: Estimate
    conditional: Estimate
    shuffled: Estimate
    control: Estimate
    by_type: dict[str, GroupBits]
    by_color: dict[str, GroupBits]
    association: Estimate | None = None


@dataclass(frozen=True, slots=True)
class NameNats:
    """What `SplitFigures` are made of, kept for paired comparisons: nats of each name, (N,) each."""

    characters: FloatArray
    unconditional: FloatArray
    conditional: FloatArray


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """All figures of one model.

    Attributes:
        label: the model's name in tables.
        size: its parameters.
        costs: memory, and its training where that is recorded.
        splits: bits per character of each held-out set.
        samples: figures of names drawn from the model as it is (temperature 1, nothing held back), or None.
        real: the same figures of real held-out names, to compare with.
        detection: whether its samples are told from real names; None without samples or scikit-learn.
        control: whether what was asked for is recognized from its names; empty without samples or scikit-learn.
        expert_loads: load of each expert over the mean on held-out names, by the number of the block.
        scored_per_second: names a second, conditional and unconditional alike. Measured: it differs from run to run.
        sampled_per_second: names a second, or None. Measured.
        seed: of the shuffling and the sampling.
        data: source and version of the data, as meta.json has them.
        examples: the first of the samples.
        nats: nats of each name, by split. Not in the JSON.
    """

    label: str
    size: ModelSize
    costs: Costs
    splits: dict[str, SplitFigures]
    samples: NameFigures | None
    real: NameFigures
    detection: Detection | None
    control: tuple[ControlFigures, ...]
    expert_loads: dict[str, tuple[float, ...]]
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
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


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
    return language_model(model, tokenizer, device, label)


def config_and_tokenizer(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[PretrainedConfig, PreTrainedTokenizerBase]]:
    """Those of a language model, whose weights need not be read; empty for "ngram", which takes names of any length."""
    if isinstance(model, PreTrainedModel):
        return [] if tokenizer is None else [(model.config, tokenizer)]
    if str(model) == NGRAM:
        return []
    config = load_config(model)
    return [(config, load_tokenizer(model, config.vocab_size))]


def language_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    label: str | None = None,
) -> LanguageModel:
    """A language model with its tokenizer. See `load_scorer`."""
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
    held_out = HeldOut.load(data_dir, splits, max_names, seed).fitting(config_and_tokenizer(model, tokenizer), seed)
    return evaluate_scorer(load_scorer(model, held_out, tokenizer, device), held_out, samples=samples, seed=seed)


def evaluate_scorer(scorer: Scorer, held_out: HeldOut, *, samples: int = SAMPLES, seed: int = 0) -> EvaluationResult:
    """`evaluate` on data and a model that are loaded already."""
    figures, nats = {}, {}
    start = time.perf_counter()
    for split, cards in held_out.splits.items():
        figures[split], nats[split] = _evaluate_split(scorer, cards, seed)
    scored_per_second = _PASSES * sum(map(len, held_out.splits.values())) / (time.perf_counter() - start)
    for split, cards in held_out.splits.items():
        association = _association(scorer, names_of(cards), nats[split].unconditional, seed)
        figures[split] = replace(figures[split], association=association)
    drawn: list[str] = []
    if samples:
        start = time.perf_counter()
        drawn = scorer.sample(samples, seed)
        sampled_per_second = samples / (time.perf_counter() - start)
    detector, judge = (held_out.detector, held_out.control_judge) if drawn else (None, None)
    real = held_out.real
    return EvaluationResult(
        label=scorer.label,
        size=scorer.size,
        costs=scorer.costs,
        splits=figures,
        samples=held_out.reference.figures(drawn) if drawn else None,
        real=held_out.reference.figures(names_of(real), real=True),
        detection=None if detector is None else detector.detect(drawn),
        control=() if judge is None else tuple(judge.judge(scorer, max(1, samples // _CONTROL_SHARE), seed)),
        expert_loads=scorer.expert_loads(names_of(real), [Attributes.of(card) for card in real]),
        scored_per_second=scored_per_second,
        sampled_per_second=sampled_per_second if drawn else None,
        seed=seed,
        data=held_out.data,
        examples=tuple(drawn[:EXAMPLES]),
        nats=nats,
    )


def _evaluate_split(scorer: Scorer, cards: Sequence[Card], seed: int) -> tuple[SplitFigures, NameNats]:
    names = names_of(cards)
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    attributes = [Attributes.of(card) for card in cards]
    unconditional = scorer.nats(names, [NONE] * len(names))
    conditional = scorer.nats(names, attributes)
    others = scorer.nats(names, shuffled(attributes, seed))
    return SplitFigures(
        names=len(names),
        unconditional=bits_estimate(unconditional, characters),
        conditional=bits_estimate(conditional, characters),
        shuffled=bits_estimate(others, characters),
        control=paired_bits_difference(others, conditional, characters),
        by_type=bits_by_group(unconditional, conditional, characters, cards, types_of),
        by_color=bits_by_group(unconditional, conditional, characters, cards, colors_of),
    ), NameNats(characters, unconditional, conditional)


def _association(scorer: Scorer, names: Sequence[str], nats_N: FloatArray, seed: int) -> Estimate | None:
    """Word association of two-word names, drawn by ``seed``; ``nats_N`` are those of all names, unconditional."""
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
    nats_swapped = scorer.nats(swapped, [NONE] * len(swapped)).reshape(-1, 2).sum(axis=1)
    return word_association(nats_N[pairs].sum(axis=1), nats_swapped, seed=seed)
