"""Bits per character of any list of names: cards printed after the training data, say, or names of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.card_files import read_text
from flash_experts.data.prompts import NONE
from flash_experts.evaluation.evaluate import NGRAM, language_model, load_scorer
from flash_experts.evaluation.held_out import HeldOut
from flash_experts.evaluation.metrics import NATS_PER_BIT, Estimate, bits_estimate
from flash_experts.evaluation.scorers import Scorer


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
        ValueError: there is no such file, it is not UTF-8 text, it holds no name, or too much (``file:line``).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot read the names in {path}: it is a folder: give a text of one name a line")
    try:
        names = [row.name.strip() for row in read_text(path)]
    except OSError as error:
        raise ValueError(f"cannot read the names in {path}: {error.strerror}") from error
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
        scorer = language_model(model, tokenizer, device)
    nats = scorer.nats(names, [NONE] * len(names))
    characters = np.array([len(name) + 1 for name in names], dtype=np.float64)
    each = nats / NATS_PER_BIT / characters
    return NamesResult(bits_estimate(nats, characters), tuple(names), tuple(float(bits) for bits in each))
