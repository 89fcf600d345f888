"""What chapter 0 and its solutions share: the picture of a row, unigram models of tokens, families cut in halves."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from chapter_tools import token_texts
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from transformers import PreTrainedTokenizerBase

from flash_experts.data.packing import EncodedName
from flash_experts.evaluation.ngram import KneserNey

READ, LEARNED = "#dddddd", "#ffd9a0"


def draw_row(axis: Axes, names: Sequence[EncodedName], tokenizer: PreTrainedTokenizerBase) -> None:
    """Draws names, a line for each: their input tokens in boxes, positions below, and targets above."""
    for line, name in enumerate(names):
        texts = [*token_texts(name, tokenizer), "[EOS]"]
        for place, text in enumerate(texts[:-1]):
            learns = place >= name.prompt_length - 1
            box = {"boxstyle": "square,pad=0.3", "facecolor": LEARNED if learns else READ, "edgecolor": "none"}
            axis.text(place, -line, text, ha="center", fontsize=7.5, bbox=box)
            axis.text(place, -line - 0.22, str(place), ha="center", fontsize=6, color="#666666")
            if learns:
                axis.text(place, -line + 0.25, texts[place + 1], ha="center", fontsize=7.5, color="tab:blue")
    labels = {READ: "read", LEARNED: "read, and the next token is learned"}
    axis.legend(
        handles=[Patch(color=color, label=label) for color, label in labels.items()],
        ncols=2,
        loc="upper right",
        fontsize=7.5,
    )
    axis.set(xlim=(-0.7, max(name.num_inputs for name in names)), ylim=(0.4 - len(names), 0.9))
    axis.axis("off")


def draw_lines(
    axis: Axes, x_K: Sequence[float], lines: Mapping[str, Sequence[float]], styles: str, **labels: Any
) -> None:
    """Draws lines over the same K values, each with its label and one of the styles ("ro- bs--")."""
    for (label, y_K), style in zip(lines.items(), styles.split(), strict=True):
        axis.plot(x_K, y_K, style, label=label)
    axis.set(**labels)
    axis.legend(fontsize=7.5)


def tokens_of(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """The tokens of names, each after a space and followed by EOS, one name after the other: (L,)."""
    texts = [" " + name for name in names]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.array([token for one in encoded for token in (*one.ids, tokenizer.eos_token_id)])


def unigram_bits(train_L: npt.NDArray[np.int64], test_L: npt.NDArray[np.int64], vocabulary: int) -> float:
    """Bits of test tokens under a unigram model: each has its share in training, whatever precedes it."""
    counts_V = np.bincount(train_L, minlength=vocabulary) + 0.5
    return float(-np.log2(counts_V / counts_V.sum())[test_L].sum())


@dataclass(frozen=True, slots=True)
class Halves:
    """Families cut in two at random: S names to score, a family's larger half, and the others, which may train."""

    scored: list[str]  # (S,)
    family_S: npt.NDArray[np.int64]
    has_relatives_S: npt.NDArray[np.bool_]
    characters_S: npt.NDArray[np.int64]  # EOS counts as one
    others: list[str]


def halves(groups: Sequence[Sequence[str]], rng: random.Random) -> Halves:
    scored, family, has_relatives, others = [], [], [], []
    for place, group in enumerate(groups):
        mixed = rng.sample(group, len(group))
        half = (len(group) + 1) // 2
        scored += mixed[:half]
        others += mixed[half:]
        family += [place] * half
        has_relatives += [len(group) > 1] * half
    characters_S = np.array([len(name) + 1 for name in scored])
    return Halves(scored, np.array(family), np.array(has_relatives), characters_S, others)


def bits_per_character_of(
    held: Halves, fit_to: Sequence[str], order: int
) -> tuple[npt.NDArray[np.float64], float, float]:
    """Bits of the scored names under an n-gram model (S,), and per character: of those with relatives, and of the others."""
    bits_S = KneserNey(fit_to, order).nats(held.scored) / math.log(2)
    cases = held.has_relatives_S, ~held.has_relatives_S
    with_relatives, alone = (float(bits_S[of].sum() / held.characters_S[of].sum()) for of in cases)
    return bits_S, with_relatives, alone
