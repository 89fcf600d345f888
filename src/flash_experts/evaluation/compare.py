"""Several models side by side: the same names, the same prompts, the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from flash_experts.evaluation.blind_test import BlindName, make_blind_test
from flash_experts.evaluation.curves import CurvePoint, read_curve
from flash_experts.evaluation.evaluate import (
    SAMPLES,
    EvaluationResult,
    config_and_tokenizer,
    evaluate_scorer,
    load_scorer,
)
from flash_experts.evaluation.held_out import SPLITS, HeldOut
from flash_experts.evaluation.metrics import Estimate, paired_bits_difference
from flash_experts.evaluation.novelty import names_of
from flash_experts.evaluation.scorers import Prompt
from flash_experts.training.tracking import METRICS_FILE

PROMPTS = (
    Prompt(),
    Prompt("Legendary Creature — Goblin", "R", 3),
    Prompt("Creature — Angel", "W", 5),
    Prompt("Instant", "U", 2),
    Prompt("Sorcery", "B", 4),
    Prompt("Land"),
)
NAMES_PER_PROMPT = 6


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two models are apart on one held-out set.

    Attributes:
        split: the held-out set.
        conditional: whether attributes were told.
        first: label of a model.
        second: label of another.
        bits: bits per character of the first less those of the second, with a paired 95% interval: under zero
            the first is better.
        significant: whether the interval leaves zero out. With many models, one pair in twenty does by
            chance.
    """

    split: str
    conditional: bool
    first: str
    second: str
    bits: Estimate
    significant: bool


@dataclass(frozen=True, slots=True)
class PromptNames:
    """Names of every model for one prompt and seed."""

    prompt: str
    names: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Figures of each model, their differences, their training, their names.

    Attributes:
        models: in the order asked for.
        differences: each pair of models on each held-out set.
        curves: training curves by label, of the models that have any.
        prompts: names side by side.
        blind_test: real and generated names in random order, for a reader to tell apart.
    """

    models: tuple[EvaluationResult, ...]
    differences: tuple[Difference, ...]
    curves: dict[str, list[CurvePoint]]
    prompts: tuple[PromptNames, ...]
    blind_test: tuple[BlindName, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {
            "models": [model.to_json() for model in self.models],
            "differences": [asdict(difference) for difference in self.differences],
            "curves": {label: [asdict(point) for point in points] for label, points in self.curves.items()},
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "blind_test": [asdict(name) for name in self.blind_test],
        }


def compare(
    models: Sequence[str | Path],
    data_dir: str | Path = "data/mtg",
    splits: Sequence[str] = SPLITS,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    max_names: int | None = None,
    device: str | torch.device | None = None,
) -> ComparisonResult:
    """Measures models on the same held-out names. One model is in memory at a time.

    Args:
        models: folders or hub ids; "ngram" is the baseline.
        data_dir: what `flash-experts prepare` wrote.
        splits: held-out sets.
        samples: names to draw from each.
        seed: of shuffling, sampling and ``max_names``.
        max_names: at most so many names of each set; None is all.
        device: where to load models to; CUDA if there is one, when None.

    Raises:
        ValueError: no model is given, one is given twice, or it or the data is not there.
    """
    if not models:
        raise ValueError("nothing to compare: give a model folder or more, or ngram")
    labels = unique_labels(models)
    held_out = HeldOut.load(data_dir, splits, max_names, seed)
    held_out = held_out.fitting([found for model in models for found in config_and_tokenizer(model)], seed)
    results, shown = [], []
    for model, label in zip(models, labels, strict=True):
        scorer = load_scorer(model, held_out, device=device, label=label)
        results.append(evaluate_scorer(scorer, held_out, samples=samples, seed=seed))
        shown.append(scorer.show(PROMPTS, NAMES_PER_PROMPT, seed, held_out.reference.known_names))
    return ComparisonResult(
        models=tuple(results),
        differences=tuple(differences(results)),
        curves={
            label: points
            for model, label in zip(models, labels, strict=True)
            if (points := read_curve(Path(model) / METRICS_FILE))
        },
        prompts=tuple(
            PromptNames(str(prompt), {label: names[index] for label, names in zip(labels, shown, strict=True)})
            for index, prompt in enumerate(PROMPTS)
        ),
        blind_test=make_blind_test(
            {result.label: result.examples for result in results},
            names_of(held_out.real),
            held_out.reference.is_known,
            seed,
        ),
    )


def unique_labels(models: Sequence[str | Path]) -> list[str]:
    """The last part of each path, and as many parts before it as tell the models apart.

    Raises:
        ValueError: a model is given twice.
    """
    parts = [Path(model).parts for model in models]
    if len(set(parts)) < len(parts):
        twice = next(str(Path(*part)) for part in parts if parts.count(part) > 1)
        raise ValueError(f"{twice} is given twice: name each model once")
    depth = [1] * len(parts)
    while True:
        labels = ["/".join(part[-used:]) for part, used in zip(parts, depth, strict=True)]
        clash = [index for index, label in enumerate(labels) if labels.count(label) > 1]
        if not clash:
            return labels
        for index in clash:
            depth[index] += 1


def differences(results: Sequence[EvaluationResult]) -> list[Difference]:
    """Paired differences of each pair of results on each held-out set, told and not told the attributes.

    The results must come from the same data: their names are paired by position.
    """
    found = []
    for first, second in combinations(results, 2):
        for split, nats in first.nats.items():
            other = second.nats[split]
            pairs = [(False, nats.unconditional, other.unconditional), (True, nats.conditional, other.conditional)]
            for conditional, a, b in pairs:
                bits = paired_bits_difference(a, b, nats.characters)
                found.append(Difference(split, conditional, first.label, second.label, bits, bits.excludes_zero))
    return found
